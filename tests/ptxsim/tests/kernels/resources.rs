//! Registers, stack and static shared memory of every kernel on every architecture, from the assembler's own report,
//! held in `kernels/resources.md`. Nothing may spill.
//!
//! Assembling all for six architectures takes minutes. So the table names the digest of what each file was compiled
//! from: the quick test sees that it is up to date, the slow one that it is true.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::harness::{folder, included, nvrtc_version, resources, source};

const ARCHITECTURES: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];
const UPDATE: &str = "UPDATE_EXPECT=1 cargo test -p ptxsim --test kernels resources -- --include-ignored";

/// What a kernel takes of one architecture.
#[derive(Clone, Copy, Default)]
struct Use {
    registers: u32,
    shared_bytes: u32,
    stack_bytes: u32,
    spilled_bytes: u32,
}

#[test]
fn the_table_of_resources_is_up_to_date() {
    if is_update() {
        return;
    }
    let table = table();
    for file in files() {
        let heading = heading(&file);
        assert!(
            table.contains(&heading),
            "`{file}` or a header has changed since the table was made: {UPDATE}"
        );
    }
    let sections = table.lines().filter(|line| line.starts_with("## ")).count();
    assert_eq!(sections, files().len(), "the table has files that are gone: {UPDATE}");
}

#[test]
#[ignore = "assembles every kernel six times"]
fn slow_the_table_of_resources_is_true_and_nothing_spills() {
    let mut written = format!(
        "# What the kernels take\n\nRegisters of a thread on each architecture, bytes of stack and of static shared \
         memory (the most of them all), as NVRTC {}\nreports them with `--ptxas-options=-v`. Nothing spills. The \
         number behind a file is the digest of its text and its headers.\nWritten by `{UPDATE}`.\n",
        nvrtc_version()
    );
    let mut spilling = Vec::new();
    for file in files() {
        let mut kernels: BTreeMap<String, BTreeMap<&str, Use>> = BTreeMap::new();
        for architecture in ARCHITECTURES {
            for (kernel, used) in uses(&resources(&file, architecture)) {
                if used.spilled_bytes > 0 {
                    spilling.push(format!("{file} {kernel} {architecture}: {} bytes", used.spilled_bytes));
                }
                kernels.entry(kernel).or_default().insert(architecture, used);
            }
        }
        write_section(&mut written, &file, &kernels).expect("text is always written");
    }
    assert!(spilling.is_empty(), "registers are spilled:\n{}", spilling.join("\n"));
    if is_update() {
        std::fs::write(folder().join("resources.md"), written).unwrap();
    } else {
        assert_eq!(table(), written, "{UPDATE}");
    }
}

fn write_section(
    written: &mut String,
    file: &str,
    kernels: &BTreeMap<String, BTreeMap<&str, Use>>,
) -> std::fmt::Result {
    writeln!(written, "\n{}\n\n| kernel | shared | stack | {} |", heading(file), ARCHITECTURES.join(" | "))?;
    writeln!(written, "|---|{}", "--:|".repeat(2 + ARCHITECTURES.len()))?;
    for (kernel, by_architecture) in kernels {
        let most = |what: fn(&Use) -> u32| by_architecture.values().map(what).max().unwrap_or(0);
        let (shared, stack) = (most(|used| used.shared_bytes), most(|used| used.stack_bytes));
        write!(written, "| `{kernel}` | {shared} | {stack} |")?;
        for architecture in ARCHITECTURES {
            let registers = by_architecture.get(architecture).map_or(0, |used| used.registers);
            write!(written, " {registers} |")?;
        }
        writeln!(written)?;
    }
    Ok(())
}

/// The kernels of a report.
fn uses(report: &str) -> BTreeMap<String, Use> {
    let mut found: BTreeMap<String, Use> = BTreeMap::new();
    let mut kernel = None;
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().map(str::to_owned);
        } else if line.contains("Function properties for") {
            // A function that is called has properties of its own: they are part of its caller's.
            let name = line.split_whitespace().last();
            kernel = kernel.filter(|kernel| name == Some(kernel));
        }
        let Some(kernel) = &kernel else { continue };
        let used = found.entry(kernel.clone()).or_default();
        let before = |unit: &str| {
            let words: Vec<&str> = line[..line.find(unit)?].split_whitespace().collect();
            words.last()?.parse::<u32>().ok()
        };
        used.registers = before(" registers").unwrap_or(used.registers);
        used.shared_bytes = before(" bytes smem").unwrap_or(used.shared_bytes);
        used.stack_bytes = before(" bytes stack frame").unwrap_or(used.stack_bytes);
        let spilled = [before(" bytes spill stores"), before(" bytes spill loads")];
        used.spilled_bytes += spilled.into_iter().flatten().sum::<u32>();
    }
    found
}

fn heading(file: &str) -> String {
    let text = source(file);
    let mut parts = included(&text);
    parts.push((file.to_owned(), text));
    // FNV-1a.
    let digest =
        parts.iter().flat_map(|(_, text)| text.bytes()).fold(0xcbf2_9ce4_8422_2325u64, |digest, byte| {
            (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("## {file} {digest:016x}")
}

fn files() -> Vec<String> {
    let entries = std::fs::read_dir(folder()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<String> = names.filter(|name| name.ends_with(".cu")).collect();
    files.sort();
    files
}

fn table() -> String {
    std::fs::read_to_string(folder().join("resources.md")).unwrap_or_default()
}

fn is_update() -> bool {
    std::env::var_os("UPDATE_EXPECT").is_some()
}

#[test]
fn a_report_is_read() {
    let report = "ptxas info    : 8 bytes gmem\n\
        ptxas info    : Compiling entry function 'rope' for 'sm_80'\n\
        ptxas info    : Function properties for rope\n\
        ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n\
        ptxas info    : Used 52 registers, used 1 barriers, 128 bytes smem, 400 bytes cmem[0]\n";
    let used = uses(report)["rope"];
    assert_eq!((used.registers, used.shared_bytes, used.stack_bytes, used.spilled_bytes), (52, 128, 16, 12));
}
