//! The exit codes: 0 ok, 1 a run or gate failed, 2 bad usage or a bad manifest.

use std::process::ExitCode;

/// All is well.
pub(crate) const OK: ExitCode = ExitCode::SUCCESS;

/// How a command ends when it does not end well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// A stage, a gate or the store failed.
    Run,
    /// The command line or the manifest is wrong; nothing was run.
    Usage,
}

impl From<Failure> for ExitCode {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Run => Self::from(1),
            Failure::Usage => Self::from(2),
        }
    }
}
