//! A block's shared memory, and for every byte who wrote and read it when.
//!
//! Time is counted by vector clocks: a warp's own clock ticks at each barrier, and a barrier tells every warp that
//! waited at it the clocks of all that came. An access is ordered before another if the later warp knows the clock of
//! the earlier one. So named barriers and barriers of part of the warps are understood too. Reads are remembered for
//! the latest clock only: with barriers of part of the warps an older read can be forgotten, never invented.

use crate::fault::{FaultKind, Mistake};
use crate::global::{first_bytes, little_endian};
use crate::lanes::{WARP, lanes_of};

const WRITTEN: u8 = 1;
/// A `cp.async` will fill it.
const PENDING: u8 = 2;
const ATOMIC: u8 = 4;

/// Warps that a block has at most.
const WARPS_MAX: usize = 32;

#[derive(Default)]
pub(crate) struct Shared {
    bytes: Vec<u8>,
    states: Vec<u8>,
    /// The clock and the warp of the last write: `clock << 5 | warp`, 0 for none.
    writes: Vec<u32>,
    /// The clock of the last read, and the warps that read at it.
    read_clocks: Vec<u32>,
    readers: Vec<u32>,
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
        self.states.clear();
        self.states.resize(length, 0);
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

    fn is_ordered(&self, stamp: u32, warp: usize) -> bool {
        let (writer, clock) = ((stamp & 31) as usize, stamp >> 5);
        writer == warp || clock <= self.clocks[warp][writer]
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
        warp: usize,
        address: u64,
        is_atomic: bool,
    ) -> Result<[u8; BYTES], Mistake> {
        let at = self.check_bounds(address, BYTES)?;
        let range = at..at + BYTES;
        let bytes = *self.bytes[at..].first_chunk().expect("the bounds were checked");
        let unready = |any, state: &u8| any | (state & (WRITTEN | PENDING) != WRITTEN);
        if self.states[range.clone()].iter().fold(false, unready) {
            return Err(self.not_readable(warp, at, BYTES));
        }
        if is_atomic {
            return Ok(bytes);
        }
        let settled = self.settled[warp];
        let recent = self.writes[range.clone()].iter().fold(false, |any, stamp| any | (stamp >> 5 > settled));
        if recent
            && let Some(stamp) =
                self.writes[range.clone()].iter().find(|stamp| !self.is_ordered(**stamp, warp))
        {
            return Err(race(address, "reads", "wrote", stamp & 31));
        }
        let (clock, me) = (self.clocks[warp][warp], 1 << warp);
        let readers = &mut self.readers[range.clone()];
        for (readers, read_clock) in readers.iter_mut().zip(&mut self.read_clocks[range.clone()]) {
            *readers = if *read_clock == clock { *readers | me } else { me };
            *read_clock = clock;
        }
        Ok(bytes)
    }

    /// Why bytes that are not all written, or that wait for a copy, cannot be read.
    fn not_readable(&self, warp: usize, at: usize, length: usize) -> Mistake {
        let address = at as u64;
        let Some(pending) = (at..at + length).find(|index| self.states[*index] & PENDING != 0) else {
            let detail = format!("reads {length} bytes of shared memory at {at} that nobody has written");
            return Mistake::at(FaultKind::UninitialisedShared, address, detail);
        };
        let stamp = self.writes[pending];
        if !self.is_ordered(stamp, warp) {
            return race(address, "reads", "copies to by `cp.async`", stamp & 31);
        }
        let detail = format!("reads shared memory at {at} before its `cp.async` was waited for");
        Mistake::at(FaultKind::PendingCopy, address, detail)
    }

    pub(crate) fn write<const BYTES: usize>(
        &mut self,
        warp: usize,
        address: u64,
        bytes: [u8; BYTES],
        is_atomic: bool,
    ) -> Result<(), Mistake> {
        let at = self.check_bounds(address, BYTES)?;
        self.check_write(warp, at, BYTES, |shared, index| {
            let unchanged = shared.bytes[index] == bytes[index - at] && shared.states[index] & PENDING == 0;
            unchanged || is_atomic && shared.states[index] & ATOMIC != 0
        })?;
        let range = at..at + BYTES;
        self.bytes[range.clone()].copy_from_slice(&bytes);
        self.mark(warp, range, if is_atomic { WRITTEN | ATOMIC } else { WRITTEN });
        Ok(())
    }

    /// A `cp.async` will write here; until then nobody may read or write.
    pub(crate) fn reserve(&mut self, warp: usize, address: u64, length: usize) -> Result<(), Mistake> {
        let at = self.check_bounds(address, length)?;
        self.check_write(warp, at, length, |_, _| false)?;
        self.mark(warp, at..at + length, PENDING);
        Ok(())
    }

    /// The bytes of a `cp.async` arrive, now that they are waited for.
    pub(crate) fn deliver(&mut self, warp: usize, address: u64, bytes: &[u8]) {
        let at = address as usize;
        let range = at..at + bytes.len();
        self.bytes[range.clone()].copy_from_slice(bytes);
        self.mark(warp, range, WRITTEN);
    }

    fn mark(&mut self, warp: usize, range: std::ops::Range<usize>, state: u8) {
        let stamp = self.clocks[warp][warp] << 5 | warp as u32;
        self.writes[range.clone()].fill(stamp);
        self.states[range].fill(state);
    }

    /// Faults if another warp wrote or read these bytes and no barrier lies between. `is_harmless` says of a byte that
    /// the two writes are no race.
    #[inline]
    fn check_write(
        &self,
        warp: usize,
        at: usize,
        length: usize,
        is_harmless: impl Fn(&Self, usize) -> bool,
    ) -> Result<(), Mistake> {
        let settled = self.settled[warp];
        let range = at..at + length;
        let written =
            self.writes[range.clone()].iter().fold(false, |any, stamp| any | (stamp >> 5 > settled));
        let read = self.read_clocks[range.clone()].iter().fold(false, |any, clock| any | (*clock > settled));
        if !written && !read {
            return Ok(());
        }
        for index in range {
            let stamp = self.writes[index];
            if !self.is_ordered(stamp, warp) && !is_harmless(self, index) {
                return Err(race(index as u64, "overwrites", "wrote", stamp & 31));
            }
            let clock = self.read_clocks[index];
            let others = self.readers[index] & !(1 << warp);
            if clock <= settled || others == 0 {
                continue;
            }
            if let Some(reader) = lanes_of(others).find(|reader| clock > self.clocks[warp][*reader]) {
                return Err(race(index as u64, "overwrites", "read", reader as u32));
            }
        }
        Ok(())
    }

    /// Replaces a value by what `update` makes of it, in one step; the old value.
    pub(crate) fn update<const BYTES: usize>(
        &mut self,
        warp: usize,
        address: u64,
        update: impl FnOnce(u64) -> u64,
    ) -> Result<u64, Mistake> {
        let old = little_endian(&self.read::<BYTES>(warp, address, true)?);
        let at = address as usize;
        let plain = (at..at + BYTES)
            .find(|index| self.states[*index] & ATOMIC == 0 && !self.is_ordered(self.writes[*index], warp));
        if let Some(index) = plain {
            return Err(race(address, "changes by an atomic", "wrote", self.writes[index] & 31));
        }
        self.write(warp, address, first_bytes::<BYTES>(update(old)), true)?;
        Ok(old)
    }
}

fn race(address: u64, does: &str, did: &str, other: u32) -> Mistake {
    let detail = format!("{does} shared memory that warp {other} {did}, with no barrier between");
    Mistake::at(FaultKind::SharedRace, address, detail)
}

const _: () = assert!(WARPS_MAX == WARP, "a mask of warps has as many bits as one of lanes");
