//! The log: lines on stderr, with a time stamp unless the journal stamps them itself.

use std::env;
use std::error::Error;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// Why there can be no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `RUST_LOG` cannot be read.
    #[error(
        "RUST_LOG={text:?} is not a log filter ({source}): write one such as info or virtionetd=debug"
    )]
    Filter {
        /// Its text.
        text: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// The process has a log already.
    #[error("the log is already set up ({0}): set it up only once in a process")]
    Twice(#[source] Box<dyn Error + Send + Sync>),
}

impl LogError {
    /// A name of the error for programs. It does not change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Filter { .. } => "log-filter-invalid",
            Self::Twice(_) => "log-set-up-twice",
        }
    }
}

/// Starts logging on stderr. `verbosity` counts `-v`: 0 is info, 1 debug, more trace; the
/// environment's `RUST_LOG` overrides it.
///
/// # Errors
/// A filter in `RUST_LOG` that cannot be read; a second call.
pub fn init(verbosity: u8) -> Result<(), LogError> {
    let rust_log = env::var_os("RUST_LOG").map(|text| text.to_string_lossy().into_owned());
    let log = tracing_subscriber::fmt()
        .compact()
        .with_env_filter(filter(verbosity, rust_log.as_deref())?)
        .with_writer(io::stderr)
        .with_ansi(
            io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
        );
    if is_journal(
        &env::var("JOURNAL_STREAM").unwrap_or_default(),
        io::stderr(),
    ) {
        log.without_time().try_init()
    } else {
        log.try_init()
    }
    .map_err(LogError::Twice)
}

fn filter(verbosity: u8, rust_log: Option<&str>) -> Result<EnvFilter, LogError> {
    let level = match verbosity {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let text = rust_log.filter(|text| !text.is_empty()).unwrap_or(level);
    EnvFilter::builder()
        .parse(text)
        .map_err(|source| LogError::Filter {
            text: text.into(),
            source,
        })
}

/// Whether `stream` is the one that systemd connected to the journal: it names that stream's
/// device and inode in `$JOURNAL_STREAM` (systemd.exec(5)).
fn is_journal(journal_stream: &str, stream: impl AsFd) -> bool {
    let metadata = stream
        .as_fd()
        .try_clone_to_owned()
        .and_then(|fd| File::from(fd).metadata());
    match (metadata, journal_stream.split_once(':')) {
        (Ok(stream), Some((device, inode))) => {
            device.parse() == Ok(stream.dev()) && inode.parse() == Ok(stream.ino())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbosity_sets_the_level_and_rust_log_overrides_it() {
        for (verbosity, rust_log, expected) in [
            (0, None, "info"),
            (1, None, "debug"),
            (2, None, "trace"),
            (9, Some(""), "trace"),
            (2, Some("warn"), "warn"),
            (0, Some("virtionetd=debug"), "virtionetd=debug"),
        ] {
            assert_eq!(
                filter(verbosity, rust_log).unwrap().to_string(),
                expected,
                "-v x {verbosity}, RUST_LOG={rust_log:?}"
            );
        }
    }

    #[test]
    fn a_bad_filter_is_one_sentence() {
        let message = filter(0, Some("virtionetd=loud")).unwrap_err().to_string();
        assert!(
            message.starts_with("RUST_LOG=\"virtionetd=loud\" is not a log filter ("),
            "{message}"
        );
        assert!(!message.contains('\n'));
    }

    #[test]
    fn only_the_named_stream_is_the_journal() {
        let file = File::open("/dev/null").unwrap();
        let metadata = file.metadata().unwrap();
        let name = format!("{}:{}", metadata.dev(), metadata.ino());
        assert!(is_journal(&name, &file));
        assert!(!is_journal(&name, io::pipe().unwrap().0));
        assert!(!is_journal("", &file));
        assert!(!is_journal("a:b", &file));
    }
}
