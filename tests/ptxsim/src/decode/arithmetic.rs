//! Moves, arithmetic, comparisons and selections.

use super::{Decoder, Trouble};
use crate::alu::{self, Opcode};
use crate::decode::{CONSTANT_WINDOW, LOCAL_WINDOW, SHARED_WINDOW};
use crate::lanes::one;
use crate::program::{Condition, Logic, Op};
use crate::syntax::{Kind, Operand, Space, Type};

impl<'a> Decoder<'a> {
    pub(super) fn arithmetic(
        &mut self,
        opcode: &Opcode<'_>,
        operands: &[Operand<'a>],
    ) -> Result<Option<Op>, Trouble> {
        let of = opcode.of();
        let on_predicates = of.is_some_and(|of| of.kind == Kind::Predicate);
        match (opcode.name, operands) {
            ("setp", _) => self.compare(opcode, operands),
            ("set", _) => self.compare_to(opcode, operands),
            ("testp", [to, from]) => {
                let Some(test) = alu::property(opcode) else { return Ok(None) };
                let from = self.source(from)?;
                let to = self.predicate(to)?;
                Ok(Some(Op::Compare { test, to, complement: None, from: [from; 2], joined: None }))
            }
            ("selp", [to, a, b, condition]) => {
                let from = self.sources(&[a.clone(), b.clone()])?;
                Ok(Some(Op::Select { to: self.written(to)?, from, condition: self.condition(condition)? }))
            }
            ("mov" | "not" | "and" | "or" | "xor", _) if on_predicates => self.logic(opcode, operands),
            ("mov", [Operand::Vector(parts), from]) => {
                let Some(Type { bits, .. }) = of else { return Ok(None) };
                let bits = bits / parts.len() as u32;
                let parts = parts.iter().map(|part| self.target(part)).collect::<Result<_, _>>()?;
                Ok(Some(Op::Unpack { parts, from: self.source(from)?, bits }))
            }
            ("mov", [to, Operand::Vector(parts)]) => {
                let Some(Type { bits, .. }) = of else { return Ok(None) };
                let bits = bits / parts.len() as u32;
                let parts = parts.iter().map(|part| self.source(part)).collect::<Result<_, _>>()?;
                Ok(Some(Op::Pack { to: self.written(to)?, parts, bits }))
            }
            ("cvta", [to, from]) => {
                let function = one(conversion_of_address(opcode));
                let from = self.source(from)?;
                Ok(Some(Op::Compute { function, to: self.written(to)?, from: [from; 3] }))
            }
            ("bfi", [to, from @ ..]) => {
                let Some(Type { bits, .. }) = of else { return Ok(None) };
                Ok(Some(Op::Insert { from: self.sources(from)?, to: self.written(to)?, bits }))
            }
            ("lop3", [to, a, b, c, Operand::Number(table)]) => {
                let from = self.sources(&[a.clone(), b.clone(), c.clone()])?;
                let function = alu::logic_of_three(*table);
                Ok(Some(Op::Compute { function, to: self.written(to)?, from }))
            }
            (_, [to, from @ ..]) if (1..=3).contains(&from.len()) => self.compute(opcode, to, from),
            _ => Ok(None),
        }
    }

    fn compute(
        &mut self,
        opcode: &Opcode<'_>,
        to: &Operand<'a>,
        from: &[Operand<'a>],
    ) -> Result<Option<Op>, Trouble> {
        let register_bits = match to {
            Operand::Name(name) => self.scopes.register_bits(name).unwrap_or(64),
            _ => 64,
        };
        let Some(function) = alu::function(opcode, register_bits) else { return Ok(None) };
        let mut registers = [0; 3];
        for (register, operand) in registers.iter_mut().zip(from) {
            *register = self.source(operand)?;
        }
        // A function reads all three; the first stands in for those that are not there.
        let first = registers[0];
        registers[from.len()..].fill(first);
        Ok(Some(Op::Compute { function, to: self.written(to)?, from: registers }))
    }

    /// `setp.lt.and.s32 p|q, a, b, c`
    fn compare(&mut self, opcode: &Opcode<'_>, operands: &[Operand<'a>]) -> Result<Option<Op>, Trouble> {
        let Some(test) = alu::comparison(opcode) else { return Ok(None) };
        let [to, a, b, joined @ ..] = operands else {
            return self.trouble("the number of operands is wrong");
        };
        let (to, complement) = match to {
            Operand::Both(to, complement) => (self.predicate(to)?, self.predicate(complement)?),
            to => (self.predicate(to)?, None),
        };
        let from = self.sources(&[a.clone(), b.clone()])?;
        let joined = self.joined(opcode, joined)?;
        Ok(Some(Op::Compare { test, to, complement, from, joined }))
    }

    /// `set.lt.u32.f32 d, a, b`
    fn compare_to(&mut self, opcode: &Opcode<'_>, operands: &[Operand<'a>]) -> Result<Option<Op>, Trouble> {
        let (Some(test), Some(of)) = (alu::comparison(opcode), opcode.of()) else { return Ok(None) };
        if of.bits != 32 {
            return Ok(None);
        }
        let [to, a, b, joined @ ..] = operands else {
            return self.trouble("the number of operands is wrong");
        };
        let value = if of.is_float() { u64::from(1f32.to_bits()) } else { 0xffff_ffff };
        let from = self.sources(&[a.clone(), b.clone()])?;
        let joined = self.joined(opcode, joined)?;
        Ok(Some(Op::CompareTo { test, to: self.written(to)?, from, joined, value }))
    }

    fn joined(
        &self,
        opcode: &Opcode<'_>,
        operands: &[Operand<'a>],
    ) -> Result<Option<(Logic, Condition)>, Trouble> {
        let [operand] = operands else { return Ok(None) };
        let logic = match () {
            () if opcode.has("and") => Logic::And,
            () if opcode.has("or") => Logic::Or,
            () if opcode.has("xor") => Logic::Xor,
            () => return self.trouble("how the predicates are joined is missing"),
        };
        Ok(Some((logic, self.condition(operand)?)))
    }

    fn logic(&self, opcode: &Opcode<'_>, operands: &[Operand<'a>]) -> Result<Option<Op>, Trouble> {
        let [to, a, rest @ ..] = operands else {
            return self.trouble("the number of operands is wrong");
        };
        let Some(to) = self.predicate(to)? else { return Ok(Some(Op::Nothing)) };
        let mut a = self.condition(a)?;
        let (logic, b) = match (opcode.name, rest) {
            ("and", [b]) => (Logic::And, self.condition(b)?),
            ("or", [b]) => (Logic::Or, self.condition(b)?),
            ("xor", [b]) => (Logic::Xor, self.condition(b)?),
            ("mov", []) => (Logic::First, a),
            ("not", []) => {
                a.negated = !a.negated;
                (Logic::First, a)
            }
            _ => return self.trouble("the number of operands is wrong"),
        };
        Ok(Some(Op::Logic { logic, to, from: [a, b] }))
    }
}

/// `cvta.shared` and `cvta.to.shared`, for each space.
fn conversion_of_address(opcode: &Opcode<'_>) -> impl Fn(u64) -> u64 + Send + Sync + use<> {
    let space = opcode.modifiers.iter().find_map(|word| Space::named(word));
    let window = match space {
        Some(Space::Shared) => SHARED_WINDOW,
        Some(Space::Local) => LOCAL_WINDOW,
        Some(Space::Constant) => CONSTANT_WINDOW,
        _ => 0,
    };
    let to_space = opcode.has("to");
    move |address: u64| if to_space { address.wrapping_sub(window) } else { address.wrapping_add(window) }
}
