//! The texts by which a configuration names uplinks.

use std::fmt;
use std::str::FromStr;

/// An uplink, which is parsed from and displayed as `tap:NAME[,bridge=BR]`,
/// `switch:NAME[,tap=IF[,bridge=BR]][,forward-reserved]` or `null`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UplinkConfig {
    /// A multiqueue TAP.
    Tap(TapConfig),
    /// A port of a switch in this process.
    Switch(SwitchConfig),
    /// No uplink: frames from the guest are dropped.
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
            ("tap", None) => Err(UplinkParseError::MissingTapName),
            ("switch", Some(details)) => Ok(Self::Switch(details.parse()?)),
            ("switch", None) => Err(UplinkParseError::MissingSwitchName),
            ("null", None) => Ok(Self::Null),
            ("null", Some(details)) => Err(UplinkParseError::NullWithDetails(details.into())),
            _ => Err(UplinkParseError::UnknownKind(text.into())),
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

/// The length of the longest interface name, in bytes (`IFNAMSIZ` without the terminating zero).
const MAX_INTERFACE_NAME: usize = 15;

/// A TAP, which is parsed from and displayed as `NAME[,bridge=BR]`. Both names are valid names of
/// interfaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapConfig {
    /// The name of the TAP. Where it contains `%d`, a new TAP is created, and the kernel replaces
    /// `%d` by the first free number.
    pub name: String,
    /// The bridge that the TAP is made a port of; `None` where it is left as it is.
    pub bridge: Option<String>,
}

impl FromStr for TapConfig {
    type Err = UplinkParseError;

    fn from_str(text: &str) -> Result<Self, UplinkParseError> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        check_interface_name(NameKind::Tap, name)?;
        let mut bridge = None;
        for part in parts {
            match part.split_once('=') {
                Some(("bridge", value)) => {
                    check_interface_name(NameKind::Bridge, value)?;
                    if bridge.replace(value.to_owned()).is_some() {
                        return Err(UplinkParseError::BridgeRepeated(text.into()));
                    }
                }
                _ => return Err(UplinkParseError::UnknownTapOption(part.into())),
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

/// Checks `name` as the kernel does, so that the error is clearer than the kernel's "Invalid
/// argument".
fn check_interface_name(kind: NameKind, name: &str) -> Result<(), UplinkParseError> {
    if name.is_empty() || name.len() > MAX_INTERFACE_NAME {
        return Err(UplinkParseError::InterfaceNameLength {
            kind,
            name: name.into(),
        });
    }
    let is_forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if let Some(character) = name.chars().find(|&c| is_forbidden(c)) {
        return Err(UplinkParseError::NameCharacter {
            kind,
            name: name.into(),
            character,
        });
    }
    if name == "." || name == ".." {
        return Err(UplinkParseError::ReservedName {
            kind,
            name: name.into(),
        });
    }
    let is_pattern = kind == NameKind::Tap && name.matches("%d").count() == 1;
    if name.matches('%').count() > usize::from(is_pattern) {
        return Err(UplinkParseError::PercentSign {
            kind,
            name: name.into(),
        });
    }
    Ok(())
}

/// The length of the longest switch name, in bytes.
const MAX_SWITCH_NAME: usize = 32;

/// The option of a switch that turns on [`SwitchConfig::forward_reserved`].
const FORWARD_RESERVED: &str = "forward-reserved";

/// A switch, which is parsed from and displayed as
/// `NAME[,tap=IF[,bridge=BR]][,forward-reserved]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchConfig {
    /// The switch's name, which is unique within this process: 1 to 32 letters, digits, `-`, `_`
    /// and `.`.
    pub name: String,
    /// The TAP that is a port of the switch; `None` where the host has no port.
    pub tap: Option<TapConfig>,
    /// Whether the switch forwards frames to the reserved group addresses 01:80:C2:00:00:00 to -0F.
    pub forward_reserved: bool,
}

impl FromStr for SwitchConfig {
    type Err = UplinkParseError;

    fn from_str(text: &str) -> Result<Self, UplinkParseError> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        check_switch_name(name)?;
        let (flags, rest): (Vec<&str>, Vec<&str>) = parts.partition(|&p| p == FORWARD_RESERVED);
        if flags.len() > 1 {
            return Err(UplinkParseError::SwitchOptionRepeated(text.into()));
        }
        let rest = (!rest.is_empty()).then(|| rest.join(","));
        let tap = match rest.as_deref().map(|r| r.strip_prefix("tap=").ok_or(r)) {
            None => None,
            Some(Ok(tap)) => Some(tap.parse()?),
            Some(Err(other)) => return Err(UplinkParseError::UnknownSwitchOption(other.into())),
        };
        Ok(Self {
            name: name.to_owned(),
            tap,
            forward_reserved: !flags.is_empty(),
        })
    }
}

impl fmt::Display for SwitchConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(tap) = &self.tap {
            write!(f, ",tap={tap}")?;
        }
        match self.forward_reserved {
            true => write!(f, ",{FORWARD_RESERVED}"),
            false => Ok(()),
        }
    }
}

fn check_switch_name(name: &str) -> Result<(), UplinkParseError> {
    if name.is_empty() || name.len() > MAX_SWITCH_NAME {
        return Err(UplinkParseError::SwitchNameLength(name.into()));
    }
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match name.chars().find(|&c| !is_allowed(c)) {
        Some(character) => Err(UplinkParseError::NameCharacter {
            kind: NameKind::Switch,
            name: name.into(),
            character,
        }),
        None => Ok(()),
    }
}

/// Why a text is not an [`UplinkConfig`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UplinkParseError {
    /// The text, which the variant holds, begins with none of the kinds.
    #[error("there is no uplink {0:?}; write tap:NAME[,bridge=BR], switch:NAME[,tap=IF] or null")]
    UnknownKind(String),
    /// `tap` without a name.
    #[error("uplink \"tap\" lacks the TAP's name; write tap:NAME")]
    MissingTapName,
    /// `switch` without a name.
    #[error("uplink \"switch\" lacks the switch's name; write switch:NAME")]
    MissingSwitchName,
    /// `null` with details, which the variant holds.
    #[error("uplink \"null\" takes no details, not {0:?}; write null")]
    NullWithDetails(String),
    /// Two bridges for one TAP. The variant holds the text behind `tap:`.
    #[error("tap:{0} names a bridge twice; a TAP is a port of one bridge only")]
    BridgeRepeated(String),
    /// An option, which the variant holds, that a TAP does not have.
    #[error("a tap uplink has no option {0:?}; write tap:NAME[,bridge=BR]")]
    UnknownTapOption(String),
    /// An option, which the variant holds, that a switch does not have.
    #[error(
        "a switch uplink has no option {0:?}; write switch:NAME[,tap=IF[,bridge=BR]][,forward-reserved]"
    )]
    UnknownSwitchOption(String),
    /// An option of a switch is repeated. The variant holds the text behind `switch:`.
    #[error("switch:{0} has forward-reserved twice; write it once")]
    SwitchOptionRepeated(String),
    /// The name of an interface is empty or too long.
    #[error(
        "{kind} {name:?} has {} bytes; an interface's name has 1 to {MAX_INTERFACE_NAME}",
        name.len()
    )]
    InterfaceNameLength {
        /// What the name is for.
        kind: NameKind,
        /// The name.
        name: String,
    },
    /// The name of a switch, which the variant holds, is empty or too long.
    #[error(
        "switch name {0:?} has {bytes} bytes; it may have 1 to {MAX_SWITCH_NAME}",
        bytes = .0.len()
    )]
    SwitchNameLength(String),
    /// A name contains a character that it must not contain.
    #[error("{kind} {name:?} contains {character:?}; use letters, digits, '-', '_' and '.'")]
    NameCharacter {
        /// What the name is for.
        kind: NameKind,
        /// The name.
        name: String,
        /// The first character that is not allowed.
        character: char,
    },
    /// The name of an interface is `.` or `..`.
    #[error("{kind} {name:?} is not a name; use letters and digits")]
    ReservedName {
        /// What the name is for.
        kind: NameKind,
        /// The name.
        name: String,
    },
    /// The name of an interface contains a percent sign other than one `%d` of a TAP.
    #[error("{kind} {name:?} contains '%'; only a TAP name may, as one \"%d\" for a free number")]
    PercentSign {
        /// What the name is for.
        kind: NameKind,
        /// The name.
        name: String,
    },
}

impl UplinkParseError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownKind(_) => "uplink-unknown",
            Self::MissingTapName => "tap-name-missing",
            Self::MissingSwitchName => "switch-name-missing",
            Self::NullWithDetails(_) => "null-with-details",
            Self::BridgeRepeated(_) => "bridge-repeated",
            Self::UnknownTapOption(_) => "tap-option-unknown",
            Self::UnknownSwitchOption(_) => "switch-option-unknown",
            Self::SwitchOptionRepeated(_) => "switch-option-repeated",
            Self::InterfaceNameLength { .. } => "interface-name-length",
            Self::SwitchNameLength(_) => "switch-name-length",
            Self::NameCharacter { .. } => "name-character-invalid",
            Self::ReservedName { .. } => "name-reserved",
            Self::PercentSign { .. } => "name-percent-sign",
        }
    }
}

/// What a name in the text of an uplink is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameKind {
    /// A TAP.
    Tap,
    /// A bridge.
    Bridge,
    /// A switch in this process.
    Switch,
}

impl fmt::Display for NameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tap => "TAP name",
            Self::Bridge => "bridge",
            Self::Switch => "switch name",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_is_parsed_and_displayed_stays_the_same() {
        for text in [
            "null",
            "tap:tap0",
            "tap:vnet%d",
            "tap:a,bridge=br-lan",
            "switch:s",
            "switch:Lan-1.a_b,tap=tap0",
            "switch:s,tap=vnet%d,bridge=br0",
            "switch:s,forward-reserved",
            "switch:s,tap=tap0,bridge=br0,forward-reserved",
        ] {
            let uplink: UplinkConfig = text.parse().unwrap();
            assert_eq!(uplink.to_string(), text);
        }
    }

    #[test]
    fn options_of_a_switch_may_have_any_order() {
        let parse = |text: &str| text.parse::<UplinkConfig>().unwrap();
        assert_eq!(
            parse("switch:s,forward-reserved,tap=t,bridge=b"),
            parse("switch:s,tap=t,bridge=b,forward-reserved")
        );
        assert_ne!(parse("switch:s,forward-reserved"), parse("switch:s"));
    }

    /// Invalid texts, with the code and a part of the text of their errors.
    const INVALID: [(&str, &str, &str); 30] = [
        ("", "uplink-unknown", "there is no uplink \"\"; write"),
        ("tap", "tap-name-missing", "lacks the TAP's name"),
        ("tap:", "interface-name-length", "has 0 bytes"),
        ("tap:,bridge=br0", "interface-name-length", "has 0 bytes"),
        (
            "tap:abcdefghijklmnop",
            "interface-name-length",
            "has 16 bytes",
        ),
        ("tap:a/b", "name-character-invalid", "contains '/'"),
        ("tap:a b", "name-character-invalid", "contains ' '"),
        ("tap:a:b", "name-character-invalid", "contains ':'"),
        ("tap:..", "name-reserved", "not a name"),
        ("tap:a%s", "name-percent-sign", "\"%d\""),
        ("tap:%d%d", "name-percent-sign", "\"%d\""),
        (
            "tap:a,bridge=",
            "interface-name-length",
            "bridge \"\" has 0 bytes",
        ),
        ("tap:a,bridge=b%d", "name-percent-sign", "\"%d\""),
        ("tap:a,bridge=b,bridge=c", "bridge-repeated", "twice"),
        ("tap:a,vlan=1", "tap-option-unknown", "no option \"vlan=1\""),
        ("switch", "switch-name-missing", "lacks the switch's name"),
        ("switch:", "switch-name-length", "has 0 bytes"),
        ("switch:,tap=t", "switch-name-length", "has 0 bytes"),
        ("switch:s,", "switch-option-unknown", "no option \"\""),
        ("switch:s,tap", "switch-option-unknown", "no option \"tap\""),
        (
            "switch:s,forward-reserved=1",
            "switch-option-unknown",
            "no option \"forward-reserved=1\"",
        ),
        (
            "switch:s,forward-reserved,forward-reserved",
            "switch-option-repeated",
            "twice",
        ),
        (
            "switch:s,bridge=b",
            "switch-option-unknown",
            "no option \"bridge=b\"",
        ),
        (
            "switch:s,tap=",
            "interface-name-length",
            "TAP name \"\" has 0 bytes",
        ),
        (
            "switch:s,tap=a,tap=b",
            "tap-option-unknown",
            "no option \"tap=b\"",
        ),
        ("switch:a b", "name-character-invalid", "contains ' '"),
        ("switch:a/b", "name-character-invalid", "contains '/'"),
        (
            "switch:abcdefghijklmnopqrstuvwxyz0123456",
            "switch-name-length",
            "has 33 bytes",
        ),
        ("null:x", "null-with-details", "takes no details"),
        (
            "passt:x",
            "uplink-unknown",
            "there is no uplink \"passt:x\"",
        ),
    ];

    #[test]
    fn each_invalid_text_has_its_own_error() {
        for (text, code, part) in INVALID {
            let error = text.parse::<UplinkConfig>().unwrap_err();
            assert_eq!(error.code(), code, "{text}: {error}");
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
    }
}
