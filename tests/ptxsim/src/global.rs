//! Global memory: allocations far apart, and for every byte whether it was written and by which block of this launch.
//!
//! Blocks run one after another, so a race shows as a *stamp*: the number of the block that last wrote or read a
//! byte. Stamps grow from launch to launch; those of earlier launches count as ordered before.

use crate::fault::{FaultKind, Mistake};

/// The first address; nothing of the windows for other memories is near.
const FIRST: u64 = 0x7000_0000_0000;
/// Nothing lies in so many bytes after an allocation.
const GAP: u64 = 1 << 30;
const ALIGN: u64 = 256;

const WRITTEN: u8 = 1;
const ATOMIC: u8 = 2;

struct Allocation {
    base: u64,
    length: u64,
    is_freed: bool,
    bytes: Vec<u8>,
    states: Vec<u8>,
    writers: Vec<u32>,
    readers: Vec<u32>,
}

pub(crate) struct Global {
    allocations: Vec<Allocation>,
    next: u64,
    /// The allocation found last: neighbours are asked for next.
    recent: usize,
    /// The stamp of this launch's first block.
    first: u32,
    /// The running block's stamp.
    block: u32,
    /// Read by more than one block of this launch.
    many: u32,
}

impl Global {
    pub(crate) fn new() -> Self {
        Self { allocations: Vec::new(), next: FIRST, recent: 0, first: 1, block: 1, many: 1 }
    }

    pub(crate) fn allocate(&mut self, length: usize) -> u64 {
        let base = self.next;
        self.next = (base + length as u64 + GAP).next_multiple_of(ALIGN);
        self.allocations.push(Allocation {
            base,
            length: length as u64,
            is_freed: false,
            // A pattern that is a large, odd number in every type.
            bytes: vec![0xa5; length],
            states: vec![0; length],
            writers: vec![0; length],
            readers: vec![0; length],
        });
        base
    }

    /// False if no allocation begins at `address`, or it was freed before.
    pub(crate) fn free(&mut self, address: u64) -> bool {
        let found = self.allocations.iter_mut().find(|held| held.base == address && !held.is_freed);
        let Some(held) = found else { return false };
        *held = Allocation {
            is_freed: true,
            bytes: Vec::new(),
            states: Vec::new(),
            writers: Vec::new(),
            readers: Vec::new(),
            ..*held
        };
        true
    }

    /// Reads as the host: nothing is checked but the bounds.
    pub(crate) fn host_read(&self, address: u64, length: usize) -> Result<&[u8], Mistake> {
        let (index, at) = self.find(address, length)?;
        Ok(&self.allocations[index].bytes[at..at + length])
    }

    pub(crate) fn host_write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Mistake> {
        let (held, at) = self.locate(address, bytes.len())?;
        held.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        held.states[at..at + bytes.len()].fill(WRITTEN);
        Ok(())
    }

    /// The bytes of `address..address + length` are written: `false` for those that nobody wrote.
    pub(crate) fn host_written(&self, address: u64, length: usize) -> Result<bool, Mistake> {
        let (index, at) = self.find(address, length)?;
        Ok(self.allocations[index].states[at..at + length].iter().all(|state| state & WRITTEN != 0))
    }

    /// Begins a launch of so many blocks.
    pub(crate) fn begin_launch(&mut self, blocks: u64) {
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX / 2);
        if self.many >= u32::MAX / 2 - blocks {
            // Out of stamps: forget the old ones.
            for held in &mut self.allocations {
                held.writers.fill(0);
                held.readers.fill(0);
            }
            self.many = 0;
        }
        self.first = self.many + 1;
        self.many = self.first + blocks;
    }

    /// The block with this linear number runs now.
    pub(crate) fn begin_block(&mut self, number: u64) {
        self.block = self.first + number as u32;
    }

    fn locate(&mut self, address: u64, length: usize) -> Result<(&mut Allocation, usize), Mistake> {
        let (index, at) = self.find(address, length)?;
        self.recent = index;
        Ok((&mut self.allocations[index], at))
    }

    /// The allocation that holds these bytes, and where in it they are.
    fn find(&self, address: u64, length: usize) -> Result<(usize, usize), Mistake> {
        let holds = |held: &Allocation| address >= held.base && address - held.base < held.length;
        let index = if self.allocations.get(self.recent).is_some_and(holds) {
            self.recent
        } else {
            self.allocations.partition_point(|held| held.base <= address).saturating_sub(1)
        };
        let Some(held) = self.allocations.get(index) else {
            return Err(outside(address, length, "nothing is allocated"));
        };
        let Some(at) = address.checked_sub(held.base).filter(|at| *at <= held.length + GAP / 2) else {
            return Err(outside(address, length, "no allocation is near"));
        };
        if at + length as u64 > held.length {
            let place = format!("offset {at} of an allocation of {} bytes", held.length);
            return Err(outside(address, length, &place));
        }
        if held.is_freed {
            let detail = format!("{length} bytes at offset {at} of freed memory");
            return Err(Mistake::at(FaultKind::FreedMemory, address, detail));
        }
        Ok((index, at as usize))
    }

    /// Reads as a thread of the running block.
    pub(crate) fn read<const BYTES: usize>(
        &mut self,
        address: u64,
        is_atomic: bool,
    ) -> Result<[u8; BYTES], Mistake> {
        self.check_read(address, BYTES, is_atomic)?;
        let (held, at) = self.locate(address, BYTES)?;
        Ok(*held.bytes[at..].first_chunk().expect("the bounds were checked"))
    }

    /// As `read`, of any number of bytes.
    pub(crate) fn read_into(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Mistake> {
        self.check_read(address, bytes.len(), false)?;
        let (held, at) = self.locate(address, bytes.len())?;
        bytes.copy_from_slice(&held.bytes[at..at + bytes.len()]);
        Ok(())
    }

    #[inline]
    fn check_read(&mut self, address: u64, length: usize, is_atomic: bool) -> Result<(), Mistake> {
        let (first, block, many) = (self.first, self.block, self.many);
        let (held, at) = self.locate(address, length)?;
        let range = at..at + length;
        if held.states[range.clone()].iter().fold(WRITTEN, |all, state| all & state) == 0 {
            let detail = format!("{length} bytes at offset {at} that nobody has written");
            return Err(Mistake::at(FaultKind::UninitialisedGlobal, address, detail));
        }
        if is_atomic {
            return Ok(());
        }
        let foreign = |writer: u32| writer >= first && writer != block;
        let writers = &held.writers[range.clone()];
        if writers.iter().fold(false, |any, writer| any | foreign(*writer)) {
            let writer = writers.iter().find(|writer| foreign(**writer)).map_or(0, |writer| writer - first);
            let detail = format!("reads offset {at}, which block number {writer} wrote");
            return Err(Mistake::at(FaultKind::GlobalRace, address, detail));
        }
        for reader in &mut held.readers[range] {
            *reader = if *reader < first || *reader == block { block } else { many };
        }
        Ok(())
    }

    /// Writes as a thread of the running block.
    pub(crate) fn write<const BYTES: usize>(
        &mut self,
        address: u64,
        bytes: [u8; BYTES],
        is_atomic: bool,
    ) -> Result<(), Mistake> {
        let (first, block) = (self.first, self.block);
        let (held, at) = self.locate(address, BYTES)?;
        let range = at..at + BYTES;
        let foreign = |stamp: &u32| *stamp >= first && *stamp != block;
        let written = held.writers[range.clone()].iter().fold(false, |any, stamp| any | foreign(stamp));
        let read = held.readers[range.clone()].iter().fold(false, |any, stamp| any | foreign(stamp));
        if written || read {
            self.check_write(address, &bytes, is_atomic)?;
        }
        let (held, at) = self.locate(address, BYTES)?;
        let range = at..at + BYTES;
        held.bytes[range.clone()].copy_from_slice(&bytes);
        held.writers[range.clone()].fill(block);
        held.states[range].fill(if is_atomic { WRITTEN | ATOMIC } else { WRITTEN });
        Ok(())
    }

    /// Another block has touched some of these bytes: faults if it is a race.
    #[cold]
    fn check_write(&mut self, address: u64, bytes: &[u8], is_atomic: bool) -> Result<(), Mistake> {
        let (first, block, many) = (self.first, self.block, self.many);
        let foreign = |stamp: u32| stamp >= first && stamp != block;
        let (held, at) = self.locate(address, bytes.len())?;
        for (index, new) in (at..).zip(bytes) {
            let both_atomic = is_atomic && held.states[index] & ATOMIC != 0;
            let (writer, reader) = (held.writers[index], held.readers[index]);
            let (what, stamp) = if foreign(writer) { ("wrote", writer) } else { ("read", reader) };
            if held.bytes[index] == *new || both_atomic || !foreign(stamp) {
                continue;
            }
            let who = if stamp == many {
                "another block".to_owned()
            } else {
                format!("block number {}", stamp - first)
            };
            let detail = format!("overwrites offset {at} with another value, which {who} {what}");
            return Err(Mistake::at(FaultKind::GlobalRace, address, detail));
        }
        Ok(())
    }

    /// Replaces a value by what `update` makes of it, in one step; the old value.
    pub(crate) fn update<const BYTES: usize>(
        &mut self,
        address: u64,
        update: impl FnOnce(u64) -> u64,
    ) -> Result<u64, Mistake> {
        let (first, block) = (self.first, self.block);
        let old = little_endian(&self.read::<BYTES>(address, true)?);
        let (held, at) = self.locate(address, BYTES)?;
        let was_plain = (at..at + BYTES).any(|index| {
            let writer = held.writers[index];
            writer >= first && writer != block && held.states[index] & ATOMIC == 0
        });
        if was_plain {
            let detail = format!("an atomic on offset {at}, which another block wrote without");
            return Err(Mistake::at(FaultKind::GlobalRace, address, detail));
        }
        self.write(address, first_bytes::<BYTES>(update(old)), true)?;
        Ok(old)
    }
}

fn outside(address: u64, length: usize, place: &str) -> Mistake {
    Mistake::at(FaultKind::OutOfBounds, address, format!("{length} bytes of global memory: {place}"))
}

/// At most 8 bytes as a number.
pub(crate) fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The low bytes of a number.
pub(crate) fn first_bytes<const BYTES: usize>(number: u64) -> [u8; BYTES] {
    *number.to_le_bytes().first_chunk().expect("at most 8 bytes")
}
