//! Starts the PDF reader in a child process under limits: memory, processor time, wall time, size of its answer.
//! Whatever the child does, the caller gets an [`Extraction`] or a [`PdfError`]. Unix only in its limits; other
//! systems have the wall time and the size.

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::{Extraction, PdfError};

/// What a child may use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Address space.
    pub(crate) memory_bytes: u64,
    /// Processor time; the wall time is [`Limits::wall`].
    pub(crate) cpu_seconds: u64,
    /// Time from start to end.
    pub(crate) wall: Duration,
    /// Size of the answer on stdout.
    pub(crate) answer_bytes: u64,
}

impl Limits {
    /// 1 GiB, the given processor time, twice that in wall time, and 64 MiB of text.
    pub(crate) fn of_seconds(cpu_seconds: u64) -> Self {
        Self {
            memory_bytes: 1 << 30,
            cpu_seconds,
            wall: Duration::from_secs(cpu_seconds.saturating_mul(2)),
            answer_bytes: 64 << 20,
        }
    }
}

/// The program that reads a PDF, and what stands between its name and the file's path.
#[derive(Debug, Clone)]
pub(crate) struct Reader {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<OsString>,
}

impl Reader {
    /// This very binary with its hidden `extract-pdf` command.
    pub(crate) fn this_binary() -> std::io::Result<Self> {
        Ok(Self { program: std::env::current_exe()?, arguments: vec!["extract-pdf".into()] })
    }
}

/// Reads `pdf` in a child.
pub(crate) fn extract(reader: &Reader, limits: Limits, pdf: &Path) -> Result<Extraction, PdfError> {
    let mut child = start(reader, limits, pdf).map_err(|error| PdfError::NotStarted {
        program: reader.program.display().to_string(),
        detail: error.to_string(),
    })?;
    let answer = receive(&mut child, limits);
    if answer.is_err() {
        // Ends a child that is over its limits; one that is already gone makes this fail, which is as good.
        let _ = child.kill();
    }
    let complaint = complaint_of(&mut child);
    let status = child.wait();
    let answer = answer?;
    match (serde_json::from_slice::<Result<Extraction, PdfError>>(&answer), status) {
        (Ok(result), Ok(status)) if status.success() => result,
        (_, status) => Err(PdfError::Crashed { status: describe(status), detail: complaint }),
    }
}

fn start(reader: &Reader, limits: Limits, pdf: &Path) -> std::io::Result<Child> {
    let mut command = Command::new(&reader.program);
    command
        .args(&reader.arguments)
        .arg(pdf)
        // One arena and one worker: each further one reserves address space, which is what is limited.
        .env("MALLOC_ARENA_MAX", "1")
        .env("RAYON_NUM_THREADS", "1")
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    limit(&mut command, limits);
    command.spawn()
}

#[cfg(unix)]
fn limit(command: &mut Command, limits: Limits) {
    use std::os::unix::process::CommandExt;
    let set = move || {
        set_limit(libc::RLIMIT_CPU, limits.cpu_seconds)?;
        set_limit(libc::RLIMIT_CORE, 0)?;
        // macOS refuses to limit the address space.
        #[cfg(target_os = "linux")]
        set_limit(libc::RLIMIT_AS, limits.memory_bytes)?;
        Ok(())
    };
    // SAFETY: between fork and exec only `setrlimit` is called, which POSIX lists as async-signal-safe in practice
    // and which neither allocates nor takes a lock.
    unsafe { command.pre_exec(set) };
}

#[cfg(not(unix))]
fn limit(_command: &mut Command, _limits: Limits) {}

#[cfg(target_os = "linux")]
type Resource = libc::__rlimit_resource_t;
#[cfg(all(unix, not(target_os = "linux")))]
type Resource = libc::c_int;

#[cfg(unix)]
fn set_limit(resource: Resource, value: u64) -> std::io::Result<()> {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: `limit` is a valid `rlimit` that lives through the call, and `resource` is one of libc's constants.
    let done = unsafe { libc::setrlimit(resource, &raw const limit) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Everything the child writes on stdout, until it closes it, the time is up or it writes too much.
fn receive(child: &mut Child, limits: Limits) -> Result<Vec<u8>, PdfError> {
    let stdout = child.stdout.take().expect("stdout is piped");
    let (send, answer) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = stdout.take(limits.answer_bytes + 1).read_to_end(&mut bytes);
        // The receiver is gone if the time was up; then nobody wants the answer.
        let _ = send.send(read.map(|_| bytes));
    });
    match answer.recv_timeout(limits.wall) {
        Ok(Ok(bytes)) if bytes.len() as u64 > limits.answer_bytes => {
            Err(PdfError::TooLarge { mebibytes: limits.answer_bytes >> 20 })
        }
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => {
            Err(PdfError::Crashed { status: "a broken pipe".to_owned(), detail: error.to_string() })
        }
        Err(_) => Err(PdfError::TimedOut { seconds: limits.wall.as_secs() }),
    }
}

/// The first line of what the child said on stderr, at most 200 characters.
fn complaint_of(child: &mut Child) -> String {
    let mut bytes = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // An unreadable complaint is no complaint.
        let _ = stderr.take(4096).read_to_end(&mut bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it said nothing");
    line.chars().take(200).collect()
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// Runs `script` in place of the PDF reader.
    fn check(script: &str, limits: Limits) -> Result<Extraction, PdfError> {
        let reader = Reader { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()] };
        extract(&reader, limits, Path::new("note.pdf"))
    }

    fn limits() -> Limits {
        Limits { wall: Duration::from_secs(20), answer_bytes: 1 << 20, ..Limits::of_seconds(5) }
    }

    #[test]
    fn an_answer_comes_back_as_it_was_sent() {
        let found =
            Extraction { title: None, page_count: 1, pages: vec![], failed: vec![(1, "torn".into())] };
        let json = serde_json::to_string(&Ok::<_, PdfError>(&found)).unwrap();
        assert_eq!(check(&format!("echo '{json}'"), limits()), Ok(found));
        let json = serde_json::to_string(&Err::<Extraction, _>(PdfError::Encrypted)).unwrap();
        assert_eq!(check(&format!("echo '{json}'"), limits()), Err(PdfError::Encrypted));
    }

    #[test]
    fn a_child_that_dies_is_reported_with_its_last_words() {
        let error = check("echo 'out of memory' >&2; kill -ABRT $$", limits()).unwrap_err();
        let PdfError::Crashed { status, detail } = error else { panic!("{error}") };
        assert!(status.contains("signal"), "{status}");
        assert_eq!(detail, "out of memory");
    }

    #[test]
    fn half_an_answer_is_no_answer() {
        assert!(matches!(
            check("printf '{\"Ok\":{\"title\"'; exit 0", limits()),
            Err(PdfError::Crashed { .. })
        ));
    }

    #[test]
    fn a_child_that_hangs_is_ended() {
        let limits = Limits { wall: Duration::from_millis(50), ..limits() };
        assert_eq!(check("exec sleep 600", limits), Err(PdfError::TimedOut { seconds: 0 }));
    }

    #[test]
    fn a_child_that_floods_is_ended() {
        assert_eq!(check("exec yes", limits()), Err(PdfError::TooLarge { mebibytes: 1 }));
    }

    #[test]
    fn a_child_that_spins_runs_out_of_processor_time() {
        let limits = Limits { cpu_seconds: 1, ..limits() };
        assert!(matches!(check("while :; do :; done", limits), Err(PdfError::Crashed { .. })));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_is_limited() {
        // The shell says in KiB what it may address.
        let error = check("ulimit -v >&2; exit 3", limits()).unwrap_err();
        let PdfError::Crashed { detail, .. } = error else { panic!("{error}") };
        assert_eq!(detail, (1u64 << 20).to_string());
    }

    #[test]
    fn a_missing_reader_is_named() {
        let reader = Reader { program: "/nowhere/tunesmith".into(), arguments: vec![] };
        let error = extract(&reader, limits(), Path::new("note.pdf")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/tunesmith"));
    }
}
