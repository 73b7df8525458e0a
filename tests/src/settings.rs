//! Settings of long forms of tests, from the environment.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

/// The number in the environment variable `name`, or `default`.
///
/// # Errors
/// When it is not a number.
pub fn number(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text}")),
        Err(_) => Ok(default),
    }
}

/// The seed in the environment variable `name`, or one of the clock.
///
/// # Errors
/// When it is not a number.
pub fn seed(name: &str) -> Result<u64> {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH)?;
    number(name, since_epoch.subsec_nanos().into())
}
