//! The names of a body: registers, variables and labels, block by block.

use std::collections::BTreeMap;

use crate::program::{Kernel, Predicate, Register, Special};
use crate::syntax::{Kind, Space, Type};

/// A variable's place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Symbol {
    pub(super) space: Space,
    pub(super) address: u64,
}

#[derive(Clone, Copy, Debug)]
enum Declared {
    Register { first: u32, bits: u32 },
    Predicate { first: u32 },
}

#[derive(Default)]
struct Scope<'a> {
    /// Registers by their name, or by their prefix and how many there are.
    single: BTreeMap<&'a str, Declared>,
    numbered: BTreeMap<&'a str, (Declared, u32)>,
    symbols: BTreeMap<&'a str, Symbol>,
    labels: BTreeMap<&'a str, u32>,
    targets: BTreeMap<&'a str, Vec<&'a str>>,
}

#[derive(Default)]
pub(super) struct Scopes<'a> {
    scopes: Vec<Scope<'a>>,
}

impl<'a> Scopes<'a> {
    pub(super) fn open(&mut self) {
        self.scopes.push(Scope::default());
    }

    pub(super) fn close(&mut self) {
        self.scopes.pop();
    }

    fn innermost(&mut self) -> &mut Scope<'a> {
        self.scopes.last_mut().expect("a body has opened a scope")
    }

    /// `count` registers `name0`, `name1`, ..., or one called `name`.
    pub(super) fn declare(&mut self, name: &'a str, count: Option<u32>, of: Type, kernel: &mut Kernel) {
        let number = count.unwrap_or(1) as usize;
        let declared = if of.kind == Kind::Predicate {
            kernel.predicates += number;
            Declared::Predicate { first: (kernel.predicates - number) as u32 }
        } else {
            kernel.registers += number;
            Declared::Register { first: (kernel.registers - number) as u32, bits: of.bits }
        };
        match count {
            None => self.innermost().single.insert(name, declared).map(|_| ()),
            Some(count) => self.innermost().numbered.insert(name, (declared, count)).map(|_| ()),
        };
    }

    fn find(&self, name: &str) -> Option<(Declared, u32)> {
        let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number: Option<u32> = name[prefix.len()..].parse().ok();
        self.scopes.iter().rev().find_map(|scope| {
            if let Some(declared) = scope.single.get(name) {
                return Some((*declared, 0));
            }
            let (declared, count) = *scope.numbered.get(prefix)?;
            number.filter(|number| *number < count).map(|number| (declared, number))
        })
    }

    pub(super) fn register(&self, name: &str) -> Option<Register> {
        match self.find(name)? {
            (Declared::Register { first, .. }, number) => Some(first + number),
            (Declared::Predicate { .. }, _) => None,
        }
    }

    pub(super) fn register_bits(&self, name: &str) -> Option<u32> {
        match self.find(name)?.0 {
            Declared::Register { bits, .. } => Some(bits),
            Declared::Predicate { .. } => None,
        }
    }

    pub(super) fn predicate(&self, name: &str) -> Option<Predicate> {
        match self.find(name)? {
            (Declared::Predicate { first }, number) => Some(first + number),
            (Declared::Register { .. }, _) => None,
        }
    }

    pub(super) fn add_symbol(&mut self, name: &'a str, symbol: Symbol) {
        self.innermost().symbols.insert(name, symbol);
    }

    pub(super) fn symbol(&self, name: &str) -> Option<Symbol> {
        self.scopes.iter().rev().find_map(|scope| scope.symbols.get(name).copied())
    }

    pub(super) fn add_label(&mut self, name: &'a str, label: u32) {
        self.innermost().labels.insert(name, label);
    }

    pub(super) fn label(&self, name: &str) -> Option<u32> {
        self.scopes.iter().rev().find_map(|scope| scope.labels.get(name).copied())
    }

    pub(super) fn add_targets(&mut self, name: &'a str, targets: Vec<&'a str>) {
        self.innermost().targets.insert(name, targets);
    }

    pub(super) fn targets(&self, name: &str) -> Option<&[&'a str]> {
        self.scopes.iter().rev().find_map(|scope| scope.targets.get(name).map(Vec::as_slice))
    }
}

/// The special register that a name with its `%` is.
pub(super) fn special(name: &str) -> Option<Special> {
    let axis = |word: &str| ["x", "y", "z"].iter().position(|axis| *axis == word);
    let name = name.strip_prefix('%')?;
    if let Some((register, word)) = name.split_once('.') {
        let axis = axis(word)?;
        return Some(match register {
            "tid" => Special::Thread(axis),
            "ntid" => Special::BlockSize(axis),
            "ctaid" => Special::Block(axis),
            "nctaid" => Special::GridSize(axis),
            _ => return None,
        });
    }
    Some(match name {
        "laneid" => Special::Lane,
        "warpid" => Special::Warp,
        "nwarpid" => Special::Warps,
        "lanemask_eq" => Special::LanesEqual,
        "lanemask_lt" => Special::LanesBelow,
        "lanemask_le" => Special::LanesUpTo,
        "lanemask_gt" => Special::LanesAbove,
        "lanemask_ge" => Special::LanesFrom,
        "total_smem_size" => Special::TotalShared,
        "clock" | "clock64" | "clock_hi" | "globaltimer" | "smid" | "gridid" => Special::Zero,
        _ => return None,
    })
}
