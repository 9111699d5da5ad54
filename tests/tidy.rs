//! The house rules a compiler does not know: every source file says what lives in it, none grows into a god
//! module, nothing is left half done, and the rooms of the card stand.

use std::path::{Path, PathBuf};

use crate::harness::repository;

/// Lines a source file may have, its tests not counted.
const LINES_MAX: usize = 520;

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn each_source(check: impl Fn(&str, &str) -> Option<String>) {
    let mut files = Vec::new();
    sources(&repository().join("src"), &mut files);
    assert!(files.len() > 40, "the sources were not found");
    let complaints: Vec<String> = files
        .iter()
        .filter_map(|path| {
            let text = std::fs::read_to_string(path).unwrap();
            let name = path.strip_prefix(repository()).unwrap().display().to_string();
            check(&name, &text).map(|complaint| format!("{name}: {complaint}"))
        })
        .collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn every_file_opens_with_what_lives_in_it() {
    each_source(|_, text| (!text.starts_with("//!")).then(|| "has no `//!` header".to_owned()));
}

#[test]
fn no_file_is_a_god_module() {
    each_source(|name, text| {
        if name.ends_with("/tests.rs") || name.contains("/tests/") {
            return None;
        }
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or(text);
        let lines = code.lines().count();
        (lines > LINES_MAX).then(|| format!("{lines} lines without tests, more than {LINES_MAX}"))
    });
}

#[test]
fn names_say_what_they_hold() {
    let banned = ["utils", "util", "common", "helpers", "misc", "types", "manager", "prelude", "mod"];
    each_source(|name, _| {
        let stem = Path::new(name).file_stem()?.to_str()?;
        banned.contains(&stem).then(|| format!("`{stem}` hides what it holds"))
    });
}

#[test]
fn nothing_is_left_half_done() {
    let words = ["TODO", "FIXME", "XXX", "unimplemented!", "todo!("];
    each_source(|_, text| {
        words.iter().find(|word| text.contains(**word)).map(|word| format!("holds `{word}`"))
    });
}

#[test]
fn the_runner_and_the_engine_do_not_know_each_other() {
    each_source(|name, text| {
        let other = if name.starts_with("src/pipeline") {
            "tunesmith_engine"
        } else if name.starts_with("src/engine") {
            "tunesmith_pipeline"
        } else {
            return None;
        };
        text.contains(other).then(|| format!("names `{other}`"))
    });
}

#[test]
fn the_rooms_of_the_card_stand() {
    for room in [
        "Cargo.toml",
        "src",
        "kernels",
        "pipelines",
        "cache",
        "tests",
        "justfile",
        "README.md",
        "ARCHITECTURE.md",
        "docs",
    ] {
        assert!(repository().join(room).exists(), "{room}");
    }
}

#[test]
fn the_lock_file_stays_lean() {
    let lock = std::fs::read_to_string(repository().join("Cargo.lock")).unwrap();
    let packages = lock.matches("[[package]]").count();
    assert!(packages <= 580, "{packages} packages; look for one that can go before raising this");
}
