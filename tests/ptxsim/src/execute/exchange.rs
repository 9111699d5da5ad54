//! What the lanes of a warp tell each other: shuffles, votes, matches, reductions.

use crate::fault::{FaultKind, Mistake};
use crate::lanes::{Lanes, Mask, lanes_of, low_bits};
use crate::program::{Op, Shuffle, ShuffleMode, VoteMode};
use crate::warp::Warp;

/// `shfl.sync`, as its pseudocode in the ISA has it.
pub(super) fn shuffle(warp: &mut Warp, shuffle: &Shuffle, active: Mask) -> Result<(), Mistake> {
    let values = *warp.register(shuffle.from);
    let (offsets, clamps) = (warp.register(shuffle.offset), warp.register(shuffle.clamp));
    let mut result: Lanes = values;
    let mut in_range: Mask = 0;
    for lane in lanes_of(active) {
        let (offset, clamp) = (offsets[lane] as i32 & 31, clamps[lane] as i32 & 31);
        let (segment, here) = (clamps[lane] as i32 >> 8 & 31, lane as i32);
        let most = here & segment | clamp & !segment;
        let (from, is_in_range) = match shuffle.mode {
            ShuffleMode::Up => (here - offset, here - offset >= most),
            ShuffleMode::Down => (here + offset, here + offset <= most),
            ShuffleMode::Butterfly => (here ^ offset, here ^ offset <= most),
            ShuffleMode::Index => {
                let from = here & segment | offset & !segment;
                (from, from <= most)
            }
        };
        let from = if is_in_range { from as usize } else { lane };
        if active >> from & 1 == 0 {
            let detail = format!("reads lane {from}, which does not take part");
            return Err(Mistake::new(FaultKind::InactiveLane, detail).in_lane(lane));
        }
        result[lane] = values[from] & 0xffff_ffff;
        in_range |= Mask::from(is_in_range) << lane;
    }
    warp.set(shuffle.to, &result, active);
    warp.set_predicate(shuffle.in_range, in_range, active);
    Ok(())
}

/// `vote`, `match` and `redux`.
pub(super) fn agree(warp: &mut Warp, op: &Op, active: Mask) {
    match op {
        Op::Vote { mode, source, .. } => {
            let votes = source.mask(&warp.predicates) & active;
            let everywhere = |holds: bool| if holds { Mask::MAX } else { 0 };
            match *mode {
                VoteMode::Ballot(to) => warp.set(to, &[u64::from(votes); 32], active),
                VoteMode::All(to) => warp.set_predicate(Some(to), everywhere(votes == active), active),
                VoteMode::Any(to) => warp.set_predicate(Some(to), everywhere(votes != 0), active),
                VoteMode::Uniform(to) => {
                    let is_uniform = votes == active || votes == 0;
                    warp.set_predicate(Some(to), everywhere(is_uniform), active);
                }
            }
        }
        Op::Match { to, all, is_all, from, bits, .. } => {
            let values = warp.register(*from).map(|value| value & low_bits(*bits));
            let mut result = [0; 32];
            let mut alike = 0;
            for lane in lanes_of(active) {
                let same = lanes_of(active)
                    .filter(|other| values[*other] == values[lane])
                    .fold(0, |mask: Mask, other| mask | 1 << other);
                alike |= if same == active { 1 << lane } else { 0 };
                result[lane] = u64::from(if *is_all && same != active { 0 } else { same });
            }
            warp.set(*to, &result, active);
            warp.set_predicate(*all, alike, active);
        }
        Op::Reduce { to, from, combine, .. } => {
            let values = warp.register(*from);
            let whole = lanes_of(active).map(|lane| values[lane] as u32).reduce(combine);
            warp.set(*to, &[u64::from(whole.unwrap_or(0)); 32], active);
        }
        _ => unreachable!("BUG: only exchanges come here"),
    }
}
