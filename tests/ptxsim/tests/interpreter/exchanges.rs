//! Shuffles, votes, matches and reductions over a warp.

use crate::lanes::{kernel, results, words};

fn by_lane(lines: &str) -> Vec<u64> {
    results(32, lines, &(0..32).map(|lane| (lane, lane * 10, 0)).collect::<Vec<_>>())
}

#[test]
fn shuffles_take_from_another_lane() {
    let lane = |f: &dyn Fn(u64) -> u64| (0..32).map(|lane| f(lane) * 10).collect::<Vec<u64>>();
    assert_eq!(by_lane("shfl.sync.bfly.b32 %d, %b, 1, 31, -1;"), lane(&|lane| lane ^ 1));
    assert_eq!(
        by_lane("shfl.sync.up.b32 %d, %b, 2, 0, -1;"),
        lane(&|lane| if lane < 2 { lane } else { lane - 2 })
    );
    assert_eq!(
        by_lane("shfl.sync.down.b32 %d, %b, 3, 31, -1;"),
        lane(&|lane| if lane > 28 { lane } else { lane + 3 })
    );
    assert_eq!(by_lane("shfl.sync.idx.b32 %d, %b, 5, 31, -1;"), lane(&|_| 5));
    // Segments of eight lanes: clamp 31, segment mask 24.
    assert_eq!(by_lane("shfl.sync.idx.b32 %d, %b, 1, 0x181f, -1;"), lane(&|lane| lane / 8 * 8 + 1));
    assert_eq!(
        by_lane("shfl.sync.down.b32 %d, %b, 4, 0x181f, -1;"),
        lane(&|lane| if lane % 8 < 4 { lane + 4 } else { lane })
    );
    let in_range = by_lane("shfl.sync.up.b32 %r0|%p0, %b, 1, 0, -1; selp.u32 %d, 1, 0, %p0;");
    assert_eq!(in_range, (0..32).map(|lane| u64::from(lane > 0)).collect::<Vec<_>>());
}

#[test]
fn votes_are_of_the_lanes_that_take_part() {
    let predicate = "setp.gt.u32 %p0, %a, 15;";
    assert!(
        by_lane(&format!("{predicate} vote.sync.ballot.b32 %d, %p0, -1;"))
            .iter()
            .all(|mask| *mask == 0xffff_0000)
    );
    let vote = |mode: &str| {
        by_lane(&format!("{predicate} vote.sync.{mode}.pred %p1, %p0, -1; selp.u32 %d, 1, 0, %p1;"))[0]
    };
    assert_eq!([vote("any"), vote("all"), vote("uni")], [1, 0, 0]);
    let half = format!(
        "{predicate} mov.u32 %d, 7; @%p0 vote.sync.all.pred %p1, %p0, 0xffff0000; @%p0 selp.u32 %d, 1, 0, %p1;"
    );
    assert_eq!(by_lane(&half)[15..17], [7, 1]);
}

#[test]
fn equal_lanes_find_each_other() {
    let any = by_lane("and.b32 %r0, %a, 3; match.any.sync.b32 %d, %r0, -1;");
    assert_eq!(any[..4], [0x1111_1111, 0x2222_2222, 0x4444_4444, 0x8888_8888]);
    let all = by_lane("mov.u32 %r0, 5; match.all.sync.b32 %d|%p0, %r0, -1;");
    assert!(all.iter().all(|mask| *mask == 0xffff_ffff));
    let none = by_lane("match.all.sync.b32 %d|%p0, %a, -1; @%p0 mov.u32 %d, 9;");
    assert!(none.iter().all(|mask| *mask == 0));
}

#[test]
fn a_warp_reduces_to_one_number() {
    let reduce = |how: &str| by_lane(&format!("redux.sync.{how} %d, %a, -1;"))[31];
    assert_eq!([reduce("add.s32"), reduce("max.u32"), reduce("xor.b32")], [496, 31, 0]);
    let low = by_lane("neg.s32 %r0, %a; redux.sync.min.s32 %d, %r0, -1;")[0];
    assert_eq!(low as u32 as i32, -31);
}

#[test]
fn lanes_wait_for_those_that_come_later() {
    // The odd lanes go another way first; the shuffle joins them.
    let lines = "and.b32 %r0, %lane, 1; setp.eq.u32 %p0, %r0, 0; mov.u32 %r1, %lane;
        @%p0 bra $even;
        add.u32 %r1, %r1, 100; add.u32 %r1, %r1, 100;
        bra $exchange;
        $even: add.u32 %r1, %r1, 1000;
        $exchange: shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
        st.global.u32 [%at], %r2;";
    let got = words(&kernel(lines), 32, 1, 32).unwrap().0;
    assert_eq!(got[..4], [201, 1000, 203, 1002]);
}
