//! What a launch can be stopped by, and where: the reports of compute-sanitizer, as values.

use std::fmt;

/// The kind of a mistake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum FaultKind {
    /// A global access that no allocation holds.
    OutOfBounds,
    /// A global access inside an allocation that was freed.
    FreedMemory,
    /// An address that is not a multiple of the access's size.
    Misaligned,
    /// A read of global memory that neither the host nor a kernel has written.
    UninitialisedGlobal,
    /// A read of shared memory that no thread of the block has written.
    UninitialisedShared,
    /// A read of local memory that its thread has not written.
    UninitialisedLocal,
    /// A read of shared memory that a `cp.async` will fill and that was not waited for.
    PendingCopy,
    /// A shared access beyond the block's static and dynamic shared memory.
    SharedOutOfBounds,
    /// A local access beyond the kernel's local memory.
    LocalOutOfBounds,
    /// An access beyond a constant or a parameter.
    ConstantOutOfBounds,
    /// Two warps touched the same shared bytes without a barrier between, one of them writing.
    SharedRace,
    /// Two blocks of a launch touched the same global bytes, one of them writing.
    GlobalRace,
    /// Threads of a warp do not reach a barrier together.
    BarrierDivergence,
    /// Threads wait that nobody will wake.
    Deadlock,
    /// A shuffle, vote or matrix instruction whose mask and active lanes do not agree.
    InactiveLane,
    /// The interpreter does not know the instruction.
    UnknownInstruction,
    /// The program ran into `trap`.
    Trap,
    /// The module has no such kernel, or its parameters are other ones.
    Arguments,
    /// More shared memory or threads than a block may have, or an empty grid.
    LaunchLimits,
    /// More instructions than a launch may run.
    Runaway,
}

/// A mistake and its place. The launch stopped there.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The kind of the mistake.
    pub kind: FaultKind,
    /// What was seen, in words.
    pub detail: Box<str>,
    /// The kernel's name.
    pub kernel: Box<str>,
    /// The line in the PTX, from 1; 0 if the launch did not begin.
    pub ptx_line: u32,
    /// The PTX instruction.
    pub instruction: Box<str>,
    /// The kernel's file and the line in it, if it was compiled with `-lineinfo`; for a function of a header that the
    /// compiler has put in the place of its call, the line of the call.
    pub source: Option<(Box<str>, u32)>,
    /// The header and the line inside that function.
    pub inlined: Option<(Box<str>, u32)>,
    /// The block that ran it.
    pub block: [u32; 3],
    /// The warp in the block.
    pub warp: u32,
    /// The lane, if it was one.
    pub lane: Option<u32>,
    /// In the memory that was accessed: global addresses are those of `Device::allocate`, others begin at 0.
    pub address: Option<u64>,
}

impl Fault {
    /// A launch that did not begin.
    pub(crate) fn before_launch(kind: FaultKind, kernel: &str, detail: String) -> Self {
        Self {
            kind,
            detail: detail.into(),
            kernel: kernel.into(),
            ptx_line: 0,
            instruction: "".into(),
            source: None,
            inlined: None,
            block: [0; 3],
            warp: 0,
            lane: None,
            address: None,
        }
    }

    /// The line of the source, 0 if it is not known.
    pub fn source_line(&self) -> u32 {
        self.source.as_ref().map_or(0, |source| source.1)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {} in `{}`", self.kind, self.detail, self.kernel)?;
        if self.ptx_line == 0 {
            return Ok(());
        }
        if let Some((file, line)) = &self.source {
            write!(f, ", {file}:{line}")?;
        }
        if let Some((file, line)) = &self.inlined {
            write!(f, " (there {file}:{line})")?;
        }
        write!(f, ", PTX line {} `{}`", self.ptx_line, self.instruction)?;
        write!(f, ", block {:?}, warp {}", self.block, self.warp)?;
        if let Some(lane) = self.lane {
            write!(f, ", lane {lane}")?;
        }
        if let Some(address) = self.address {
            write!(f, ", address {address:#x}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}

/// A mistake whose instruction is not named yet.
#[derive(Debug)]
pub(crate) struct Mistake(pub(crate) Box<Details>);

#[derive(Debug)]
pub(crate) struct Details {
    pub(crate) kind: FaultKind,
    pub(crate) detail: String,
    pub(crate) lane: Option<u32>,
    pub(crate) address: Option<u64>,
}

impl Mistake {
    pub(crate) fn new(kind: FaultKind, detail: impl Into<String>) -> Self {
        Self(Box::new(Details { kind, detail: detail.into(), lane: None, address: None }))
    }

    pub(crate) fn at(kind: FaultKind, address: u64, detail: impl Into<String>) -> Self {
        Self(Box::new(Details { kind, detail: detail.into(), lane: None, address: Some(address) }))
    }

    pub(crate) fn in_lane(mut self, lane: usize) -> Self {
        self.0.lane = Some(lane as u32);
        self
    }
}
