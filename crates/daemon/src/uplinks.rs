//! The uplinks of this process: devices that name the same switch are ports of one, and a TAP has one
//! owner.

use std::collections::BTreeMap;
use std::sync::Arc;

use virtionet_config::uplink::{SwitchConfig, UplinkConfig};
use virtionet_uplink::null::Null;
use virtionet_uplink::switch::{HostPortForwarder, Switch};
use virtionet_uplink::tap::{Tap, TapConfig};
use virtionet_virtio_net::uplink::{Uplink, UplinkError};

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
    pub fn open(&mut self, config: &UplinkConfig) -> Result<Arc<dyn Uplink>, UplinkError> {
        match config {
            UplinkConfig::Tap(tap) => {
                self.claim(&tap.name, "a device".into())?;
                Ok(Arc::new(Tap::open(&tap_config(tap))?))
            }
            UplinkConfig::Switch(switch) => Ok(Arc::new(self.switch(switch)?.add_device_port()?)),
            UplinkConfig::Null => Ok(Arc::new(Null)),
        }
    }

    /// What must run beside the devices' workers, each in a thread of its own.
    #[must_use]
    pub fn host_port_forwarders(&self) -> Vec<HostPortForwarder> {
        self.switches
            .values()
            .filter_map(Switch::host_port_forwarder)
            .collect()
    }

    /// The switches, by name.
    pub fn switches(&self) -> impl Iterator<Item = &Switch> {
        self.switches.values().map(|switch| &**switch)
    }

    fn switch(&mut self, config: &SwitchConfig) -> Result<Arc<Switch>, UplinkError> {
        let name = &config.name;
        if let Some(tap) = &config.tap {
            self.claim(&tap.name, format!("switch {name}"))?;
        }
        let switch = self
            .switches
            .entry(name.clone())
            .or_insert_with(|| Switch::new(name));
        if let Some(tap) = &config.tap {
            switch.add_host_port(&tap_config(tap))?;
        }
        Ok(Arc::clone(switch))
    }

    /// A TAP has one owner. (The kernel would say only that it is held.) A pattern makes a new one.
    fn claim(&mut self, name: &str, owner: String) -> Result<(), UplinkError> {
        if name.contains('%') {
            return Ok(());
        }
        match self.taps.get(name) {
            Some(other) if *other != owner => Err(UplinkError(format!(
                "TAP {name} belongs to {other} already; name another one for {owner}"
            ))),
            _ => {
                self.taps.insert(name.to_owned(), owner);
                Ok(())
            }
        }
    }
}

fn tap_config(tap: &virtionet_config::uplink::TapConfig) -> TapConfig {
    TapConfig {
        name: tap.name.clone(),
        bridge: tap.bridge.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_name_one_switch_are_ports_of_one() {
        let mut uplinks = Uplinks::default();
        for (name, kind) in [("a", "switch"), ("b", "switch"), ("a", "switch")] {
            let spec = format!("switch:{name}").parse().unwrap();
            let uplink = uplinks.open(&spec).unwrap();
            assert_eq!((uplink.kind(), uplink.name().as_str()), (kind, name));
        }
        assert_eq!(uplinks.switches.len(), 2);
        assert!(uplinks.host_port_forwarders().is_empty());
    }

    #[test]
    fn a_tap_has_one_owner() {
        let mut uplinks = Uplinks::default();
        uplinks.claim("t0", "switch a".into()).unwrap();
        uplinks.claim("t0", "switch a".into()).unwrap();
        let sentence = uplinks.claim("t0", "switch b".into()).unwrap_err();
        assert!(sentence.to_string().contains("belongs to switch a"));
    }

    #[test]
    fn null_opens() {
        let uplink = Uplinks::default().open(&UplinkConfig::Null).unwrap();
        assert_eq!((uplink.kind(), uplink.name().as_str()), ("null", "null"));
    }
}
