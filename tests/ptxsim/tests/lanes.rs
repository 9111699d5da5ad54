//! Runs a few lines of PTX on the lanes of a warp, each lane with its own sources.

use ptxsim::{Arg, Counts, Device, Fault, Launch, Module};

/// Registers that the lines may use besides `%a`, `%b`, `%c` (sources), `%d` (result) and `%lane`.
const REGISTERS: &str = ".reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %x<16>;";

/// A row: sources a, b, c and the expected d.
pub(crate) type Row = (u64, u64, u64, u64);

pub(crate) fn module(text: &str) -> Module {
    let head = ".version 8.7 .target sm_80 .address_size 64";
    Module::parse(&format!("{head}\n{text}")).unwrap_or_else(|error| panic!("{error}"))
}

/// Runs one warp of `lines` with the sources of each row in a lane of its own, and compares the results. All
/// registers have `bits` bits.
#[track_caller]
pub(crate) fn check(bits: u32, lines: &str, rows: &[Row]) {
    let got = results(bits, lines, &rows.iter().map(|row| (row.0, row.1, row.2)).collect::<Vec<_>>());
    for (row, got) in rows.iter().zip(got) {
        let (a, b, c, expected) = row;
        assert_eq!(got, *expected, "`{lines}` of {a:#x}, {b:#x}, {c:#x}: {got:#x}, not {expected:#x}");
    }
}

#[track_caller]
pub(crate) fn check16(lines: &str, rows: &[Row]) {
    check(16, lines, rows);
}

#[track_caller]
pub(crate) fn check32(lines: &str, rows: &[Row]) {
    check(32, lines, rows);
}

#[track_caller]
pub(crate) fn check64(lines: &str, rows: &[Row]) {
    check(64, lines, rows);
}

/// Sources are floats.
#[track_caller]
pub(crate) fn check_floats(lines: &str, rows: &[(f32, f32, f32, f32)]) {
    let bits = |x: f32| u64::from(x.to_bits());
    let rows: Vec<Row> =
        rows.iter().map(|row| (bits(row.0), bits(row.1), bits(row.2), bits(row.3))).collect();
    check(32, lines, &rows);
}

/// What `%d` is in each lane.
#[track_caller]
pub(crate) fn results(bits: u32, lines: &str, sources: &[(u64, u64, u64)]) -> Vec<u64> {
    assert!(sources.len() <= 32, "a warp has 32 lanes");
    let bytes = (bits / 8) as usize;
    let mut device = Device::new();
    let addresses: Vec<u64> = (0..4).map(|_| device.allocate(32 * bytes)).collect();
    for (index, address) in addresses.iter().enumerate().take(3) {
        device.fill(*address, 0, 32 * bytes);
        for (lane, (a, b, c)) in sources.iter().enumerate() {
            let value = [*a, *b, *c][index].to_le_bytes();
            device.write(address + (lane * bytes) as u64, &value[..bytes]);
        }
    }
    let text = format!(
        ".visible .entry test(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd) {{
            {REGISTERS}
            .reg .b{bits} %a, %b, %c, %d;
            .reg .b32 %lane;
            .reg .b64 %at, %pa, %pb, %pc, %pd;
            ld.param.u64 %pa, [pa]; ld.param.u64 %pb, [pb]; ld.param.u64 %pc, [pc]; ld.param.u64 %pd, [pd];
            mov.u32 %lane, %tid.x;
            mul.wide.u32 %at, %lane, {bytes};
            add.s64 %pa, %pa, %at; add.s64 %pb, %pb, %at; add.s64 %pc, %pc, %at; add.s64 %pd, %pd, %at;
            ld.global.u{bits} %a, [%pa]; ld.global.u{bits} %b, [%pb]; ld.global.u{bits} %c, [%pc];
            {lines}
            st.global.u{bits} [%pd], %d;
            ret;
        }}"
    );
    let launch = Launch { grid: [1, 1, 1], block: [32, 1, 1], shared: 0 };
    let arguments: Vec<Arg> = addresses.iter().map(|address| Arg::Pointer(*address)).collect();
    let counts = device.launch(&module(&text), "test", &launch, &arguments);
    counts.unwrap_or_else(|fault| panic!("`{lines}`: {fault}"));
    let bytes_of = |lane: usize| {
        let mut whole = [0; 8];
        whole[..bytes].copy_from_slice(device.read(addresses[3] + (lane * bytes) as u64, bytes));
        u64::from_le_bytes(whole)
    };
    (0..sources.len()).map(bytes_of).collect()
}

/// Runs a kernel called `test` whose only parameter is an address of `words` 32-bit words, all zero at first; the words
/// after it, or the fault.
pub(crate) fn words(
    text: &str,
    words: usize,
    grid: u32,
    block: u32,
) -> Result<(Vec<u32>, Counts), Box<Fault>> {
    let mut device = Device::new();
    let x = device.allocate(words * 4);
    device.fill(x, 0, words * 4);
    let launch = Launch { grid: [grid, 1, 1], block: [block, 1, 1], shared: 0 };
    let counts = device.launch(&module(text), "test", &launch, &[Arg::Pointer(x)])?;
    let bytes = device.read(x, words * 4).chunks_exact(4);
    Ok((bytes.map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect(), counts))
}

/// A kernel `test` on words: `%x` is their address, `%at` that of this thread's word, `%t` its number in the block and
/// `%lane` the same. `before` stands outside of the kernel.
pub(crate) fn kernel_with(before: &str, lines: &str) -> String {
    format!(
        "{before}
        .visible .entry test(.param .u64 px) {{
            {REGISTERS}
            .reg .b32 %t, %lane, %n, %block;
            .reg .b64 %x, %at;
            ld.param.u64 %x, [px];
            mov.u32 %t, %tid.x; mov.u32 %lane, %laneid; mov.u32 %n, %ntid.x; mov.u32 %block, %ctaid.x;
            mul.wide.u32 %at, %t, 4;
            add.s64 %at, %x, %at;
            {lines}
            ret;
        }}"
    )
}

pub(crate) fn kernel(lines: &str) -> String {
    kernel_with("", lines)
}
