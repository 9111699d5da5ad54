//! Branches, calls, barriers: lanes that part and meet again.

use ptxsim::{Arg, Device, FaultKind, Launch, Order};

use crate::lanes::{check32, kernel, kernel_with, module, words};

#[test]
fn lanes_part_and_meet_again() {
    // Each lane counts to its own number; then all sum up together.
    let got = words(
        &kernel(
            "mov.u32 %r0, 0;
             $loop: setp.ge.u32 %p0, %r0, %lane; @%p0 bra $end;
             add.u32 %r0, %r0, 1; bra.uni $loop;
             $end: activemask.b32 %r1;
             st.global.u32 [%at], %r0; st.global.u32 [%at+128], %r1;",
        ),
        64,
        1,
        32,
    );
    let (got, counts) = got.unwrap();
    assert_eq!(got[..32], (0..32).collect::<Vec<u32>>());
    assert!(got[32..].iter().all(|mask| *mask == u32::MAX), "{got:x?}");
    assert_eq!(counts.opcodes["add.u32"], 31);
    assert_eq!(counts.opcodes["activemask.b32"], 1);
}

#[test]
fn a_lane_that_has_left_is_not_waited_for() {
    let got = words(
        &kernel(
            "setp.gt.u32 %p0, %lane, 9; @%p0 exit; bar.warp.sync -1;
             vote.sync.ballot.b32 %r0, %p0, -1; mov.pred %p1, -1; vote.sync.ballot.b32 %r0, %p1, -1;
             bar.sync 0; st.global.u32 [%at], %r0;",
        ),
        64,
        1,
        64,
    );
    assert_eq!(
        got.unwrap().0[..11],
        [0x3ff; 11].map(|mask| mask)[..10].iter().copied().chain([0]).collect::<Vec<_>>()
    );
}

#[test]
fn a_switch_jumps_by_its_index() {
    let lines = "targets: .branchtargets $a, $b, $c;
        rem.u32 %r0, %a, 3; brx.idx %r0, targets;
        $a: mov.u32 %d, 10; bra $end;
        $b: mov.u32 %d, 20; bra $end;
        $c: mov.u32 %d, 30;
        $end:";
    check32(lines, &[(0, 0, 0, 10), (1, 0, 0, 20), (2, 0, 0, 30), (3, 0, 0, 10)]);
}

#[test]
fn functions_have_their_own_registers() {
    let before = ".func (.param .b32 result) square(.param .b32 value) {
            .reg .b32 %r<3>; .reg .pred %p<2>;
            ld.param.u32 %r0, [value];
            setp.eq.u32 %p1, %r0, 3; @%p1 bra $three;
            mul.lo.u32 %r1, %r0, %r0; st.param.b32 [result+0], %r1; ret;
            $three: mov.u32 %r2, 333; st.param.b32 [result], %r2; ret;
        }
        .func (.param .b32 result) fourth(.param .b32 value) {
            .reg .b32 %r<3>;
            ld.param.u32 %r0, [value];
            { .param .b32 in; .param .b32 out; st.param.b32 [in], %r0;
              call.uni (out), square, (in); ld.param.b32 %r1, [out]; }
            mul.lo.u32 %r2, %r1, %r1; st.param.b32 [result], %r2; ret;
        }";
    let lines = "mov.u32 %r1, 5; setp.ge.u32 %p1, %lane, 8;
        { .param .b32 in; .param .b32 out; st.param.b32 [in], %lane; st.param.b32 [out], %r1;
          @!%p1 call (out), fourth, (in); ld.param.b32 %r0, [out]; }
        add.u32 %r0, %r0, %r1; st.global.u32 [%at], %r0;";
    let got = words(&kernel_with(before, lines), 32, 1, 32).unwrap().0;
    for (lane, got) in (0u32..).zip(got) {
        let expected = match lane {
            3 => 333 * 333 + 5,
            0..8 => lane.pow(4) + 5,
            _ => 10,
        };
        assert_eq!(got, expected, "lane {lane}");
    }
}

#[test]
fn a_function_that_calls_itself_is_refused() {
    let text = ".func f() { call.uni f; ret; } .visible .entry test() { call.uni f; ret; }";
    let error = ptxsim::Module::parse(text).unwrap_err();
    assert!(error.detail.contains("recursion"), "{error}");
}

#[test]
fn a_barrier_may_count_its_threads() {
    // Warps 0 and 1 hand a number on to warps 2 and 3 by barrier 1, and get it back by barrier 2.
    let lines = "setp.ge.u32 %p0, %t, 64; and.b32 %r1, %t, 63; mul.lo.u32 %r1, %r1, 4; mov.u32 %r0, box; add.u32 %r1, %r1, %r0;
        @%p0 bra $take;
        add.u32 %r2, %t, 1; st.shared.u32 [%r1], %r2;
        bar.arrive 1, 128; bar.sync 2, 128;
        ld.shared.u32 %r3, [%r1]; st.global.u32 [%at], %r3; bra $end;
        $take: bar.sync 1, 128;
        ld.shared.u32 %r3, [%r1]; mul.lo.u32 %r3, %r3, 2; st.shared.u32 [%r1], %r3;
        bar.arrive 2, 128;
        $end:";
    let text = kernel_with(".shared .align 4 .b8 box[256];", lines);
    for order in [Order::Forward, Order::Reverse] {
        let mut device = Device::new();
        device.order(order);
        let x = device.allocate(512);
        let launch = Launch { grid: [1, 1, 1], block: [128, 1, 1], shared: 0 };
        device.launch(&module(&text), "test", &launch, &[Arg::Pointer(x)]).unwrap();
        assert_eq!(device.read(x, 8), [2, 0, 0, 0, 4, 0, 0, 0]);
        // Without the first hand-over the taker races with the giver.
        let early = text.replace("bar.sync 1, 128;", "").replace("bar.arrive 1, 128;", "");
        let fault = device.launch(&module(&early), "test", &launch, &[Arg::Pointer(x)]).unwrap_err();
        assert!(matches!(fault.kind, FaultKind::SharedRace | FaultKind::UninitialisedShared), "{fault}");
    }
}

#[test]
fn a_barrier_tells_what_all_think() {
    let got = words(
        &kernel(
            "setp.lt.u32 %p0, %t, 40; setp.lt.u32 %p1, %t, 64;
             barrier.red.popc.aligned.u32 %r0, 0, %p0;
             bar.red.and.pred %p2, 0, %p0; bar.red.or.pred %p3, 0, !%p1; bar.red.and.pred %p4, 0, %p1;
             selp.u32 %r1, 1, 0, %p2; selp.u32 %r2, 2, 0, %p3; selp.u32 %r3, 4, 0, %p4;
             or.b32 %r1, %r1, %r2; or.b32 %r1, %r1, %r3;
             st.global.u32 [%at], %r0; st.global.u32 [%at+256], %r1;",
        ),
        128,
        1,
        64,
    );
    let (got, counts) = got.unwrap();
    assert!(got[..64].iter().all(|count| *count == 40));
    assert!(got[64..].iter().all(|bits| *bits == 4));
    assert_eq!(counts.barriers, 4);
}

#[test]
fn special_registers_say_where_a_thread_is() {
    let text = ".visible .entry test(.param .u64 px) {
        .reg .b32 %r<16>; .reg .b64 %x<4>;
        ld.param.u64 %x0, [px];
        mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z;
        mov.u32 %r3, %ntid.x; mov.u32 %r4, %ntid.y;
        mad.lo.u32 %r5, %r2, %r4, %r1; mad.lo.u32 %r5, %r5, %r3, %r0;
        mov.u32 %r6, %ctaid.x; mov.u32 %r7, %ctaid.y; mov.u32 %r8, %nctaid.x; mad.lo.u32 %r6, %r7, %r8, %r6;
        mad.lo.u32 %r9, %r6, 48, %r5;
        mul.wide.u32 %x1, %r9, 4; add.s64 %x1, %x1, %x0;
        mov.u32 %r10, %laneid; mov.u32 %r11, %warpid; mad.lo.u32 %r10, %r11, 32, %r10; sub.u32 %r10, %r10, %r5;
        mov.u32 %r12, %lanemask_lt; popc.b32 %r12, %r12; mov.u32 %r13, %laneid; sub.u32 %r12, %r12, %r13;
        add.u32 %r9, %r9, %r10; add.u32 %r9, %r9, %r12;
        st.global.u32 [%x1], %r9;
        ret;
    }";
    let mut device = Device::new();
    let x = device.allocate(6 * 48 * 4);
    let launch = Launch { grid: [3, 2, 1], block: [4, 6, 2], shared: 0 };
    device.launch(&module(text), "test", &launch, &[Arg::Pointer(x)]).unwrap();
    let expected: Vec<u8> = (0..6 * 48u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(device.read(x, 6 * 48 * 4), expected);
}
