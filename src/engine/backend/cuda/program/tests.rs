//! The lists of kernels are whole, the portable PTX is that of the sources, and kept code is what was compiled.

use std::path::{Path, PathBuf};

use super::*;

/// The PTX version that the portable text claims, which drivers since 470 read. NVRTC claims its own, which only a
/// driver as new reads, though it uses nothing newer than this.
const PORTABLE_VERSION: &str = "7.4";

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels")
}

fn folder_has(extension: &str) -> Vec<String> {
    let entries = std::fs::read_dir(kernels()).unwrap().map(|entry| entry.unwrap().path());
    let mut names: Vec<String> = entries
        .filter(|path| path.extension().is_some_and(|end| end == extension))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn every_file_of_the_folder_is_in_the_lists() {
    let names = |list: &[(&str, &str)]| list.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>();
    assert_eq!(names(SOURCES), folder_has("cu"), "`SOURCES` in program.rs");
    assert_eq!(names(HEADERS), folder_has("cuh"), "`HEADERS` in program.rs");
}

/// What the portable part of a program is named by; the build of the compiler is not in it, for another build's text
/// would do as well.
fn portable_digest(program: &Program) -> String {
    program.digest(&options(PORTABLE_ARCHITECTURE, &[]), PORTABLE_VERSION).to_hex().to_string()
}

/// The portable part of a program, compiled now.
fn portable_part(program: &Program, compiler: &Compiler) -> String {
    let ptx = program.ptx(compiler, PORTABLE_ARCHITECTURE, &[]).unwrap();
    let version = ptx.lines().find(|line| line.starts_with(".version ")).unwrap();
    let code =
        ptx[ptx.find(version).unwrap()..].replacen(version, &format!(".version {PORTABLE_VERSION}"), 1);
    format!("{PART}{} {}\n{}\n", program.name, portable_digest(program), code.trim_end())
}

#[test]
fn portable_ptx_is_that_of_the_sources() {
    if std::env::var_os("TUNESMITH_BLESS").is_some_and(|value| value == "1") {
        let compiler = Compiler::found().unwrap();
        let head = format!(
            "// What kernels/*.cu become on every device since {PORTABLE_ARCHITECTURE}; made by NVRTC {}.\n\
             // After a change: TUNESMITH_BLESS=1 cargo test -p tunesmith-engine --lib portable_ptx\n",
            compiler.version(),
        );
        let parts = Program::all().iter().map(|program| portable_part(program, compiler));
        std::fs::write(kernels().join("portable.ptx"), head + &parts.collect::<String>()).unwrap();
        return;
    }
    for program in Program::all() {
        let head = format!("{PART}{} {}\n", program.name, portable_digest(program));
        assert!(
            PORTABLE.contains(&head),
            "`{}` has changed: TUNESMITH_BLESS=1 cargo test -p tunesmith-engine --lib portable_ptx",
            program.name
        );
    }
    assert_eq!(portable_parts().len(), Program::all().len(), "no part without a source");
}

#[test]
fn portable_ptx_claims_what_old_drivers_read() {
    for program in Program::all() {
        let head: Vec<&str> = program.portable().lines().take(3).collect();
        assert_eq!(head, [".version 7.4", ".target sm_80", ".address_size 64"], "{}", program.name);
    }
}

#[test]
fn every_kernel_is_found_by_its_name_and_has_one_file() {
    let mut entries: Vec<&str> = Program::all().iter().flat_map(Program::entries).collect();
    assert_eq!(Program::of_entry("rope").unwrap().name, "rope.cu");
    assert!(Program::of_entry("no_such_kernel").is_none());
    let count = entries.len();
    entries.sort_unstable();
    entries.dedup();
    assert_eq!(entries.len(), count, "two kernels of one name");
    assert!(Program::all().iter().all(|program| program.entries().next().is_some()));
}

#[test]
fn headers_are_found_through_headers() {
    let glu = Program::all().iter().find(|program| program.name == "glu.cu").unwrap();
    let names: Vec<&str> = glu.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["common.cuh", "eight.cuh"]);
}

#[test]
fn code_is_compiled_once_and_a_damaged_file_again() {
    let (folder, compiler) = (tempfile::tempdir().unwrap(), Compiler::found().unwrap());
    let kept = Kept::at(folder.path().join("cubins"));
    let program = Program::of_entry("rope").unwrap();
    let code = program.cubin(compiler, "sm_89", &kept).unwrap();
    let file = std::fs::read_dir(folder.path().join("cubins")).unwrap().next().unwrap().unwrap().path();
    let key = program.key(compiler, "sm_89");
    assert_eq!(kept.get(key).unwrap(), code);

    // What is kept is taken: other code under the same name, with its own digest, is believed.
    kept.put(key, b"other code");
    assert_eq!(program.cubin(compiler, "sm_89", &kept).unwrap(), b"other code");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    assert_eq!(program.cubin(compiler, "sm_89", &kept).unwrap(), code);
    assert_eq!(kept.get(key).unwrap(), code, "mended");
}

#[test]
fn digest_covers_source_headers_options_and_compiler() {
    let program = Program::of_entry("glu").unwrap();
    let options = |architecture| options(architecture, &[]);
    let digest = program.digest(&options("sm_90"), "a");
    assert_ne!(digest, program.digest(&options("sm_89"), "a"));
    assert_ne!(digest, program.digest(&options("sm_90"), "b"));
    let mut changed = program.clone();
    changed.headers[0].1 = "";
    assert_ne!(digest, changed.digest(&options("sm_90"), "a"));
    assert_ne!(digest, Program { source: "", ..program.clone() }.digest(&options("sm_90"), "a"));
}
