//! TAPs that the service manager keeps open over a restart of this program, with their addresses and
//! routes: the file descriptor store of systemd (sd_pid_notify_with_fds(3), sd_listen_fds(3)).
//!
//! The name of a descriptor is the configuration of its TAP. One whose configuration is another now is
//! closed, and so is everything else that nobody asked for.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Display;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::process;
use std::sync::Arc;

use virtionet_config::uplink::UplinkConfig;
use virtionet_config::{Config, DeviceConfig, Socket};
use virtionet_uplink::tap::{Tap, TapConfig};
use virtionet_vhost_user::take_fd;

use crate::service_manager::ServiceManager;

/// The first descriptor that a service manager passes (SD_LISTEN_FDS_START).
const FIRST_FD: RawFd = 3;
/// Begins the name of a TAP's descriptor.
const PREFIX: &str = "tap=";
/// The name of a descriptor for which the service manager gives none.
const NO_NAME: &str = "unknown";

/// The descriptors that the service manager has passed to this process, without those that `--fd`
/// names.
#[derive(Debug, Default)]
pub struct PassedDescriptors(Vec<(String, OwnedFd)>);

impl PassedDescriptors {
    /// Takes them. Call this before anything is opened: afterwards a number could be that of another
    /// descriptor.
    // syscalls: fcntl
    #[must_use]
    pub fn take(config: &Config) -> Self {
        let variable = |name: &str| env::var(name).unwrap_or_default();
        // They are meant for that process only.
        if variable("LISTEN_PID") != process::id().to_string() {
            return Self::default();
        }
        let count = variable("LISTEN_FDS").parse().unwrap_or(0);
        let configured = |number: RawFd| {
            let mut sockets = config.devices.iter().map(|device| &device.socket);
            sockets.any(|socket| matches!(socket, Socket::Inherited(fd) if *fd == number))
        };
        let mut taken = Vec::new();
        for (number, name) in numbered(count, &variable("LISTEN_FDNAMES")) {
            if configured(number) {
                continue;
            }
            // Behind the first one that is missing there is none.
            let Ok(fd) = take_fd(number) else { break };
            taken.push((name, fd));
        }
        Self(taken)
    }
}

/// The numbers and names of `count` descriptors.
fn numbered(count: u16, names: &str) -> impl Iterator<Item = (RawFd, String)> {
    let mut names = names.split(':');
    (0..RawFd::from(count)).map(move |index| {
        let name = names.next().filter(|name| !name.is_empty());
        (FIRST_FD + index, name.unwrap_or(NO_NAME).to_owned())
    })
}

/// The TAPs that the service manager keeps.
#[derive(Debug, Default)]
pub struct KeptTaps {
    manager: Arc<ServiceManager>,
    /// The files that no TAP has taken yet, by the names of the descriptors.
    files: BTreeMap<String, OwnedFd>,
}

impl KeptTaps {
    /// Those of `passed` that `config` has. All others are closed, and a line in the log names them.
    #[must_use]
    pub fn new(manager: Arc<ServiceManager>, passed: PassedDescriptors, config: &Config) -> Self {
        let configured: Vec<String> = config.devices.iter().filter_map(descriptor_of).collect();
        let mut kept = Self {
            manager,
            files: BTreeMap::new(),
        };
        for (name, fd) in passed.0 {
            if configured.contains(&name) {
                kept.files.insert(name, fd);
                continue;
            }
            tracing::info!(
                "the service manager has passed the descriptor \"{name}\", which the configuration does not name, and it is closed"
            );
            drop(fd);
            if name.starts_with(PREFIX) {
                kept.manager.discard(&name);
            }
        }
        kept
    }

    /// The TAP of `config`, if it was kept. One that cannot be used is discarded, and the log says why.
    pub fn take(&mut self, config: &TapConfig) -> Option<Tap> {
        let name = descriptor_name(config);
        match Tap::from_kept(config, self.files.remove(&name)?) {
            Ok(tap) => Some(tap),
            Err(error) => {
                tracing::warn!(
                    "TAP {} was kept by the service manager, but cannot be used again, and is made anew: {error}",
                    config.name
                );
                self.manager.discard(&name);
                None
            }
        }
    }

    /// Lets the service manager keep the TAP of `config` no longer.
    pub fn discard(&self, config: &TapConfig) {
        if self.manager.keeps_descriptors() {
            self.manager.discard(&descriptor_name(config));
        }
    }

    /// Lets the service manager keep `tap` from now on, if this program created it.
    pub fn keep(&self, config: &TapConfig, tap: &Tap) {
        let name = descriptor_name(config);
        // The next process could not find the interface that the kernel names, and systemd refuses
        // names that are not ASCII.
        if config.name.contains('%') || !name.is_ascii() || !self.manager.keeps_descriptors() {
            return;
        }
        match tap.file_to_keep() {
            Ok(Some(file)) => self.manager.keep(&name, file.as_fd()),
            Ok(None) => {}
            Err(error) => tracing::warn!(
                "TAP {} is not kept over a restart ({error}); raise the limit of open files",
                config.name
            ),
        }
    }
}

/// The name of the descriptor of a device's TAP, if it has one.
fn descriptor_of(device: &DeviceConfig) -> Option<String> {
    let tap = match &device.uplink {
        UplinkConfig::Tap(tap) => tap,
        UplinkConfig::Switch(switch) => switch.tap.as_ref()?,
        UplinkConfig::Null => return None,
    };
    Some(descriptor_name(tap))
}

/// The name for the configuration of a TAP, as the configuration or the uplink has it.
fn descriptor_name(config: &impl Display) -> String {
    format!("{PREFIX}{config}")
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use virtionet_guest::log_lines::with_log;

    use super::*;
    use crate::testing::config;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn descriptors_are_numbered_from_3_and_named_as_far_as_there_are_names() {
        let all = |count, names| numbered(count, names).collect::<Vec<_>>();
        assert_eq!(all(0, "a"), []);
        assert_eq!(
            all(3, "a:tap=t0,bridge=br0"),
            [
                (3, "a".into()),
                (4, "tap=t0,bridge=br0".into()),
                (5, NO_NAME.into())
            ]
        );
        assert_eq!(all(1, ""), [(3, NO_NAME.into())]);
    }

    #[test]
    fn only_taps_with_the_present_configuration_are_kept() {
        let config = config(
            "--device socket-path=/a,tap=t0,,bridge=br0 --device socket-path=/b,uplink=switch:s,,tap=t1",
        );
        let names = [
            "tap=t0,bridge=br0",
            "tap=t1",
            "tap=t0",
            "tap=t2",
            "virtionetd.socket",
        ];
        let passed = PassedDescriptors(names.map(|name| (name.to_owned(), null())).into());
        let (kept, log) = with_log(|| KeptTaps::new(Arc::default(), passed, &config));
        let kept: Vec<_> = kept.files.keys().map(String::as_str).collect();
        assert_eq!(kept, ["tap=t0,bridge=br0", "tap=t1"]);
        for closed in &names[2..] {
            assert!(log.contains(&format!("\"{closed}\"")), "{closed}: {log}");
        }
    }

    #[test]
    fn descriptor_that_is_no_tap_is_not_used() {
        let config = config("--socket-path /a --tap t0");
        let passed = PassedDescriptors(vec![("tap=t0".into(), null())]);
        let mut kept = KeptTaps::new(Arc::default(), passed, &config);
        let tap = TapConfig {
            name: "t0".into(),
            bridge: None,
        };
        let (taken, log) = with_log(|| kept.take(&tap));
        assert!(taken.is_none());
        assert!(log.contains("t0 was kept by the service manager"), "{log}");
        assert!(kept.take(&tap).is_none());
    }
}
