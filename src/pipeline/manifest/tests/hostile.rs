//! Manifests nobody writes in good faith: each ends in an error, and none can take long or fill the memory,
//! because a limit stops it.

use std::fmt::Write as _;

use super::*;

/// The codes of a manifest's problems, after showing them.
fn codes(name: &str, text: &[u8]) -> Vec<&'static str> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs_err::write(&path, text).unwrap();
    match load(&path, &Overrides::default(), KINDS) {
        Ok(_) => Vec::new(),
        Err(errors) => {
            assert!(errors.to_string().len() < 1_000);
            let _ = rendered(&errors.problems, folder.path());
            errors.problems.iter().map(|problem| problem.code).collect()
        }
    }
}

#[test]
fn deep_nesting_ends_at_the_limit() {
    for (name, open, close) in [
        ("m.yaml", "[", "]"),
        ("m.yaml", "{a: ", "}"),
        ("m.yaml", "- ", ""),
        ("m.toml", "[", "]"),
        ("m.toml", "{a=", "}"),
    ] {
        for depth in [100, 100_000] {
            let prefix = if name == "m.toml" { "params = " } else { "" };
            let text = format!("{prefix}{}1{}", open.repeat(depth), close.repeat(depth));
            let codes = codes(name, text.as_bytes());
            assert!(!codes.is_empty(), "{name} {open}");
        }
    }
    assert_eq!(
        codes("m.yaml", format!("a: {}{}", "[".repeat(70), "]".repeat(70)).as_bytes()),
        ["manifest::too_deep"]
    );
    assert!(!codes("m.toml", format!("{}a = 1", "a.".repeat(200_000)).as_bytes()).is_empty());
    assert_eq!(codes("m.toml", format!("{}a = 1", "a.".repeat(70)).as_bytes()), ["manifest::too_deep"]);
}

#[test]
fn an_alias_bomb_ends_at_once() {
    let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..30 {
        let items = vec![format!("*a{}", level - 1); 10].join(", ");
        writeln!(text, "a{level}: &a{level} [{items}]").unwrap();
    }
    assert_eq!(codes("m.yaml", text.as_bytes()), ["manifest::alias_budget"]);
    let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(1_000_000), vec!["*a"; 10_000].join(", "));
    assert_eq!(codes("m.yaml", long.as_bytes()), ["manifest::alias_budget"]);
    assert_eq!(codes("m.yaml", b"a: &a [*a]\n"), ["manifest::syntax"]);
}

#[test]
fn params_that_double_each_other_end_at_the_limit() {
    let mut text = String::from("params:\n  p0: 0123456789\n");
    for level in 1..60 {
        let below = format!("${{params.p{}}}", level - 1);
        writeln!(text, "  p{level}: \"{below}{below}\"").unwrap();
    }
    text.push_str("stages: { r: { uses: report } }\n");
    assert!(codes("m.yaml", text.as_bytes()).contains(&"manifest::too_large"));
    let lists = text.replace("}$", "}\", \"$").replace(": \"$", ": [\"$").replace("}\"\n", "}\"]\n");
    assert!(codes("m.yaml", lists.as_bytes()).contains(&"manifest::too_large"));
}

#[test]
fn a_long_chain_of_params_needs_no_deep_stack() {
    let mut text = String::from("params:\n  p0: 1\n");
    for level in 1..20_000 {
        writeln!(text, "  p{level}: ${{params.p{}}}", level - 1).unwrap();
    }
    text.push_str("stages: { n: { uses: ingest, with: { paths: [\"${params.p19999}\"] } } }\n");
    assert!(codes("m.yaml", text.as_bytes()).contains(&"manifest::too_deep"));
}

#[test]
fn slow_garbage_of_five_megabytes_is_refused() {
    let mut state = 1_u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    let bytes: Vec<u8> = (0..5_000_000).map(|_| random()).collect();
    let printable: Vec<u8> = bytes.iter().map(|byte| b' ' + byte % 95).collect();
    let braces: Vec<u8> = bytes.iter().map(|byte| b"[]{},:-\n &*a\"'#"[usize::from(*byte) % 15]).collect();
    for name in ["m.yaml", "m.toml"] {
        assert_eq!(codes(name, &bytes), ["manifest::encoding"]);
        assert!(!codes(name, &printable).is_empty());
        assert!(!codes(name, &braces).is_empty());
        assert!(!codes(name, &vec![b'\t'; 1_000_000]).is_empty());
        assert!(!codes(name, &vec![b'a'; 1_000_000]).is_empty());
    }
    assert_eq!(codes("m.yaml", &vec![b' '; 11 * 1024 * 1024]), ["manifest::too_large"]);
    assert_eq!(codes("m.yaml", b"a: 1\nb: \0\n"), ["manifest::encoding"]);
}

#[test]
fn very_many_keys_stages_and_problems_stay_bounded() {
    let items: String = (0..100_000).map(|index| format!("k{index}: 1\n")).collect();
    assert_eq!(codes("m.yaml", items.as_bytes()).len(), 100);
    let with: String = (0..50_000).map(|index| format!("k{index}: 1, ")).collect();
    let text = format!("stages: {{ n: {{ uses: ingest, with: {{ {with} }} }} }}");
    assert_eq!(codes("m.yaml", text.as_bytes()).len(), 100);
    let stages: String =
        (0..20_000).map(|index| format!("  s{index}: {{ uses: chunk, needs: t{index} }}\n")).collect();
    assert_eq!(codes("m.yaml", format!("stages:\n{stages}").as_bytes()).len(), 100);
    let sequence = vec!["1"; 600_000].join(",");
    assert_eq!(codes("m.yaml", format!("params: {{ a: [{sequence}] }}").as_bytes()), ["manifest::too_large"]);
}

#[test]
fn many_profiles_of_many_params_stay_bounded() {
    let params: String = (0..20_000).map(|index| format!("  k{index}: 1\n")).collect();
    let profiles: String = (0..20_000).map(|index| format!("  p{index}: {{ x: 1 }}\n")).collect();
    let text = format!("params:\n{params}profiles:\n{profiles}stages: {{ r: {{ uses: report }} }}\n");
    assert!(codes("m.yaml", text.as_bytes()).contains(&"manifest::too_large"));
}

#[test]
fn thousands_of_stages_in_a_chain_load() {
    let mut text = String::from("stages:\n  s0: { uses: ingest, with: { paths: [x] } }\n");
    for index in 1..5_000 {
        writeln!(text, "  s{index}: {{ uses: chunk, needs: s{} }}", index - 1).unwrap();
    }
    assert!(codes("m.yaml", text.as_bytes()).is_empty());
}

#[test]
fn a_matrix_that_explodes_is_refused() {
    let axis =
        |count: usize| format!("[{}]", (0..count).map(|n| n.to_string()).collect::<Vec<_>>().join(", "));
    let stage = |matrix: &str| format!("stages: {{ r: {{ uses: report, matrix: {{ {matrix} }} }} }}\n");
    let many: Vec<String> = (0..9).map(|n| format!("a{n}: {}", axis(100))).collect();
    assert_eq!(codes("m.yaml", stage(&many.join(", ")).as_bytes()), ["manifest::matrix"]);
    let wide: Vec<String> = (0..50_000).map(|n| format!("a{n}: [1]")).collect();
    assert_eq!(codes("m.yaml", stage(&wide.join(", ")).as_bytes()), ["manifest::matrix"]);
    let long = format!("a: [\"{}\", x], b: {}", "x".repeat(1_000_000), axis(10_000));
    assert_eq!(codes("m.yaml", stage(&long).as_bytes()), ["manifest::matrix"]);
    let all: String =
        (0..200).map(|n| format!("  r{n}: {{ uses: report, matrix: {{ a: {} }} }}\n", axis(1000))).collect();
    assert!(codes("m.yaml", format!("stages:\n{all}").as_bytes()).contains(&"manifest::matrix"));
}

#[test]
fn a_sweep_that_explodes_is_refused() {
    let sweep = |sweep: &str| {
        format!(
            "params: {{ a: 1 }}\nstages: {{ r: {{ uses: report }} }}\nsweep: {{ {sweep}, objective: r.x }}\n"
        )
    };
    let axis: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    let many: Vec<String> = (0..30).map(|n| format!("a{n}: [{}]", axis.join(", "))).collect();
    assert_eq!(
        codes("m.yaml", sweep(&format!("matrix: {{ {} }}", many.join(", "))).as_bytes()),
        ["manifest::sweep"]
    );
    let wide: Vec<String> = (0..50_000).map(|n| format!("a{n}: [1]")).collect();
    let random = format!("random: {{ trials: 10000, params: {{ {} }} }}", wide.join(", "));
    assert_eq!(codes("m.yaml", sweep(&random).as_bytes()), ["manifest::sweep"]);
    assert!(
        !codes("m.yaml", sweep("random: { trials: 4000000000, params: { a: [1] } }").as_bytes()).is_empty()
    );
    assert!(
        !codes("m.yaml", sweep("random: { trials: 2, params: { a: { low: 2, high: 1 } } }").as_bytes())
            .is_empty()
    );
    assert!(!codes("m.yaml", sweep("list: []").as_bytes()).is_empty());
    let halving = "matrix: { a: [1, 2] }, halving: { param: a, min: 1, max: 9223372036854775807, factor: 2 }";
    assert!(codes("m.yaml", sweep(halving).as_bytes()).is_empty(), "sixty-four rounds are many, and few");
}
