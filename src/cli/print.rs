//! Where words leave the program: data to stdout, talk to stderr. A closed pipe ends the program quietly.

use std::io::{IsTerminal, Write};

/// Writes a line of data to stdout.
pub(crate) fn data(text: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).is_err() {
        std::process::exit(0);
    }
}

/// Writes a line of talk to stderr; nobody listening is no reason to stop.
pub(crate) fn note(text: &str) {
    let mut err = std::io::stderr().lock();
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.write_all(b"\n"));
}

/// Writes a value as one line of JSON to stdout.
pub(crate) fn json(value: &impl serde::Serialize) {
    data(&serde_json::to_string(value).expect("reports hold nothing JSON cannot say"));
}

/// Colours, where the stream is a terminal and `NO_COLOR` is not set.
#[derive(Clone, Copy)]
pub(crate) struct Paint {
    on: bool,
}

impl Paint {
    /// For stderr.
    pub(crate) fn stderr() -> Self {
        Self { on: std::io::stderr().is_terminal() && wanted() }
    }

    /// For stdout.
    pub(crate) fn stdout() -> Self {
        Self { on: std::io::stdout().is_terminal() && wanted() }
    }

    /// Whether colours are used.
    pub(crate) fn is_on(self) -> bool {
        self.on
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    pub(crate) fn red(self, text: &str) -> String {
        self.wrap("31", text)
    }

    pub(crate) fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    /// A token of a row: green if it is learnt, yellow if it is special, dim if it is only read.
    pub(crate) fn token(self, text: &str, learnt: bool, special: bool, underlined: bool) -> String {
        let colour = match (learnt, special) {
            (true, true) => "1;32",
            (true, false) => "32",
            (false, true) => "33",
            (false, false) => "2",
        };
        let code = if underlined { format!("4;{colour}") } else { colour.to_owned() };
        // A colour that runs over a line's end would paint the rest of the line too.
        text.split('\n')
            .map(|line| if line.is_empty() { String::new() } else { self.wrap(&code, line) })
            .collect::<Vec<_>>()
            .join("\n")
    }

    pub(crate) fn yellow(self, text: &str) -> String {
        self.wrap("33", text)
    }
}

fn wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
