//! The outer level of a PTX text: kernels, functions, variables, the list of source files.

use super::body;
use super::tokens::{Token, Tokens, number};
use super::{Body, ParseError, Space, Text, Type, Variable};

/// Reads a whole PTX text.
pub(crate) fn parse(text: &str) -> Result<Text<'_>, ParseError> {
    let mut tokens = Tokens::new(text)?;
    let mut module = Text::default();
    while let Some(token) = tokens.peek() {
        let Token::Word(word) = token else {
            if tokens.takes(';') {
                continue;
            }
            return Err(tokens.error("a directive is missing"));
        };
        let line_start = tokens.error("unknown directive");
        tokens.take();
        match word {
            ".version" | ".target" | ".address_size" | ".loc" => {
                tokens.rest_of_line();
            }
            ".file" => {
                if let [Token::Word(index), Token::Text(path), ..] = tokens.rest_of_line()[..]
                    && let Ok(index) = index.parse()
                {
                    module.files.insert(index, path.to_owned());
                }
            }
            ".section" => tokens.skip_braces()?,
            ".visible" | ".extern" | ".weak" | ".common" => {}
            ".entry" => {
                let kernel = parse_body(&mut tokens, Vec::new())?;
                module.kernels.extend(kernel);
            }
            ".func" => {
                while matches!(tokens.peek(), Some(Token::Word(".noreturn"))) {
                    tokens.take();
                }
                let results = parameters(&mut tokens)?;
                if let Some(function) = parse_body(&mut tokens, results)? {
                    module.functions.insert(function.name, function);
                }
            }
            ".const" | ".global" | ".shared" => {
                let space = Space::named(&word[1..]).expect("one of three spaces");
                let variable = variable(&mut tokens)?;
                tokens.expect(';')?;
                module.variables.push((space, variable));
            }
            _ => return Err(line_start),
        }
    }
    Ok(module)
}

/// From the name to the end of the body; nothing if there is only a prototype.
fn parse_body<'a>(
    tokens: &mut Tokens<'a>,
    results: Vec<Variable<'a>>,
) -> Result<Option<Body<'a>>, ParseError> {
    let name = tokens.word()?;
    let parameters = parameters(tokens)?;
    let mut threads_max = None;
    loop {
        match tokens.peek() {
            Some(Token::Mark('{')) => break,
            Some(Token::Mark(';')) => {
                tokens.take();
                return Ok(None);
            }
            Some(Token::Word(word @ (".maxntid" | ".reqntid"))) => {
                tokens.take();
                let mut threads = 1u64;
                loop {
                    threads *= tokens.number()?;
                    if !tokens.takes(',') {
                        break;
                    }
                }
                let threads = u32::try_from(threads).map_err(|_| tokens.error(word))?;
                threads_max = Some(threads);
            }
            Some(_) => {
                tokens.take();
            }
            None => return Err(tokens.error("a body is missing")),
        }
    }
    let items = body::items(tokens)?;
    Ok(Some(Body { name, results, parameters, items, threads_max }))
}

/// `(.param .u64 a, .param .align 4 .b8 b[8])`, or nothing.
fn parameters<'a>(tokens: &mut Tokens<'a>) -> Result<Vec<Variable<'a>>, ParseError> {
    let mut found = Vec::new();
    if !tokens.takes('(') {
        return Ok(found);
    }
    while !tokens.takes(')') {
        found.push(variable(tokens)?);
        tokens.takes(',');
    }
    Ok(found)
}

/// `.align 16 .b8 name[64] = {1, 2}`, its space already taken or named here.
pub(super) fn variable<'a>(tokens: &mut Tokens<'a>) -> Result<Variable<'a>, ParseError> {
    let mut align = 1;
    let mut of_pointee = false;
    let mut element = None;
    let name = loop {
        let word = tokens.word()?;
        match word {
            ".align" => {
                let number = tokens.number()? as usize;
                align = if of_pointee { align } else { number };
            }
            ".ptr" => of_pointee = true,
            _ => match word.strip_prefix('.') {
                Some(attribute) => element = Type::named(attribute).or(element),
                None => break word,
            },
        }
    };
    let element = element.ok_or_else(|| tokens.error("a variable has no type"))?;
    let mut count = 1;
    let mut unsized_array = false;
    while tokens.takes('[') {
        if tokens.takes(']') {
            unsized_array = true;
            count = 0;
        } else {
            count *= tokens.number()? as usize;
            tokens.expect(']')?;
        }
    }
    let bytes = count * element.bytes();
    let initial = if tokens.takes('=') { Some(initial(tokens, element, bytes)?) } else { None };
    Ok(Variable { name, align: align.max(element.bytes()), bytes, initial, unsized_array })
}

/// `{1, 2, {3}}` or one number; the rest is zero.
fn initial(tokens: &mut Tokens<'_>, element: Type, bytes: usize) -> Result<Vec<u8>, ParseError> {
    let mut values = Vec::with_capacity(bytes);
    let mut depth = 0;
    loop {
        if tokens.takes('{') {
            depth += 1;
        } else if tokens.takes('}') {
            depth -= 1;
        } else if !tokens.takes(',') {
            if let Some(Token::Word(word)) = tokens.peek()
                && number(word).is_none()
            {
                return Err(tokens.error("an address as initial value is not supported"));
            }
            values.extend_from_slice(&tokens.number()?.to_le_bytes()[..element.bytes()]);
        }
        if depth == 0 {
            break;
        }
    }
    if values.len() > bytes {
        return Err(tokens.error("more initial values than the variable holds"));
    }
    values.resize(bytes, 0);
    Ok(values)
}
