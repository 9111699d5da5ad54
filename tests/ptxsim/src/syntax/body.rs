//! The inside of a kernel or function: registers, variables, labels, instructions.

use std::collections::BTreeMap;

use super::module::variable;
use super::tokens::{Token, Tokens, number};
use super::{Item, Operand, ParseError, Place, Space, Statement, Type};

/// From `{` to the `}` that closes it.
pub(super) fn items<'a>(tokens: &mut Tokens<'a>) -> Result<Vec<Item<'a>>, ParseError> {
    tokens.expect('{')?;
    let mut items = Vec::new();
    let mut depth = 1;
    let mut places = Places::default();
    while depth > 0 {
        let Some(token) = tokens.peek() else { return Err(tokens.error("`}` is missing")) };
        match token {
            Token::Mark('{') => {
                tokens.take();
                depth += 1;
                items.push(Item::Open);
            }
            Token::Mark('}') => {
                tokens.take();
                depth -= 1;
                if depth > 0 {
                    items.push(Item::Close);
                }
            }
            Token::Mark(';') => {
                tokens.take();
            }
            Token::Word(".loc") => {
                tokens.take();
                places.read(&tokens.rest_of_line());
            }
            Token::Word(word) if word.starts_with('.') => items.extend(directive(tokens)?),
            Token::Word(label) if tokens.peek_second() == Some(Token::Mark(':')) => {
                tokens.take();
                tokens.take();
                if tokens.peek() == Some(Token::Word(".branchtargets")) {
                    tokens.take();
                    items.push(Item::Targets(label, names(tokens)?));
                } else {
                    items.push(Item::Label(label));
                }
            }
            _ => items.push(Item::Statement(statement(tokens, places.current)?)),
        }
    }
    Ok(items)
}

/// The `.loc` directives so far. Before what was inlined through several calls stands one for each of them, from the
/// outside in, each with the place of its call only.
#[derive(Default)]
struct Places {
    calls: BTreeMap<(u32, u32), Option<(u32, u32)>>,
    current: Option<Place>,
}

impl Places {
    /// `.loc 1 12 3, function_name $L, inlined_at 1 40 5`
    fn read(&mut self, words: &[Token<'_>]) {
        let pair = |at: usize| match words.get(at..at + 2)? {
            [Token::Word(file), Token::Word(line)] => Some((file.parse().ok()?, line.parse().ok()?)),
            _ => None,
        };
        // Line 0 is code of no line in particular.
        let Some(own) = pair(0).filter(|(_, line)| *line > 0) else { return };
        let call = words.iter().position(|word| *word == Token::Word("inlined_at"));
        self.calls.insert(own, call.and_then(|at| pair(at + 1)));
        let mut frames = vec![own];
        while let Some(Some(call)) = self.calls.get(&frames[frames.len() - 1])
            && !frames.contains(call)
        {
            frames.push(*call);
        }
        let (kernel_file, _) = frames[frames.len() - 1];
        let in_kernel_file = frames.iter().find(|frame| frame.0 == kernel_file);
        self.current = in_kernel_file.map(|frame| Place { own, in_kernel_file: *frame });
    }
}

fn directive<'a>(tokens: &mut Tokens<'a>) -> Result<Option<Item<'a>>, ParseError> {
    let at_directive = tokens.error("unknown directive");
    let word = tokens.word()?;
    match word {
        ".reg" => {
            let of = tokens.word()?;
            let of = of.strip_prefix('.').and_then(Type::named).ok_or(at_directive)?;
            let mut registers = Vec::new();
            loop {
                let name = tokens.word()?;
                let count = if tokens.takes('<') {
                    let count = tokens.number()? as u32;
                    tokens.expect('>')?;
                    Some(count)
                } else {
                    None
                };
                registers.push((name, count));
                if !tokens.takes(',') {
                    break;
                }
            }
            tokens.expect(';')?;
            Ok(Some(Item::Registers(of, registers)))
        }
        ".local" | ".shared" | ".param" | ".const" | ".global" => {
            let space = Space::named(&word[1..]).ok_or(at_directive)?;
            let variable = variable(tokens)?;
            tokens.expect(';')?;
            Ok(Some(Item::Variable(space, variable)))
        }
        ".pragma" => {
            while !tokens.takes(';') {
                tokens.take().ok_or_else(|| at_directive.clone())?;
            }
            Ok(None)
        }
        _ => Err(at_directive),
    }
}

fn names<'a>(tokens: &mut Tokens<'a>) -> Result<Vec<&'a str>, ParseError> {
    let mut names = Vec::new();
    loop {
        names.push(tokens.word()?);
        if !tokens.takes(',') {
            tokens.expect(';')?;
            return Ok(names);
        }
    }
}

fn statement<'a>(tokens: &mut Tokens<'a>, place: Option<Place>) -> Result<Statement<'a>, ParseError> {
    let line = tokens.line();
    let guard = if tokens.takes('@') { Some(operand(tokens)?) } else { None };
    let opcode = tokens.word()?;
    let mut operands = Vec::new();
    while !tokens.takes(';') {
        operands.push(operand(tokens)?);
        if !tokens.takes(',') && tokens.peek() != Some(Token::Mark(';')) {
            return Err(tokens.error("`;` is missing"));
        }
    }
    Ok(Statement { line, place, guard, opcode, operands })
}

fn operand<'a>(tokens: &mut Tokens<'a>) -> Result<Operand<'a>, ParseError> {
    if tokens.takes('{') {
        return Ok(Operand::Vector(list(tokens, '}')?));
    }
    if tokens.takes('(') {
        return Ok(Operand::List(list(tokens, ')')?));
    }
    if tokens.takes('!') {
        return tokens.word().map(Operand::Not);
    }
    if tokens.takes('[') {
        let inside = operand(tokens)?;
        tokens.expect(']')?;
        return Ok(match inside {
            Operand::Address(base, offset) => Operand::Address(base, offset),
            base => Operand::Address(Box::new(base), 0),
        });
    }
    let first = match tokens.peek() {
        Some(Token::Word(word)) if number(word).is_none() => {
            tokens.take();
            Operand::Name(word)
        }
        _ => Operand::Number(tokens.number()?),
    };
    if tokens.takes('|') {
        return Ok(Operand::Both(Box::new(first), Box::new(operand(tokens)?)));
    }
    if tokens.takes('+') {
        return Ok(Operand::Address(Box::new(first), tokens.number()? as i64));
    }
    Ok(first)
}

fn list<'a>(tokens: &mut Tokens<'a>, end: char) -> Result<Vec<Operand<'a>>, ParseError> {
    let mut operands = Vec::new();
    while !tokens.takes(end) {
        operands.push(operand(tokens)?);
        tokens.takes(',');
    }
    Ok(operands)
}
