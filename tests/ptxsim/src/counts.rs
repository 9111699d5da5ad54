//! What a launch cost, in units that do not depend on a clock.

use std::collections::BTreeMap;

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
    pub global_store_bytes: u64,
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
