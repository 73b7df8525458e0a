//! Where a device's frames go.
//!
//! An uplink is named on the command line as `KIND[:DETAILS]` and parsed into an [`UplinkSpec`];
//! [`Uplinks`] makes the [`Uplink`] that queue pairs send to and receive from. It is what the
//! devices of a process have in common: those that name the same switch are ports of one.

mod gate;
mod link;
pub mod null;
pub mod switch;
mod sys;
pub mod tap;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use virtionet_device::port::{Uplink, UplinkError};

use crate::null::Null;
use crate::switch::{Pump, Switch, SwitchConfig};
use crate::tap::{Tap, TapConfig};

/// An uplink as the command line names it: `tap:NAME[,bridge=BR]`,
/// `switch:NAME[,tap=IF[,bridge=BR]]` or `null`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UplinkSpec {
    /// A multiqueue TAP.
    Tap(TapConfig),
    /// A port of a switch in this process.
    Switch(SwitchConfig),
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
            ("switch", Some(details)) => Ok(Self::Switch(details.parse()?)),
            ("switch", None) => Err(UplinkError(
                "uplink \"switch\" lacks the switch's name; write switch:NAME".into(),
            )),
            ("null", None) => Ok(Self::Null),
            ("null", Some(details)) => Err(UplinkError(format!(
                "uplink \"null\" takes no details, not {details:?}; write null"
            ))),
            _ => Err(UplinkError(format!(
                "there is no uplink {text:?}; write tap:NAME[,bridge=BR], switch:NAME[,tap=IF] or null"
            ))),
        }
    }
}

impl fmt::Display for UplinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(config) => write!(f, "tap:{config}"),
            Self::Switch(config) => write!(f, "switch:{config}"),
            Self::Null => f.write_str("null"),
        }
    }
}

/// The uplinks of a process.
#[derive(Debug, Default)]
pub struct Uplinks {
    switches: BTreeMap<String, Arc<Switch>>,
    /// Who has which TAP.
    taps: BTreeMap<String, String>,
}

impl Uplinks {
    /// Opens the uplink of one more device.
    ///
    /// # Errors
    /// One sentence that says what is wrong and what to do.
    pub fn open(&mut self, spec: &UplinkSpec) -> Result<Arc<dyn Uplink>, UplinkError> {
        match spec {
            UplinkSpec::Tap(config) => {
                self.claim(config, "a device".into())?;
                Ok(Arc::new(Tap::open(config)?))
            }
            UplinkSpec::Switch(config) => Ok(Arc::new(self.switch(config)?.add_device()?)),
            UplinkSpec::Null => Ok(Arc::new(Null)),
        }
    }

    /// What must run beside the devices' workers, each in a thread of its own.
    #[must_use]
    pub fn pumps(&self) -> Vec<Pump> {
        self.switches.values().filter_map(Switch::pump).collect()
    }

    /// The switches, by name.
    pub fn switches(&self) -> impl Iterator<Item = &Switch> {
        self.switches.values().map(|switch| &**switch)
    }

    fn switch(&mut self, config: &SwitchConfig) -> Result<Arc<Switch>, UplinkError> {
        let name = &config.name;
        if let Some(tap) = &config.tap {
            self.claim(tap, format!("switch {name}"))?;
        }
        let switch = self
            .switches
            .entry(name.clone())
            .or_insert_with(|| Switch::new(name));
        if let Some(tap) = &config.tap {
            switch.add_host(tap)?;
        }
        Ok(Arc::clone(switch))
    }

    /// A TAP has one owner. (The kernel would say only that it is held.) A pattern makes a new one.
    fn claim(&mut self, tap: &TapConfig, owner: String) -> Result<(), UplinkError> {
        let name = &tap.name;
        if name.contains('%') {
            return Ok(());
        }
        match self.taps.get(name) {
            Some(other) if *other != owner => Err(UplinkError(format!(
                "TAP {name} belongs to {other} already; name another one for {owner}"
            ))),
            _ => {
                self.taps.insert(name.clone(), owner);
                Ok(())
            }
        }
    }
}

/// Opens the uplink that `spec` names, where it is a process's only one.
///
/// # Errors
/// One sentence that says what is wrong and what to do.
pub fn open(spec: &UplinkSpec) -> Result<Arc<dyn Uplink>, UplinkError> {
    Uplinks::default().open(spec)
}

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
            let sentence = text.parse::<UplinkSpec>().unwrap_err().to_string();
            assert!(sentence.contains(want), "{text}: {sentence}");
        }
    }

    #[test]
    fn devices_that_name_one_switch_are_ports_of_one() {
        let mut uplinks = Uplinks::default();
        for (name, kind) in [("a", "switch"), ("b", "switch"), ("a", "switch")] {
            let spec = format!("switch:{name}").parse().unwrap();
            let uplink = uplinks.open(&spec).unwrap();
            assert_eq!((uplink.kind(), uplink.name().as_str()), (kind, name));
        }
        assert_eq!(uplinks.switches.len(), 2);
        assert!(uplinks.pumps().is_empty());
    }

    #[test]
    fn a_tap_has_one_owner() {
        let mut uplinks = Uplinks::default();
        let tap: TapConfig = "t0".parse().unwrap();
        uplinks.claim(&tap, "switch a".into()).unwrap();
        uplinks.claim(&tap, "switch a".into()).unwrap();
        let sentence = uplinks.claim(&tap, "switch b".into()).unwrap_err();
        assert!(sentence.to_string().contains("belongs to switch a"));
    }

    #[test]
    fn null_opens() {
        let uplink = open(&UplinkSpec::Null).unwrap();
        assert_eq!((uplink.kind(), uplink.name().as_str()), ("null", "null"));
    }
}
