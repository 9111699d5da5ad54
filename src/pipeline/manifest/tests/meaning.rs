//! What a right manifest means: the same in YAML and in TOML, with includes, profiles and overrides.

use proptest::prelude::*;

use super::*;

pub(super) const YAML: &str = r#"
# comment
name: demo
description: two languages, one meaning
params:
  rank: 20
  rate: 0.20
  train: { seed: 7, date: 2024-01-31 }
  notes: ["a/**/*", b]
  quoted: "20"
profiles:
  full: { rank: 64, train: { seed: 8, date: 2024-01-31 } }
stages:
  notes: { uses: ingest, with: { paths: "${params.notes}" } }
  base:
    uses: ingest
    with:
      paths: ["${params.train.date}/${params.quoted}-${params.rank}", "$${params.rank}", costs $5]
  adapter:
    uses: train
    needs: { data: notes, base: base }
    with:
      rank: ${params.rank}
      learning_rate: "${params.rate}"
      seed: ${params.train.seed}
      schedule: cosine
      targets: [q, k]
      stop: { when: plateau, patience: 2 }
      extra: { list: [1, 2.5, true, "x"], text: "${params.quoted}" }
  report: { uses: report, needs: [adapter, notes] }
"#;

const TOML: &str = r#"
name = "demo"
description = "two languages, one meaning"

[params]
rank = 20
rate = 0.2
train = { seed = 7, date = 2024-01-31 }
notes = ["a/**/*", "b"]
quoted = "20"

[profiles.full]
rank = 64
train = { seed = 8, date = 2024-01-31 }

[stages.notes]
uses = "ingest"
with.paths = "${params.notes}"

[stages.base]
uses = "ingest"
with.paths = ["${params.train.date}/${params.quoted}-${params.rank}", "$${params.rank}", "costs $5"]

[stages.adapter]
uses = "train"
needs = { data = "notes", base = "base" }

[stages.adapter.with]
rank = "${params.rank}"
learning_rate = "${params.rate}"
seed = "${params.train.seed}"
schedule = "cosine"
targets = ["q", "k"]
stop = { when = "plateau", patience = 2 }
extra = { list = [1, 2.5, true, "x"], text = "${params.quoted}" }

[stages.report]
uses = "report"
needs = ["adapter", "notes"]
"#;

#[test]
fn yaml_and_toml_mean_the_same() {
    let full = Overrides { profile: Some("full".to_owned()), ..Overrides::default() };
    for overrides in [Overrides::default(), full] {
        assert_eq!(meaning("m.yaml", YAML, &overrides), meaning("m.toml", TOML, &overrides));
    }
    let summary = meaning("m.yaml", YAML, &Overrides::default());
    expect![[r#"
        [
          {
            "name": "notes",
            "uses": "ingest",
            "needs": [],
            "with": {
              "paths": [
                "a/**/*",
                "b"
              ]
            }
          },
          {
            "name": "base",
            "uses": "ingest",
            "needs": [],
            "with": {
              "paths": [
                "2024-01-31/20-20",
                "${params.rank}",
                "costs $5"
              ]
            }
          },
          {
            "name": "adapter",
            "uses": "train",
            "needs": [
              "data: notes",
              "base: base"
            ],
            "with": {
              "rank": 20,
              "learning_rate": 0.2,
              "seed": 7,
              "schedule": "cosine",
              "targets": [
                "q",
                "k"
              ],
              "stop": {
                "when": "plateau",
                "patience": 2
              },
              "extra": {
                "list": [
                  1,
                  2.5,
                  true,
                  "x"
                ],
                "text": "20"
              }
            }
          },
          {
            "name": "report",
            "uses": "report",
            "needs": [
              "adapter: adapter",
              "notes: notes"
            ],
            "with": {}
          }
        ]"#]]
    .assert_eq(&serde_json::to_string_pretty(&summary["stages"]).unwrap());
}

#[test]
fn json_is_read_as_yaml() {
    let json = "{\n\t\"stages\": {\n\t\t\"n\": { \"uses\": \"ingest\", \"with\": { \"paths\": [\"\\u00e9\\/\\ud83d\\ude00\", \"a\\tb\"] } }\n\t}\n}\n";
    let summary = meaning("m.json", json, &Overrides::default());
    assert_eq!(summary["stages"][0]["with"]["paths"], json!(["é/😀", "a\tb"]));
}

#[test]
fn later_words_win_over_earlier_ones() {
    let manifest = r#"
params: { a: default, b: default, c: default, d: default, t: { x: default, y: default } }
profiles: { p: { b: profile, c: profile, d: profile, t: { x: profile, y: profile } } }
stages:
  n: { uses: ingest, with: { paths: ["${params.a}", "${params.b}", "${params.c}", "${params.d}", "${params.t.x}", "${params.t.y}"] } }
"#;
    let overrides = Overrides {
        profile: Some("p".to_owned()),
        params_files: vec!["one.toml".into(), "two.json".into()],
        set: vec![("d".to_owned(), "set # 1: 2".to_owned()), ("t.y".to_owned(), "'quoted'".to_owned())],
    };
    let files = [
        ("m.yaml", manifest),
        ("one.toml", "c = 'one'\nd = 'one'\n"),
        ("two.json", "{\"c\": \"two\", \"d\": \"two\"}"),
    ];
    let loaded = load_files(&files, &overrides).unwrap_or_else(|text| panic!("{text}"));
    assert_eq!(
        loaded.pipeline.stages[0].with["paths"],
        json!(["default", "profile", "two", "set # 1: 2", "profile", "quoted"])
    );
}

#[test]
fn set_takes_scalars_with_their_type_and_flow_collections() {
    let manifest = "params: { v: 0 }\nstages:\n  n: { uses: ingest, with: { paths: [x] } }\n  t: { uses: train, needs: { data: n, base: n }, with: { rank: 8, extra: \"${params.v}\" } }\n";
    for (text, value) in [
        ("3", json!(3)),
        ("3e-4", json!(3e-4)),
        ("true", json!(true)),
        ("", json!(null)),
        ("'3'", json!("3")),
        ("[1, {a: b}]", json!([1, { "a": "b" }])),
        ("hf:org/model", json!("hf:org/model")),
        ("*not an alias", json!("*not an alias")),
    ] {
        let overrides = Overrides { set: vec![("v".to_owned(), text.to_owned())], ..Overrides::default() };
        assert_eq!(meaning("m.yaml", manifest, &overrides)["stages"][1]["with"]["extra"], value, "{text}");
    }
}

#[test]
fn the_including_file_wins_over_its_includes() {
    let files = [
        (
            "sub/m.yaml",
            "include: [../shared/a.toml, ../shared/b.yaml]\nparams: { x: own }\nstages:\n  own: { uses: ingest, with: { paths: [\"${params.x}\", \"${params.y}\", \"${params.z}\"] } }\n  over: { uses: report, needs: own }\n",
        ),
        (
            "shared/a.toml",
            "include = 'c.yaml'\n[params]\nx = 'a'\ny = 'a'\nz = 'a'\n[stages.over]\nuses = 'chunk'\n",
        ),
        ("shared/b.yaml", "name: ignored\nparams: { y: b, unused: 1 }\nprofiles: { p: { z: b } }\n"),
        ("shared/c.yaml", "stages: { deep: { uses: ingest, with: { paths: [x] } } }\n"),
    ];
    let overrides = Overrides { profile: Some("p".to_owned()), ..Overrides::default() };
    let loaded = load_files(&files, &overrides).unwrap_or_else(|text| panic!("{text}"));
    let summary = summary(&loaded.pipeline);
    assert_eq!(summary["name"], "m");
    let names: Vec<_> = loaded.pipeline.stages.iter().map(|stage| stage.name.as_str()).collect();
    assert_eq!(names, ["deep", "own", "over"]);
    assert_eq!(loaded.pipeline.stages[1].with["paths"], json!(["own", "b", "b"]));
    assert!(loaded.warnings.is_empty(), "an unused param of an include is nobody's mistake");
}

#[test]
fn an_unused_param_is_a_warning() {
    let manifest = "params:\n  rank: 8\n  rate: \"${params.rank}\"\n  paths: [\"${params.root}/a\"]\n  root: notes\nstages:\n  n: { uses: ingest, with: { paths: \"${params.paths}\" } }\n";
    let loaded = load_files(&[("m.yaml", manifest)], &Overrides::default()).ok().unwrap();
    let found: Vec<_> =
        loaded.warnings.iter().map(|warning| (warning.line, warning.message.as_str())).collect();
    assert_eq!(
        found,
        [(2, "param `rank` is not used by any stage"), (3, "param `rate` is not used by any stage")]
    );
}

#[test]
fn a_param_that_a_stage_does_not_read_leaves_it_alone() {
    let with = |rank: &str| {
        let overrides = Overrides { set: vec![("rank".to_owned(), rank.to_owned())], ..Overrides::default() };
        let summary = meaning("m.yaml", YAML, &overrides);
        (summary["stages"][0].clone(), summary["stages"][2].clone())
    };
    let ((notes, adapter), (notes_after, adapter_after)) = (with("8"), with("9"));
    assert_eq!(notes, notes_after);
    assert_ne!(adapter, adapter_after);
}

#[test]
fn the_environment_is_read() {
    let manifest = "stages: { n: { uses: ingest, with: { paths: [\"${env.CARGO_PKG_NAME}/x\"] } } }\n";
    let summary = meaning("m.yaml", manifest, &Overrides::default());
    assert_eq!(summary["stages"][0]["with"]["paths"][0], "tunesmith-pipeline/x");
}

#[test]
fn needs_find_their_slots() {
    let summary = meaning(
        "m.yaml",
        r#"
stages:
  data: { uses: ingest, with: { paths: [x] } }
  base: { uses: ingest, with: { paths: [x] } }
  chunks: { uses: chunk, needs: [data] }
  adapter: { uses: train, needs: [base, data], with: { rank: 8 } }
  second: { uses: train, needs: { base: [base], data: chunks, previous: adapter }, with: { rank: 8 } }
  all: { uses: report, needs: [chunks, adapter, data] }
  named: { uses: report, needs: { facts: chunks, tables: data, more: [base, second] } }
  alone: { uses: report }
"#,
        &Overrides::default(),
    );
    let needs: Vec<String> = summary["stages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|stage| format!("{} <- {}", stage["name"].as_str().unwrap(), stage["needs"]))
        .collect();
    expect![[r#"
        data <- []
        base <- []
        chunks <- ["documents: data"]
        adapter <- ["base: base","data: data"]
        second <- ["base: base","data: chunks","previous: adapter"]
        all <- ["adapter: adapter","chunks: chunks","data: data"]
        named <- ["facts: chunks","tables: data","base: base","second: second"]
        alone <- []"#]]
    .assert_eq(&needs.join("\n"));
}

#[test]
fn selected_stages_come_with_all_they_need() {
    let loaded = load_files(&[("m.yaml", YAML)], &Overrides::default()).ok().unwrap();
    let pipeline = loaded.pipeline;
    let names = |targets: &[&str]| {
        let targets: Vec<String> = targets.iter().map(|name| (*name).to_owned()).collect();
        pipeline.select(&targets).map(|ids| {
            ids.into_iter().map(|id| pipeline.stage(id).name.clone()).collect::<Vec<_>>().join(" ")
        })
    };
    assert_eq!(names(&[]).unwrap(), "notes base adapter report");
    assert_eq!(names(&["adapter"]).unwrap(), "notes base adapter");
    assert_eq!(names(&["base", "notes"]).unwrap(), "notes base");
    let error = names(&["adaptor"]).unwrap_err();
    assert_eq!(
        (error.to_string().as_str(), error.hint.as_str()),
        ("the pipeline has no stage `adaptor`", "did you mean `adapter`?")
    );
}

/// Values both languages can write: no null, finite numbers.
fn value() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        (-1e12..1e12_f64).prop_map(Json::from),
        "[ -~éß\n\t]{0,12}".prop_map(Json::from),
        prop::sample::select(vec!["true", "~", "12", "0x1f", "1e3", "null", "- a", "a: b", "#", ""])
            .prop_map(Json::from),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Json::from),
            prop::collection::btree_map("[a-zA-Z0-9 .:#é-]{1,8}", inner, 0..5)
                .prop_map(|map| Json::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_params_mean_the_same_in_yaml_and_toml(
        params in prop::collection::btree_map("[a-z][a-z0-9_-]{0,8}", value(), 1..6)
    ) {
        // A text with `${` would be a reference.
        let params = serde_json::to_string(&params).unwrap().replace("${", "$(");
        let params: Json = serde_json::from_str(&params).unwrap();
        let tree = json!({ "params": params, "stages": { "r": { "uses": "report" } } });
        let yaml = serde_yaml::to_string(&tree).unwrap();
        let toml = ::toml::to_string(&tree).unwrap();
        let json_text = serde_json::to_string_pretty(&tree).unwrap();
        let read = |file: &str, text: &str| meaning(file, text, &Overrides::default())["params"].clone();
        prop_assert_eq!(&read("m.json", &json_text), &params);
        prop_assert_eq!(&read("m.yaml", &yaml), &params);
        prop_assert_eq!(sorted(&read("m.toml", &toml)), sorted(&params));
    }

    #[test]
    fn no_text_makes_it_panic(text in "[ -~\n\t${}\\[\\]:&*\"']{0,200}") {
        for name in ["m.yaml", "m.toml"] {
            let _ = load_files(&[(name, &text), ("x", "")], &Overrides::default());
            let inside = format!("stages:\n  n:\n    uses: ingest\n    with:\n      paths: [{text}]\n");
            let _ = load_files(&[(name, &inside)], &Overrides::default());
        }
    }
}

/// TOML writes plain values before tables, so the order of keys is not kept in that direction.
fn sorted(value: &Json) -> String {
    match value {
        Json::Object(map) => {
            let mut entries: Vec<_> =
                map.iter().map(|(key, value)| format!("{key:?}: {}", sorted(value))).collect();
            entries.sort();
            format!("{{{}}}", entries.join(", "))
        }
        Json::Array(items) => format!("{:?}", items.iter().map(sorted).collect::<Vec<_>>()),
        other => other.to_string(),
    }
}
