//! Chat templates: the Jinja programs that models carry, run as Hugging Face runs them. Knows messages and
//! text; nothing of tokens.
//!
//! A template is foreign code: it has no access to files, its steps are counted, and it never sees the clock.
//! `strftime_now` answers with a fixed day, because a prompt must have the same tokens in training, in the
//! cache and when served; it is the day templates themselves fall back to where that function is missing.

use std::borrow::Cow;
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, context};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter};

/// Instructions of a rendering; a conversation of a thousand turns takes well below a million.
const FUEL: u64 = 20_000_000;
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
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_template_owned(NAME, without_generation_tags(source).into_owned())?;
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
        self.environment.get_template(NAME)?.render(context! {
            messages => messages.collect::<Vec<Value>>(),
            add_generation_prompt,
            bos_token => tokens.bos_token.unwrap_or_default(),
            eos_token => tokens.eos_token.unwrap_or_default(),
            pad_token => tokens.pad_token.unwrap_or_default(),
            unk_token => tokens.unk_token.unwrap_or_default(),
            // transformers defines both, as none.
            tools => (),
            documents => (),
        })
    }
}

/// `{% generation %}` marks answers for transformers' own masks and is no Jinja; a block that is always taken
/// leaves the text and its white space as they are.
fn without_generation_tags(source: &str) -> Cow<'_, str> {
    static TAG: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a constant pattern")
    });
    TAG.replace_all(source, |tag: &regex::Captures<'_>| {
        let statement = if tag.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {statement} {}%}}", &tag[1], &tag[3])
    })
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The 26th of July 2024, a Friday, at midnight.
fn strftime_now(format: &str) -> Result<String, Error> {
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        out.push_str(match characters.next() {
            Some('d') => "26",
            Some('m') => "07",
            Some('Y') => "2024",
            Some('y') => "24",
            Some('b') => "Jul",
            Some('B') => "July",
            Some('a') => "Fri",
            Some('A') => "Friday",
            Some('H' | 'M' | 'S') => "00",
            Some('%') => "%",
            other => {
                let code = other.map(String::from).unwrap_or_default();
                let detail = format!("strftime_now does not know `%{code}`");
                return Err(Error::new(ErrorKind::InvalidOperation, detail));
            }
        });
    }
    Ok(out)
}

/// As Hugging Face defines it: `json.dumps(value, ensure_ascii=False, indent=indent)`, nothing escaped for HTML.
#[allow(clippy::needless_pass_by_value, reason = "minijinja hands filters their keyword arguments by value")]
fn to_json(value: &Value, arguments: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    // Accepted and without effect here: text is never escaped to ASCII, and keys keep their order.
    let _ = arguments.get::<Option<bool>>("ensure_ascii")?;
    arguments.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)),
        Some(indent) => {
            let spaces = " ".repeat(indent.min(16));
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
    };
    let fail = |detail: String| Error::new(ErrorKind::BadSerialization, detail);
    written.map_err(|error| fail(error.to_string()))?;
    String::from_utf8(out).map_err(|error| fail(error.to_string()))
}

/// Python's `json.dumps` puts a space after commas and colons.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
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
    }

    #[test]
    fn dates_do_not_depend_on_the_day() {
        check("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024");
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
}
