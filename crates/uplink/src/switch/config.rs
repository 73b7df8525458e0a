//! Which switch, as the command line names it.

use std::fmt;
use std::str::FromStr;

use virtionet_device::port::UplinkError;

use crate::tap::TapConfig;

/// Bytes of the longest switch name.
const MAX_NAME: usize = 32;

/// `NAME[,tap=IF[,bridge=BR]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchConfig {
    /// The switch's name, within this process.
    pub name: String,
    /// The TAP that is a port of it.
    pub tap: Option<TapConfig>,
}

impl FromStr for SwitchConfig {
    type Err = UplinkError;

    fn from_str(text: &str) -> Result<Self, UplinkError> {
        let (name, rest) = match text.split_once(',') {
            Some((name, rest)) => (name, Some(rest)),
            None => (text, None),
        };
        check_name(name)?;
        let tap = match rest.map(|rest| rest.strip_prefix("tap=").ok_or(rest)) {
            None => None,
            Some(Ok(tap)) => Some(tap.parse()?),
            Some(Err(other)) => {
                return Err(UplinkError(format!(
                    "a switch uplink has no option {other:?}; write switch:NAME[,tap=IF[,bridge=BR]]"
                )));
            }
        };
        Ok(Self {
            name: name.to_owned(),
            tap,
        })
    }
}

impl fmt::Display for SwitchConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        match &self.tap {
            Some(tap) => write!(f, ",tap={tap}"),
            None => Ok(()),
        }
    }
}

fn check_name(name: &str) -> Result<(), UplinkError> {
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(UplinkError(format!(
            "switch name {name:?} has {} bytes; it may have 1 to {MAX_NAME}",
            name.len()
        )));
    }
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match name.chars().find(|&c| !good(c)) {
        Some(c) => Err(UplinkError(format!(
            "switch name {name:?} contains {c:?}; use letters, digits, '-', '_' and '.'"
        ))),
        None => Ok(()),
    }
}
