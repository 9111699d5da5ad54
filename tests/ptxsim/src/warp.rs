//! The state of a warp: registers, where its lanes are, its local memory and its copies under way.
//!
//! Lanes that are at one place form a group. The group at the lowest place runs first, and groups that meet become
//! one: what diverges in an `if` or a loop is together again after it, since compilers place the end last. A group
//! whose instruction needs lanes that are elsewhere is parked until they come.

use crate::fault::{FaultKind, Mistake};
use crate::lanes::{Lanes, Mask, WARP, lanes_of};
use crate::program::{Kernel, Reduction, Special};
use crate::shared::Thread;

/// Lanes at one place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    pub(crate) place: u32,
    pub(crate) lanes: Mask,
    /// Its instruction waits for other lanes.
    pub(crate) is_parked: bool,
}

/// Whether a warp can go on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum State {
    Ready,
    Waiting(Wait),
    Done,
}

/// A warp at a barrier.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    /// The instruction.
    pub(crate) place: u32,
    pub(crate) id: u64,
    pub(crate) threads: Option<u64>,
    pub(crate) lanes: Mask,
    /// The lanes whose predicate holds.
    pub(crate) votes: Mask,
    pub(crate) reduction: Option<Reduction>,
}

/// A `cp.async` that was not waited for.
pub(crate) struct Copy {
    pub(crate) lane: usize,
    /// How many groups the lane had committed before.
    pub(crate) group: u32,
    pub(crate) to: u64,
    pub(crate) bytes: [u8; 16],
    pub(crate) length: usize,
}

pub(crate) struct Warp {
    pub(crate) index: usize,
    pub(crate) registers: Vec<Lanes>,
    pub(crate) predicates: Vec<Mask>,
    pub(crate) live: Mask,
    pub(crate) groups: Vec<Group>,
    pub(crate) state: State,
    pub(crate) copies: Vec<Copy>,
    pub(crate) committed: [u32; WARP],
    local: Vec<u8>,
    local_written: Vec<bool>,
    local_bytes: usize,
}

impl Warp {
    pub(crate) fn new(index: usize, kernel: &Kernel) -> Self {
        // What no instruction has set is an odd number, not a convenient zero.
        let mut registers = vec![[0xdead_beef_dead_beef; WARP]; kernel.registers];
        for (register, bits) in &kernel.constants {
            registers[*register as usize] = [*bits; WARP];
        }
        Self {
            index,
            registers,
            predicates: vec![0; kernel.predicates],
            live: 0,
            groups: Vec::new(),
            state: State::Done,
            copies: Vec::new(),
            committed: [0; WARP],
            local: vec![0; kernel.local_bytes * WARP],
            local_written: vec![false; kernel.local_bytes * WARP],
            local_bytes: kernel.local_bytes,
        }
    }

    /// Puts the warp at the beginning of the kernel, as part of a block.
    pub(crate) fn begin(&mut self, kernel: &Kernel, position: &Position) {
        let threads: u32 = position.block_size.iter().product();
        let before = (self.index * WARP) as u32;
        let count = (threads - before).min(WARP as u32);
        self.live = if count == 32 { Mask::MAX } else { (1 << count) - 1 };
        self.groups.clear();
        self.groups.push(Group { place: 0, lanes: self.live, is_parked: false });
        self.state = State::Ready;
        self.copies.clear();
        self.committed = [0; WARP];
        self.local_written.fill(false);
        for (register, special) in &kernel.specials {
            if *special != Special::DynamicShared {
                self.registers[*register as usize] =
                    std::array::from_fn(|lane| position.special(*special, self.index, lane));
            }
        }
    }

    /// The group to run next: the lowest that is not parked, with all that are at its place. If all are parked, the
    /// lowest.
    pub(crate) fn next_group(&mut self) -> Option<Group> {
        let free = self.groups.iter().filter(|group| !group.is_parked).map(|group| group.place).min();
        let place = free.or_else(|| self.groups.iter().map(|group| group.place).min())?;
        let mut lanes = 0;
        self.groups.retain(|group| {
            lanes |= if group.place == place { group.lanes } else { 0 };
            group.place != place
        });
        Some(Group { place, lanes, is_parked: false })
    }

    /// Another group is to run before one at `place` goes on.
    pub(crate) fn must_yield(&self, place: u32) -> bool {
        self.groups.iter().any(|group| group.place == place || group.place < place && !group.is_parked)
    }

    /// Lanes have gone: what waited for them may go on.
    pub(crate) fn exit(&mut self, lanes: Mask) {
        self.live &= !lanes;
        for group in &mut self.groups {
            group.is_parked = false;
        }
    }

    pub(crate) fn has_free_group(&self) -> bool {
        self.groups.iter().any(|group| !group.is_parked)
    }

    pub(crate) fn thread(&self, lane: usize) -> Thread {
        Thread { warp: self.index, lane: lane as u8 }
    }

    pub(crate) fn register(&self, register: u32) -> &Lanes {
        &self.registers[register as usize]
    }

    /// Sets a register in the lanes of `active`.
    pub(crate) fn set(&mut self, register: u32, values: &Lanes, active: Mask) {
        let target = &mut self.registers[register as usize];
        if active == Mask::MAX {
            *target = *values;
            return;
        }
        for lane in lanes_of(active) {
            target[lane] = values[lane];
        }
    }

    pub(crate) fn set_predicate(&mut self, predicate: Option<u32>, values: Mask, active: Mask) {
        if let Some(predicate) = predicate {
            let target = &mut self.predicates[predicate as usize];
            *target = *target & !active | values & active;
        }
    }

    fn local_range(
        &self,
        lane: usize,
        address: u64,
        length: usize,
    ) -> Result<std::ops::Range<usize>, Mistake> {
        if address.checked_add(length as u64).is_some_and(|end| end <= self.local_bytes as u64) {
            let at = lane * self.local_bytes + address as usize;
            return Ok(at..at + length);
        }
        let detail = format!("{length} bytes of local memory at {address} of {}", self.local_bytes);
        Err(Mistake::at(FaultKind::LocalOutOfBounds, address, detail))
    }

    pub(crate) fn local_read<const BYTES: usize>(
        &self,
        lane: usize,
        address: u64,
    ) -> Result<[u8; BYTES], Mistake> {
        let range = self.local_range(lane, address, BYTES)?;
        if self.local_written[range.clone()].contains(&false) {
            let detail =
                format!("reads {BYTES} bytes of local memory at {address} that the thread has not written");
            return Err(Mistake::at(FaultKind::UninitialisedLocal, address, detail));
        }
        Ok(*self.local[range.start..].first_chunk().expect("the bounds were checked"))
    }

    pub(crate) fn local_write(&mut self, lane: usize, address: u64, bytes: &[u8]) -> Result<(), Mistake> {
        let range = self.local_range(lane, address, bytes.len())?;
        self.local[range.clone()].copy_from_slice(bytes);
        self.local_written[range].fill(true);
        Ok(())
    }
}

/// Where a block is in its grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position {
    pub(crate) grid: [u32; 3],
    pub(crate) block_size: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
}

impl Position {
    fn special(&self, special: Special, warp: usize, lane: usize) -> u64 {
        let [width, height, _] = self.block_size;
        let thread = (warp * WARP + lane) as u32;
        let value = match special {
            Special::Thread(0) => thread % width,
            Special::Thread(1) => thread / width % height,
            Special::Thread(_) => thread / width / height,
            Special::BlockSize(axis) => self.block_size[axis],
            Special::Block(axis) => self.block[axis],
            Special::GridSize(axis) => self.grid[axis],
            Special::Lane => lane as u32,
            Special::Warp => warp as u32,
            Special::Warps => self.block_size.iter().product::<u32>().div_ceil(WARP as u32),
            Special::LanesEqual => 1 << lane,
            Special::LanesBelow => (1 << lane) - 1,
            Special::LanesUpTo => u32::MAX >> (31 - lane),
            Special::LanesAbove => !(u32::MAX >> (31 - lane)),
            Special::LanesFrom => u32::MAX << lane,
            Special::TotalShared => self.shared_bytes,
            Special::DynamicShared | Special::Zero => 0,
        };
        u64::from(value)
    }
}
