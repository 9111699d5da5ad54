//! Objects that are altered, cut short or lost are found before they are used, and made again.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::digest::Digest;

fn object(desk: &Desk, digest: Digest) -> PathBuf {
    desk.store().object_path(digest)
}

/// Changes a byte of an object and keeps its size; its timestamps too, if asked.
fn alter(path: &Path, keep_times: bool) {
    let modified = fs_err::metadata(path).unwrap().modified().unwrap();
    let mut bytes = fs_err::read(path).unwrap();
    bytes[0] ^= 1;
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    fs_err::write(path, bytes).unwrap();
    if keep_times {
        fs_err::OpenOptions::new().write(true).open(path).unwrap().set_modified(modified).unwrap();
    }
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o444)).unwrap();
}

#[test]
fn altered_result_is_made_again() {
    let desk = Desk::new();
    let kind = Kind::join();
    let lines: &[Line<'_>] = &[("a", kind, &[], json!({"add": "aaa"})), ("b", kind, &["a"], json!({}))];
    let report = desk.run(lines);
    alter(&object(&desk, report.stages[0].outputs[0].digest), false);
    // Both stages made the same bytes, so they share the object.
    assert_eq!(desk.plan(lines)[0], "a Run: output text is missing or damaged");
    assert_eq!(desk.ran(lines)[0], "a");
    assert_eq!(desk.text("b"), "aaa");
    assert_eq!(desk.ran(lines), none());
}

#[test]
fn hidden_damage_is_found_before_a_stage_reads_it() {
    let desk = Desk::new();
    let kind = Kind::join();
    let lines = |add: &str| -> [Line<'static>; 3] {
        [
            ("a", kind, &[], json!({"add": "aaa"})),
            ("b", kind, &["a"], json!({"add": "b"})),
            ("c", kind, &["b"], json!({"add": add})),
        ]
    };
    let report = desk.run(&lines("1"));
    kind.runs();
    for stage in &report.stages[..2] {
        alter(&object(&desk, stage.outputs[0].digest), true);
    }
    assert_eq!(desk.ran(&lines("2")), ["a", "b", "c"]);
    assert_eq!(desk.text("c"), "aaab2");
    assert_eq!(kind.runs(), 3, "nothing ran on damaged input");
    assert_eq!(fs_err::read_dir(desk.path("cache/damaged")).unwrap().count(), 2);
}

#[test]
fn lost_intermediate_result_is_made_again() {
    let desk = Desk::new();
    let kind = Kind::join();
    let lines: &[Line<'_>] =
        &[("a", kind, &[], json!({"add": "aaa"})), ("b", kind, &["a"], json!({"add": "b"}))];
    let report = desk.run(lines);
    fs_err::remove_file(object(&desk, report.stages[0].outputs[0].digest)).unwrap();
    assert_eq!(desk.ran(lines), ["a"]);
    fs_err::remove_dir_all(desk.path("cache/objects")).unwrap();
    assert_eq!(desk.ran(lines), ["a", "b"]);
}

#[test]
fn damage_found_while_putting_results_into_place_is_mended() {
    let desk = Desk::new();
    let kind = Kind::join();
    let lines: &[Line<'_>] = &[("a", kind, &[], json!({"add": "aaa"}))];
    let report = desk.run(lines);
    alter(&object(&desk, report.stages[0].outputs[0].digest), true);
    fs_err::remove_dir_all(desk.path("cache/out")).unwrap();
    assert_eq!(desk.ran(lines), ["a"]);
    assert_eq!(desk.text("a"), "aaa");
}

#[test]
fn damaged_source_object_is_taken_from_its_file_again() {
    let desk = Desk::new();
    desk.write("notes/a.md", "a note");
    let kind = Kind::join();
    let lines =
        |add: &str| -> [Line<'static>; 1] { [("notes", kind, &[], json!({"paths": ["notes"], "add": add}))] };
    desk.run(&lines("1"));
    alter(&object(&desk, Digest::of(b"a note")), true);
    assert_eq!(desk.ran(&lines("2")), ["notes"]);
    assert_eq!(desk.text("notes"), "a note2");
    fs_err::remove_file(object(&desk, Digest::of(b"a note"))).unwrap();
    assert_eq!(desk.ran(&lines("3")), ["notes"]);
    assert_eq!(desk.text("notes"), "a note3");
}

#[test]
fn stage_that_writes_into_its_input_harms_nobody_for_long() {
    let desk = Desk::new();
    let join = Kind::join();
    let vandal = Kind::new(|context| {
        let input = context.inputs[0].1.file("text")?;
        fs_err::set_permissions(&input, std::fs::Permissions::from_mode(0o644))?;
        fs_err::write(input, "xxx")?;
        Ok(fs_err::write(context.out.join("text"), "done")?)
    });
    let lines: &[Line<'_>] = &[
        ("a", join, &[], json!({"add": "aaa"})),
        ("vandal", vandal, &["a"], json!({})),
        ("b", join, &["a", "vandal"], json!({})),
    ];
    let options = RunOptions { jobs: 1, ..RunOptions::default() };
    let report = desk.run_with(lines, &options);
    assert!(report.ok, "{:?}", report.errors);
    assert_eq!(desk.text("b"), "aaadone");
}
