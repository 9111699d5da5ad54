//! From items to a kernel: names become registers and addresses, opcodes become operations.
//!
//! Immediates and special registers get registers of their own, so that at run time an operand is always a register.
//! Functions are put in the place of their calls: each call has its own copy with its own registers.

mod arithmetic;
mod control;
mod memory;
mod scope;

use std::collections::BTreeMap;

use crate::alu::Opcode;
use crate::program::{Condition, Instruction, Kernel, Op, Parameter, Predicate, Register, Special};
use crate::syntax::{Body, Item, Operand, ParseError, Place, Space, Statement, Text, Variable};
use scope::{Scopes, Symbol};

/// Where constants begin in the generic address space.
pub(crate) const CONSTANT_WINDOW: u64 = 0x6000_0000_0000;
/// Where a block's shared memory begins in the generic address space.
pub(crate) const SHARED_WINDOW: u64 = 0x5000_0000_0000;
/// Where a thread's local memory begins in the generic address space.
pub(crate) const LOCAL_WINDOW: u64 = 0x5800_0000_0000;
/// The bytes that each window may have.
pub(crate) const WINDOW_BYTES: u64 = 1 << 32;

/// Dynamic shared memory begins after the static one, at a multiple of so many bytes at least.
const DYNAMIC_ALIGN: usize = 16;

/// The constants and variables that all kernels of a module see.
pub(crate) struct Globals<'a> {
    text: &'a Text<'a>,
    symbols: BTreeMap<&'a str, Symbol>,
    shared: BTreeMap<&'a str, &'a Variable<'a>>,
    pub(crate) constants: Vec<u8>,
}

impl<'a> Globals<'a> {
    pub(crate) fn new(text: &'a Text<'a>) -> Self {
        let mut globals =
            Self { text, symbols: BTreeMap::new(), shared: BTreeMap::new(), constants: Vec::new() };
        for (space, variable) in &text.variables {
            if *space == Space::Shared {
                globals.shared.insert(variable.name, variable);
                continue;
            }
            let at = globals.constants.len().next_multiple_of(variable.align);
            globals.constants.resize(at, 0);
            globals.constants.extend(variable.initial.clone().unwrap_or_else(|| vec![0; variable.bytes]));
            let window = if *space == Space::Global { CONSTANT_WINDOW } else { 0 };
            globals.symbols.insert(variable.name, Symbol { space: *space, address: window + at as u64 });
        }
        globals
    }
}

/// What a statement could not be made into an instruction for.
pub(crate) struct Trouble {
    line: u32,
    detail: String,
}

impl Trouble {
    pub(crate) fn at(self, lines: &[String]) -> ParseError {
        let text = lines.get(self.line as usize - 1).map_or("", |line| line.trim());
        ParseError { line: self.line, text: text.to_owned(), detail: self.detail }
    }
}

/// Makes a kernel of its text.
pub(crate) fn kernel(body: &Body<'_>, globals: &Globals<'_>) -> Result<Kernel, Trouble> {
    let mut decoder = Decoder::new(body, globals);
    let first_line = body.items.iter().find_map(|item| match item {
        Item::Statement(statement) => Some(statement.line),
        _ => None,
    });
    decoder.line = first_line.unwrap_or(1);
    let symbols = decoder.declare_parameters(&body.parameters);
    decoder.body(&body.items, symbols)?;
    decoder.emit(Op::Exit, None, "exit");
    decoder.finish()
}

/// A kernel under way.
struct Decoder<'a> {
    globals: &'a Globals<'a>,
    kernel: Kernel,
    scopes: Scopes<'a>,
    immediates: BTreeMap<u64, Register>,
    specials: BTreeMap<Special, Register>,
    opcodes: BTreeMap<String, u32>,
    /// The instruction that each label stands before, once it is known.
    labels: Vec<Option<u32>>,
    /// Shared variables of the module that this kernel uses.
    shared: BTreeMap<&'a str, u64>,
    dynamic_align: usize,
    /// Calls that are being put in place.
    depth: u32,
    line: u32,
    place: Option<Place>,
}

impl<'a> Decoder<'a> {
    fn new(body: &Body<'_>, globals: &'a Globals<'a>) -> Self {
        let kernel = Kernel {
            name: body.name.to_owned(),
            parameters: Vec::new(),
            parameter_bytes: 0,
            instructions: Vec::new(),
            opcodes: Vec::new(),
            registers: 0,
            predicates: 1,
            constants: Vec::new(),
            specials: Vec::new(),
            static_shared: 0,
            local_bytes: 0,
            threads_max: body.threads_max,
        };
        Self {
            globals,
            kernel,
            scopes: Scopes::default(),
            immediates: BTreeMap::new(),
            specials: BTreeMap::new(),
            opcodes: BTreeMap::new(),
            labels: Vec::new(),
            shared: BTreeMap::new(),
            dynamic_align: DYNAMIC_ALIGN,
            depth: 0,
            line: 1,
            place: None,
        }
    }

    fn declare_parameters(&mut self, parameters: &[Variable<'a>]) -> Vec<(&'a str, Symbol)> {
        let mut symbols = Vec::new();
        for variable in parameters {
            let offset = self.kernel.parameter_bytes.next_multiple_of(variable.align);
            self.kernel.parameter_bytes = offset + variable.bytes;
            let name = variable.name.to_owned();
            self.kernel.parameters.push(Parameter { name, offset, bytes: variable.bytes });
            symbols.push((variable.name, Symbol { space: Space::Parameter, address: offset as u64 }));
        }
        symbols
    }

    /// Decodes the items of a kernel, or of a function whose parameters are `symbols`.
    fn body(&mut self, items: &[Item<'a>], symbols: Vec<(&'a str, Symbol)>) -> Result<(), Trouble> {
        self.scopes.open();
        for (name, symbol) in symbols {
            self.scopes.add_symbol(name, symbol);
        }
        for item in items {
            // A label may be used before it stands.
            if let Item::Label(name) = item {
                self.scopes.add_label(name, self.labels.len() as u32);
                self.labels.push(None);
            }
        }
        for item in items {
            self.item(item)?;
        }
        self.scopes.close();
        Ok(())
    }

    fn item(&mut self, item: &Item<'a>) -> Result<(), Trouble> {
        match item {
            Item::Open => self.scopes.open(),
            Item::Close => self.scopes.close(),
            Item::Label(name) => {
                let label = self.scopes.label(name).expect("every label of a body is known before");
                self.labels[label as usize] = Some(self.kernel.instructions.len() as u32);
            }
            Item::Targets(name, targets) => self.scopes.add_targets(name, targets.clone()),
            Item::Registers(of, names) => {
                for (name, count) in names {
                    self.scopes.declare(name, *count, *of, &mut self.kernel);
                }
            }
            Item::Variable(space, variable) => self.variable(*space, variable),
            Item::Statement(statement) => {
                self.line = statement.line;
                self.place = statement.place;
                self.statement(statement)?;
            }
        }
        Ok(())
    }

    fn variable(&mut self, space: Space, variable: &Variable<'a>) {
        let symbol = match space {
            Space::Shared => Symbol { space, address: self.place_shared(variable) },
            // The parameters of calls live with the thread, like its local variables.
            _ => Symbol { space: Space::Local, address: self.place_local(variable) },
        };
        self.scopes.add_symbol(variable.name, symbol);
    }

    fn place_local(&mut self, variable: &Variable<'_>) -> u64 {
        let at = self.kernel.local_bytes.next_multiple_of(variable.align);
        self.kernel.local_bytes = at + variable.bytes;
        at as u64
    }

    fn place_shared(&mut self, variable: &Variable<'_>) -> u64 {
        let at = self.kernel.static_shared.next_multiple_of(variable.align);
        self.kernel.static_shared = at + variable.bytes;
        at as u64
    }

    fn statement(&mut self, statement: &Statement<'a>) -> Result<(), Trouble> {
        let opcode = Opcode::parse(statement.opcode);
        let guard = statement.guard.as_ref().map(|guard| self.condition(guard)).transpose()?;
        if opcode.name == "call" {
            return self.call(statement, guard);
        }
        let op = self.operation(&opcode, &statement.operands)?;
        self.emit(op, guard, statement.opcode);
        Ok(())
    }

    fn operation(&mut self, opcode: &Opcode<'_>, operands: &[Operand<'a>]) -> Result<Op, Trouble> {
        if !opcode.is_understood() {
            return Ok(Op::Unknown);
        }
        let found = match self.control(opcode, operands)? {
            Some(op) => Some(op),
            None => match self.memory(opcode, operands)? {
                Some(op) => Some(op),
                None => self.arithmetic(opcode, operands)?,
            },
        };
        Ok(found.unwrap_or(Op::Unknown))
    }

    fn emit(&mut self, op: Op, guard: Option<Condition>, opcode: &str) {
        let next = self.opcodes.len() as u32;
        let number = *self.opcodes.entry(opcode.to_owned()).or_insert_with(|| {
            self.kernel.opcodes.push(opcode.to_owned());
            next
        });
        let instruction = Instruction { guard, op, opcode: number, line: self.line, place: self.place };
        self.kernel.instructions.push(instruction);
    }

    fn trouble<T>(&self, detail: &str) -> Result<T, Trouble> {
        Err(Trouble { line: self.line, detail: detail.to_owned() })
    }

    /// Puts in what is known only at the end: where labels stand, and where dynamic shared memory begins.
    fn finish(mut self) -> Result<Kernel, Trouble> {
        let place = |label: &mut u32| {
            *label = self.labels[*label as usize].expect("every label of a body was met");
        };
        for instruction in &mut self.kernel.instructions {
            match &mut instruction.op {
                Op::Branch { target } => place(target),
                Op::BranchIndexed { targets, .. } => targets.iter_mut().for_each(place),
                _ => {}
            }
        }
        self.kernel.static_shared = self.kernel.static_shared.next_multiple_of(self.dynamic_align);
        let dynamic = self.kernel.static_shared as u64;
        for (register, special) in &self.kernel.specials {
            if *special == Special::DynamicShared {
                self.kernel.constants.push((*register, dynamic));
            }
        }
        self.kernel.constants.sort_unstable();
        Ok(self.kernel)
    }

    // Operands

    fn new_register(&mut self) -> Register {
        self.kernel.registers += 1;
        self.kernel.registers as Register - 1
    }

    fn new_predicate(&mut self) -> Predicate {
        self.kernel.predicates += 1;
        self.kernel.predicates as Predicate - 1
    }

    fn immediate(&mut self, bits: u64) -> Register {
        if let Some(register) = self.immediates.get(&bits) {
            return *register;
        }
        let register = self.new_register();
        self.immediates.insert(bits, register);
        self.kernel.constants.push((register, bits));
        register
    }

    fn special(&mut self, special: Special) -> Register {
        if let Some(register) = self.specials.get(&special) {
            return *register;
        }
        let register = self.new_register();
        self.specials.insert(special, register);
        self.kernel.specials.push((register, special));
        register
    }

    /// A register that holds what the operand says.
    fn source(&mut self, operand: &Operand<'a>) -> Result<Register, Trouble> {
        match operand {
            Operand::Number(bits) => Ok(self.immediate(*bits)),
            Operand::Name(name) => {
                if let Some(register) = self.scopes.register(name) {
                    return Ok(register);
                }
                if let Some(special) = scope::special(name) {
                    return Ok(self.special(special));
                }
                match self.symbol(name) {
                    Some(Base::At(symbol)) => Ok(self.immediate(symbol.address)),
                    Some(Base::Dynamic) => Ok(self.special(Special::DynamicShared)),
                    None => self.trouble(&format!("`{name}` is not declared")),
                }
            }
            Operand::Address(base, offset) => match &**base {
                Operand::Name(name) => match self.symbol(name) {
                    Some(Base::At(symbol)) => Ok(self.immediate(symbol.address.wrapping_add(*offset as u64))),
                    _ => self.trouble(&format!("`{name}` is not a variable")),
                },
                _ => self.trouble("a variable is missing"),
            },
            _ => self.trouble("an operand of another kind is needed"),
        }
    }

    fn sources<const COUNT: usize>(
        &mut self,
        operands: &[Operand<'a>],
    ) -> Result<[Register; COUNT], Trouble> {
        if operands.len() != COUNT {
            return self.trouble("the number of operands is wrong");
        }
        let mut registers = [0; COUNT];
        for (register, operand) in registers.iter_mut().zip(operands) {
            *register = self.source(operand)?;
        }
        Ok(registers)
    }

    /// The register that an operand names to be written; nothing for `_`.
    fn target(&self, operand: &Operand<'_>) -> Result<Option<Register>, Trouble> {
        match operand {
            Operand::Name("_") => Ok(None),
            Operand::Name(name) => match self.scopes.register(name) {
                Some(register) => Ok(Some(register)),
                None => self.trouble(&format!("`{name}` is not a register")),
            },
            _ => self.trouble("a register is missing"),
        }
    }

    /// The register to be written, one that nobody reads for `_`.
    fn written(&mut self, operand: &Operand<'_>) -> Result<Register, Trouble> {
        match self.target(operand)? {
            Some(register) => Ok(register),
            None => Ok(self.new_register()),
        }
    }

    fn predicate(&self, operand: &Operand<'_>) -> Result<Option<Predicate>, Trouble> {
        match operand {
            Operand::Name("_") => Ok(None),
            Operand::Name(name) => match self.scopes.predicate(name) {
                Some(predicate) => Ok(Some(predicate)),
                None => self.trouble(&format!("`{name}` is not a predicate")),
            },
            _ => self.trouble("a predicate is missing"),
        }
    }

    fn condition(&self, operand: &Operand<'_>) -> Result<Condition, Trouble> {
        let (name, negated) = match operand {
            Operand::Name(name) => (name, false),
            Operand::Not(name) => (name, true),
            Operand::Number(bits) => {
                return Ok(if *bits == 0 { Condition::FALSE } else { Condition::TRUE });
            }
            _ => return self.trouble("a predicate is missing"),
        };
        match self.scopes.predicate(name) {
            Some(predicate) => Ok(Condition { predicate, negated }),
            None => self.trouble(&format!("`{name}` is not a predicate")),
        }
    }

    fn symbol(&mut self, name: &str) -> Option<Base> {
        if let Some(symbol) = self.scopes.symbol(name).or_else(|| self.globals.symbols.get(name).copied()) {
            return Some(Base::At(symbol));
        }
        let globals = self.globals;
        let (name, variable) = globals.shared.get_key_value(name)?;
        if variable.unsized_array {
            self.dynamic_align = self.dynamic_align.max(variable.align);
            return Some(Base::Dynamic);
        }
        let address = match self.shared.get(name) {
            Some(address) => *address,
            None => self.place_shared(variable),
        };
        self.shared.insert(name, address);
        Some(Base::At(Symbol { space: Space::Shared, address }))
    }
}

/// Where a variable is.
enum Base {
    At(Symbol),
    /// After all static shared memory.
    Dynamic,
}
