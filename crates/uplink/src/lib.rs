//! Where a device's frames go.
//!
//! An uplink is named on the command line as `KIND[:DETAILS]` and parsed into an [`UplinkSpec`];
//! [`open`] makes the [`Uplink`] that queue pairs send to and receive from.

mod gate;
mod link;
pub mod null;
mod sys;
pub mod tap;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use virtionet_device::port::{Uplink, UplinkError};

use crate::null::Null;
use crate::tap::{Tap, TapConfig};

/// An uplink as the command line names it: `tap:NAME[,bridge=BR]` or `null`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UplinkSpec {
    /// A multiqueue TAP.
    Tap(TapConfig),
    /// Nowhere.
    Null,
}

impl FromStr for UplinkSpec {
    type Err = UplinkError;

    fn from_str(text: &str) -> Result<Self, UplinkError> {
        let (kind, details) = match text.split_once(':') {
            Some((kind, details)) => (kind, Some(details)),
            None => (text, None),
        };
        match (kind, details) {
            ("tap", Some(details)) => Ok(Self::Tap(details.parse()?)),
            ("tap", None) => Err(UplinkError(
                "uplink \"tap\" lacks the TAP's name; write tap:NAME".into(),
            )),
            ("null", None) => Ok(Self::Null),
            ("null", Some(details)) => Err(UplinkError(format!(
                "uplink \"null\" takes no details, not {details:?}; write null"
            ))),
            _ => Err(UplinkError(format!(
                "there is no uplink {text:?}; write tap:NAME[,bridge=BR] or null"
            ))),
        }
    }
}

impl fmt::Display for UplinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(config) => write!(f, "tap:{config}"),
            Self::Null => f.write_str("null"),
        }
    }
}

/// Opens the uplink that `spec` names.
///
/// # Errors
/// One sentence that says what is wrong and what to do.
pub fn open(spec: &UplinkSpec) -> Result<Arc<dyn Uplink>, UplinkError> {
    match spec {
        UplinkSpec::Tap(config) => Ok(Arc::new(Tap::open(config)?)),
        UplinkSpec::Null => Ok(Arc::new(Null)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_read_and_written_alike() {
        for text in ["null", "tap:tap0", "tap:vnet%d", "tap:a,bridge=br-lan"] {
            let spec: UplinkSpec = text.parse().unwrap();
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
            ("null:x", "takes no details"),
            ("passt:x", "there is no uplink \"passt:x\""),
        ] {
            let sentence = text.parse::<UplinkSpec>().unwrap_err().to_string();
            assert!(sentence.contains(want), "{text}: {sentence}");
        }
    }

    #[test]
    fn null_opens() {
        let uplink = open(&UplinkSpec::Null).unwrap();
        assert_eq!((uplink.kind(), uplink.name().as_str()), ("null", "null"));
    }
}
