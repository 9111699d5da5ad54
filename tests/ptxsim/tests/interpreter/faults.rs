//! Each kind of mistake in a few lines: found, and found in the right place.

use ptxsim::{Arg, Device, Fault, FaultKind, Launch, Module, Order};

use crate::lanes::{kernel, kernel_with, module, words};

/// Runs `text` on 256 written words and expects a fault of this kind whose instruction has `instruction` in it.
#[track_caller]
fn faults_with(text: &str, (grid, block): (u32, u32), kind: FaultKind, instruction: &str) -> Fault {
    let fault = words(text, 256, grid, block).expect_err("nothing was found");
    assert_eq!(fault.kind, kind, "{fault}");
    assert!(fault.instruction.contains(instruction), "{fault}");
    assert!(text.lines().count() < 2 || fault.ptx_line > 1, "{fault}");
    *fault
}

#[track_caller]
fn faults(lines: &str, block: u32, kind: FaultKind, instruction: &str) -> Fault {
    let text = kernel_with(".shared .align 16 .b8 box[1024];", &lines.replace("; ", ";\n"));
    faults_with(&text, (1, block), kind, instruction)
}

#[test]
fn global_memory_has_ends() {
    let fault = faults("ld.global.u32 %r0, [%x+1024];", 1, FaultKind::OutOfBounds, "ld.global");
    assert_eq!(fault.lane, Some(0));
    let fault = faults(
        "mul.wide.u32 %x1, %t, 16; add.s64 %x1, %x1, %x; st.global.v2.u64 [%x1+528], {%x1, %x1};",
        32,
        FaultKind::OutOfBounds,
        "st.global",
    );
    assert_eq!((fault.lane, fault.block, fault.warp), (Some(31), [0, 0, 0], 0));
    faults("mov.u64 %x1, 0; ld.global.u32 %r0, [%x1];", 1, FaultKind::OutOfBounds, "ld.global");
    faults("ld.u32 %r0, [%x+-4];", 1, FaultKind::OutOfBounds, "ld.u32");
    faults("red.global.add.u32 [%x+1024], 1;", 1, FaultKind::OutOfBounds, "red");
    faults("cp.async.ca.shared.global [box], [%x+1024], 4;", 1, FaultKind::OutOfBounds, "cp.async");
}

#[test]
fn addresses_are_multiples_of_the_width() {
    faults("ld.global.u32 %r0, [%x+2];", 1, FaultKind::Misaligned, "ld.global");
    faults("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%x+8];", 1, FaultKind::Misaligned, "ld.global");
    faults("st.shared.u32 [box+1], %t;", 1, FaultKind::Misaligned, "st.shared");
    faults("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [box+8];", 32, FaultKind::Misaligned, "ldmatrix");
}

#[test]
fn nothing_is_read_before_it_is_written() {
    faults("ld.shared.u32 %r0, [box+4];", 1, FaultKind::UninitialisedShared, "ld.shared");
    let local = ".local .b32 own[2]; st.local.u32 [own], %t; ld.local.u32 %r0, [own+4];";
    faults(local, 1, FaultKind::UninitialisedLocal, "ld.local");
    let mut device = Device::new();
    let x = device.allocate(8);
    device.write(x, &[0; 7]);
    let launch = Launch { grid: [1, 1, 1], block: [1, 1, 1], shared: 0 };
    let text = kernel("ld.global.u32 %r0, [%x]; ld.global.u32 %r0, [%x+4];");
    let fault = device.launch(&module(&text), "test", &launch, &[Arg::Pointer(x)]).unwrap_err();
    assert_eq!((fault.kind, fault.address), (FaultKind::UninitialisedGlobal, Some(x + 4)));
    device.free(x);
    let fault = device.launch(&module(&text), "test", &launch, &[Arg::Pointer(x)]).unwrap_err();
    assert_eq!(fault.kind, FaultKind::FreedMemory);
}

#[test]
fn other_memories_have_ends_too() {
    faults("st.shared.u32 [box+1024], %t;", 1, FaultKind::SharedOutOfBounds, "st.shared");
    faults(".local .b32 own[2]; st.local.u32 [own+8], %t;", 1, FaultKind::LocalOutOfBounds, "st.local");
    let text = kernel_with(".const .b32 one = 1;", "ld.const.u32 %r0, [one+4];");
    faults_with(&text, (1, 1), FaultKind::ConstantOutOfBounds, "ld.const");
    let text = kernel_with(".global .b32 one = 1;", "st.global.u32 [one], %t;");
    faults_with(&text, (1, 1), FaultKind::ConstantOutOfBounds, "st.global");
}

#[test]
fn warps_race_without_a_barrier() {
    // Warp 1 reads what warp 0 writes.
    let address = "mul.lo.u32 %r0, %t, 4; mov.u32 %r9, box; add.u32 %r1, %r9, %r0;
        xor.b32 %r2, %r0, 128; add.u32 %r2, %r2, %r9;";
    let read = format!(
        "{address} st.shared.u32 [%r1], %t; bar.sync 0; setp.lt.u32 %p0, %t, 32;
         @%p0 st.shared.u32 [%r1], 99; @!%p0 ld.shared.u32 %r3, [%r2];"
    );
    let fault = faults(&read, 64, FaultKind::SharedRace, "ld.shared");
    assert_eq!(fault.warp, 1);
    // Warp 0 has read what warp 1 then writes.
    let written = format!(
        "{address} st.shared.u32 [%r1], %t; bar.sync 0; setp.lt.u32 %p0, %t, 32;
         @%p0 ld.shared.u32 %r3, [%r2]; @!%p0 st.shared.u32 [%r1], 99;"
    );
    faults(&written, 64, FaultKind::SharedRace, "st.shared.u32 [%r1], 99");
    // Both write the same place: other values race, the same do not.
    faults("st.shared.u32 [box], %t;", 64, FaultKind::SharedRace, "st.shared");
    let same = kernel_with(
        ".shared .align 16 .b8 box[1024];",
        "st.shared.u32 [box], 7; bar.sync 0; ld.shared.u32 %r0, [box];",
    );
    assert!(words(&same, 256, 1, 64).is_ok());
    faults("atom.shared.add.u32 %r0, [box], 1;", 64, FaultKind::UninitialisedShared, "atom");
    let mixed = "setp.lt.u32 %p0, %t, 32; mov.u32 %r0, 5; @%p0 st.shared.u32 [box], %r0; @!%p0 red.shared.add.u32 [box], 1;";
    faults(mixed, 64, FaultKind::SharedRace, "red.shared");
}

#[test]
fn lanes_of_a_warp_wait_for_each_other() {
    let before = ".shared .align 16 .b8 box[1024];";
    let address = "mul.lo.u32 %r0, %t, 16; mov.u32 %r9, box; add.u32 %r1, %r9, %r0; xor.b32 %r2, %r1, 16;";
    let exchange =
        format!("{address} st.shared.v4.u32 [%r1], {{%t, %t, %t, %t}}; WAIT ld.shared.u32 %r3, [%r2];");
    faults(&exchange.replace("WAIT ", ""), 32, FaultKind::SharedRace, "ld.shared");
    let waited = exchange.replace("WAIT", "bar.warp.sync -1;");
    assert!(words(&kernel_with(before, &waited), 256, 1, 32).is_ok());
    // Who has read must be waited for too, unless all read at once.
    let overwritten = format!("{waited} st.shared.u32 [%r1], 77;");
    let fault = faults(&overwritten, 32, FaultKind::SharedRace, "st.shared.u32 [%r1], 77");
    assert!(fault.detail.contains("__syncwarp"), "{fault}");
    let together = waited.replace(
        "ld.shared.u32 %r3, [%r2];",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r2];",
    );
    assert!(words(&kernel_with(before, &format!("{together} st.shared.u32 [%r1], 77;")), 256, 1, 32).is_ok());
    // Different values to one place in one instruction.
    faults("st.shared.u32 [box], %t;", 32, FaultKind::SharedRace, "st.shared");
}

#[test]
fn blocks_race_in_either_order() {
    let write = kernel("st.global.u32 [%at], %block;");
    faults_with(&write, (2, 1), FaultKind::GlobalRace, "st.global");
    let same = kernel("mov.u32 %r0, 7; st.global.u32 [%at], %r0;");
    assert!(words(&same, 256, 2, 1).is_ok());
    let atomics = kernel("red.global.add.u32 [%x], 1;");
    assert_eq!(words(&atomics, 256, 4, 32).unwrap().0[0], 128);
    // Each block writes its own word and reads its neighbour's.
    let own = "mul.wide.u32 %x1, %block, 4; add.s64 %x1, %x1, %x; xor.b32 %r0, %block, 1; mul.wide.u32 %x2, %r0, 4; add.s64 %x2, %x2, %x;";
    for lines in [
        "st.global.u32 [%x1], 9; ld.global.u32 %r1, [%x2];",
        "ld.global.u32 %r1, [%x2]; st.global.u32 [%x1], 9;",
    ] {
        let text = kernel(&format!("{own} {lines}"));
        for order in [Order::Forward, Order::Reverse] {
            let mut device = Device::new();
            device.order(order);
            let x = device.allocate(1024);
            device.fill(x, 0, 1024);
            let launch = Launch { grid: [2, 1, 1], block: [1, 1, 1], shared: 0 };
            let fault = device.launch(&module(&text), "test", &launch, &[Arg::Pointer(x)]).unwrap_err();
            assert_eq!(fault.kind, FaultKind::GlobalRace, "{fault}");
        }
    }
    // One launch after the other is no race.
    let mut device = Device::new();
    let x = device.allocate(4);
    let launch = Launch { grid: [1, 1, 1], block: [1, 1, 1], shared: 0 };
    let program = module(&kernel("st.global.u32 [%x], %t; ld.global.u32 %r0, [%x];"));
    for _ in 0..2 {
        device.launch(&program, "test", &launch, &[Arg::Pointer(x)]).unwrap();
    }
}

#[test]
fn copies_are_waited_for() {
    let copy = "mul.lo.u32 %r0, %t, 4; mov.u32 %r1, box; add.u32 %r1, %r1, %r0; cp.async.ca.shared.global [%r1], [%at], 4; cp.async.commit_group;";
    let read = "ld.shared.u32 %r2, [%r1];";
    faults(&format!("{copy} {read}"), 32, FaultKind::PendingCopy, "ld.shared");
    faults(&format!("{copy} cp.async.wait_group 1; {read}"), 32, FaultKind::PendingCopy, "ld.shared");
    // Another warp's copy needs its wait and then a barrier, in this order.
    let other = "xor.b32 %r0, %r0, 128; mov.u32 %r1, box; add.u32 %r1, %r1, %r0; ld.shared.u32 %r2, [%r1];";
    faults(
        &format!("{copy} bar.sync 0; cp.async.wait_all; {other}"),
        64,
        FaultKind::PendingCopy,
        "ld.shared",
    );
    faults(&format!("{copy} cp.async.wait_all; {other}"), 64, FaultKind::UninitialisedShared, "ld.shared");
    let right = format!("{copy} cp.async.wait_all; bar.sync 0; {other}");
    assert!(words(&kernel_with(".shared .align 16 .b8 box[1024];", &right), 256, 1, 64).is_ok());
}

#[test]
fn barriers_are_met_by_all() {
    let half = "setp.lt.u32 %p0, %lane, 16; @%p0 bra $low; bar.sync 0; bra $end; $low: bar.sync 0; $end:";
    faults(half, 32, FaultKind::BarrierDivergence, "bar.sync");
    let one_warp = "setp.lt.u32 %p0, %t, 32; @%p0 bar.sync 1; bar.sync 0;";
    faults(one_warp, 64, FaultKind::Deadlock, "bar.sync");
    faults("bar.sync 1, 96;", 64, FaultKind::Deadlock, "bar.sync");
    faults("bar.sync 1, 33;", 64, FaultKind::BarrierDivergence, "bar.sync");
    // Who has left is not waited for.
    let left = "setp.lt.u32 %p0, %t, 40; @%p0 ret; bar.sync 0;";
    assert!(words(&kernel(left), 256, 1, 64).is_ok());
}

#[test]
fn an_exchange_is_met_by_its_members() {
    let half =
        "setp.lt.u32 %p0, %lane, 16; @%p0 shfl.sync.bfly.b32 %r0, %lane, 1, 31, -1; @!%p0 bra $end; $end:";
    faults(half, 32, FaultKind::InactiveLane, "shfl");
    let outside = "shfl.sync.bfly.b32 %r0, %lane, 1, 31, 0xffff;";
    faults(outside, 32, FaultKind::InactiveLane, "shfl");
    let gone = "setp.lt.u32 %p0, %lane, 16; @%p0 ret; shfl.sync.idx.b32 %r0, %lane, 3, 31, -1;";
    let fault = faults(gone, 32, FaultKind::InactiveLane, "shfl");
    assert_eq!(fault.lane, Some(16));
    let matrix = "setp.lt.u32 %p0, %lane, 31; mov.u32 %r0, 0; @%p0 mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r0, %r0}, {%r0}, {%r0, %r0, %r0, %r0};";
    faults(matrix, 32, FaultKind::InactiveLane, "mma");
}

#[test]
fn what_is_not_known_is_named_when_it_runs() {
    let fault = faults("fancy.new.u32 %r0, %r1;", 1, FaultKind::UnknownInstruction, "fancy.new");
    assert!(fault.to_string().contains("`fancy.new.u32`"), "{fault}");
    // A modifier that is not known could change what a known instruction does.
    for instruction in
        ["add.cc.u32 %r0, %r1, %r2", "mad.hi.sat.s32 %r0, %r1, %r2, %r3", "min.xorsign.abs.f32 %r0, %r1, %r2"]
    {
        faults(&format!("{instruction};"), 1, FaultKind::UnknownInstruction, instruction);
    }
    // A word that does not run does no harm.
    assert!(words(&kernel("bra $end; fancy.new.u32 %r0, %r1; $end:"), 256, 1, 1).is_ok());
    faults("trap;", 1, FaultKind::Trap, "trap");
}

#[test]
fn arguments_fit_their_parameters() {
    let program = module(".visible .entry test(.param .u64 x, .param .u32 n) { ret; }");
    let launch = Launch { grid: [1, 1, 1], block: [1, 1, 1], shared: 0 };
    let refused = |name: &str, arguments: &[Arg]| {
        let fault = Device::new().launch(&program, name, &launch, arguments).unwrap_err();
        assert_eq!(fault.kind, FaultKind::Arguments);
        fault.detail.into_string()
    };
    assert_eq!(refused("other", &[]), "the module has no such kernel, but `test`");
    assert_eq!(refused("test", &[Arg::Pointer(0)]), "2 parameters, but 1 arguments");
    let short = refused("test", &[Arg::I32(0), Arg::I32(0)]);
    assert_eq!(short, "parameter `x` has 8 bytes, its argument I32(0) 4");
}

#[test]
fn launches_have_limits() {
    let launch = |text: &str, block: [u32; 3], grid: [u32; 3], shared: u32| {
        let fault = Device::new().launch(&module(text), "test", &Launch { grid, block, shared }, &[]);
        fault.err().map(|fault| fault.kind)
    };
    let plain = ".visible .entry test() { ret; }";
    let refused = Some(FaultKind::LaunchLimits);
    assert_eq!(launch(plain, [1024, 1, 1], [1, 1, 1], 0), None);
    assert_eq!(launch(plain, [1025, 1, 1], [1, 1, 1], 0), refused);
    assert_eq!(launch(plain, [1, 1, 1], [0, 1, 1], 0), refused);
    assert_eq!(launch(plain, [1, 1, 1], [1, 65_536, 1], 0), refused);
    assert_eq!(launch(plain, [1, 1, 1], [1, 1, 1], 227 << 10), None);
    assert_eq!(launch(plain, [1, 1, 1], [1, 1, 1], (227 << 10) + 1), refused);
    let limited = ".visible .entry test() .maxntid 64, 1, 1 { ret; }";
    assert_eq!(launch(limited, [65, 1, 1], [1, 1, 1], 0), refused);
    let large = ".visible .entry test() { .shared .b8 box[49200]; ret; }";
    assert_eq!(launch(large, [1, 1, 1], [1, 1, 1], 0), refused);
}

#[test]
fn a_loop_without_end_is_stopped() {
    let mut device = Device::new();
    device.budget(1000);
    let program = Module::parse(".visible .entry test() { $loop: bra $loop; }").unwrap();
    let launch = Launch { grid: [1, 1, 1], block: [32, 1, 1], shared: 0 };
    let fault = device.launch(&program, "test", &launch, &[]).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Runaway);
}
