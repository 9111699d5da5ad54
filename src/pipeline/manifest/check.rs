//! Holds a stage's parameters against the JSON Schema of its kind and tells everything that does not fit,
//! each at the key or value it concerns.
//!
//! Supports what `schemars` derives from our parameter structs: types, properties, required and additional
//! keys, enums and constants, `anyOf`/`oneOf` of tagged and untagged enums, references, items and bounds.
//! General validators know no spans and no kinder words, which is why this is not one.

use serde_json::Value as Json;

use crate::manifest::node::{Key, Node, Value};
use crate::manifest::problem::{Problem, quoted, suggestion};
use crate::manifest::source::Span;

/// References followed in a row before a schema is taken for endless.
const REFERENCES_MAX: usize = 32;
/// More problems of one stage are not looked for.
const PROBLEMS_MAX: usize = 100;

/// What is wrong with `with`; `at` is where a missing parameter is told.
pub(crate) fn check(schema: &Json, with: &Node, at: Span) -> Vec<Problem> {
    let mut problems = Vec::new();
    Checker { root: schema }.node(schema, with, at, &mut problems);
    problems
}

struct Checker<'s> {
    root: &'s Json,
}

impl<'s> Checker<'s> {
    fn node(&self, schema: &'s Json, node: &Node, at: Span, problems: &mut Vec<Problem>) {
        let schema = self.followed(schema);
        if node.value == Value::Broken || problems.len() > PROBLEMS_MAX {
            return;
        }
        if schema == &Json::Bool(false) {
            problems.push(Problem::new("manifest::wrong_type", node.span, "nothing is allowed here"));
            return;
        }
        for all in list(schema, "allOf") {
            self.node(all, node, at, problems);
        }
        let branches: Vec<&Json> = list(schema, "anyOf").chain(list(schema, "oneOf")).collect();
        if !branches.is_empty() {
            self.branches(&branches, node, at, problems);
        }
        if !self.fits_type(schema, node) {
            problems.push(self.wrong_type(&[schema], node));
            return;
        }
        let constants = constants(schema);
        if !constants.is_empty() && !constants.contains(&&node.to_json()) {
            problems.push(not_one_of(&constants, node));
            return;
        }
        match &node.value {
            Value::Int(number) => bounds(schema, *number as f64, node, problems),
            Value::Float(number) => bounds(schema, *number, node, problems),
            Value::String(text) => {
                let length = text.chars().count() as u64;
                lengths(schema, ("minLength", "maxLength"), length, "character", node, problems);
            }
            Value::List(items) => self.items(schema, items, node, problems),
            Value::Map(entries) => self.entries(schema, entries, at, problems),
            Value::Null | Value::Bool(_) | Value::Broken => {}
        }
    }

    /// The schema itself, behind any `$ref`.
    fn followed(&self, mut schema: &'s Json) -> &'s Json {
        for _ in 0..REFERENCES_MAX {
            let Some(reference) = schema.get("$ref").and_then(Json::as_str) else { break };
            let pointer = reference.strip_prefix('#').unwrap_or(reference);
            let Some(target) = self.root.pointer(pointer) else { break };
            schema = target;
        }
        schema
    }

    fn items(&self, schema: &'s Json, items: &[Node], node: &Node, problems: &mut Vec<Problem>) {
        lengths(schema, ("minItems", "maxItems"), items.len() as u64, "entry", node, problems);
        let prefix: Vec<&Json> = list(schema, "prefixItems").collect();
        for (index, item) in items.iter().enumerate() {
            if let Some(schema) = prefix.get(index).copied().or_else(|| schema.get("items")) {
                self.node(schema, item, item.span, problems);
            }
        }
    }

    fn entries(&self, schema: &'s Json, entries: &[(Key, Node)], at: Span, problems: &mut Vec<Problem>) {
        let properties = schema.get("properties").and_then(Json::as_object);
        let additional = schema.get("additionalProperties").or_else(|| schema.get("unevaluatedProperties"));
        for (key, node) in entries {
            match (properties.and_then(|properties| properties.get(&key.text)), additional) {
                (Some(schema), _) => self.node(schema, node, key.span, problems),
                (None, Some(Json::Bool(false))) => {
                    let known = properties.into_iter().flat_map(|properties| properties.keys());
                    problems.push(unknown_key(key, known.map(String::as_str)));
                }
                (None, Some(schema)) => self.node(schema, node, key.span, problems),
                (None, None) => {}
            }
            if problems.len() > PROBLEMS_MAX {
                return;
            }
        }
        for name in list(schema, "required").filter_map(Json::as_str) {
            if !entries.iter().any(|(key, _)| key.text == name) {
                problems.push(self.missing(properties.and_then(|all| all.get(name)), name, at));
            }
        }
    }

    fn missing(&self, schema: Option<&'s Json>, name: &str, at: Span) -> Problem {
        let problem = Problem::new("manifest::missing_key", at, format!("`{name}` is missing"));
        let Some(schema) = schema else { return problem };
        let doc = schema.get("description").and_then(Json::as_str).unwrap_or_default();
        let doc = doc.lines().next().unwrap_or_default().trim_end_matches('.');
        let wanted = self.phrase(schema);
        problem.hint(if doc.is_empty() {
            format!("it is {wanted}")
        } else {
            format!("it is {wanted}: {doc}")
        })
    }

    /// A value that has to fit one of several schemas. Where none fits, the problems of the one that was
    /// meant are told.
    fn branches(&self, branches: &[&'s Json], node: &Node, at: Span, problems: &mut Vec<Problem>) {
        let mut tried = Vec::with_capacity(branches.len());
        for branch in branches {
            let branch = self.followed(branch);
            let mut found = Vec::new();
            if self.is_meant(branch, node) {
                self.node(branch, node, at, &mut found);
                if found.is_empty() {
                    return;
                }
                tried.push(found);
            }
        }
        if let [_] = tried.as_slice() {
            problems.extend(tried.pop().into_iter().flatten());
            return;
        }
        let followed: Vec<&Json> = branches.iter().map(|branch| self.followed(branch)).collect();
        problems.push(self.no_branch(&followed, node, at));
    }

    /// True if `node` has the type and, where the schema has one, the tag of `schema`.
    fn is_meant(&self, schema: &'s Json, node: &Node) -> bool {
        if !self.fits_type(schema, node) {
            return false;
        }
        let own = constants(schema);
        let Value::Map(_) = node.value else {
            return own.is_empty() || own.contains(&&node.to_json());
        };
        if let Some(outer) = outer_tag(schema) {
            return node.get(outer).is_some();
        }
        self.tags(schema).all(|(name, constant)| node.get(name).is_some_and(|tag| tag.to_json() == *constant))
    }

    /// The properties of an object schema that can hold one constant only, and it.
    fn tags(&self, schema: &'s Json) -> impl Iterator<Item = (&'s str, &'s Json)> {
        let properties = schema.get("properties").and_then(Json::as_object).into_iter().flatten();
        properties.filter_map(|(name, schema)| match constants(schema).as_slice() {
            [constant] => Some((name.as_str(), *constant)),
            _ => None,
        })
    }

    fn no_branch(&self, branches: &[&'s Json], node: &Node, at: Span) -> Problem {
        let choices: Vec<&Json> = branches.iter().flat_map(|branch| constants(branch)).collect();
        if let (Value::String(_), false) = (&node.value, choices.is_empty()) {
            return not_one_of(&choices, node);
        }
        if let Value::Map(entries) = &node.value {
            let tags: Vec<_> = branches.iter().flat_map(|branch| self.tags(branch)).collect();
            if let Some(&(name, _)) = tags.first() {
                let choices: Vec<&Json> = tags.iter().map(|(_, constant)| *constant).collect();
                return match node.get(name) {
                    Some(tag) => not_one_of(&choices, tag),
                    None => Problem::new("manifest::missing_key", at, format!("`{name}` is missing"))
                        .hint(format!("it is {}", one_of(&choices))),
                };
            }
            let outer: Vec<&str> = branches.iter().filter_map(|branch| outer_tag(branch)).collect();
            if let ([(key, _)], false) = (entries.as_slice(), outer.is_empty()) {
                return unknown_key(key, outer.iter().copied());
            }
        }
        self.wrong_type(branches, node)
    }

    fn fits_type(&self, schema: &Json, node: &Node) -> bool {
        let fits = |name: &str| match &node.value {
            Value::Null => name == "null",
            Value::Bool(_) => name == "boolean",
            Value::Int(_) => name == "integer" || name == "number",
            Value::Float(_) => name == "number",
            Value::String(_) => name == "string",
            Value::List(_) => name == "array",
            Value::Map(_) => name == "object",
            Value::Broken => true,
        };
        match schema.get("type") {
            Some(Json::String(name)) => fits(name),
            Some(Json::Array(names)) => names.iter().filter_map(Json::as_str).any(fits),
            _ => true,
        }
    }

    fn wrong_type(&self, schemas: &[&'s Json], node: &Node) -> Problem {
        let mut wanted: Vec<String> = Vec::new();
        for schema in schemas {
            let phrase = self.phrase(schema);
            if !wanted.contains(&phrase) {
                wanted.push(phrase);
            }
        }
        let message = format!("expected {}, found {}", wanted.join(" or "), node.found());
        let problem = Problem::new("manifest::wrong_type", node.span, message);
        match self.type_hint(schemas, node) {
            Some(hint) => problem.hint(hint),
            None => problem,
        }
    }

    /// The usual slips: quotes too many, quotes too few, a value for a list of one, a word for a boolean.
    fn type_hint(&self, schemas: &[&'s Json], node: &Node) -> Option<String> {
        let wants = |name: &str| {
            schemas.iter().any(|schema| match schema.get("type") {
                _ if !constants(schema).is_empty() => false,
                Some(Json::String(wanted)) => wanted == name,
                Some(Json::Array(names)) => names.iter().any(|wanted| wanted == name),
                _ => false,
            })
        };
        match &node.value {
            Value::String(text) if wants("boolean") => match text.to_ascii_lowercase().as_str() {
                "yes" | "on" | "y" => Some("write `true`".to_owned()),
                "no" | "off" | "n" => Some("write `false`".to_owned()),
                "true" | "false" => Some("remove the quotes".to_owned()),
                _ => None,
            },
            Value::String(text) if wants("integer") && text.parse::<i64>().is_ok() => {
                Some("remove the quotes".to_owned())
            }
            Value::String(text) if wants("number") && text.parse::<f64>().is_ok() => {
                Some("remove the quotes".to_owned())
            }
            Value::Int(_) | Value::Float(_) | Value::Bool(_) if wants("string") => {
                Some("put it in quotes".to_owned())
            }
            Value::String(_) | Value::Int(_) | Value::Float(_) if wants("array") => {
                Some("write a list: `[...]`".to_owned())
            }
            _ => None,
        }
    }

    /// What a schema asks for, in words.
    fn phrase(&self, schema: &'s Json) -> String {
        let schema = self.followed(schema);
        let constants = constants(schema);
        if !constants.is_empty() {
            return one_of(&constants);
        }
        let mut phrases: Vec<String> = Vec::new();
        let named = match schema.get("type") {
            Some(Json::String(name)) => vec![name.as_str()],
            Some(Json::Array(names)) => names.iter().filter_map(Json::as_str).collect(),
            _ => Vec::new(),
        };
        phrases.extend(
            named.into_iter().filter(|name| *name != "null").map(|name| type_phrase(name).to_owned()),
        );
        let branches: Vec<&Json> = list(schema, "anyOf").chain(list(schema, "oneOf")).collect();
        let choices: Vec<&Json> =
            branches.iter().flat_map(|branch| self::constants(self.followed(branch))).collect();
        if !choices.is_empty() {
            phrases.push(one_of(&choices));
        }
        for branch in branches {
            let branch = self.followed(branch);
            let is_told = !self::constants(branch).is_empty() || branch.get("type") == Some(&"null".into());
            let phrase = self.phrase(branch);
            if !is_told && !phrases.contains(&phrase) {
                phrases.push(phrase);
            }
        }
        if phrases.is_empty() { "a value".to_owned() } else { phrases.join(" or ") }
    }
}

fn list<'s>(schema: &'s Json, word: &str) -> impl Iterator<Item = &'s Json> {
    schema.get(word).and_then(Json::as_array).into_iter().flatten()
}

/// The only values `schema` allows, by `const` or `enum`; empty if it does not say.
fn constants(schema: &Json) -> Vec<&Json> {
    schema.get("const").into_iter().chain(list(schema, "enum")).collect()
}

/// The key of an externally tagged variant: `{ key: ... }`.
fn outer_tag(schema: &Json) -> Option<&str> {
    let properties = schema.get("properties")?.as_object()?;
    let (name, inner) = properties.iter().next().filter(|_| properties.len() == 1)?;
    let is_required = list(schema, "required").any(|required| required == name);
    (is_required && constants(inner).is_empty()).then_some(name)
}

fn one_of(constants: &[&Json]) -> String {
    let shown = |constant: &&Json| match constant {
        Json::String(text) => format!("`{text}`"),
        other => format!("`{other}`"),
    };
    match constants {
        [only] => shown(only),
        _ => format!("one of {}", constants.iter().map(shown).collect::<Vec<_>>().join(", ")),
    }
}

fn not_one_of(constants: &[&Json], node: &Node) -> Problem {
    let message = format!("expected {}, found {}", one_of(constants), node.found());
    let problem = Problem::new("manifest::not_one_of", node.span, message);
    let Value::String(text) = &node.value else { return problem };
    match crate::manifest::problem::nearest(text, constants.iter().filter_map(|constant| constant.as_str())) {
        Some(near) => problem.hint(format!("did you mean `{near}`?")),
        None => problem,
    }
}

fn unknown_key<'a>(key: &Key, known: impl Iterator<Item = &'a str> + Clone) -> Problem {
    let problem =
        Problem::new("manifest::unknown_key", key.span, format!("unknown key {}", quoted(&key.text)));
    match suggestion(&key.text, known) {
        Some(hint) => problem.hint(hint),
        None => problem.hint("no key is known here"),
    }
}

fn type_phrase(name: &str) -> &str {
    match name {
        "integer" => "an integer",
        "number" => "a number",
        "string" => "a text",
        "boolean" => "`true` or `false`",
        "array" => "a list",
        "object" => "a map",
        _ => "nothing",
    }
}

fn bounds(schema: &Json, number: f64, node: &Node, problems: &mut Vec<Problem>) {
    let bound = |word: &str| schema.get(word).and_then(Json::as_f64);
    let mut refuse = |is_outside: bool, words: &str, bound: f64| {
        if is_outside {
            let message = format!("expected {words} `{bound}`, found {}", node.found());
            problems.push(Problem::new("manifest::out_of_range", node.span, message));
        }
    };
    if let Some(bound) = bound("minimum") {
        refuse(number < bound, "at least", bound);
    }
    if let Some(bound) = bound("exclusiveMinimum") {
        refuse(number <= bound, "more than", bound);
    }
    if let Some(bound) = bound("exclusiveMaximum") {
        refuse(number >= bound, "less than", bound);
    }
    if let Some(bound) = bound("maximum").or_else(|| format_maximum(schema)) {
        refuse(number > bound, "at most", bound);
    }
}

/// What a Rust integer can hold: `schemars` names the type but gives no upper bound.
fn format_maximum(schema: &Json) -> Option<f64> {
    match schema.get("format")?.as_str()? {
        "uint8" => Some(f64::from(u8::MAX)),
        "uint16" => Some(f64::from(u16::MAX)),
        "uint32" => Some(f64::from(u32::MAX)),
        "int8" => Some(f64::from(i8::MAX)),
        "int16" => Some(f64::from(i16::MAX)),
        "int32" => Some(f64::from(i32::MAX)),
        _ => None,
    }
}

fn lengths(
    schema: &Json,
    (least, most): (&str, &str),
    length: u64,
    unit: &str,
    node: &Node,
    problems: &mut Vec<Problem>,
) {
    let bound = |word: &str| schema.get(word).and_then(Json::as_u64);
    let wrong = match (bound(least), bound(most)) {
        (Some(least), _) if length < least => format!("at least {least}"),
        (_, Some(most)) if length > most => format!("at most {most}"),
        _ => return,
    };
    let units = if unit == "entry" { "entries" } else { "characters" };
    let unit = if wrong.ends_with(" 1") { unit } else { units };
    let message = format!("expected {wrong} {unit}, found {length}");
    problems.push(Problem::new("manifest::out_of_range", node.span, message));
}
