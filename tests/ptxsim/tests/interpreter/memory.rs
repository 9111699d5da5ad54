//! Loads, stores, address spaces, atomics, and what they are counted as.

use ptxsim::{Arg, Device, Launch};

use crate::lanes::{check64, kernel, kernel_with, module, words};

fn run(lines: &str, count: usize) -> Vec<u32> {
    words(&kernel(lines), count, 1, 32).unwrap().0
}

#[test]
fn vectors_are_loaded_and_stored_whole() {
    let got = run(
        "setp.ne.u32 %p0, %t, 0; @%p0 ret;
         mov.u32 %r0, 10; mov.u32 %r1, 11; mov.u32 %r2, 12; mov.u32 %r3, 13;
         st.global.v4.u32 [%x], {%r0, %r1, %r2, %r3};
         ld.global.v2.u32 {%r4, %r5}, [%x+8];
         ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {_, %r6, _, _}, [%x];
         add.u32 %r4, %r4, %r5; add.u32 %r4, %r4, %r6;
         st.global.cs.u32 [%x+16], %r4;",
        8,
    );
    assert_eq!(got[..5], [10, 11, 12, 13, 12 + 13 + 11]);
}

#[test]
fn narrow_loads_fill_their_register() {
    let got = run(
        "setp.ne.u32 %p0, %t, 0; @%p0 ret;
         mov.u32 %r0, 0x80ff; st.global.u32 [%x], %r0;
         ld.global.s8 %r1, [%x]; ld.global.u8 %r2, [%x]; ld.global.s16 %r3, [%x]; ld.global.u16 %r4, [%x];
         ld.global.s8 %h0, [%x]; cvt.u32.u16 %r5, %h0;
         st.global.v4.u32 [%x+16], {%r1, %r2, %r3, %r4}; st.global.u32 [%x+32], %r5;
         st.global.u8 [%x+5], %r1; st.global.u16 [%x+8], %r0;",
        12,
    );
    assert_eq!(got[..9], [0x80ff, 0xff00, 0x80ff, 0, u32::MAX, 255, 0xffff_80ff, 0x80ff, 0xffff]);
}

#[test]
fn shared_memory_is_seen_by_the_block() {
    let got = words(
        &kernel_with(
            ".shared .align 4 .b8 table[256]; .extern .shared .align 64 .b8 dynamic[];",
            ".shared .align 8 .b64 own[4];
             mov.u32 %r0, table; mul.lo.u32 %r1, %t, 4; add.u32 %r2, %r0, %r1;
             st.shared.u32 [%r2], %t;
             bar.sync 0;
             xor.b32 %r3, %r1, 252; add.u32 %r3, %r0, %r3;
             ld.shared.u32 %r4, [%r3];
             mov.u64 %x2, table; cvta.shared.u64 %x1, %x2;
             ld.u32 %r5, [%x1+252]; add.u32 %r4, %r4, %r5;
             mov.u32 %r6, own; mov.u32 %r7, dynamic; shl.b32 %r6, %r6, 16; or.b32 %r6, %r6, %r7;
             setp.eq.u32 %p0, %t, 0; @%p0 mov.u32 %r4, %r6;
             st.global.u32 [%at], %r4;",
        ),
        64,
        1,
        64,
    );
    let (got, counts) = got.unwrap();
    let expected: Vec<u32> = (1..64).map(|thread| 63 - thread + 63).collect();
    assert_eq!(got[1..], expected);
    // `own` stands first, `table` where it was first used; dynamic memory after both, at its own alignment.
    assert_eq!(got[0], 320);
    assert_eq!(counts.barriers, 1);
}

#[test]
fn local_memory_belongs_to_each_thread() {
    let got = run(
        ".local .align 8 .b8 depot[16];
         mov.u64 %x1, depot; cvta.local.u64 %x2, %x1;
         st.u32 [%x2+4], %lane; st.local.u32 [%x1+8], %t;
         ld.local.u32 %r1, [%x1+4]; ld.u32 %r2, [%x2+8]; add.u32 %r1, %r1, %r2;
         cvta.to.local.u64 %x3, %x2; ld.local.u32 %r2, [%x3+8]; add.u32 %r1, %r1, %r2;
         st.global.u32 [%at], %r1;",
        32,
    );
    assert_eq!(got, (0..32).map(|lane| 3 * lane).collect::<Vec<_>>());
}

#[test]
fn constants_are_found_by_every_kind_of_address() {
    let got = words(
        &kernel_with(
            ".const .align 4 .b8 skipped[3] = {9, 9, 9};
             .const .align 4 .f32 one[2] = {0f3F800000, 0f40000000};
             .global .align 4 .b8 bytes[8] = {1, 2, 3, 4, 5};
             .global .align 4 .u32 number = 77;",
            "ld.const.f32 %r0, [one+4];
             mov.u64 %x1, one; cvta.const.u64 %x2, %x1; ld.u32 %r1, [%x2];
             mov.u64 %x3, bytes; ld.global.u32 %r2, [%x3]; ld.global.nc.u8 %r3, [bytes+4]; ld.global.u8 %r4, [bytes+7];
             mov.u64 %x4, number+0; ld.u32 %r5, [%x4];
             st.global.v4.u32 [%x], {%r0, %r1, %r2, %r3}; st.global.v2.u32 [%x+16], {%r4, %r5};",
        ),
        8,
        1,
        1,
    );
    assert_eq!(got.unwrap().0[..6], [0x4000_0000, 0x3f80_0000, 0x0403_0201, 5, 0, 77]);
}

#[test]
fn parameters_lie_where_their_types_put_them() {
    let text = ".visible .entry test(.param .u32 a, .param .u64 .ptr .global .align 16 x, .param .f32 b, .param .u64 c) {
        .reg .b32 %r<4>; .reg .b64 %x<4>;
        ld.param.u32 %r0, [a]; ld.param.u64 %x0, [x]; ld.param.f32 %r1, [b]; ld.param.u64 %x1, [c];
        st.global.u32 [%x0], %r0; st.global.u32 [%x0+4], %r1; st.global.u64 [%x0+8], %x1;
        ret;
    }";
    let mut device = Device::new();
    let x = device.allocate(16);
    let arguments = [Arg::I32(-1), Arg::Pointer(x), Arg::F32(1.0), Arg::I64(-2)];
    let launch = Launch { grid: [1, 1, 1], block: [1, 1, 1], shared: 0 };
    device.launch(&module(text), "test", &launch, &arguments).unwrap();
    let mut expected = vec![0xff; 4];
    expected.extend(1f32.to_le_bytes());
    expected.extend((-2i64).to_le_bytes());
    assert_eq!(device.read(x, 16), expected);
}

#[test]
fn atomics_of_all_lanes_add_up() {
    let got = run(
        "atom.global.add.u32 %r0, [%x], 1;
         red.global.max.s32 [%x+4], %t; red.global.or.b32 [%x+8], %t; red.global.add.f32 [%x+12], 0f3F800000;
         mov.u32 %r1, 0; atom.global.cas.b32 %r2, [%x+16], %r1, %t;
         atom.global.exch.b32 %r3, [%x+20], %t;
         atom.global.inc.u32 %r4, [%x+24], 9;
         mov.u64 %x1, 1; red.global.add.u64 [%x+32], %x1;",
        16,
    );
    assert_eq!(got[..9], [32, 31, 31, 32f32.to_bits(), 1, 31, 2, 0, 32]);
}

#[test]
fn atomics_on_shared_memory_need_no_barrier_between_them() {
    let got = words(
        &kernel_with(
            ".shared .align 4 .u32 sum;",
            "setp.eq.u32 %p0, %t, 0; mov.u32 %r0, 0; @%p0 st.shared.u32 [sum], %r0;
             bar.sync 0; atom.shared.add.u32 %r1, [sum], %t; bar.sync 0;
             ld.shared.u32 %r2, [sum]; st.global.u32 [%at], %r2;",
        ),
        128,
        1,
        128,
    );
    assert!(got.unwrap().0.iter().all(|sum| *sum == 127 * 64));
}

#[test]
fn copies_arrive_when_they_are_waited_for() {
    let got = words(
        &kernel_with(
            ".shared .align 16 .b8 buffer[1024];",
            "mul.lo.u32 %r1, %t, 16; mov.u32 %r0, buffer; add.u32 %r2, %r0, %r1;
             cvt.u64.u32 %x1, %r1; add.u64 %x1, %x, %x1; add.u32 %r9, %t, 100; st.global.v4.u32 [%x1], {%t, %r9, %t, %t};
             mov.u32 %r3, 8;
             cp.async.cg.shared.global [%r2], [%x1], 16, %r3; cp.async.commit_group;
             cp.async.ca.shared.global [%r2+512], [%x1+4], 4; cp.async.commit_group;
             cp.async.wait_group 1; ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r2];
             cp.async.wait_all; ld.shared.u32 %r8, [%r2+512];
             add.u32 %r4, %r4, %r5; add.u32 %r4, %r4, %r6; add.u32 %r4, %r4, %r8;
             st.global.u32 [%x1+12], %r4;",
        ),
        128,
        1,
        32,
    );
    let (got, counts) = got.unwrap();
    // Of the 16 bytes only 8 were read; the rest is zero.
    assert!((0..32).all(|thread| got[thread * 4 + 3] == thread as u32 * 3 + 200));
    // 8 and then 4 bytes a thread; a sector lies under two threads.
    assert_eq!((counts.global_load_bytes, counts.global_load_sectors), (32 * 12, 16 + 16));
}

#[test]
fn sectors_and_banks_are_counted() {
    let counts = |lines: &str| {
        let before = ".shared .align 16 .b8 table[8192];";
        let filled = "mov.u32 %r0, table; mov.u32 %r9, 0;
            $fill: shl.b32 %r8, %r9, 7; mul.lo.u32 %r7, %t, 4; add.u32 %r7, %r7, %r8; add.u32 %r7, %r7, %r0;
            st.shared.u32 [%r7], %r9; add.u32 %r9, %r9, 1; setp.lt.u32 %p0, %r9, 64; @%p0 bra $fill; bar.warp.sync -1;";
        words(&kernel_with(before, &format!("{filled} {lines}")), 1024, 1, 32).unwrap().1
    };
    let dense = counts("st.global.u32 [%at], %t;");
    assert_eq!((dense.global_store_bytes, dense.global_store_sectors), (128, 4));
    assert_eq!((dense.store_efficiency(), dense.bank_conflicts), (1.0, 0));
    let strided = counts("mul.wide.u32 %x1, %t, 64; add.s64 %x1, %x1, %x; ld.global.u32 %r1, [%x1];");
    assert_eq!((strided.global_load_sectors, strided.load_efficiency()), (32, 0.125));
    // 32 rows of 128 bytes: all in one bank; the same word: a broadcast.
    let column = counts("shl.b32 %r1, %t, 7; add.u32 %r1, %r1, %r0; ld.shared.u32 %r2, [%r1];");
    assert_eq!(column.bank_conflicts, 31);
    assert_eq!(counts("ld.shared.u32 %r2, [%r0+64];").bank_conflicts, 0);
    // 16 bytes a lane: four passes of eight lanes, each without conflict.
    let wide =
        counts("shl.b32 %r1, %t, 4; add.u32 %r1, %r1, %r0; ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r1];");
    assert_eq!((wide.bank_conflicts, wide.shared_accesses), (0, 65));
    let wide =
        counts("shl.b32 %r1, %t, 6; add.u32 %r1, %r1, %r0; ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r1];");
    assert_eq!(wide.bank_conflicts, 4 * 3);
    assert_eq!(wide.opcodes["ld.shared.v4.u32"], 1);
}

#[test]
fn what_the_host_has_freed_or_never_filled_is_known() {
    let mut device = Device::new();
    let (x, y) = (device.allocate(100), device.allocate(1));
    assert!(x % 256 == 0 && y % 256 == 0 && y - x > 1 << 20);
    assert!(!device.is_written(x, 100));
    device.fill(x, 7, 99);
    assert!(device.is_written(x, 99) && !device.is_written(x + 99, 1));
    device.write(x + 10, &[1, 2]);
    assert_eq!(device.read(x + 9, 4), [7, 1, 2, 7]);
    device.free(x);
    assert_ne!(device.allocate(100), x);
}

#[test]
fn offsets_may_be_negative() {
    check64("add.s64 %x1, %pa, 8; ld.global.u64 %d, [%x1+-8];", &[(5, 0, 0, 5)]);
}
