//! The entry points for a program: the parser of its command line, and the errors of it.

use std::ffi::OsString;
use std::io::{self, Write};

use crate::arguments::Arguments;
use crate::problem::ConfigError;
use crate::resolve::resolve;
use crate::types::Config;

/// The answer to `--print-capabilities` (QEMU's docs/interop/vhost-user.rst).
pub const CAPABILITIES: &str = "{\n  \"type\": \"net\"\n}\n";

/// The command that the command line gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Print the capabilities of this back-end (`--print-capabilities`).
    PrintCapabilities,
    /// Serve the devices of this configuration.
    Serve(Box<Config>),
}

/// The error of a command line that gives no [`Command`].
#[derive(Debug)]
pub enum CliError {
    /// Flags that do not exist or that lack their value. `--help` and `--version` are errors too.
    Flags(clap::Error),
    /// Flags that cannot be used together, or values that cannot be used.
    Config(ConfigError),
    /// A command that belongs to virtionetctl, such as `plan`.
    Moved(String),
}

impl CliError {
    /// Prints the error on standard error, or the help text on standard output, and returns the
    /// exit status.
    #[must_use]
    pub fn report(&self) -> u8 {
        // An error of writing is ignored, because the exit status reports the failure too.
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
                    "virtionetd: '{command}' is a command of virtionetctl: run 'virtionetctl \
                     {command}' with the same arguments"
                );
                2
            }
        }
    }
}

/// Parses the command line `args`, of which the first word is the program's name.
///
/// # Errors
/// When the command line cannot be used. `--help` and `--version` are errors too.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, CliError> {
    let args: Vec<OsString> = args.into_iter().collect();
    // The specification requires that it overrides all other arguments, even unusable ones.
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
        .map(|config| Command::Serve(Box::new(config)))
        .map_err(CliError::Config)
}

/// Prints [`CAPABILITIES`] on standard output.
///
/// # Errors
/// When standard output cannot be written.
pub fn print_capabilities() -> io::Result<()> {
    io::stdout().write_all(CAPABILITIES.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_override_all_else_and_are_json() {
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
    fn exit_status_is_0_for_an_answer_and_2_for_an_error() {
        for (args, status) in [
            ("--help", 0),
            ("--version", 0),
            ("--nonsense", 2),
            ("--poll", 2),
        ] {
            let error = parse(["virtionetd", args].map(Into::into)).unwrap_err();
            let CliError::Flags(why) = &error else {
                panic!("{args}: {error:?}");
            };
            assert_eq!(why.exit_code(), status, "{args}");
        }
        let error = parse(["virtionetd".into()]).unwrap_err();
        assert_eq!(error.report(), 2);
    }
}
