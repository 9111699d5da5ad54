//! Runs the instructions of a warp until it waits at a barrier or has ended.

mod access;
mod copies;
mod exchange;
mod matrix;

pub(crate) use access::Seen;

use crate::counts::Tally;
use crate::fault::{Fault, FaultKind, Mistake};
use crate::global::Global;
use crate::lanes::{Mask, lanes_of};
use crate::module::Module;
use crate::program::{Barrier, Instruction, Kernel, Op};
use crate::shared::Shared;
use crate::warp::{Group, Position, State, Wait, Warp};

/// What the warps of a block run on.
pub(crate) struct Machine<'a> {
    pub(crate) module: &'a Module,
    pub(crate) kernel: &'a Kernel,
    pub(crate) parameters: &'a [u8],
    pub(crate) global: &'a mut Global,
    pub(crate) shared: Shared,
    pub(crate) tally: Tally,
    pub(crate) position: Position,
    /// Warp instructions that may still run.
    pub(crate) budget: u64,
    /// Barriers by id: warps that have arrived and gone on, with what they knew.
    pub(crate) arrivals: Vec<(u64, [u32; 32])>,
}

/// Where the lanes that ran an instruction go.
enum Flow {
    Next,
    Jump(u32),
    /// Each lane to its own place.
    Scatter(Box<[u32; 32]>),
    Exit,
    /// Nothing has happened: other lanes of the warp must come first.
    Park,
    Wait(Wait),
}

impl Machine<'_> {
    /// Runs `warp` as far as it goes by itself.
    pub(crate) fn run(&mut self, warp: &mut Warp) -> Result<(), Fault> {
        while let Some(group) = warp.next_group() {
            if self.run_group(warp, group)? {
                return Ok(());
            }
        }
        warp.state = State::Done;
        Ok(())
    }

    /// Runs `group` until another is to go first; true if the warp waits at a barrier.
    fn run_group(&mut self, warp: &mut Warp, mut group: Group) -> Result<bool, Fault> {
        let kernel = self.kernel;
        loop {
            let place = group.place;
            let instruction = &kernel.instructions[place as usize];
            let active = match instruction.guard {
                None => group.lanes,
                Some(guard) => group.lanes & guard.mask(&warp.predicates),
            };
            self.count(warp, place, active)?;
            group.place += 1;
            if active != 0 {
                let rest = group.lanes & !active;
                match self.execute(warp, instruction, place, active) {
                    Err(mistake) => return Err(self.fault(mistake, place, warp.index)),
                    Ok(Flow::Next) => {}
                    Ok(Flow::Jump(target)) if rest == 0 => group.place = target,
                    Ok(Flow::Jump(target)) => {
                        warp.groups.push(Group { place: target, lanes: active, is_parked: false });
                        group.lanes = rest;
                    }
                    Ok(Flow::Scatter(targets)) => {
                        for lane in lanes_of(active) {
                            let (place, lanes) = (targets[lane], 1 << lane);
                            warp.groups.push(Group { place, lanes, is_parked: false });
                        }
                        group.lanes = rest;
                    }
                    Ok(Flow::Exit) => {
                        warp.exit(active);
                        group.lanes = rest;
                    }
                    Ok(Flow::Park) => {
                        self.tally.take_back(place, active.count_ones());
                        warp.groups.push(Group { place, lanes: active, is_parked: true });
                        group.lanes = rest;
                    }
                    Ok(Flow::Wait(wait)) => {
                        warp.groups.push(group);
                        warp.state = State::Waiting(wait);
                        return Ok(true);
                    }
                }
                if group.lanes == 0 {
                    return Ok(false);
                }
            }
            if !warp.groups.is_empty() && warp.must_yield(group.place) {
                warp.groups.push(group);
                return Ok(false);
            }
        }
    }

    fn count(&mut self, warp: &Warp, place: u32, active: Mask) -> Result<(), Fault> {
        self.tally.issue(place, active.count_ones());
        if self.budget == 0 {
            let mistake = Mistake::new(FaultKind::Runaway, "the launch has run all the instructions it may");
            return Err(self.fault(mistake, place, warp.index));
        }
        self.budget -= 1;
        Ok(())
    }

    fn execute(
        &mut self,
        warp: &mut Warp,
        instruction: &Instruction,
        place: u32,
        active: Mask,
    ) -> Result<Flow, Mistake> {
        match &instruction.op {
            Op::Compute { function, to, from: [a, b, c] } => {
                let result = function(warp.register(*a), warp.register(*b), warp.register(*c));
                warp.set(*to, &result, active);
            }
            Op::Insert { to, from, bits } => {
                let [a, b, at, width] = from.map(|register| warp.register(register));
                let result = std::array::from_fn(|lane| {
                    crate::alu::insert(a[lane], b[lane], at[lane], width[lane], *bits)
                });
                warp.set(*to, &result, active);
            }
            Op::Compare { test, to, complement, from: [a, b], joined } => {
                let holds = test(warp.register(*a), warp.register(*b));
                let join = |holds| match joined {
                    Some((logic, other)) => logic.of(holds, other.mask(&warp.predicates)),
                    None => holds,
                };
                let (first, second) = (join(holds), join(!holds));
                warp.set_predicate(*to, first, active);
                warp.set_predicate(*complement, second, active);
            }
            Op::CompareTo { test, to, from: [a, b], joined, value } => {
                let holds = test(warp.register(*a), warp.register(*b));
                let holds = match joined {
                    Some((logic, other)) => logic.of(holds, other.mask(&warp.predicates)),
                    None => holds,
                };
                let result = std::array::from_fn(|lane| if holds >> lane & 1 == 1 { *value } else { 0 });
                warp.set(*to, &result, active);
            }
            Op::Select { to, from: [a, b], condition } => {
                let mask = condition.mask(&warp.predicates);
                let (a, b) = (warp.register(*a), warp.register(*b));
                let result =
                    std::array::from_fn(|lane| if mask >> lane & 1 == 1 { a[lane] } else { b[lane] });
                warp.set(*to, &result, active);
            }
            Op::Logic { logic, to, from: [a, b] } => {
                let result = logic.of(a.mask(&warp.predicates), b.mask(&warp.predicates));
                warp.set_predicate(Some(*to), result, active);
            }
            Op::Pack { to, parts, bits } => {
                let mut result = [0; 32];
                for (index, part) in parts.iter().enumerate() {
                    let (part, shift) = (warp.register(*part), index as u32 * bits);
                    let mask = crate::lanes::low_bits(*bits);
                    for (whole, part) in result.iter_mut().zip(part) {
                        *whole |= (part & mask) << shift;
                    }
                }
                warp.set(*to, &result, active);
            }
            Op::Unpack { parts, from, bits } => {
                let whole = *warp.register(*from);
                for (index, part) in parts.iter().enumerate() {
                    let (Some(part), shift) = (part, index as u32 * bits) else { continue };
                    let mask = crate::lanes::low_bits(*bits);
                    warp.set(*part, &whole.map(|whole| whole >> shift & mask), active);
                }
            }
            Op::Load(load) => self.load(warp, load, active)?,
            Op::Store(store) => self.store(warp, store, active)?,
            Op::Atomic(atomic) => self.atomic(warp, atomic, active)?,
            Op::CopyAsync(copy) => self.copy(warp, copy, active)?,
            Op::CommitCopies => warp.commit_copies(active),
            Op::WaitForCopies(pending) => self.wait_for_copies(warp, *pending, active),
            Op::LoadMatrices { parts, address, transposed } => {
                needs_whole_warp(active, "ldmatrix")?;
                self.load_matrices(warp, parts, address, *transposed)?;
            }
            Op::Multiply(multiply) => {
                needs_whole_warp(active, "mma")?;
                self.tally.counts.mma += 1;
                matrix::multiply(warp, multiply);
            }
            Op::Shuffle(shuffle) => {
                let members = warp.register(shuffle.members);
                if !gathered(warp, active, members[active.trailing_zeros() as usize])? {
                    return Ok(Flow::Park);
                }
                exchange::shuffle(warp, shuffle, active)?;
            }
            Op::Vote { members, .. } | Op::Match { members, .. } | Op::Reduce { members, .. } => {
                let mask = warp.register(*members)[active.trailing_zeros() as usize];
                if !gathered(warp, active, mask)? {
                    return Ok(Flow::Park);
                }
                exchange::agree(warp, &instruction.op, active);
            }
            Op::ActiveMask { to } => warp.set(*to, &[u64::from(active); 32], active),
            Op::Branch { target } => return Ok(Flow::Jump(*target)),
            Op::BranchIndexed { index, targets } => {
                let index = warp.register(*index);
                let mut places = Box::new([0; 32]);
                for lane in lanes_of(active) {
                    let Some(target) = targets.get(index[lane] as u32 as usize) else {
                        let detail = format!("index {} of {} targets", index[lane], targets.len());
                        return Err(Mistake::new(FaultKind::Trap, detail).in_lane(lane));
                    };
                    places[lane] = *target;
                }
                return Ok(Flow::Scatter(places));
            }
            Op::Exit => return Ok(Flow::Exit),
            Op::Barrier(barrier) => return self.arrive(warp, barrier, place, active),
            Op::WarpBarrier { members } => {
                let mask = warp.register(*members)[active.trailing_zeros() as usize];
                if !gathered(warp, active, mask)? {
                    return Ok(Flow::Park);
                }
                self.shared.tick(warp.index);
            }
            Op::Nothing => {}
            Op::Trap => return Err(Mistake::new(FaultKind::Trap, "the kernel gave up")),
            Op::Unknown => {
                let opcode = &self.kernel.opcodes[instruction.opcode as usize];
                let detail = format!("the interpreter does not know `{opcode}`");
                return Err(Mistake::new(FaultKind::UnknownInstruction, detail));
            }
        }
        Ok(Flow::Next)
    }

    /// The lanes of a warp come to a barrier: all that have not exited, together.
    fn arrive(&mut self, warp: &Warp, barrier: &Barrier, place: u32, active: Mask) -> Result<Flow, Mistake> {
        if active != warp.live {
            if warp.has_free_group() {
                return Ok(Flow::Park);
            }
            let detail = format!(
                "lanes {active:#010x} of a warp wait at a barrier that its other lanes {:#010x} do not come to",
                warp.live & !active
            );
            return Err(Mistake::new(FaultKind::BarrierDivergence, detail));
        }
        let lane = active.trailing_zeros() as usize;
        let of_lane = |register: u32| warp.register(register)[lane] & 0xffff_ffff;
        let id = of_lane(barrier.id);
        let threads = barrier.threads.map(of_lane);
        if threads.is_some_and(|threads| threads == 0 || threads % 32 != 0) {
            let detail = format!("a barrier of {} threads, not a multiple of 32", threads.unwrap_or(0));
            return Err(Mistake::new(FaultKind::BarrierDivergence, detail));
        }
        if !barrier.waits {
            self.arrivals.push((id, self.shared.clock(warp.index)));
            self.shared.tick(warp.index);
            return Ok(Flow::Next);
        }
        let reduction = barrier.reduction;
        let votes = reduction.map_or(0, |reduction| reduction.source.mask(&warp.predicates) & active);
        Ok(Flow::Wait(Wait { place, id, threads, lanes: active, votes, reduction }))
    }

    /// The fault of a mistake that the instruction at `place` made.
    pub(crate) fn fault(&self, mistake: Mistake, place: u32, warp: usize) -> Fault {
        let instruction = &self.kernel.instructions[place as usize];
        let details = *mistake.0;
        let (source, inlined) = self.module.source(instruction.place);
        Fault {
            kind: details.kind,
            detail: details.detail.into(),
            kernel: self.kernel.name.as_str().into(),
            ptx_line: instruction.line,
            instruction: self.module.line(instruction.line).into(),
            source,
            inlined,
            block: self.position.block,
            warp: warp as u32,
            lane: details.lane,
            address: details.address,
        }
    }
}

/// Whether all lanes that an exchange is among are here; an error if they cannot come any more.
fn gathered(warp: &Warp, active: Mask, members: u64) -> Result<bool, Mistake> {
    let members = members as Mask;
    if active & !members != 0 {
        let detail = format!("lanes {:#010x} are not in the mask {members:#010x}", active & !members);
        return Err(Mistake::new(FaultKind::InactiveLane, detail));
    }
    let missing = members & warp.live & !active;
    if missing == 0 {
        return Ok(true);
    }
    if warp.has_free_group() {
        return Ok(false);
    }
    let detail = format!("lanes {missing:#010x} of the mask do not come");
    Err(Mistake::new(FaultKind::InactiveLane, detail))
}

fn needs_whole_warp(active: Mask, name: &str) -> Result<(), Mistake> {
    if active == Mask::MAX {
        return Ok(());
    }
    let detail = format!("`{name}` with lanes {active:#010x} only");
    Err(Mistake::new(FaultKind::InactiveLane, detail))
}
