//! Which TAP, as the command line names it.

use std::fmt;
use std::str::FromStr;

use virtionet_device::port::UplinkError;

/// Bytes of the longest interface name.
const MAX_NAME: usize = 15;

/// `NAME[,bridge=BR]`: names that an interface can bear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapConfig {
    /// The interface's name. With `%d` in it, a new TAP is made and the kernel puts in the first
    /// free number.
    pub name: String,
    /// The bridge that the interface is, or becomes, a port of.
    pub bridge: Option<String>,
}

impl FromStr for TapConfig {
    type Err = UplinkError;

    fn from_str(text: &str) -> Result<Self, UplinkError> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        check_name("TAP name", name, true)?;
        let mut bridge = None;
        for part in parts {
            match part.split_once('=') {
                Some(("bridge", value)) => {
                    check_name("bridge", value, false)?;
                    if bridge.replace(value.to_owned()).is_some() {
                        return Err(UplinkError(format!(
                            "tap:{text} names a bridge twice; a TAP is a port of one bridge only"
                        )));
                    }
                }
                _ => {
                    return Err(UplinkError(format!(
                        "a tap uplink has no option {part:?}; write tap:NAME[,bridge=BR]"
                    )));
                }
            }
        }
        Ok(Self {
            name: name.to_owned(),
            bridge,
        })
    }
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

/// What the kernel takes for a name, checked here for a better sentence than "Invalid argument".
fn check_name(what: &str, name: &str, pattern: bool) -> Result<(), UplinkError> {
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(UplinkError(format!(
            "{what} {name:?} has {} bytes; an interface's name has 1 to {MAX_NAME}",
            name.len()
        )));
    }
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if let Some(c) = name.chars().find(|&c| bad(c)) {
        return Err(UplinkError(format!(
            "{what} {name:?} contains {c:?}; use letters, digits, '-', '_' and '.'"
        )));
    }
    if name == "." || name == ".." {
        return Err(UplinkError(format!(
            "{what} {name:?} is not a name; use letters and digits"
        )));
    }
    let numbered = pattern && name.matches("%d").count() == 1;
    if name.matches('%').count() > usize::from(numbered) {
        return Err(UplinkError(format!(
            "{what} {name:?} contains '%'; only a TAP name may, as one \"%d\" for a free number"
        )));
    }
    Ok(())
}
