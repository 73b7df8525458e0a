//! Uplinks as the configuration names them.

use std::fmt;
use std::str::FromStr;

/// An uplink as the command line names it: `tap:NAME[,bridge=BR]`,
/// `switch:NAME[,tap=IF[,bridge=BR]]` or `null`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UplinkConfig {
    /// A multiqueue TAP.
    Tap(TapConfig),
    /// A port of a switch in this process.
    Switch(SwitchConfig),
    /// Nowhere.
    Null,
}

impl FromStr for UplinkConfig {
    type Err = UplinkParseError;

    fn from_str(text: &str) -> Result<Self, UplinkParseError> {
        let (kind, details) = match text.split_once(':') {
            Some((kind, details)) => (kind, Some(details)),
            None => (text, None),
        };
        match (kind, details) {
            ("tap", Some(details)) => Ok(Self::Tap(details.parse()?)),
            ("tap", None) => Err(UplinkParseError(
                "uplink \"tap\" lacks the TAP's name; write tap:NAME".into(),
            )),
            ("switch", Some(details)) => Ok(Self::Switch(details.parse()?)),
            ("switch", None) => Err(UplinkParseError(
                "uplink \"switch\" lacks the switch's name; write switch:NAME".into(),
            )),
            ("null", None) => Ok(Self::Null),
            ("null", Some(details)) => Err(UplinkParseError(format!(
                "uplink \"null\" takes no details, not {details:?}; write null"
            ))),
            _ => Err(UplinkParseError(format!(
                "there is no uplink {text:?}; write tap:NAME[,bridge=BR], switch:NAME[,tap=IF] or null"
            ))),
        }
    }
}

impl fmt::Display for UplinkConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(config) => write!(f, "tap:{config}"),
            Self::Switch(config) => write!(f, "switch:{config}"),
            Self::Null => f.write_str("null"),
        }
    }
}

/// Bytes of the longest interface name.
const MAX_INTERFACE_NAME: usize = 15;

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
    type Err = UplinkParseError;

    fn from_str(text: &str) -> Result<Self, UplinkParseError> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        check_interface_name("TAP name", name, true)?;
        let mut bridge = None;
        for part in parts {
            match part.split_once('=') {
                Some(("bridge", value)) => {
                    check_interface_name("bridge", value, false)?;
                    if bridge.replace(value.to_owned()).is_some() {
                        return Err(UplinkParseError(format!(
                            "tap:{text} names a bridge twice; a TAP is a port of one bridge only"
                        )));
                    }
                }
                _ => {
                    return Err(UplinkParseError(format!(
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
fn check_interface_name(what: &str, name: &str, pattern: bool) -> Result<(), UplinkParseError> {
    if name.is_empty() || name.len() > MAX_INTERFACE_NAME {
        return Err(UplinkParseError(format!(
            "{what} {name:?} has {} bytes; an interface's name has 1 to {MAX_INTERFACE_NAME}",
            name.len()
        )));
    }
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if let Some(c) = name.chars().find(|&c| bad(c)) {
        return Err(UplinkParseError(format!(
            "{what} {name:?} contains {c:?}; use letters, digits, '-', '_' and '.'"
        )));
    }
    if name == "." || name == ".." {
        return Err(UplinkParseError(format!(
            "{what} {name:?} is not a name; use letters and digits"
        )));
    }
    let numbered = pattern && name.matches("%d").count() == 1;
    if name.matches('%').count() > usize::from(numbered) {
        return Err(UplinkParseError(format!(
            "{what} {name:?} contains '%'; only a TAP name may, as one \"%d\" for a free number"
        )));
    }
    Ok(())
}

/// Bytes of the longest switch name.
const MAX_SWITCH_NAME: usize = 32;

/// `NAME[,tap=IF[,bridge=BR]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchConfig {
    /// The switch's name, within this process.
    pub name: String,
    /// The TAP that is a port of it.
    pub tap: Option<TapConfig>,
}

impl FromStr for SwitchConfig {
    type Err = UplinkParseError;

    fn from_str(text: &str) -> Result<Self, UplinkParseError> {
        let (name, rest) = match text.split_once(',') {
            Some((name, rest)) => (name, Some(rest)),
            None => (text, None),
        };
        check_switch_name(name)?;
        let tap = match rest.map(|rest| rest.strip_prefix("tap=").ok_or(rest)) {
            None => None,
            Some(Ok(tap)) => Some(tap.parse()?),
            Some(Err(other)) => {
                return Err(UplinkParseError(format!(
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

fn check_switch_name(name: &str) -> Result<(), UplinkParseError> {
    if name.is_empty() || name.len() > MAX_SWITCH_NAME {
        return Err(UplinkParseError(format!(
            "switch name {name:?} has {} bytes; it may have 1 to {MAX_SWITCH_NAME}",
            name.len()
        )));
    }
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match name.chars().find(|&c| !good(c)) {
        Some(c) => Err(UplinkParseError(format!(
            "switch name {name:?} contains {c:?}; use letters, digits, '-', '_' and '.'"
        ))),
        None => Ok(()),
    }
}

/// A text that names no uplink: one sentence that says what to write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UplinkParseError(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_read_and_written_alike() {
        for text in [
            "null",
            "tap:tap0",
            "tap:vnet%d",
            "tap:a,bridge=br-lan",
            "switch:s",
            "switch:Lan-1.a_b,tap=tap0",
            "switch:s,tap=vnet%d,bridge=br0",
        ] {
            let spec: UplinkConfig = text.parse().unwrap();
            assert_eq!(spec.to_string(), text);
        }
    }

    #[test]
    fn bad_specs_are_told_apart() {
        for (text, want) in [
            ("", "there is no uplink \"\"; write"),
            ("tap", "lacks the TAP's name"),
            ("tap:", "has 0 bytes"),
            ("tap:,bridge=br0", "has 0 bytes"),
            ("tap:abcdefghijklmnop", "has 16 bytes"),
            ("tap:a/b", "contains '/'"),
            ("tap:a b", "contains ' '"),
            ("tap:a:b", "contains ':'"),
            ("tap:..", "not a name"),
            ("tap:a%s", "\"%d\""),
            ("tap:%d%d", "\"%d\""),
            ("tap:a,bridge=", "bridge \"\" has 0 bytes"),
            ("tap:a,bridge=b%d", "\"%d\""),
            ("tap:a,bridge=b,bridge=c", "twice"),
            ("tap:a,vlan=1", "no option \"vlan=1\""),
            ("switch", "lacks the switch's name"),
            ("switch:", "has 0 bytes"),
            ("switch:,tap=t", "has 0 bytes"),
            ("switch:s,", "no option \"\""),
            ("switch:s,tap", "no option \"tap\""),
            ("switch:s,bridge=b", "no option \"bridge=b\""),
            ("switch:s,tap=", "TAP name \"\" has 0 bytes"),
            ("switch:s,tap=a,tap=b", "no option \"tap=b\""),
            ("switch:a b", "contains ' '"),
            ("switch:a/b", "contains '/'"),
            ("switch:abcdefghijklmnopqrstuvwxyz0123456", "has 33 bytes"),
            ("null:x", "takes no details"),
            ("passt:x", "there is no uplink \"passt:x\""),
        ] {
            let sentence = text.parse::<UplinkConfig>().unwrap_err().to_string();
            assert!(sentence.contains(want), "{text}: {sentence}");
        }
    }
}
