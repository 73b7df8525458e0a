//! The uplinks of this process. Devices that name the same switch are ports of it, and a TAP has
//! one owner.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use virtionet_config::uplink::{SwitchConfig, UplinkConfig};
use virtionet_handover::SharedFd;
use virtionet_uplink::null::Null;
use virtionet_uplink::switch::{HostPortForwarder, Switch, SwitchImage};
use virtionet_uplink::tap::{Tap, TapConfig, TapImage};
use virtionet_virtio_net::uplink::{Uplink, UplinkError};

use crate::kept_taps::KeptTaps;

/// An uplink that a device can use.
#[derive(Debug)]
pub struct OpenedUplink {
    /// The uplink.
    pub uplink: Arc<dyn Uplink>,
    /// What was created or opened for it, for the log.
    pub summary: String,
}

impl OpenedUplink {
    fn new(uplink: Arc<impl Uplink + 'static>, summary: String) -> Self {
        Self { uplink, summary }
    }
}

/// Why an uplink cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenUplinkError {
    /// The uplink itself reports why.
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    /// The TAP has another owner already.
    #[error("TAP {tap} belongs to {owner} already; name another one for {claimant}")]
    TapClaimed {
        /// The TAP's name.
        tap: String,
        /// The owner of the TAP.
        owner: String,
        /// The second owner that names it.
        claimant: String,
    },
}

impl OpenUplinkError {
    /// A stable name of the error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Uplink(_) => "uplink-not-opened",
            Self::TapClaimed { .. } => "tap-claimed-twice",
        }
    }
}

/// How a TAP came to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TapOrigin {
    /// From the daemon before this one.
    TakenOver,
    /// From an earlier process, by way of the service manager.
    Kept,
    /// It existed.
    Opened,
    /// It was created.
    Created,
}

impl TapOrigin {
    fn describe(self, name: &str) -> String {
        match self {
            Self::TakenOver => format!("TAP {name} taken over"),
            Self::Kept => format!("TAP {name} kept by the service manager"),
            Self::Opened => format!("existing TAP {name} opened"),
            Self::Created => format!("TAP {name} created"),
        }
    }
}

/// The owner of a TAP that is a device's own.
const A_DEVICE: &str = "a device";

/// The uplinks of a process.
#[derive(Debug, Default)]
pub struct Uplinks {
    switches: BTreeMap<String, Arc<Switch>>,
    /// The owner of each TAP.
    owners: BTreeMap<String, String>,
    /// The TAPs and their configurations, by their owners.
    taps: BTreeMap<String, (TapConfig, Arc<Tap>)>,
    /// What the service manager keeps.
    kept: KeptTaps,
    /// The TAPs of the daemon before this one that are not opened yet, by their owners.
    inherited_taps: BTreeMap<String, TapImage<SharedFd>>,
    /// The seeds of its switches.
    inherited_seeds: BTreeMap<String, u64>,
}

impl Uplinks {
    /// No uplinks yet. TAPs that the service manager keeps are used again.
    #[must_use]
    pub fn new(kept: KeptTaps) -> Self {
        Self {
            kept,
            ..Self::default()
        }
    }

    /// With the uplinks of the daemon before this one, to which they belong until [`Uplinks::own`].
    #[must_use]
    pub fn inheriting(
        self,
        taps: BTreeMap<String, TapImage<SharedFd>>,
        switch_seeds: BTreeMap<String, u64>,
    ) -> Self {
        Self {
            inherited_taps: taps,
            inherited_seeds: switch_seeds,
            ..self
        }
    }

    /// Opens the uplink of one more device, which `device` names.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(
        &mut self,
        device: &str,
        config: &UplinkConfig,
    ) -> Result<OpenedUplink, OpenUplinkError> {
        match config {
            UplinkConfig::Tap(tap) => {
                self.claim(&tap.name, A_DEVICE.into())?;
                let owner = format!("device {device}");
                let (uplink, origin) = self.open_tap(owner, &tap_config(tap))?;
                let summary = origin.describe(&uplink.name());
                Ok(OpenedUplink::new(uplink, summary))
            }
            UplinkConfig::Switch(switch) => {
                let port = self.switch(switch)?.add_device_port(device)?;
                Ok(OpenedUplink::new(
                    Arc::new(port),
                    format!("port of switch {}", switch.name),
                ))
            }
            UplinkConfig::Null => Ok(OpenedUplink::new(Arc::new(Null), "no uplink (null)".into())),
        }
    }

    /// The forwarders of the switches' host ports, each of which needs a thread of its own.
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

    fn switch(&mut self, config: &SwitchConfig) -> Result<Arc<Switch>, OpenUplinkError> {
        let name = &config.name;
        if let Some(tap) = &config.tap {
            self.claim(&tap.name, format!("switch {name}"))?;
        }
        let seed = self.inherited_seeds.get(name);
        let create = || match seed {
            Some(seed) => Switch::with_seed(name, *seed),
            None => Switch::new(name),
        };
        let switch = Arc::clone(self.switches.entry(name.clone()).or_insert_with(create));
        if config.forward_reserved {
            switch.forward_reserved_groups();
        }
        if let Some(tap) = &config.tap {
            let config = tap_config(tap);
            let owner = format!("switch {name}");
            switch.add_host_tap(&config, || Ok(self.open_tap(owner, &config)?.0))?;
        }
        Ok(switch)
    }

    fn open_tap(
        &mut self,
        owner: String,
        config: &TapConfig,
    ) -> Result<(Arc<Tap>, TapOrigin), UplinkError> {
        let (tap, origin) = if let Some(image) = self.inherited_taps.remove(&owner) {
            (Tap::from_image(config, &image)?, TapOrigin::TakenOver)
        } else if let Some(tap) = self.kept.take(config) {
            (tap, TapOrigin::Kept)
        } else {
            let tap = Tap::open(config)?;
            match tap.is_created_by_us() {
                true => (tap, TapOrigin::Created),
                false => (tap, TapOrigin::Opened),
            }
        };
        let tap = Arc::new(tap);
        let configured = (config.clone(), Arc::clone(&tap));
        self.taps.insert(owner, configured);
        Ok((tap, origin))
    }

    /// Whether `config` needs nothing that only the start of the process makes: a switch gets its TAP,
    /// and the thread for it, then.
    #[must_use]
    pub fn can_be_added(&self, config: &UplinkConfig) -> bool {
        let UplinkConfig::Switch(SwitchConfig {
            name,
            tap: Some(tap),
            ..
        }) = config
        else {
            return true;
        };
        let switch = self.switches.get(name);
        switch.is_some_and(|switch| switch.host_tap() == Some(tap.name.as_str()))
    }

    /// Forgets the uplink of a device that was removed, and the switches that have no port any more. The
    /// service manager keeps the device's TAP no longer.
    pub fn release(&mut self, device: &str, config: &UplinkConfig) {
        if let UplinkConfig::Tap(tap) = config {
            if self.taps.remove(&format!("device {device}")).is_some() {
                self.kept.discard(&tap_config(tap));
            }
            self.owners
                .retain(|name, owner| name != &tap.name || owner != A_DEVICE);
        }
        self.switches.retain(|_, switch| !switch.is_unused());
    }

    /// Lets the service manager keep the TAPs that this program has created, for its next start.
    pub fn keep(&self) {
        for (config, tap) in self.taps.values() {
            self.kept.keep(config, tap);
        }
    }

    /// The images of the TAPs, by their owners.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn tap_images(&self) -> io::Result<BTreeMap<String, TapImage<SharedFd>>> {
        let taps = self.taps.iter();
        taps.map(|(owner, (_, tap))| Ok((owner.clone(), tap.to_image()?)))
            .collect()
    }

    /// The seed of each switch.
    #[must_use]
    pub fn switch_seeds(&self) -> BTreeMap<String, u64> {
        let seed = |(name, switch): (&String, &Arc<Switch>)| (name.clone(), switch.seed());
        self.switches.iter().map(seed).collect()
    }

    /// What the switches have learned.
    #[must_use]
    pub fn switch_images(&self) -> Vec<SwitchImage> {
        self.switches().map(Switch::to_image).collect()
    }

    /// Brings inherited uplinks up to date.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn update(
        &self,
        taps: &BTreeMap<String, TapImage<SharedFd>>,
        switches: &[SwitchImage],
    ) -> io::Result<()> {
        for (owner, (_, tap)) in &self.taps {
            if let Some(image) = taps.get(owner) {
                tap.update_from_image(image)?;
            }
        }
        for image in switches {
            if let Some(switch) = self.switches.get(&image.name) {
                switch.learn_image(image);
            }
        }
        Ok(())
    }

    /// Makes inherited uplinks those of this process.
    pub fn own(&self) {
        self.taps.values().for_each(|(_, tap)| tap.own());
    }

    /// Records the owner of a TAP, because the kernel's error would not name the other owner. A
    /// pattern always creates a new TAP.
    fn claim(&mut self, name: &str, owner: String) -> Result<(), OpenUplinkError> {
        if name.contains('%') {
            return Ok(());
        }
        match self.owners.get(name) {
            Some(other) if *other != owner => Err(OpenUplinkError::TapClaimed {
                tap: name.to_owned(),
                owner: other.clone(),
                claimant: owner,
            }),
            _ => {
                self.owners.insert(name.to_owned(), owner);
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
    fn devices_that_name_the_same_switch_share_it() {
        let mut uplinks = Uplinks::default();
        for (name, kind) in [("a", "switch"), ("b", "switch"), ("a", "switch")] {
            let spec = format!("switch:{name}").parse().unwrap();
            let uplink = uplinks.open("net", &spec).unwrap().uplink;
            assert_eq!((uplink.kind(), uplink.name().as_str()), (kind, name));
        }
        assert_eq!(uplinks.switches.len(), 2);
        assert!(uplinks.host_port_forwarders().is_empty());
    }

    #[test]
    fn tap_of_another_owner_is_refused() {
        let mut uplinks = Uplinks::default();
        uplinks.claim("t0", "switch a".into()).unwrap();
        uplinks.claim("t0", "switch a".into()).unwrap();
        let error = uplinks.claim("t0", "switch b".into()).unwrap_err();
        assert!(error.to_string().contains("belongs to switch a"));
    }

    #[test]
    fn null_uplink_is_opened() {
        let opened = Uplinks::default().open("net", &UplinkConfig::Null).unwrap();
        let uplink = opened.uplink;
        assert_eq!((uplink.kind(), uplink.name().as_str()), ("null", "null"));
    }
}
