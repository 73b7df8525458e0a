//! What the tests of several modules share.

use virtionet_config::{Command, Config, cli};

/// The configuration that these flags mean.
pub(crate) fn config(flags: &str) -> Config {
    let words = ["virtionetd"].into_iter().chain(flags.split_whitespace());
    match cli::parse(words.map(Into::into)) {
        Ok(Command::Serve(config)) => *config,
        other => panic!("{flags}: {other:?}"),
    }
}
