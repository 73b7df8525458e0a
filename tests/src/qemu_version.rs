//! The program and the version of the installed QEMU.

use anyhow::{Context, Result};

use crate::process::output;

pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// Returns QEMU's version, such as `10.0.2`.
///
/// # Errors
/// When QEMU is not installed.
pub fn version() -> Result<String> {
    let text = output(PROGRAM, ["--version"])?;
    let mut words = text.split_whitespace();
    words
        .by_ref()
        .find(|word| *word == "version")
        .and_then(|_| words.next())
        .map(str::to_owned)
        .with_context(|| format!("{PROGRAM} --version prints no version: {text:?}"))
}
