//! What arithmetic instructions compute: from an opcode with its modifiers to a function over lanes.
//!
//! A table for each kind of number. What is in no table is not known: it faults when it is run, by name.

mod compare;
mod convert;
mod float;
mod half;
mod integer;

pub(crate) use compare::{comparison, property};
pub(crate) use integer::{extreme, insert, logic_of_three, update};

use crate::lanes::Function;
use crate::number::Rounding;
use crate::syntax::{Kind, Type};

/// An opcode taken apart at its dots.
#[derive(Clone, Debug)]
pub(crate) struct Opcode<'a> {
    pub(crate) name: &'a str,
    pub(crate) modifiers: Vec<&'a str>,
    /// Those of the modifiers that are types.
    pub(crate) types: Vec<Type>,
}

impl<'a> Opcode<'a> {
    pub(crate) fn parse(text: &'a str) -> Self {
        let mut parts = text.split('.');
        let name = parts.next().unwrap_or(text);
        let modifiers: Vec<&str> = parts.collect();
        let types = modifiers.iter().filter_map(|word| Type::named(word)).collect();
        Self { name, modifiers, types }
    }

    /// Whether every modifier is one that the interpreter has heard of: one that it has not could change anything.
    pub(crate) fn is_understood(&self) -> bool {
        self.modifiers.iter().all(|word| {
            let is_hint = word.starts_with("L1::") || word.starts_with("L2::") && *word != "L2::cache_hint";
            Type::named(word).is_some() || MODIFIERS.contains(word) || is_hint
        })
    }

    pub(crate) fn has(&self, modifier: &str) -> bool {
        self.modifiers.contains(&modifier)
    }

    /// The first type: that of the result.
    pub(crate) fn of(&self) -> Option<Type> {
        self.types.first().copied()
    }

    pub(crate) fn rounding(&self) -> Option<Rounding> {
        self.modifiers.iter().find_map(|word| {
            Some(match *word {
                "rn" => Rounding::Nearest,
                "rna" => Rounding::Away,
                "rz" => Rounding::Zero,
                "rm" => Rounding::Down,
                "rp" => Rounding::Up,
                _ => return None,
            })
        })
    }

    /// The rounding to a whole number.
    pub(crate) fn integral(&self) -> Option<Rounding> {
        self.modifiers.iter().find_map(|word| {
            Some(match *word {
                "rni" => Rounding::Nearest,
                "rzi" => Rounding::Zero,
                "rmi" => Rounding::Down,
                "rpi" => Rounding::Up,
                _ => return None,
            })
        })
    }
}

/// The modifiers that some instruction of the interpreter has, types left out, by the instructions that have them.
const MODIFIERS: &[&str] = &[
    // Arithmetic.
    "rn",
    "rna",
    "rz",
    "rm",
    "rp",
    "rni",
    "rzi",
    "rmi",
    "rpi",
    "ftz",
    "sat",
    "approx",
    "full",
    "NaN",
    "relu",
    "lo",
    "hi",
    "wide",
    "l",
    "r",
    "wrap",
    "clamp",
    "shiftamt",
    "f4e",
    "b4e",
    "rc8",
    "ecl",
    "ecr",
    "rc16",
    "to",
    // Comparisons.
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "lo",
    "ls",
    "hi",
    "hs",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
    "num",
    "nan",
    "and",
    "or",
    "xor",
    "finite",
    "infinite",
    "number",
    "notanumber",
    "normal",
    "subnormal",
    // Memory.
    "param",
    "param::entry",
    "param::func",
    "global",
    "shared",
    "shared::cta",
    "local",
    "const",
    "v2",
    "v4",
    "v8",
    "nc",
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "volatile",
    "weak",
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "sc",
    "mmio",
    "gpu",
    "cta",
    "sys",
    "cl",
    "gl",
    "proxy",
    "alias",
    "generic",
    "L1",
    "L2",
    "async",
    "commit_group",
    "wait_group",
    "wait_all",
    "add",
    "min",
    "max",
    "exch",
    "cas",
    "inc",
    "dec",
    // Warps and blocks.
    "uni",
    "idx",
    "sync",
    "aligned",
    "arrive",
    "red",
    "popc",
    "warp",
    "up",
    "down",
    "bfly",
    "ballot",
    "all",
    "any",
    "row",
    "col",
    "m8n8",
    "x1",
    "x2",
    "x4",
    "trans",
    "m16n8k4",
    "m16n8k8",
    "m16n8k16",
];

/// The function of an instruction with up to three sources. `register_bits` is the width of the register that the
/// result goes to.
pub(crate) fn function(opcode: &Opcode<'_>, register_bits: u32) -> Option<Function> {
    let of = opcode.of()?;
    if opcode.name == "cvt" {
        return convert::conversion(opcode, register_bits);
    }
    match (of.kind, of.bits) {
        (Kind::Float, 32) if !of.pair => float::single(opcode),
        (Kind::Float, 64) => float::double(opcode),
        (Kind::Float | Kind::Brain, _) => half::function(opcode, of),
        _ => integer::function(opcode, of),
    }
}
