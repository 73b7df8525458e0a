//! The configuration of a TAP.

use std::fmt;

/// A TAP and the bridge that it is a port of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapConfig {
    /// The interface's name. Where it contains `%d`, a new TAP is created and the kernel puts in
    /// the first free number.
    pub name: String,
    /// The bridge of which the interface is, or becomes, a port.
    pub bridge: Option<String>,
}

impl fmt::Display for TapConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        match &self.bridge {
            Some(bridge) => write!(f, ",bridge={bridge}"),
            None => Ok(()),
        }
    }
}
