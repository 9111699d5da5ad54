//! Runs a block: its warps in turn, from barrier to barrier.

use crate::execute::Machine;
use crate::fault::{Fault, FaultKind, Mistake};
use crate::program::{Kernel, ReductionTarget};
use crate::warp::{State, Wait, Warp};

use crate::device::Order;

/// Runs the block that the machine stands at, to its end. `warps` are those of an earlier block or new ones.
pub(crate) fn run(machine: &mut Machine<'_>, warps: &mut [Warp], order: Order) -> Result<(), Fault> {
    let kernel: &Kernel = machine.kernel;
    machine.shared.begin_block(machine.position.shared_bytes as usize, warps.len());
    machine.arrivals.clear();
    for warp in warps.iter_mut() {
        warp.begin(kernel, &machine.position);
    }
    loop {
        let mut has_run = false;
        for step in 0..warps.len() {
            let index = if order == Order::Forward { step } else { warps.len() - 1 - step };
            let warp = &mut warps[index];
            if matches!(warp.state, State::Ready) {
                machine.run(warp)?;
                has_run = true;
            }
        }
        if warps.iter().all(|warp| matches!(warp.state, State::Done)) {
            return Ok(());
        }
        if !release(machine, warps) && !has_run {
            return Err(deadlock(machine, warps));
        }
    }
}

/// Lets go the warps of every barrier that all have come to; false if there was none.
fn release(machine: &mut Machine<'_>, warps: &mut [Warp]) -> bool {
    let mut ids: Vec<u64> = waiting(warps).map(|(_, wait)| wait.id).collect();
    ids.sort_unstable();
    ids.dedup();
    let mut has_released = false;
    for id in ids {
        let here: Vec<(usize, Wait)> = waiting(warps).filter(|(_, wait)| wait.id == id).collect();
        let arrived = machine.arrivals.iter().filter(|(other, _)| *other == id).count();
        let threads = here.iter().find_map(|(_, wait)| wait.threads);
        let is_complete = match threads {
            Some(threads) => (here.len() + arrived) as u64 * 32 >= threads,
            // Threads that have exited are not waited for.
            None => warps.iter().all(|warp| match &warp.state {
                State::Done => true,
                State::Waiting(wait) => wait.id == id,
                State::Ready => false,
            }),
        };
        if is_complete {
            pass(machine, warps, id, &here);
            has_released = true;
        }
    }
    has_released
}

fn waiting(warps: &[Warp]) -> impl Iterator<Item = (usize, Wait)> {
    warps.iter().filter_map(|warp| match warp.state {
        State::Waiting(wait) => Some((warp.index, wait)),
        State::Ready | State::Done => None,
    })
}

/// The barrier is passed: every warp learns what the others knew, and what they voted.
fn pass(machine: &mut Machine<'_>, warps: &mut [Warp], id: u64, here: &[(usize, Wait)]) {
    machine.tally.counts.barriers += 1;
    let mut known = [0; 32];
    let mut join = |clock: &[u32; 32]| {
        for (known, clock) in known.iter_mut().zip(clock) {
            *known = (*known).max(*clock);
        }
    };
    here.iter().for_each(|(index, _)| join(&machine.shared.clock(*index)));
    machine.arrivals.iter().filter(|(other, _)| *other == id).for_each(|(_, clock)| join(clock));
    machine.arrivals.retain(|(other, _)| *other != id);
    let votes: u32 = here.iter().map(|(_, wait)| wait.votes.count_ones()).sum();
    let lanes: u32 = here.iter().map(|(_, wait)| wait.lanes.count_ones()).sum();
    for (index, wait) in here {
        machine.shared.tick(*index);
        machine.shared.learn(*index, &known);
        let warp = &mut warps[*index];
        warp.state = State::Ready;
        let everywhere = |holds: bool| if holds { u32::MAX } else { 0 };
        match wait.reduction.map(|reduction| reduction.to) {
            Some(ReductionTarget::Count(to)) => warp.set(to, &[u64::from(votes); 32], wait.lanes),
            Some(ReductionTarget::All(to)) => {
                warp.set_predicate(Some(to), everywhere(votes == lanes), wait.lanes);
            }
            Some(ReductionTarget::Any(to)) => {
                warp.set_predicate(Some(to), everywhere(votes > 0), wait.lanes);
            }
            None => {}
        }
    }
}

fn deadlock(machine: &Machine<'_>, warps: &[Warp]) -> Fault {
    let ids: Vec<String> =
        waiting(warps).map(|(index, wait)| format!("warp {index} at barrier {}", wait.id)).collect();
    let detail = format!("nobody comes any more: {}", ids.join(", "));
    let (index, wait) = waiting(warps).next().expect("a block that does not go on has a warp that waits");
    machine.fault(Mistake::new(FaultKind::Deadlock, detail), wait.place, index)
}
