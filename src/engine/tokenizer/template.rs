//! Chat templates: the Jinja programs that models carry, run as Hugging Face runs them. Knows messages and
//! text; nothing of tokens.
//!
//! A template is foreign code: it has no access to files, its steps and the bytes it makes are counted (see
//! `bounds`), and it never sees the clock. What Python would write, `python` writes.
//! `strftime_now` answers with a fixed day, because a prompt must have the same tokens in training, in the
//! cache and when served; it is the day templates themselves fall back to where that function is missing.

mod bounds;
mod python;

use std::borrow::Cow;
use std::io;
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use regex::Regex;
use serde::{Deserialize, Serialize};

/// Instructions of a rendering; a conversation of a thousand turns takes well below a million.
const FUEL: u64 = 20_000_000;
/// Texts between tags are written without being counted, so there is less fuel where they are long: about as many
/// bytes as this, at three steps a text.
const TEXT_BYTES_MAX: u64 = 512 << 20;
const NAME: &str = "chat_template";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

/// The special tokens a template may write.
#[derive(Debug, Clone, Copy, Default)]
pub struct TemplateTokens<'token> {
    pub bos_token: Option<&'token str>,
    pub eos_token: Option<&'token str>,
    pub pad_token: Option<&'token str>,
    pub unk_token: Option<&'token str>,
}

/// A parsed chat template.
pub struct Template {
    environment: Environment<'static>,
}

impl Template {
    /// Parses a template.
    pub fn new(source: &str) -> Result<Self, Error> {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
        // Jinja takes every line ending for a line feed.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let wrapped = bounds::wrap(&without_generation_tags(&source), NAME, syntax.clone())?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(method);
        environment.set_fuel(Some(FUEL.min(TEXT_BYTES_MAX / wrapped.longest_text.max(1) as u64 * 3)));
        environment.set_formatter(|out, _, value| {
            let text = python::text(value)?;
            bounds::count(text.len())?;
            out.write_str(&text).map_err(Error::from)
        });
        environment.add_filter(bounds::FILTER, bounds::bounded);
        environment.add_filter("tojson", python::to_json);
        environment.add_filter("string", |value: &Value| python::text(value));
        environment.add_filter("replace", |text: &Value, from: &str, to: &str| {
            replace(&python::text(text)?, from, to)
        });
        environment.add_filter("join", |members: &Value, separator: Option<&str>| join(members, separator));
        environment.add_test("sequence", is_sequence);
        environment.add_test("iterable", is_iterable);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", python::strftime_now);
        environment.add_template_owned(NAME, wrapped.source)?;
        Ok(Self { environment })
    }

    /// The conversation as text. `add_generation_prompt` appends what precedes an answer.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        tokens: &TemplateTokens<'_>,
    ) -> Result<String, Error> {
        let messages = messages.iter().map(|message| {
            Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())])
        });
        let messages = Value::from(messages.collect::<Vec<Value>>());
        self.render_with(messages, Value::from(()), add_generation_prompt, tokens)
    }

    /// The same for messages of any form, with the tools the assistant may call, or none.
    fn render_with(
        &self,
        messages: Value,
        tools: Value,
        add_generation_prompt: bool,
        tokens: &TemplateTokens<'_>,
    ) -> Result<String, Error> {
        // transformers defines tools and documents, as none; special tokens it defines only where there are some.
        let mut context = vec![
            ("messages", messages),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("tools", tools),
            ("documents", Value::from(())),
        ];
        let named = [
            ("bos_token", tokens.bos_token),
            ("eos_token", tokens.eos_token),
            ("pad_token", tokens.pad_token),
            ("unk_token", tokens.unk_token),
        ];
        context.extend(named.into_iter().filter_map(|(name, token)| Some((name, Value::from(token?)))));
        bounds::begin();
        let mut out = Limited(Vec::new());
        let template = self.environment.get_template(NAME)?;
        template.render_captured_to(Value::from_pairs(context), &mut out).map_err(|error| {
            match error.kind() {
                ErrorKind::WriteFailure => bounds::too_large(),
                _ => error,
            }
        })?;
        String::from_utf8(out.0).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
    }
}

/// `{% generation %}` marks answers for transformers' own masks and is no Jinja; an empty `with`, which has its
/// scope too, leaves the text and its white space as they are.
fn without_generation_tags(source: &str) -> Cow<'_, str> {
    static TAG: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a constant pattern")
    });
    TAG.replace_all(source, |tag: &regex::Captures<'_>| {
        let statement = if tag.get(2).is_some() { "endwith" } else { "with" };
        format!("{{%{} {statement} {}%}}", &tag[1], &tag[3])
    })
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Jinja's `sequence` test: whatever has a length and can be indexed, strings too.
fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
}

/// Jinja's `iterable` test, to which strings belong.
fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || matches!(value.kind(), ValueKind::Iterable | ValueKind::Undefined)
}

/// `text.replace(from, to)`, measured before it is made.
fn replace(text: &str, from: &str, to: &str) -> Result<String, Error> {
    let found = text.matches(from).count();
    bounds::count(found.saturating_mul(to.len()).saturating_add(text.len()))?;
    Ok(text.replace(from, to))
}

/// Members as text with `separator` between, measured while they are joined.
fn join(members: &Value, separator: Option<&str>) -> Result<String, Error> {
    let mut out = String::new();
    for (at, member) in members.try_iter()?.enumerate() {
        if at > 0 {
            out.push_str(separator.unwrap_or_default());
        }
        out.push_str(&python::text(&member)?);
        if out.len() > bounds::VALUE_BYTES_MAX {
            return Err(bounds::too_large());
        }
    }
    Ok(out)
}

/// Python's string methods, those that make text grow measured first.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name, arguments) {
        (Some(text), "replace", [from, to]) if from.as_str().is_some() && to.as_str().is_some() => {
            replace(text, from.as_str().unwrap_or_default(), to.as_str().unwrap_or_default()).map(Value::from)
        }
        (Some(separator), "join", [members]) => join(members, Some(separator)).map(Value::from),
        (Some(text), "format", _) if has_width(text) => Err(bounds::too_large()),
        _ => bounds::bounded(minijinja_contrib::pycompat::unknown_method_callback(
            state, value, name, arguments,
        )?),
    }
}

/// Whether a format pads by a thousand or more.
fn has_width(format: &str) -> bool {
    let mut digits = 0;
    format.chars().any(|character| {
        digits = if character.is_ascii_digit() { digits + 1 } else { 0 };
        digits > 3
    })
}

/// Takes the output until it is too large.
struct Limited(Vec<u8>);

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > bounds::VALUE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, Error> {
        let messages = [Message::new("user", "Hi <b>"), Message::new("assistant", " Ho ")];
        let tokens = TemplateTokens { bos_token: Some("<s>"), ..TemplateTokens::default() };
        Template::new(source)?.render(&messages, true, &tokens)
    }

    #[track_caller]
    fn check(source: &str, expected: &str) {
        assert_eq!(render(source).unwrap(), expected);
    }

    #[test]
    fn python_methods_and_loop_controls_work() {
        check("{{ messages[1].content.strip() }}{{ messages[0]['role'].upper() }}", "HoUSER");
        check(
            "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
            "user",
        );
        check(
            "{{ bos_token }}{% if tools is not none %}tools{% endif %}{% if add_generation_prompt %}>{% endif %}",
            "<s>>",
        );
    }

    #[test]
    fn blocks_are_trimmed_as_hugging_face_trims_them() {
        check("a\r\n{{ 'b\r' }}\r\n", "a\nb\n");
        check(
            "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}\n",
            "user\nassistant\n",
        );
    }

    #[test]
    fn generation_tags_leave_their_text() {
        check("a {% generation %}b{% endgeneration %} c", "a b c");
        check("a {%- generation -%} b {%- endgeneration -%} c", "abc");
    }

    #[test]
    fn tojson_writes_python_json_without_html_escapes() {
        check("{{ messages[0] | tojson }}", r#"{"role": "user", "content": "Hi <b>"}"#);
        check("{{ [1, 'é'] | tojson(indent=1) }}", "[\n 1,\n \"é\"\n]");
        check(
            "{{ {'b': [], 'a': 'é\\n🦀'} | tojson(ensure_ascii=true, sort_keys=true, separators=[',', ':']) }}",
            r#"{"a":"\u00e9\n\ud83e\udd80","b":[]}"#,
        );
        check(
            "{{ {'a': {'b': [1.0, none]}} | tojson(indent=2) }}",
            "{\n  \"a\": {\n    \"b\": [\n      1.0,\n      null\n    ]\n  }\n}",
        );
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        check("{{ true }} {{ none }} {{ ['a', 1.0] }} {{ x }}", "True None ['a', 1.0] ");
        check("{{ [none, 'a', 2]|join('-') }} {{ 'ab' is sequence and 'ab' is iterable }}", "None-a-2 True");
        check("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024");
    }

    #[test]
    fn growing_templates_are_stopped_by_size() {
        let doubling = "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = CHANGE %}{% endfor %}{{ ns.s }}";
        for change in [
            "ns.s ~ ns.s",
            "ns.s + ns.s",
            "ns.s * 9",
            "ns.s|replace('a', ns.s)",
            "ns.s.replace('a', ns.s)",
            "[ns.s, ns.s]|join('')",
            "''.join([ns.s, ns.s])",
            "'%s%s'|format(ns.s, ns.s)",
            "'{}{}'.format(ns.s, ns.s)",
            "[ns.s, [ns.s]]",
            "{'a': ns.s}",
        ] {
            let error = render(&doubling.replace("CHANGE", change)).unwrap_err().to_string();
            assert!(error.contains("larger than 16 MiB"), "{change}: {error}");
        }
        for source in [
            "{% set x %}ab{% endset %}{% macro m(s, n) %}{{ s }}{{ s }}{% endmacro %}".to_owned()
                + &"{% set x = m(x) %}".repeat(60),
            "{% set s = 'ab' %}".to_owned() + &"{% set s %}{{ s }}{{ s }}{% endset %}".repeat(60),
            "{% for i in range(99999) %}".to_owned() + &"long text ".repeat(100) + "{% endfor %}",
            "{{ 'x' * 99999999 }}".to_owned(),
            "{{ '%99999999d'|format(1) }}".to_owned(),
            "{{ 'x'|indent(99999999, true) }}".to_owned(),
        ] {
            let error = render(&source).unwrap_err().to_string();
            assert!(error.contains("larger than 16 MiB"), "{}: {error}", &source[..40.min(source.len())]);
        }
    }

    #[test]
    fn measuring_changes_no_meaning() {
        check("{{ [1, 2][0] + 3 * 2 }}{{ (1, 2)|length }}{{ {'a': 'b' ~ 'c'}['a'] }}", "72bc");
        check("{{ 'a' ~ 'b' ~ ('c' ~ 'd').upper() ~ [1]|length }}{{ -1 + 2 }}", "abCD11");
        check(
            "{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}{{ 'x' if 1 + 1 == 2 else 'y' }}",
            "a1x",
        );
        let error = render("\n{{ 'a' ~ 'b' }}\n{{ raise_exception('here') }}").unwrap_err();
        assert_eq!(error.line(), Some(3));
    }

    #[test]
    fn raised_exceptions_carry_their_text() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }

    #[test]
    fn endless_templates_run_out_of_fuel() {
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        assert_eq!(render(source).unwrap_err().kind(), ErrorKind::OutOfFuel);
    }

    #[test]
    fn syntax_errors_name_their_line() {
        let error = Template::new("a\n{% for %}").err().unwrap().to_string();
        assert!(error.contains("chat_template:2"), "{error}");
    }

    mod golden {
        use std::collections::BTreeMap;
        use std::path::Path;

        use super::*;

        #[derive(Deserialize)]
        struct Golden {
            conversations: BTreeMap<String, Conversation>,
            templates: BTreeMap<String, Rendered>,
        }

        #[derive(Deserialize)]
        struct Conversation {
            messages: Value,
            tools: Value,
        }

        #[derive(Deserialize)]
        struct Rendered {
            bos_token: Option<String>,
            eos_token: Option<String>,
            rendered: BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>,
        }

        /// Every template of `tests/golden/templates`, as transformers renders it (`templates_golden.py`).
        #[test]
        fn real_templates_render_as_hugging_face_renders_them() {
            let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/templates"));
            let folder = std::env::var_os("TEMPLATES").map_or(folder.to_owned(), Into::into);
            let expected = std::fs::read_to_string(folder.join("expected.json")).unwrap();
            let golden: Golden = serde_json::from_str(&expected).unwrap();
            let (mut complaints, mut checked) = (Vec::new(), 0);
            for (name, expected) in &golden.templates {
                let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
                let template = match Template::new(&source) {
                    Ok(template) => template,
                    Err(error) => {
                        complaints.push(format!("{name}: {error}"));
                        continue;
                    }
                };
                let tokens = TemplateTokens {
                    bos_token: expected.bos_token.as_deref(),
                    eos_token: expected.eos_token.as_deref(),
                    ..TemplateTokens::default()
                };
                for (conversation, rendered) in &expected.rendered {
                    let Conversation { messages, tools } = &golden.conversations[conversation];
                    for (prompt, expected) in rendered {
                        let ours = template.render_with(
                            messages.clone(),
                            tools.clone(),
                            prompt == "prompt",
                            &tokens,
                        );
                        checked += 1;
                        let agree = match (&ours, expected.get("text"), expected.get("error")) {
                            (Ok(ours), Some(theirs), _) => ours == theirs,
                            (Err(_), None, Some(_)) => true,
                            _ => false,
                        };
                        if !agree {
                            complaints
                                .push(format!("{name} {conversation} {prompt}:\n  {ours:?}\n  {expected:?}"));
                        }
                    }
                }
            }
            assert!(
                complaints.is_empty(),
                "{} of {checked} differ\n{}",
                complaints.len(),
                complaints.join("\n")
            );
            assert!(checked > 400);
        }
    }
}
