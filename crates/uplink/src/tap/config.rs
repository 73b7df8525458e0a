//! Which TAP.

use std::fmt;

/// A TAP and the bridge that it is a port of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapConfig {
    /// The interface's name. With `%d` in it, a new TAP is made and the kernel puts in the first
    /// free number.
    pub name: String,
    /// The bridge that the interface is, or becomes, a port of.
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
