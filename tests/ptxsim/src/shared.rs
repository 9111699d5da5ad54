//! A block's shared memory, and for every byte who wrote and read it when.
//!
//! Time is counted by vector clocks: a warp's own clock ticks at each barrier, and a barrier tells every warp that
//! waited at it the clocks of all that came. An access is ordered before another if the later warp knows the clock of
//! the earlier one. So named barriers and barriers of part of the warps are understood too. Reads are remembered for
//! the latest clock only: with barriers of part of the warps an older read can be forgotten, never invented.
//!
//! The lanes of a warp do not run in step either: between them a `__syncwarp` must lie, which ticks their warp's clock.
//! Only `ldmatrix` reads for all of them at once.

use crate::fault::{FaultKind, Mistake};
use crate::global::{first_bytes, little_endian};
use crate::lanes::{WARP, lanes_of};

const WRITTEN: u8 = 1;
/// A `cp.async` will fill it.
const PENDING: u8 = 2;
const ATOMIC: u8 = 4;

/// Several lanes have read the same.
const MANY: u8 = u8::MAX;

/// The lanes of a warp have read together, as `ldmatrix` does: none goes on before all have.
pub(crate) const TOGETHER: u8 = u8::MAX - 1;

/// A lane of a warp of the block, or `TOGETHER`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Thread {
    pub(crate) warp: usize,
    pub(crate) lane: u8,
}

/// Warps that a block has at most.
const WARPS_MAX: usize = 32;

#[derive(Default)]
pub(crate) struct Shared {
    bytes: Vec<u8>,
    states: Vec<u8>,
    /// The clock and the warp of the last write: `clock << 5 | warp`, 0 for none.
    writes: Vec<u32>,
    write_lanes: Vec<u8>,
    /// The clock of the last read, the warps that read at it, and the lane if it was one of one warp.
    read_clocks: Vec<u32>,
    readers: Vec<u32>,
    read_lanes: Vec<u8>,
    /// What each warp knows of each warp's clock.
    clocks: Vec<[u32; WARPS_MAX]>,
    /// The clock up to which each warp knows all others.
    settled: Vec<u32>,
}

impl Shared {
    pub(crate) fn begin_block(&mut self, length: usize, warps: usize) {
        self.bytes.resize(length, 0);
        self.bytes.fill(0xff);
        for list in [&mut self.writes, &mut self.read_clocks, &mut self.readers] {
            list.clear();
            list.resize(length, 0);
        }
        for list in [&mut self.states, &mut self.write_lanes, &mut self.read_lanes] {
            list.clear();
            list.resize(length, 0);
        }
        self.clocks.clear();
        self.clocks.extend((0..warps).map(|warp| {
            let mut known = [0; WARPS_MAX];
            known[warp] = 1;
            known
        }));
        self.settled.clear();
        self.settled.resize(warps, 0);
    }

    /// What `warp` knows now.
    pub(crate) fn clock(&self, warp: usize) -> [u32; WARPS_MAX] {
        self.clocks[warp]
    }

    /// `warp` has arrived at a barrier: what it does next is later than what others will learn of it there.
    pub(crate) fn tick(&mut self, warp: usize) {
        self.clocks[warp][warp] += 1;
    }

    /// `warp` learns what others knew.
    pub(crate) fn learn(&mut self, warp: usize, known: &[u32; WARPS_MAX]) {
        for (mine, theirs) in self.clocks[warp].iter_mut().zip(known) {
            *mine = (*mine).max(*theirs);
        }
        let warps = self.clocks.len();
        let others = self.clocks[warp][..warps].iter().enumerate().filter(|(other, _)| *other != warp);
        self.settled[warp] = others.map(|(_, clock)| *clock).min().unwrap_or(u32::MAX >> 5);
    }

    /// Whether the last write of a byte is known to be over.
    fn is_ordered(&self, index: usize, thread: Thread) -> bool {
        let stamp = self.writes[index];
        let (writer, clock) = ((stamp & 31) as usize, stamp >> 5);
        let known = self.clocks[thread.warp][writer];
        if writer == thread.warp {
            clock < known || self.write_lanes[index] == thread.lane
        } else {
            clock <= known
        }
    }

    fn check_bounds(&self, address: u64, length: usize) -> Result<usize, Mistake> {
        if address.checked_add(length as u64).is_some_and(|end| end <= self.bytes.len() as u64) {
            return Ok(address as usize);
        }
        let detail = format!("{length} bytes of shared memory at {address} of {}", self.bytes.len());
        Err(Mistake::at(FaultKind::SharedOutOfBounds, address, detail))
    }

    pub(crate) fn read<const BYTES: usize>(
        &mut self,
        thread: Thread,
        address: u64,
        is_atomic: bool,
    ) -> Result<[u8; BYTES], Mistake> {
        let at = self.check_bounds(address, BYTES)?;
        let range = at..at + BYTES;
        let bytes = *self.bytes[at..].first_chunk().expect("the bounds were checked");
        let unready = |any, state: &u8| any | (state & (WRITTEN | PENDING) != WRITTEN);
        if self.states[range.clone()].iter().fold(false, unready) {
            return Err(self.not_readable(thread, at, BYTES));
        }
        if is_atomic {
            return Ok(bytes);
        }
        let settled = self.settled[thread.warp];
        let recent = self.writes[range.clone()].iter().fold(false, |any, stamp| any | (stamp >> 5 > settled));
        if recent && let Some(index) = range.clone().find(|index| !self.is_ordered(*index, thread)) {
            return Err(self.race(index, "reads", "wrote", thread));
        }
        let (clock, me) = (self.clocks[thread.warp][thread.warp], 1 << thread.warp);
        let readers = self.readers[range.clone()].iter_mut().zip(&mut self.read_clocks[range.clone()]);
        for ((readers, read_clock), lane) in readers.zip(&mut self.read_lanes[range]) {
            let is_first = *read_clock != clock || *readers == me && *lane == TOGETHER;
            let is_same = *readers == me && (*lane == thread.lane || thread.lane == TOGETHER);
            *readers = if *read_clock != clock { me } else { *readers | me };
            *lane = match () {
                () if is_first => thread.lane,
                () if is_same => *lane,
                () => MANY,
            };
            *read_clock = clock;
        }
        Ok(bytes)
    }

    /// Why bytes that are not all written, or that wait for a copy, cannot be read.
    fn not_readable(&self, thread: Thread, at: usize, length: usize) -> Mistake {
        let address = at as u64;
        let Some(pending) = (at..at + length).find(|index| self.states[*index] & PENDING != 0) else {
            let detail = format!("reads {length} bytes of shared memory at {at} that nobody has written");
            return Mistake::at(FaultKind::UninitialisedShared, address, detail);
        };
        let is_of_other_warp = (self.writes[pending] & 31) as usize != thread.warp;
        if is_of_other_warp && !self.is_ordered(pending, thread) {
            return self.race(pending, "reads", "copies to by `cp.async`", thread);
        }
        let detail = format!("reads shared memory at {at} before its `cp.async` was waited for");
        Mistake::at(FaultKind::PendingCopy, address, detail)
    }

    pub(crate) fn write<const BYTES: usize>(
        &mut self,
        thread: Thread,
        address: u64,
        bytes: [u8; BYTES],
        is_atomic: bool,
    ) -> Result<(), Mistake> {
        let at = self.check_bounds(address, BYTES)?;
        self.check_write(thread, at, BYTES, |shared, index| {
            let unchanged = shared.bytes[index] == bytes[index - at] && shared.states[index] & PENDING == 0;
            unchanged || is_atomic && shared.states[index] & ATOMIC != 0
        })?;
        let range = at..at + BYTES;
        self.bytes[range.clone()].copy_from_slice(&bytes);
        self.mark(thread, range, if is_atomic { WRITTEN | ATOMIC } else { WRITTEN });
        Ok(())
    }

    /// A `cp.async` will write here; until then nobody may read or write.
    pub(crate) fn reserve(&mut self, thread: Thread, address: u64, length: usize) -> Result<(), Mistake> {
        let at = self.check_bounds(address, length)?;
        self.check_write(thread, at, length, |_, _| false)?;
        self.mark(thread, at..at + length, PENDING);
        Ok(())
    }

    /// The bytes of a `cp.async` arrive, now that they are waited for.
    pub(crate) fn deliver(&mut self, thread: Thread, address: u64, bytes: &[u8]) {
        let at = address as usize;
        let range = at..at + bytes.len();
        self.bytes[range.clone()].copy_from_slice(bytes);
        self.mark(thread, range, WRITTEN);
    }

    fn mark(&mut self, thread: Thread, range: std::ops::Range<usize>, state: u8) {
        let stamp = self.clocks[thread.warp][thread.warp] << 5 | thread.warp as u32;
        self.writes[range.clone()].fill(stamp);
        self.write_lanes[range.clone()].fill(thread.lane);
        self.states[range].fill(state);
    }

    /// Faults if another thread wrote or read these bytes and no barrier lies between. `is_harmless` says of a byte
    /// that the two writes are no race.
    #[inline]
    fn check_write(
        &self,
        thread: Thread,
        at: usize,
        length: usize,
        is_harmless: impl Fn(&Self, usize) -> bool,
    ) -> Result<(), Mistake> {
        let settled = self.settled[thread.warp];
        let range = at..at + length;
        let written =
            self.writes[range.clone()].iter().fold(false, |any, stamp| any | (stamp >> 5 > settled));
        let read = self.read_clocks[range.clone()].iter().fold(false, |any, clock| any | (*clock > settled));
        if !written && !read {
            return Ok(());
        }
        for index in range {
            if !self.is_ordered(index, thread) && !is_harmless(self, index) {
                return Err(self.race(index, "overwrites", "wrote", thread));
            }
            if self.read_clocks[index] > settled {
                self.check_readers(index, thread)?;
            }
        }
        Ok(())
    }

    /// Faults if the last reads of a byte that is to be written are not known to be over.
    fn check_readers(&self, index: usize, thread: Thread) -> Result<(), Mistake> {
        let (clock, known) = (self.read_clocks[index], &self.clocks[thread.warp]);
        let me = 1 << thread.warp;
        let others = self.readers[index] & !me;
        if let Some(reader) = lanes_of(others).find(|reader| clock > known[*reader]) {
            let detail = format!("overwrites shared memory that warp {reader} read, with no barrier between");
            return Err(Mistake::at(FaultKind::SharedRace, index as u64, detail));
        }
        let is_own = self.readers[index] == me && clock == known[thread.warp];
        if is_own && ![thread.lane, TOGETHER].contains(&self.read_lanes[index]) {
            let detail =
                "overwrites shared memory that other lanes of its warp read, with no `__syncwarp` between";
            return Err(Mistake::at(FaultKind::SharedRace, index as u64, detail));
        }
        Ok(())
    }

    /// A race with the last write of a byte.
    fn race(&self, index: usize, does: &str, did: &str, thread: Thread) -> Mistake {
        let writer = self.writes[index] & 31;
        let (who, missing) = if writer as usize == thread.warp {
            (format!("lane {} of its warp", self.write_lanes[index]), "`__syncwarp`")
        } else {
            (format!("warp {writer}"), "barrier")
        };
        let detail = format!("{does} shared memory that {who} {did}, with no {missing} between");
        Mistake::at(FaultKind::SharedRace, index as u64, detail)
    }

    /// Replaces a value by what `update` makes of it, in one step; the old value.
    pub(crate) fn update<const BYTES: usize>(
        &mut self,
        thread: Thread,
        address: u64,
        update: impl FnOnce(u64) -> u64,
    ) -> Result<u64, Mistake> {
        let old = little_endian(&self.read::<BYTES>(thread, address, true)?);
        let at = address as usize;
        let is_plain = |index: &usize| self.states[*index] & ATOMIC == 0 && !self.is_ordered(*index, thread);
        let plain = (at..at + BYTES).find(is_plain);
        if let Some(index) = plain {
            return Err(self.race(index, "changes by an atomic", "wrote", thread));
        }
        self.write(thread, address, first_bytes::<BYTES>(update(old)), true)?;
        Ok(old)
    }
}

const _: () = assert!(WARPS_MAX == WARP, "a mask of warps has as many bits as one of lanes");
