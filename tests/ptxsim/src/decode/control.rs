//! Branches, calls, barriers, and what lanes tell each other.

use super::{Decoder, Symbol, Trouble};
use crate::alu::{self, Opcode};
use crate::program::{
    Barrier, Condition, Op, Reduction, ReductionTarget, Register, Shuffle, ShuffleMode, VoteMode,
};
use crate::syntax::{Operand, Space, Statement};

/// Calls within calls; a recursion would never end.
const CALLS_MAX: u32 = 32;

/// All lanes.
const EVERY_LANE: u64 = 0xffff_ffff;

impl<'a> Decoder<'a> {
    pub(super) fn control(
        &mut self,
        opcode: &Opcode<'_>,
        operands: &[Operand<'a>],
    ) -> Result<Option<Op>, Trouble> {
        Ok(Some(match (opcode.name, operands) {
            ("bra", [Operand::Name(label)]) => Op::Branch { target: self.label(label)? },
            ("brx", [index, Operand::Name(list)]) => {
                let index = self.source(index)?;
                let Some(names) = self.scopes.targets(list) else {
                    return self.trouble(&format!("`{list}` is not a list of targets"));
                };
                let names = names.to_vec();
                let targets = names.iter().map(|name| self.label(name)).collect::<Result<_, _>>()?;
                Op::BranchIndexed { index, targets }
            }
            ("ret", []) if self.depth > 0 => Op::Branch { target: self.label(RETURN)? },
            ("ret" | "exit", []) => Op::Exit,
            ("trap" | "brkpt", []) => Op::Trap,
            ("nanosleep", _) => Op::Nothing,
            ("bar" | "barrier", _) if opcode.has("warp") => {
                let [members] = self.sources(operands)?;
                Op::WarpBarrier { members }
            }
            ("bar" | "barrier", _) if !opcode.has("cluster") => return self.barrier(opcode, operands),
            ("activemask", [to]) => Op::ActiveMask { to: self.written(to)? },
            ("shfl", [to, rest @ ..]) => return self.shuffle(opcode, to, rest),
            ("vote", [to, source, members @ ..]) => return self.vote(opcode, to, source, members),
            ("match", [to, from, members]) => {
                let Some(of) = opcode.of() else { return Ok(None) };
                let (to, all) = match to {
                    Operand::Both(to, all) => (&**to, self.predicate(all)?),
                    to => (to, None),
                };
                let [from, members] = self.sources(&[from.clone(), members.clone()])?;
                let is_all = opcode.has("all");
                Op::Match { to: self.written(to)?, all, is_all, from, members, bits: of.bits }
            }
            ("redux", [to, from, members]) => {
                let Some(combine) = alu::extreme(opcode) else { return Ok(None) };
                let [from, members] = self.sources(&[from.clone(), members.clone()])?;
                Op::Reduce { to: self.written(to)?, from, members, combine }
            }
            _ => return Ok(None),
        }))
    }

    fn label(&self, name: &str) -> Result<u32, Trouble> {
        match self.scopes.label(name) {
            Some(label) => Ok(label),
            None => self.trouble(&format!("`{name}` is not a label")),
        }
    }

    /// `bar.sync id, threads`, `barrier.red.popc.u32 d, id, threads, p`
    fn barrier(&mut self, opcode: &Opcode<'_>, operands: &[Operand<'a>]) -> Result<Option<Op>, Trouble> {
        if !opcode.has("red") {
            let (id, threads) = match operands {
                [id] => (self.source(id)?, None),
                [id, threads] => (self.source(id)?, Some(self.source(threads)?)),
                _ => return self.trouble("the number of operands is wrong"),
            };
            let waits = !opcode.has("arrive");
            return Ok(Some(Op::Barrier(Barrier { id, threads, waits, reduction: None })));
        }
        let [to, id, threads @ .., source] = operands else {
            return self.trouble("the number of operands is wrong");
        };
        let threads = match threads {
            [] => None,
            [threads] => Some(self.source(threads)?),
            _ => return self.trouble("the number of operands is wrong"),
        };
        let to = if opcode.has("popc") {
            ReductionTarget::Count(self.written(to)?)
        } else {
            let to = match self.predicate(to)? {
                Some(to) => to,
                None => self.new_predicate(),
            };
            if opcode.has("and") { ReductionTarget::All(to) } else { ReductionTarget::Any(to) }
        };
        let reduction = Some(Reduction { source: self.condition(source)?, to });
        Ok(Some(Op::Barrier(Barrier { id: self.source(id)?, threads, waits: true, reduction })))
    }

    /// `shfl.sync.bfly.b32 d|p, a, b, c, members`
    fn shuffle(
        &mut self,
        opcode: &Opcode<'_>,
        to: &Operand<'a>,
        operands: &[Operand<'a>],
    ) -> Result<Option<Op>, Trouble> {
        let mode = match () {
            () if opcode.has("up") => ShuffleMode::Up,
            () if opcode.has("down") => ShuffleMode::Down,
            () if opcode.has("bfly") => ShuffleMode::Butterfly,
            () if opcode.has("idx") => ShuffleMode::Index,
            () => return Ok(None),
        };
        let (to, in_range) = match to {
            Operand::Both(to, in_range) => (&**to, self.predicate(in_range)?),
            to => (to, None),
        };
        let to = self.written(to)?;
        let [from, offset, clamp] = self.sources(operands.get(..3).unwrap_or(operands))?;
        let members = self.members(operands.get(3))?;
        Ok(Some(Op::Shuffle(Shuffle { mode, to, in_range, from, offset, clamp, members })))
    }

    fn vote(
        &mut self,
        opcode: &Opcode<'_>,
        to: &Operand<'a>,
        source: &Operand<'a>,
        members: &[Operand<'a>],
    ) -> Result<Option<Op>, Trouble> {
        let source: Condition = self.condition(source)?;
        let members = self.members(members.first())?;
        let mode = if opcode.has("ballot") {
            VoteMode::Ballot(self.written(to)?)
        } else {
            let to = match self.predicate(to)? {
                Some(to) => to,
                None => self.new_predicate(),
            };
            match () {
                () if opcode.has("all") => VoteMode::All(to),
                () if opcode.has("any") => VoteMode::Any(to),
                () => VoteMode::Uniform(to),
            }
        };
        Ok(Some(Op::Vote { mode, source, members }))
    }

    /// The lanes that take part; all where nothing is said.
    fn members(&mut self, operand: Option<&Operand<'a>>) -> Result<Register, Trouble> {
        match operand {
            Some(operand) => self.source(operand),
            None => Ok(self.immediate(EVERY_LANE)),
        }
    }

    /// Puts a copy of the function here. `call.uni (result), function, (a, b)`: results and arguments are variables
    /// of the caller, and the function's parameters are other names for them.
    pub(super) fn call(
        &mut self,
        statement: &Statement<'a>,
        guard: Option<Condition>,
    ) -> Result<(), Trouble> {
        let mut lists: Vec<&[Operand<'a>]> = Vec::new();
        let mut called = None;
        for operand in &statement.operands {
            match operand {
                Operand::List(list) => lists.push(list),
                Operand::Name(name) if called.is_none() => {
                    called = Some((*name, lists.len()));
                }
                _ => {}
            }
        }
        let globals = self.globals;
        let function = called.and_then(|(name, _)| globals.text.functions.get(name));
        let (Some((name, results_given)), Some(function)) = (called, function) else {
            self.emit(Op::Unknown, guard, statement.opcode);
            return Ok(());
        };
        if self.depth == CALLS_MAX {
            return self.trouble(&format!("`{name}` calls itself; recursion is not supported"));
        }
        let results = if results_given > 0 { lists.remove(0) } else { &[] };
        let arguments = lists.first().copied().unwrap_or(&[]);
        let given = results.iter().chain(arguments);
        let wanted = function.results.iter().chain(&function.parameters);
        if results.len() + arguments.len() != function.results.len() + function.parameters.len() {
            return self.trouble(&format!("`{name}` has another number of parameters"));
        }
        let mut symbols = Vec::new();
        for (operand, parameter) in given.zip(wanted) {
            let symbol = match operand {
                Operand::Name(variable) => self.scopes.symbol(variable),
                _ => None,
            };
            let Some(symbol @ Symbol { space: Space::Local, .. }) = symbol else {
                return self.trouble("an argument is not a parameter variable");
            };
            symbols.push((parameter.name, symbol));
        }
        let end = self.labels.len() as u32;
        self.labels.push(None);
        if let Some(guard) = guard {
            let skip = Condition { negated: !guard.negated, ..guard };
            self.emit(Op::Branch { target: end }, Some(skip), statement.opcode);
        }
        self.depth += 1;
        self.scopes.open();
        self.scopes.add_label(RETURN, end);
        self.body(&function.items, symbols)?;
        self.scopes.close();
        self.depth -= 1;
        self.labels[end as usize] = Some(self.kernel.instructions.len() as u32);
        Ok(())
    }
}

/// The label after the copy of a function: no PTX name has a space.
const RETURN: &str = "after the call";
