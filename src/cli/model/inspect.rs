//! `model inspect`: what a model or an adapter on disk is.

use std::path::{Path, PathBuf};

use clap::Args;
use tunesmith_engine::adapter::AdapterContents;
use tunesmith_engine::trainer::readable;

use super::super::exit_code::Failure;
use super::super::print::{self, Paint};
use super::super::problems;
use crate::inspect::{self, ModelFacts, TemplateFacts, TokenizerFacts};

/// Special tokens and idle modules named in a line.
const NAMED_MAX: usize = 8;

/// Options of `model inspect`.
#[derive(Args)]
pub(in crate::cli) struct Options {
    /// A GGUF file, a Hugging Face folder, a base of a `model` stage, or a PEFT adapter
    path: PathBuf,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

/// Describes what is there.
pub(super) fn main(options: &Options) -> Result<(), Failure> {
    let path = &options.path;
    if AdapterContents::is_adapter(path) {
        let adapter = AdapterContents::read(path).map_err(|error| {
            problems::show_error(&error, Some("an adapter is a folder with PEFT's two files"));
            Failure::Run
        })?;
        if options.json {
            print::json(&adapter);
        } else {
            show(&adapter_lines(path, &adapter));
        }
        return Ok(());
    }
    let facts = inspect::model(path).map_err(|error| {
        let hint = "give a GGUF file, a folder with config.json and *.safetensors, or an adapter's folder";
        problems::show_error(&error, Some(hint));
        Failure::Run
    })?;
    if options.json {
        print::json(&facts);
    } else {
        show(&model_lines(&facts));
    }
    Ok(())
}

/// A name and what there is to say, a line each; lines without a name go on.
type Lines = Vec<(&'static str, String)>;

fn show(lines: &Lines) {
    let paint = Paint::stdout();
    for (name, text) in lines {
        print::data(format!("{} {text}", paint.bold(&format!("{name:<14}"))).trim_end());
    }
}

fn adapter_lines(path: &Path, adapter: &AdapterContents) -> Lines {
    let (low, high) = adapter.update_norms;
    let mut lines = vec![
        ("adapter", path.display().to_string()),
        (
            "kind",
            format!(
                "{}, rank {}, alpha {}, dropout {}",
                adapter.kind, adapter.rank, adapter.alpha, adapter.dropout
            ),
        ),
        ("trained on", adapter.base.clone()),
        ("targets", format!("{} layers: {}", adapter.modules, adapter.targets.join(", "))),
        ("values", grouped(adapter.parameters as u64)),
        ("updates", format!("norms from {low:.4} to {high:.4}")),
    ];
    if adapter.state_spaces > 0 {
        lines.push(("", format!("A_log, D and dt_bias of {} Mamba layers", adapter.state_spaces)));
    }
    if !adapter.idle.is_empty() {
        let all = adapter.modules;
        lines.push(("", format!("{} of {all} change nothing: {}", adapter.idle.len(), some(&adapter.idle))));
    }
    lines
}

fn model_lines(facts: &ModelFacts) -> Lines {
    let layers = match facts.mamba_layers {
        0 => format!("{} layers", facts.layers),
        mamba => format!("{} layers, {mamba} of them Mamba", facts.layers),
    };
    let window = facts.sliding_window.map(|window| format!(", window {window}")).unwrap_or_default();
    let tied = if facts.tied_embedding { "tied embedding" } else { "output layer of its own" };
    let mut lines = vec![
        ("model", format!("{} ({})", facts.path, facts.format)),
        ("family", facts.family.clone()),
        ("shape", format!("{layers}, hidden {}, MLP {}", facts.hidden_size, facts.intermediate_size)),
        (
            "attention",
            format!(
                "{} heads of {} over {} key-value heads{window}; positions: {}",
                facts.attention_heads, facts.head_dim, facts.key_value_heads, facts.positions
            ),
        ),
        ("context", format!("{} tokens", grouped(facts.context_length as u64))),
        ("vocabulary", format!("{} tokens, {tied}", grouped(facts.vocabulary as u64))),
        (
            "parameters",
            format!(
                "{}, of them {} in linear layers",
                grouped(facts.parameters),
                grouped(facts.linear_parameters)
            ),
        ),
    ];
    for (index, kind) in facts.encodings.iter().enumerate() {
        let linear = match kind.linear_tensors {
            0 => String::new(),
            count if count == kind.tensors => ", all linear layers".to_owned(),
            count => format!(", {count} of them linear layers"),
        };
        let bits = 8.0 * kind.bytes as f64 / kind.values.max(1) as f64;
        let name = if index == 0 { "tensors" } else { "" };
        lines.push((
            name,
            format!(
                "{} {}, {}, {bits:.2} bits a value{linear}",
                kind.tensors,
                kind.encoding,
                readable(kind.bytes)
            ),
        ));
    }
    if let Some(tokenizer) = &facts.tokenizer {
        lines.extend(tokenizer_lines(tokenizer));
    }
    if let Some(problem) = &facts.tokenizer_problem {
        lines.push(("tokenizer", problem.clone()));
    }
    lines.extend(training_lines(facts));
    lines
}

fn tokenizer_lines(facts: &TokenizerFacts) -> Lines {
    let token =
        |token: &Option<String>| token.as_ref().map_or("none".to_owned(), |token| format!("`{token}`"));
    let bos = match (&facts.bos, facts.adds_bos) {
        (Some(_), true) => ", put before every text",
        (Some(_), false) => ", not put before texts",
        (None, _) => "",
    };
    let mut lines = vec![
        ("tokenizer", format!("{}, {} tokens", facts.kind, grouped(facts.tokens as u64))),
        (
            "",
            format!(
                "begins {}{bos}; ends {}; pads {}",
                token(&facts.bos),
                token(&facts.eos),
                token(&facts.pad)
            ),
        ),
    ];
    if !facts.special_tokens.is_empty() {
        lines.push(("", format!("{} special: {}", facts.special_tokens.len(), some(&facts.special_tokens))));
    }
    lines.push(("chat template", template_line(&facts.chat_template)));
    lines
}

fn template_line(facts: &TemplateFacts) -> String {
    if !facts.present {
        return "none: not a chat model".to_owned();
    }
    if let Some(failure) = &facts.failure {
        return format!("does not render: {failure}");
    }
    if let Some(reason) = &facts.not_trainable {
        return format!("renders, but cannot be trained with: {reason}");
    }
    let system = if facts.takes_system { "takes" } else { "does not take" };
    let answers = if facts.learns_every_answer { "every answer" } else { "only the last answer" };
    format!(
        "renders; closes turns with `{}`; {system} a system message; {answers} of a conversation can be learnt",
        facts.closes_turns_with.join("`, `").escape_debug()
    )
}

fn training_lines(facts: &ModelFacts) -> Lines {
    let lora = &facts.lora;
    let only = lora
        .attention_only_percent
        .filter(|only| *only < lora.auto_percent)
        .map(|only| format!("; q, k, v and o alone would be {only:.1} %"))
        .unwrap_or_default();
    let mut lines = vec![(
        "LoRA",
        format!(
            "`auto` adapts {:.1} % of linear weights{only}; rank {} trains {} values",
            lora.auto_percent,
            lora.rank,
            grouped(lora.trained_values as u64)
        ),
    )];
    for layer in &lora.layers {
        let shape = format!("{} x {}", layer.out_features, layer.in_features);
        lines.push((
            "",
            format!("{:<14} {:>3} of {shape:<14} {:>5.1} %", layer.name, layer.count, layer.percent),
        ));
    }
    lines.push(("to train", format!("about {}", facts.training_memory)));
    lines
}

fn some(names: &[String]) -> String {
    let named = names
        .iter()
        .take(NAMED_MAX)
        .map(|name| format!("`{}`", name.escape_debug()))
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > NAMED_MAX { format!("{named} and {} more", names.len() - NAMED_MAX) } else { named }
}

/// A number with its thousands apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_stand_apart() {
        assert_eq!([0, 12, 123, 1234, 134_515_008].map(grouped), ["0", "12", "123", "1,234", "134,515,008"]);
    }
}
