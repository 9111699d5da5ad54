//! PTX text to items: declarations, labels and instructions with their operands, nothing resolved yet.
//!
//! Only the grammar that compilers emit and that tests write by hand; anything else is an error with its line.

mod body;
mod module;
mod tokens;

use std::collections::BTreeMap;
use std::fmt;

pub(crate) use module::parse;

/// A line of PTX that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParseError {
    /// From 1.
    pub line: u32,
    /// The line, trimmed.
    pub text: String,
    pub detail: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in PTX line {}: `{}`", self.detail, self.line, self.text)
    }
}

impl std::error::Error for ParseError {}

/// How the bits of a register or of memory are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Predicate,
    Bits,
    Unsigned,
    Signed,
    Float,
    /// bf16
    Brain,
    /// tf32, in 32 bits
    Tensor,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Type {
    pub(crate) kind: Kind,
    /// The bits of one value; of both if it is a pair.
    pub(crate) bits: u32,
    /// Two 16-bit values.
    pub(crate) pair: bool,
}

impl Type {
    /// The type that a word without its dot names.
    pub(crate) fn named(word: &str) -> Option<Self> {
        let (kind, digits) = match word {
            "pred" => return Some(Self { kind: Kind::Predicate, bits: 1, pair: false }),
            "bf16" => return Some(Self { kind: Kind::Brain, bits: 16, pair: false }),
            "bf16x2" => return Some(Self { kind: Kind::Brain, bits: 32, pair: true }),
            "f16x2" => return Some(Self { kind: Kind::Float, bits: 32, pair: true }),
            "tf32" => return Some(Self { kind: Kind::Tensor, bits: 32, pair: false }),
            _ if word.starts_with('b') => (Kind::Bits, &word[1..]),
            _ if word.starts_with('u') => (Kind::Unsigned, &word[1..]),
            _ if word.starts_with('s') => (Kind::Signed, &word[1..]),
            _ if word.starts_with('f') => (Kind::Float, &word[1..]),
            _ => return None,
        };
        let bits = match digits {
            "8" if kind != Kind::Float => 8,
            "16" => 16,
            "32" => 32,
            "64" => 64,
            _ => return None,
        };
        Some(Self { kind, bits, pair: false })
    }

    pub(crate) fn is_float(self) -> bool {
        matches!(self.kind, Kind::Float | Kind::Brain | Kind::Tensor)
    }

    pub(crate) fn bytes(self) -> usize {
        (self.bits as usize).div_ceil(8)
    }
}

/// A variable of memory.
#[derive(Clone, Debug)]
pub(crate) struct Variable<'a> {
    pub(crate) name: &'a str,
    pub(crate) align: usize,
    pub(crate) bytes: usize,
    /// As many bytes as the variable has, if it is initialised.
    pub(crate) initial: Option<Vec<u8>>,
    /// `name[]`: its size is given at the launch.
    pub(crate) unsized_array: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum Operand<'a> {
    /// A register, a label, a variable or a special register.
    Name(&'a str),
    /// An immediate; floats by their bits.
    Number(u64),
    /// `[base+offset]`, or `base+offset` of a variable.
    Address(Box<Self>, i64),
    /// `{a, b}`
    Vector(Vec<Self>),
    /// `!a`
    Not(&'a str),
    /// `a|b`
    Both(Box<Self>, Box<Self>),
    /// `(a, b)` of a call
    List(Vec<Self>),
}

#[derive(Clone, Debug)]
pub(crate) struct Statement<'a> {
    pub(crate) line: u32,
    pub(crate) place: Option<Place>,
    /// `@p` or `@!p`
    pub(crate) guard: Option<Operand<'a>>,
    /// With its modifiers: `ld.global.nc.f32`.
    pub(crate) opcode: &'a str,
    pub(crate) operands: Vec<Operand<'a>>,
}

/// Where in the sources an instruction comes from: file numbers and lines.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    /// The line that was compiled to it.
    pub(crate) own: (u32, u32),
    /// Of the calls that functions were put in the place of, the innermost in the kernel's own file; else `own`.
    pub(crate) in_kernel_file: (u32, u32),
}

#[derive(Clone, Debug)]
pub(crate) enum Item<'a> {
    Open,
    Close,
    Label(&'a str),
    /// `.reg .b32 %r<3>, %x;`: names, and how many if they are numbered.
    Registers(Type, Vec<(&'a str, Option<u32>)>),
    Variable(Space, Variable<'a>),
    /// `label: .branchtargets a, b;`
    Targets(&'a str, Vec<&'a str>),
    Statement(Statement<'a>),
}

/// A state space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Constant,
    Parameter,
}

impl Space {
    /// The space that a word without its dot names.
    pub(crate) fn named(word: &str) -> Option<Self> {
        Some(match word.split("::").next().unwrap_or(word) {
            "global" => Self::Global,
            "shared" => Self::Shared,
            "local" => Self::Local,
            "const" => Self::Constant,
            "param" => Self::Parameter,
            _ => return None,
        })
    }
}

/// A kernel, or a function that kernels call.
#[derive(Clone, Debug)]
pub(crate) struct Body<'a> {
    pub(crate) name: &'a str,
    /// What a function returns.
    pub(crate) results: Vec<Variable<'a>>,
    pub(crate) parameters: Vec<Variable<'a>>,
    pub(crate) items: Vec<Item<'a>>,
    /// Threads a block may have: `.maxntid`, `.reqntid`.
    pub(crate) threads_max: Option<u32>,
}

#[derive(Clone, Default, Debug)]
pub(crate) struct Text<'a> {
    pub(crate) kernels: Vec<Body<'a>>,
    pub(crate) functions: BTreeMap<&'a str, Body<'a>>,
    pub(crate) variables: Vec<(Space, Variable<'a>)>,
    pub(crate) files: BTreeMap<u32, String>,
}
