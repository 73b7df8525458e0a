//! The entry points for a program: its command line, and the errors about it.

use std::ffi::OsString;
use std::io::{self, Write};

use crate::arguments::Arguments;
use crate::problem::ConfigError;
use crate::resolve::resolve;
use crate::types::Config;

/// The answer to `--print-capabilities` (QEMU's docs/interop/vhost-user.rst).
pub const CAPABILITIES: &str = "{\n  \"type\": \"net\"\n}\n";

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `--print-capabilities`.
    PrintCapabilities,
    /// Serve the devices of this configuration.
    Serve(Config),
}

/// Why a command line results in no [`Command`].
#[derive(Debug)]
pub enum CliError {
    /// Flags that do not exist or lack their value; also `--help` and `--version`.
    Flags(clap::Error),
    /// Flags that cannot be used together, or values that cannot be used.
    Config(ConfigError),
    /// A command of virtionetctl.
    Moved(String),
}

impl CliError {
    /// Prints the error, and returns the exit status.
    #[must_use]
    pub fn report(&self) -> u8 {
        // An error of writing is ignored: the exit status reports the failure all the same.
        match self {
            Self::Flags(why) => {
                let _ = why.print();
                u8::try_from(why.exit_code()).unwrap_or(2)
            }
            Self::Config(why) => {
                for problem in why.problems() {
                    let _ = writeln!(io::stderr(), "virtionetd: {problem}");
                }
                2
            }
            Self::Moved(command) => {
                let _ = writeln!(
                    io::stderr(),
                    "virtionetd: '{command}' is a command of virtionetctl: run 'virtionetctl {command}' with the same arguments"
                );
                2
            }
        }
    }
}

/// Reads the command line, the program's name first.
///
/// # Errors
/// When it cannot be used; also for `--help` and `--version`.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, CliError> {
    let args: Vec<OsString> = args.into_iter().collect();
    // The specification requires it to win over all other arguments, even unusable ones.
    if args.iter().any(|arg| arg == "--print-capabilities") {
        return Ok(Command::PrintCapabilities);
    }
    if let Some(command) = args.get(1).and_then(|arg| arg.to_str())
        && matches!(command, "plan" | "check")
    {
        return Err(CliError::Moved(command.into()));
    }
    let arguments = Arguments::parse(args).map_err(CliError::Flags)?;
    resolve(arguments)
        .map(Command::Serve)
        .map_err(CliError::Config)
}

/// Answers `--print-capabilities` on stdout.
///
/// # Errors
/// When stdout cannot be written.
pub fn print_capabilities() -> io::Result<()> {
    io::stdout().write_all(CAPABILITIES.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_win_over_all_else_and_are_json() {
        for args in [
            &["--print-capabilities"][..],
            &["--nonsense", "--print-capabilities", "--fd"],
        ] {
            let args = [&["virtionetd"], args].concat();
            let command = parse(args.iter().map(Into::into)).unwrap();
            assert_eq!(command, Command::PrintCapabilities);
        }
        let json: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
        assert_eq!(json, serde_json::json!({"type": "net"}));
    }

    #[test]
    fn the_exit_status_is_0_for_an_answer_and_2_for_an_error() {
        for (args, status) in [
            ("--help", 0),
            ("--version", 0),
            ("--nonsense", 2),
            ("--poll", 2),
        ] {
            let refusal = parse(["virtionetd", args].map(Into::into)).unwrap_err();
            let CliError::Flags(why) = &refusal else {
                panic!("{args}: {refusal:?}");
            };
            assert_eq!(why.exit_code(), status, "{args}");
        }
        let refusal = parse(["virtionetd".into()]).unwrap_err();
        assert_eq!(refusal.report(), 2);
    }
}
