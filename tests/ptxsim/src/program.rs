//! A kernel ready to run: instructions with every name resolved to a register, a constant or an address.

use crate::lanes::{Function, Mask, Test};
use crate::number::Format;
use crate::syntax::Space;

/// A register of a warp: 64 bits a lane. Immediates and special registers have their own.
pub(crate) type Register = u32;

/// A predicate register of a warp: a bit a lane. Number 0 is always false.
pub(crate) type Predicate = u32;

/// A predicate or its opposite.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Condition {
    pub(crate) predicate: Predicate,
    pub(crate) negated: bool,
}

impl Condition {
    pub(crate) const FALSE: Self = Self { predicate: 0, negated: false };
    pub(crate) const TRUE: Self = Self { predicate: 0, negated: true };

    pub(crate) fn mask(self, predicates: &[Mask]) -> Mask {
        let mask = predicates[self.predicate as usize];
        if self.negated { !mask } else { mask }
    }
}

pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) parameter_bytes: usize,
    pub(crate) instructions: Vec<Instruction>,
    pub(crate) opcodes: Vec<String>,
    pub(crate) registers: usize,
    pub(crate) predicates: usize,
    /// Registers that hold the same value in every lane.
    pub(crate) constants: Vec<(Register, u64)>,
    pub(crate) specials: Vec<(Register, Special)>,
    pub(crate) static_shared: usize,
    pub(crate) local_bytes: usize,
    pub(crate) threads_max: Option<u32>,
}

pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

pub(crate) struct Instruction {
    pub(crate) guard: Option<Condition>,
    pub(crate) op: Op,
    /// Into `Kernel::opcodes`.
    pub(crate) opcode: u32,
    /// In the PTX, from 1.
    pub(crate) line: u32,
    pub(crate) place: Option<crate::syntax::Place>,
}

/// What a special register says of a thread.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Special {
    Thread(usize),
    BlockSize(usize),
    Block(usize),
    GridSize(usize),
    Lane,
    Warp,
    Warps,
    LanesEqual,
    LanesBelow,
    LanesUpTo,
    LanesAbove,
    LanesFrom,
    DynamicShared,
    TotalShared,
    /// A clock that does not move, and other numbers that are always 0.
    Zero,
}

pub(crate) enum Op {
    Compute {
        function: Function,
        to: Register,
        from: [Register; 3],
    },
    /// `bfi`
    Insert {
        to: Register,
        from: [Register; 4],
        bits: u32,
    },
    /// `setp`: the test, joined with another predicate.
    Compare {
        test: Test,
        to: Option<Predicate>,
        complement: Option<Predicate>,
        from: [Register; 2],
        joined: Option<(Logic, Condition)>,
    },
    /// `set`: `value` where the test holds, else 0.
    CompareTo {
        test: Test,
        to: Register,
        from: [Register; 2],
        joined: Option<(Logic, Condition)>,
        value: u64,
    },
    Select {
        to: Register,
        from: [Register; 2],
        condition: Condition,
    },
    Logic {
        logic: Logic,
        to: Predicate,
        from: [Condition; 2],
    },
    /// Parts of `bits` bits each into one register, the lowest first.
    Pack {
        to: Register,
        parts: Vec<Register>,
        bits: u32,
    },
    Unpack {
        parts: Vec<Option<Register>>,
        from: Register,
        bits: u32,
    },
    Load(Load),
    Store(Store),
    Atomic(Atomic),
    CopyAsync(CopyAsync),
    CommitCopies,
    /// Until at most so many groups are under way; nothing: all, committed or not.
    WaitForCopies(Option<usize>),
    LoadMatrices {
        parts: Vec<Register>,
        address: Address,
        transposed: bool,
    },
    Multiply(Multiply),
    Shuffle(Shuffle),
    Vote {
        mode: VoteMode,
        source: Condition,
        members: Register,
    },
    /// `match.any`, `match.all`: the lanes with this lane's value.
    Match {
        to: Register,
        all: Option<Predicate>,
        is_all: bool,
        from: Register,
        members: Register,
        bits: u32,
    },
    /// `redux.sync`
    Reduce {
        to: Register,
        from: Register,
        members: Register,
        combine: fn(u32, u32) -> u32,
    },
    ActiveMask {
        to: Register,
    },
    Branch {
        target: u32,
    },
    BranchIndexed {
        index: Register,
        targets: Vec<u32>,
    },
    Exit,
    Barrier(Barrier),
    WarpBarrier {
        members: Register,
    },
    /// Fences and prefetches: nothing to do where memory has one order.
    Nothing,
    Trap,
    Unknown,
}

/// `and`, `or`, `xor` of predicates, or the first alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
    First,
}

impl Logic {
    pub(crate) fn of(self, a: Mask, b: Mask) -> Mask {
        match self {
            Self::And => a & b,
            Self::Or => a | b,
            Self::Xor => a ^ b,
            Self::First => a,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub(crate) space: Space,
    pub(crate) base: Register,
    pub(crate) offset: i64,
    /// The base has 32 bits, and so has the sum.
    pub(crate) is_short: bool,
}

impl Address {
    pub(crate) fn of(&self, base: u64) -> u64 {
        let sum = base.wrapping_add(self.offset as u64);
        if self.is_short { sum & 0xffff_ffff } else { sum }
    }
}

pub(crate) struct Load {
    pub(crate) address: Address,
    /// `_` drops a part.
    pub(crate) to: Vec<Option<Register>>,
    /// Bytes of one part.
    pub(crate) bytes: usize,
    /// Of a signed part: the width of the register it fills.
    pub(crate) extend_to: Option<u32>,
    /// `volatile`, `relaxed` or `acquire`: exempt from the search for races.
    pub(crate) is_atomic: bool,
}

pub(crate) struct Store {
    pub(crate) address: Address,
    pub(crate) from: Vec<Register>,
    pub(crate) bytes: usize,
    pub(crate) is_atomic: bool,
}

/// What an atomic makes of memory, its operand, and a second one (`cas`).
pub(crate) type Update = Box<dyn Fn(u64, u64, u64) -> u64 + Send + Sync>;

pub(crate) struct Atomic {
    pub(crate) address: Address,
    /// Nothing for `red`.
    pub(crate) to: Option<Register>,
    pub(crate) from: [Register; 2],
    pub(crate) bytes: usize,
    pub(crate) update: Update,
}

pub(crate) struct CopyAsync {
    /// In shared memory.
    pub(crate) to: Address,
    /// In global memory.
    pub(crate) from: Address,
    pub(crate) bytes: usize,
    /// Bytes that are read; the rest becomes zero.
    pub(crate) read: Option<Register>,
}

/// `mma.sync.m16n8kK.row.col.f32`: d = a·b + c.
pub(crate) struct Multiply {
    pub(crate) depth: usize,
    pub(crate) format: Format,
    pub(crate) d: [Register; 4],
    pub(crate) a: Vec<Register>,
    pub(crate) b: Vec<Register>,
    pub(crate) c: [Register; 4],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

pub(crate) struct Shuffle {
    pub(crate) mode: ShuffleMode,
    pub(crate) to: Register,
    pub(crate) in_range: Option<Predicate>,
    pub(crate) from: Register,
    pub(crate) offset: Register,
    pub(crate) clamp: Register,
    pub(crate) members: Register,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum VoteMode {
    Ballot(Register),
    All(Predicate),
    Any(Predicate),
    Uniform(Predicate),
}

pub(crate) struct Barrier {
    pub(crate) id: Register,
    /// Threads that take part; nothing: all of the block.
    pub(crate) threads: Option<Register>,
    /// `bar.arrive` goes on at once.
    pub(crate) waits: bool,
    pub(crate) reduction: Option<Reduction>,
}

/// `barrier.red`: what each thread learns of the others' predicates.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reduction {
    pub(crate) source: Condition,
    pub(crate) to: ReductionTarget,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum ReductionTarget {
    Count(Register),
    All(Predicate),
    Any(Predicate),
}
