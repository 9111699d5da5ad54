//! Loads, stores, atomics, asynchronous copies, and the matrix instructions.

use super::{Base, Decoder, Trouble};
use crate::alu::{self, Opcode};
use crate::number::{BF16, F16, TF32};
use crate::program::{Address, Atomic, CopyAsync, Load, Multiply, Op, Register, Special, Store};
use crate::syntax::{Kind, Operand, Space};

impl<'a> Decoder<'a> {
    pub(super) fn memory(
        &mut self,
        opcode: &Opcode<'_>,
        operands: &[Operand<'a>],
    ) -> Result<Option<Op>, Trouble> {
        match (opcode.name, operands) {
            ("ld" | "ldu", [to, address]) => self.load(opcode, to, address),
            ("st", [address, from]) => self.store(opcode, address, from),
            ("atom", [to, address, from @ ..]) => self.atomic(opcode, Some(to), address, from),
            ("red", [address, from @ ..]) => self.atomic(opcode, None, address, from),
            ("cp", _) if opcode.modifiers.first() == Some(&"async") => self.copy(opcode, operands),
            ("ldmatrix", [to, address]) => {
                if !opcode.has("m8n8") || !opcode.has("b16") {
                    return Ok(None);
                }
                let one = [to.clone()];
                let parts = if let Operand::Vector(parts) = to { parts.as_slice() } else { &one };
                let parts = parts.iter().map(|part| self.written(part)).collect::<Result<_, _>>()?;
                let address = self.address(opcode, address, Space::Shared)?;
                Ok(Some(Op::LoadMatrices { parts, address, transposed: opcode.has("trans") }))
            }
            ("mma", [d, a, b, c]) => self.multiply(opcode, [d, a, b, c]),
            ("membar" | "fence" | "prefetch" | "prefetchu" | "applypriority" | "discard", _) => {
                Ok(Some(Op::Nothing))
            }
            _ => Ok(None),
        }
    }

    /// `[register+offset]`, `[variable+offset]` or `[number]`, in the space that the opcode names.
    fn address(
        &mut self,
        opcode: &Opcode<'_>,
        operand: &Operand<'a>,
        unnamed: Space,
    ) -> Result<Address, Trouble> {
        let space = opcode.modifiers.iter().find_map(|word| Space::named(word)).unwrap_or(unnamed);
        let Operand::Address(base, offset) = operand else {
            return self.trouble("an address is missing");
        };
        self.address_in(space, base, *offset)
    }

    fn address_in(&mut self, space: Space, base: &Operand<'a>, offset: i64) -> Result<Address, Trouble> {
        if let Operand::Name(name) = base {
            if let Some(register) = self.scopes.register(name) {
                let is_short = self.scopes.register_bits(name) == Some(32);
                return Ok(Address { space, base: register, offset, is_short });
            }
            return match self.symbol(name) {
                Some(Base::At(symbol)) => {
                    // The parameters of a call are local variables of the caller.
                    let space = if symbol.space == Space::Local { Space::Local } else { space };
                    let base = self.immediate(symbol.address);
                    Ok(Address { space, base, offset, is_short: false })
                }
                Some(Base::Dynamic) => {
                    let base = self.special(Special::DynamicShared);
                    Ok(Address { space, base, offset, is_short: false })
                }
                None => self.trouble(&format!("`{name}` is not declared")),
            };
        }
        let base = self.source(base)?;
        Ok(Address { space, base, offset, is_short: false })
    }

    fn load(
        &mut self,
        opcode: &Opcode<'_>,
        to: &Operand<'a>,
        address: &Operand<'a>,
    ) -> Result<Option<Op>, Trouble> {
        let Some(of) = opcode.of() else { return Ok(None) };
        let address = self.address(opcode, address, Space::Generic)?;
        let one = [to.clone()];
        let parts = if let Operand::Vector(parts) = to { parts.as_slice() } else { &one };
        let to = parts.iter().map(|part| self.target(part)).collect::<Result<_, _>>()?;
        let register_bits = parts.iter().find_map(|part| match part {
            Operand::Name(name) => self.scopes.register_bits(name),
            _ => None,
        });
        let extend_to = register_bits.filter(|bits| of.kind == Kind::Signed && *bits > of.bits);
        Ok(Some(Op::Load(Load { address, to, bytes: of.bytes(), extend_to, is_atomic: is_atomic(opcode) })))
    }

    fn store(
        &mut self,
        opcode: &Opcode<'_>,
        address: &Operand<'a>,
        from: &Operand<'a>,
    ) -> Result<Option<Op>, Trouble> {
        let Some(of) = opcode.of() else { return Ok(None) };
        let address = self.address(opcode, address, Space::Generic)?;
        let one = [from.clone()];
        let parts = if let Operand::Vector(parts) = from { parts.as_slice() } else { &one };
        let from = parts.iter().map(|part| self.source(part)).collect::<Result<_, _>>()?;
        Ok(Some(Op::Store(Store { address, from, bytes: of.bytes(), is_atomic: is_atomic(opcode) })))
    }

    fn atomic(
        &mut self,
        opcode: &Opcode<'_>,
        to: Option<&Operand<'a>>,
        address: &Operand<'a>,
        from: &[Operand<'a>],
    ) -> Result<Option<Op>, Trouble> {
        let (Some(of), Some(update)) = (opcode.of(), alu::update(opcode)) else { return Ok(None) };
        let address = self.address(opcode, address, Space::Generic)?;
        let from = match from {
            [a] => [self.source(a)?; 2],
            [a, b] => [self.source(a)?, self.source(b)?],
            _ => return self.trouble("the number of operands is wrong"),
        };
        let to = to.map(|to| self.target(to)).transpose()?.flatten();
        Ok(Some(Op::Atomic(Atomic { address, to, from, bytes: of.bytes(), update })))
    }

    fn copy(&mut self, opcode: &Opcode<'_>, operands: &[Operand<'a>]) -> Result<Option<Op>, Trouble> {
        if opcode.has("commit_group") {
            return Ok(Some(Op::CommitCopies));
        }
        if opcode.has("wait_all") {
            return Ok(Some(Op::WaitForCopies(None)));
        }
        if opcode.has("wait_group") {
            let [Operand::Number(pending)] = operands else {
                return self.trouble("the number of groups is missing");
            };
            return Ok(Some(Op::WaitForCopies(Some(*pending as usize))));
        }
        let ([to, from, Operand::Number(bytes), rest @ ..], true) = (operands, opcode.has("global")) else {
            return Ok(None);
        };
        if opcode.has("bulk") || opcode.has("mbarrier") {
            return Ok(None);
        }
        let (Operand::Address(to, to_offset), Operand::Address(from, from_offset)) = (to, from) else {
            return self.trouble("an address is missing");
        };
        let to = self.address_in(Space::Shared, to, *to_offset)?;
        let from = self.address_in(Space::Global, from, *from_offset)?;
        let read = match rest {
            [] => None,
            [Operand::Name(name)] if self.scopes.predicate(name).is_some() => return Ok(None),
            [read, ..] => Some(self.source(read)?),
        };
        Ok(Some(Op::CopyAsync(CopyAsync { to, from, bytes: *bytes as usize, read })))
    }

    fn multiply(&mut self, opcode: &Opcode<'_>, operands: [&Operand<'a>; 4]) -> Result<Option<Op>, Trouble> {
        let [of_d, of_a, of_b, of_c] = opcode.types[..] else { return Ok(None) };
        let in_f32 = [of_d, of_c].iter().all(|of| (of.kind, of.bits) == (Kind::Float, 32));
        let format = match (of_a.kind, of_a.bits) {
            (Kind::Brain, 16) => BF16,
            (Kind::Float, 16) => F16,
            (Kind::Tensor, _) => TF32,
            _ => return Ok(None),
        };
        let depths = if format == TF32 {
            [("m16n8k8", 8), ("m16n8k4", 4)]
        } else {
            [("m16n8k16", 16), ("m16n8k8", 8)]
        };
        let depth = depths.iter().find(|(shape, _)| opcode.has(shape)).map(|(_, depth)| *depth);
        let (Some(depth), true, true) = (depth, in_f32, of_a == of_b) else { return Ok(None) };
        let [Operand::Vector(d), Operand::Vector(a), Operand::Vector(b), Operand::Vector(c)] = operands
        else {
            return self.trouble("a fragment is missing");
        };
        // 16 rows of a over 32 lanes, two 16-bit values or one tf32 a register.
        let of_register = if format == TF32 { 1 } else { 2 };
        let counts = [d.len(), a.len(), b.len(), c.len()];
        if counts != [4, 16 * depth / 32 / of_register, 8 * depth / 32 / of_register, 4] {
            return self.trouble("a fragment has another number of registers");
        }
        let mut read = |parts: &[Operand<'a>]| -> Result<Vec<Register>, Trouble> {
            parts.iter().map(|part| self.source(part)).collect()
        };
        let (a, b, c) = (read(a)?, read(b)?, read(c)?);
        let d: Vec<Register> = d.iter().map(|part| self.written(part)).collect::<Result<_, _>>()?;
        let four = |registers: Vec<Register>| [registers[0], registers[1], registers[2], registers[3]];
        Ok(Some(Op::Multiply(Multiply { depth, format, d: four(d), a, b, c: four(c) })))
    }
}

/// Accesses that order others: they are no race.
fn is_atomic(opcode: &Opcode<'_>) -> bool {
    ["volatile", "relaxed", "acquire", "release", "mmio"].iter().any(|word| opcode.has(word))
}
