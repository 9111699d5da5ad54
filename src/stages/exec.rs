//! `uses: exec`: runs any command, so that nobody is ever stuck.
//!
//! Reads: the declared `inputs` (files, folders, globs beside the manifest) and its needs.
//! Writes: exactly the declared `outputs`, which become the artifact.
//!
//! The command runs with `sh -c` in a fresh folder that holds nothing but the inputs, at the same relative
//! paths, and each need as a read-only folder under its name. What it leaves there beside its outputs is an
//! error; `TMPDIR` is a folder of its own for what nobody needs. Its environment is an allow-list. Exit code
//! 75 (`EX_TEMPFAIL` of sysexits.h) says that trying again may help. Bump `VERSION` when any of this changes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Component, Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;
use tunesmith_pipeline::stage::{
    Arity, EmptySource, InputSlot, ParamProblem, SourceSpec, StageContext, StageError, StageKind,
};

const VERSION: u32 = 2;
/// Variables of the caller that the command sees.
const ENVIRONMENT: [&str; 5] = ["PATH", "HOME", "LANG", "LC_ALL", "USER"];
/// `EX_TEMPFAIL` of sysexits.h: a failure that may pass.
const TRY_AGAIN: i32 = 75;
/// A command is looked at after this time, then ever more rarely: many are done at once, some run for hours.
const PAUSE_MIN: Duration = Duration::from_micros(250);
const PAUSE_MAX: Duration = Duration::from_millis(16);
/// Undeclared files that an error names.
const UNDECLARED_SHOWN_MAX: usize = 5;

/// The `exec` kind.
pub(crate) struct Exec;

/// Parameters of `exec`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// The command, given to `sh -c`.
    run: String,
    /// Files, folders or globs beside the manifest that the command may read.
    #[serde(default)]
    inputs: Vec<String>,
    /// Files or folders the command must write, relative to its folder; they become the artifact.
    #[schemars(length(min = 1))]
    outputs: Vec<String>,
    /// Extra environment variables.
    #[serde(default)]
    env: BTreeMap<String, Variable>,
    /// Names of variables of the caller that the command sees too. Their values are in no key, record or log.
    #[serde(default)]
    secrets: Vec<String>,
    /// One of the outputs: a JSON object whose numbers, texts and booleans become the stage's metrics. Objects inside
    /// it give dotted names.
    metrics: Option<String>,
}

/// Value of an environment variable.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
enum Variable {
    /// A text.
    Text(String),
    /// A number, as it is written in JSON.
    Number(serde_json::Number),
    /// `true` or `false`.
    Bool(bool),
}

impl Variable {
    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(number) => number.to_string(),
            Self::Bool(value) => value.to_string(),
        }
    }
}

/// Names and values of variables that nobody is to read.
type Secrets = Vec<(String, String)>;

impl Params {
    fn secrets(&self) -> Result<Secrets, StageError> {
        let secret = |name: &String| {
            let value = std::env::var(name).map_err(|_| {
                StageError::new("exec::secret", format!("the environment variable `{name}` is not set"))
                    .hint("`secrets` names it; set it for this run")
            })?;
            Ok((name.clone(), value))
        };
        self.secrets.iter().map(secret).collect()
    }
}

impl StageKind for Exec {
    fn name(&self) -> &'static str {
        "exec"
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn doc(&self) -> &'static str {
        "Runs a command in a folder that holds only its declared inputs; what it declares as outputs becomes the artifact."
    }

    fn inputs(&self) -> &'static [InputSlot] {
        &[InputSlot {
            name: "needs",
            doc: "each need stands as a read-only folder under its own name",
            arity: Arity::Any,
        }]
    }

    fn outputs(&self) -> &'static [(&'static str, &'static str)] {
        &[("*", "the declared outputs")]
    }

    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(Params)
    }

    fn check(&self, with: &Value) -> Vec<ParamProblem> {
        let Ok(params) = serde_json::from_value::<Params>(with.clone()) else { return Vec::new() };
        let mut problems = Vec::new();
        for (index, output) in params.outputs.iter().enumerate() {
            if !stays_inside(Path::new(output)) {
                problems.push(ParamProblem {
                    path: format!("outputs.{index}"),
                    message: format!("output `{output}` leaves the command's folder"),
                    hint: Some("name a path below the folder the command runs in".to_owned()),
                });
            }
            for (other_index, other) in params.outputs.iter().enumerate().skip(index + 1) {
                if Path::new(output).starts_with(other) || Path::new(other).starts_with(output) {
                    problems.push(ParamProblem {
                        path: format!("outputs.{other_index}"),
                        message: format!("outputs `{output}` and `{other}` overlap"),
                        hint: Some("keep the outer one".to_owned()),
                    });
                }
            }
        }
        let is_output =
            |path: &String| params.outputs.iter().any(|output| Path::new(path).starts_with(output));
        if let Some(path) = params.metrics.as_ref().filter(|path| !is_output(path)) {
            problems.push(ParamProblem {
                path: "metrics".to_owned(),
                message: format!("`{path}` is none of the outputs"),
                hint: Some("add it to `outputs`".to_owned()),
            });
        }
        for (index, input) in params.inputs.iter().enumerate() {
            if !stays_inside(Path::new(input)) {
                problems.push(ParamProblem {
                    path: format!("inputs.{index}"),
                    message: format!("input `{input}` is outside the manifest's folder"),
                    hint: Some("copy or link it beside the manifest".to_owned()),
                });
            }
        }
        problems
    }

    fn sources(&self, with: &Value) -> Vec<SourceSpec> {
        let patterns: Vec<String> = with
            .get("inputs")
            .and_then(|value| serde_json::from_value(value.clone()).ok())
            .unwrap_or_default();
        if patterns.is_empty() {
            return Vec::new();
        }
        vec![SourceSpec {
            name: "inputs".to_owned(),
            patterns,
            param: "inputs".to_owned(),
            empty: EmptySource::Refused,
        }]
    }

    fn run(&self, context: &StageContext<'_>) -> Result<(), StageError> {
        let params: Params = context.params()?;
        let scratch = context.out.parent().unwrap_or(context.out);
        let (folder, temporary) = (tempfile::tempdir_in(scratch)?, tempfile::tempdir_in(scratch)?);
        lay_out(context, folder.path())?;
        let secrets = params.secrets()?;
        let child = start(context, &params, &secrets, folder.path(), temporary.path())?;
        let status = follow(context, &secrets, child)?;
        if !status.success() {
            let ended = match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (None, Some(signal)) => format!("signal {signal}"),
                (None, None) => "an unknown status".to_owned(),
            };
            let error = StageError::new("exec::failed", format!("the command ended with {ended}"))
                .hint("its output stands above and in the stage's log");
            return Err(if status.code() == Some(TRY_AGAIN) { error.transient() } else { error });
        }
        collect(&params.outputs, folder.path(), context.out)?;
        refuse_undeclared(context, folder.path())?;
        params.metrics.map_or(Ok(()), |path| report_metrics(context, &path))
    }
}

/// Reports what stands in the output `path` as metrics.
fn report_metrics(context: &StageContext<'_>, path: &str) -> Result<(), StageError> {
    let bytes = fs_err::read(context.out.join(path))?;
    let refused = || {
        StageError::new("exec::metrics", format!("`{path}` is not a JSON object"))
            .hint("write `{\"name\": 0.5}`; what `metrics` names has to be such a file")
    };
    let Ok(Value::Object(metrics)) = serde_json::from_slice(&bytes) else { return Err(refused()) };
    let mut open: Vec<(String, Value)> = metrics.into_iter().collect();
    while let Some((name, value)) = open.pop() {
        match value {
            Value::Object(inner) => {
                open.extend(inner.into_iter().map(|(key, value)| (format!("{name}.{key}"), value)));
            }
            Value::Null | Value::Array(_) => {}
            single => context.metric(&name, single),
        }
    }
    Ok(())
}

fn stays_inside(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        && path.components().any(|part| matches!(part, Component::Normal(_)))
}

/// Copies the inputs and links the needs into `folder`.
fn lay_out(context: &StageContext<'_>, folder: &Path) -> Result<(), StageError> {
    for file in context.source("inputs") {
        let target = folder.join(&file.path);
        fs_err::create_dir_all(target.parent().unwrap_or(folder))?;
        fs_err::copy(&file.object, &target)?;
        let mut permissions = fs_err::metadata(&target)?.permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
        fs_err::set_permissions(&target, permissions)?;
    }
    for (name, artifact) in context.inputs {
        let target = folder.join(name);
        if target.exists() {
            return Err(StageError::new(
                "exec::name_taken",
                format!("need `{name}` and an input have the same path `./{name}`"),
            )
            .hint("give the need another key in `needs`"));
        }
        fs_err::os::unix::fs::symlink(&artifact.folder, &target)?;
    }
    Ok(())
}

fn start(
    context: &StageContext<'_>,
    params: &Params,
    secrets: &Secrets,
    folder: &Path,
    temporary: &Path,
) -> Result<Child, StageError> {
    let allowed = ENVIRONMENT.iter().filter_map(|name| std::env::var_os(name).map(|value| (*name, value)));
    let mut command = Command::new("sh");
    command
        .args(["-c", &params.run])
        .current_dir(folder)
        .env_clear()
        .envs(allowed)
        .env("TMPDIR", temporary)
        .env("CUDA_VISIBLE_DEVICES", context.gpus.join(","))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .envs(secrets.iter().map(|(name, value)| (name, value)))
        .envs(params.env.iter().map(|(name, value)| (name, value.text())))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    command
        .spawn()
        .map_err(|error| StageError::new("exec::start", "the shell `sh` cannot be started").caused_by(error))
}

/// Passes the command's output on line by line and ends its process group if the run is cancelled.
fn follow(context: &StageContext<'_>, secrets: &Secrets, mut child: Child) -> Result<ExitStatus, StageError> {
    let stdout = child.stdout.take();
    let stderr = child.stderr.take();
    std::thread::scope(|scope| {
        scope.spawn(move || stdout.map(|pipe| pass_on(context, secrets, pipe)));
        scope.spawn(move || stderr.map(|pipe| pass_on(context, secrets, pipe)));
        let mut pause = PAUSE_MIN;
        loop {
            if let Some(status) = child.try_wait()? {
                // What the command left running would hold its output open, and this stage with it.
                signal_group(&child, libc::SIGKILL);
                return Ok(status);
            }
            if context.services.cancelled() {
                end_group(&mut child)?;
                return Err(StageError::cancelled());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    })
}

fn pass_on(context: &StageContext<'_>, secrets: &Secrets, pipe: impl Read) {
    for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
        let mut text = String::from_utf8_lossy(&line).trim_end().to_owned();
        for (_, value) in secrets.iter().filter(|(_, value)| !value.is_empty()) {
            text = text.replace(value.as_str(), "***");
        }
        context.info(&text);
    }
}

fn end_group(child: &mut Child) -> std::io::Result<()> {
    signal_group(child, libc::SIGTERM);
    for _ in 0..100 {
        if child.try_wait()?.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    signal_group(child, libc::SIGKILL);
    child.wait().map(drop)
}

/// Signals the command and all that it started and that did not leave its group.
fn signal_group(child: &Child, signal: libc::c_int) {
    let group = -libc::pid_t::try_from(child.id()).expect("a process id fits pid_t");
    // SAFETY: kill(2) takes plain numbers; the group is the child's own, made by `process_group(0)`.
    let _nobody_is_left = unsafe { libc::kill(group, signal) };
}

/// An error if the command left files beside its outputs: what nobody declares, nobody would find again.
fn refuse_undeclared(context: &StageContext<'_>, folder: &Path) -> Result<(), StageError> {
    let mut known: BTreeSet<&str> = context.source("inputs").iter().map(|file| file.path.as_str()).collect();
    known.extend(context.inputs.iter().map(|(name, _)| name.as_str()));
    let mut undeclared = Vec::new();
    let mut open = vec![PathBuf::new()];
    while let Some(inside) = open.pop() {
        for entry in fs_err::read_dir(folder.join(&inside))? {
            let entry = entry?;
            let path = inside.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                open.push(path);
            } else if path.to_str().is_none_or(|path| !known.contains(path)) {
                undeclared.push(format!("`{}`", path.display()));
            }
        }
    }
    if undeclared.is_empty() {
        return Ok(());
    }
    undeclared.sort();
    let more = match undeclared.len().saturating_sub(UNDECLARED_SHOWN_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    undeclared.truncate(UNDECLARED_SHOWN_MAX);
    let text = format!("the command wrote {}{more}, which it does not declare", undeclared.join(", "));
    Err(StageError::new("exec::undeclared_output", text)
        .hint("add it to `outputs`, or write it below `$TMPDIR`, which is removed afterwards"))
}

/// Moves the declared outputs into the artifact; a missing one is an error that shows what is there.
fn collect(outputs: &[String], folder: &Path, out: &Path) -> Result<(), StageError> {
    for output in outputs {
        let written = folder.join(output);
        if fs_err::symlink_metadata(&written).is_err() {
            let mut there: Vec<String> = fs_err::read_dir(folder)?
                .filter_map(|entry| {
                    entry.ok().map(|entry| format!("`{}`", entry.file_name().to_string_lossy()))
                })
                .collect();
            there.sort();
            return Err(StageError::new(
                "exec::missing_output",
                format!("the command did not write `{output}`"),
            )
            .hint(format!("its folder holds {}", there.join(", "))));
        }
        let target: PathBuf = out.join(output);
        fs_err::create_dir_all(target.parent().unwrap_or(out))?;
        fs_err::rename(&written, &target)?;
    }
    Ok(())
}
