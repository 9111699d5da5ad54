//! What a launch cost, in units that do not depend on a clock.

use std::collections::BTreeMap;

use crate::execute::Seen;
use crate::lanes::lanes_of;
use crate::program::Kernel;

/// Counts over all warps of a launch.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Instructions issued, once a warp and diverged path.
    pub warp_instructions: u64,
    /// Instructions times the lanes that ran them.
    pub lane_instructions: u64,
    /// Tensor core instructions.
    pub mma: u64,
    /// Bytes that lanes asked of global memory, copies by `cp.async` included.
    pub global_load_bytes: u64,
    /// The 32-byte sectors touched for it, each once a warp instruction.
    pub global_load_sectors: u64,
    /// Bytes that lanes stored to global memory.
    pub global_store_bytes: u64,
    /// The 32-byte sectors touched for it, each once a warp instruction.
    pub global_store_sectors: u64,
    /// Warp instructions on shared memory.
    pub shared_accesses: u64,
    /// Passes over shared memory beyond those that the width of an access needs: bank conflicts.
    pub bank_conflicts: u64,
    /// Barriers that whole blocks passed.
    pub barriers: u64,
    /// Warp instructions by opcode, with its modifiers, as the PTX has it.
    pub opcodes: BTreeMap<String, u64>,
}

impl Counts {
    /// The used part of the bytes of the sectors that loads touched, 1.0 if there were none.
    pub fn load_efficiency(&self) -> f64 {
        used(self.global_load_bytes, self.global_load_sectors)
    }

    /// The used part of the bytes of the sectors that stores touched, 1.0 if there were none.
    pub fn store_efficiency(&self) -> f64 {
        used(self.global_store_bytes, self.global_store_sectors)
    }
}

fn used(bytes: u64, sectors: u64) -> f64 {
    if sectors == 0 { 1.0 } else { bytes as f64 / (sectors * 32) as f64 }
}

/// The counts of a launch under way, by instruction.
pub(crate) struct Tally {
    pub(crate) counts: Counts,
    issued: Vec<u64>,
}

impl Tally {
    pub(crate) fn new(kernel: &Kernel) -> Self {
        Self { counts: Counts::default(), issued: vec![0; kernel.instructions.len()] }
    }

    pub(crate) fn issue(&mut self, place: u32, lanes: u32) {
        self.issued[place as usize] += 1;
        self.counts.lane_instructions += u64::from(lanes);
    }

    /// The instruction at `place` has to be issued again.
    pub(crate) fn take_back(&mut self, place: u32, lanes: u32) {
        self.issued[place as usize] -= 1;
        self.counts.lane_instructions -= u64::from(lanes);
    }

    /// A load or store of `bytes` bytes a lane.
    pub(crate) fn accesses(&mut self, seen: &Seen, bytes: usize, is_store: bool) {
        if seen.global != 0 {
            let asked = u64::from(seen.global.count_ones()) * bytes as u64;
            let sectors = sectors(seen, bytes);
            let counts = &mut self.counts;
            let (total, total_sectors) = if is_store {
                (&mut counts.global_store_bytes, &mut counts.global_store_sectors)
            } else {
                (&mut counts.global_load_bytes, &mut counts.global_load_sectors)
            };
            *total += asked;
            *total_sectors += sectors;
        }
        if seen.shared != 0 {
            self.counts.shared_accesses += 1;
            self.counts.bank_conflicts += conflicts(seen, bytes);
        }
    }

    /// `cp.async` of `bytes` bytes a lane, `bytes_read` of all lanes from global memory.
    pub(crate) fn copies(&mut self, global: &Seen, shared: &Seen, bytes: usize, bytes_read: usize) {
        self.counts.global_load_bytes += bytes_read as u64;
        self.counts.global_load_sectors += sectors(global, bytes);
        self.counts.shared_accesses += 1;
        self.counts.bank_conflicts += conflicts(shared, bytes);
    }

    /// One matrix of an `ldmatrix`.
    pub(crate) fn matrix(&mut self, seen: &Seen, bytes: usize) {
        self.counts.bank_conflicts += conflicts(seen, bytes);
    }

    pub(crate) fn finish(mut self, kernel: &Kernel) -> Counts {
        for (instruction, issued) in kernel.instructions.iter().zip(&self.issued) {
            self.counts.warp_instructions += issued;
            if *issued > 0 {
                let opcode = &kernel.opcodes[instruction.opcode as usize];
                *self.counts.opcodes.entry(opcode.clone()).or_default() += issued;
            }
        }
        self.counts
    }
}

/// The 32-byte sectors of global memory that an access touches, each once.
fn sectors(seen: &Seen, bytes: usize) -> u64 {
    // Accesses are aligned to their size: each touches one sector.
    let mut touched = [0u64; 32];
    let mut count = 0;
    let mut is_sorted = true;
    debug_assert!(bytes <= 32, "no access is wider than a sector");
    for lane in lanes_of(seen.global) {
        let sector = seen.addresses[lane] >> 5;
        match touched[..count].last() {
            Some(last) if *last == sector => continue,
            Some(last) => is_sorted &= *last < sector,
            None => {}
        }
        touched[count] = sector;
        count += 1;
    }
    if is_sorted {
        return count as u64;
    }
    touched[..count].sort_unstable();
    1 + touched[..count].windows(2).filter(|pair| pair[0] != pair[1]).count() as u64
}

/// The passes over shared memory beyond those that the width of the access needs. A pass takes 32 lanes of 4 bytes,
/// 16 of 8 or 8 of 16, and in it each of the 32 banks gives one word.
fn conflicts(seen: &Seen, bytes: usize) -> u64 {
    let (words, lanes_a_pass) = match bytes {
        0..=4 => (1, 32),
        5..=8 => (2, 16),
        _ => (4, 8),
    };
    let mut extra = 0;
    let mut lanes = lanes_of(seen.shared).peekable();
    while lanes.peek().is_some() {
        let mut held = [0u64; 32];
        let mut taken = 0u32;
        let mut more: Vec<u64> = Vec::new();
        for lane in lanes.by_ref().take(lanes_a_pass) {
            let first = seen.addresses[lane] >> 2;
            for word in first..first + words {
                let bank = word as usize & 31;
                if taken >> bank & 1 == 0 {
                    taken |= 1 << bank;
                    held[bank] = word;
                } else if held[bank] != word && !more.contains(&word) {
                    more.push(word);
                }
            }
        }
        if !more.is_empty() {
            let mut passes = [0u64; 32];
            more.iter().for_each(|word| passes[*word as usize & 31] += 1);
            extra += passes.iter().max().copied().unwrap_or(0);
        }
    }
    extra
}
