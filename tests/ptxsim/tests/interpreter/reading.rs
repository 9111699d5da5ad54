//! Reading PTX: what is refused, and by which words.

use ptxsim::Module;

#[track_caller]
fn refused(text: &str, line: u32, detail: &str) {
    let error = Module::parse(text).unwrap_err();
    assert_eq!((error.line, error.detail.as_str()), (line, detail));
    assert!(text.lines().nth(line as usize - 1).is_some_and(|held| held.trim() == error.text));
}

#[test]
fn an_error_names_its_line() {
    let body = |line: &str| format!(".visible .entry k()\n{{\n.reg .b32 %r<2>;\n{line}\nret;\n}}");
    refused(&body("add.u32 %r0, %r1, %r2;"), 4, "`%r2` is not declared");
    refused(&body("mov.u32 %r0, unknown;"), 4, "`unknown` is not declared");
    refused(&body("bra $nowhere;"), 4, "`$nowhere` is not a label");
    refused(&body("@%p0 ret;"), 4, "`%p0` is not a predicate");
    refused(&body("ld.global.u32 %r0, %r1;"), 4, "an address is missing");
    refused(&body("mov.u32 5, %r1;"), 4, "a register is missing");
    refused(&body(".nonsense 3;"), 4, "unknown directive");
    refused(".strange", 1, "unknown directive");
    refused(".visible .entry k()\n{\nret;", 3, "`}` is missing");
    refused(".global .b8 text[2] = {1, 2, 3};", 1, "more initial values than the variable holds");
}

#[test]
fn what_does_not_run_is_skipped() {
    let text = "// a comment\n.version 9.0\n.target sm_80, debug\n.address_size 64\n\
        .extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);\n\
        .visible .entry k(\n.param .u64 k_param_0\n)\n.maxntid 256, 1, 1\n.minnctapersm 2\n{\n\
        .reg .b64 %rd<2>; /* two\nlines */\n.loc 1 3 0\n$L__BB0_1:\n.pragma \"nounroll\";\n\
        ld.param.u64 %rd1, [k_param_0];\nret;\n}\n\
        .file 1 \"/a/b.cu\"\n.section .debug_str\n{\n$L: .b8 1,2,3\n}\n";
    assert_eq!(Module::parse(text).unwrap().kernels().collect::<Vec<_>>(), ["k"]);
}
