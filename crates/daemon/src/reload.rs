//! Reading the configuration again: the differences are applied, all or none, and the rest is
//! untouched.
//!
//! The configuration is that of the command line with which the process was started, and of the file
//! that it names. What concerns the whole process is set at the start only. Devices that were added by
//! a request are not part of it and stay.

use std::sync::Arc;

use virtionet_config::{Command, Config, DeviceConfig, cli};
use virtionet_control::v1::{Changed, Refusal, Reload};

use crate::device_set::Changing;
use crate::host::default_state_folder;
use crate::manager::{Author, Manager, not_added, unusable};
use crate::served_device::ServedDevice;

/// What a reload does.
#[derive(Debug, Default)]
struct Differences {
    added: Vec<DeviceConfig>,
    /// The running devices, and their new configurations.
    changed: Vec<(Arc<ServedDevice>, DeviceConfig)>,
    removed: Vec<Arc<ServedDevice>>,
    unchanged: Vec<Arc<ServedDevice>>,
}

impl Manager {
    pub(crate) fn reload(
        &self,
        permit: &Changing<'_>,
        dry_run: bool,
        author: &Author,
    ) -> Result<Changed, Refusal> {
        let config = read()?;
        let fixed = self.config.differing_process_keys(&config);
        if !fixed.is_empty() {
            let message = format!(
                "{} can only be set at the start: restart virtionetd, or leave it as it was",
                fixed.join(", ")
            );
            return Err(Refusal::new(409, "restart-needed", message));
        }
        let differences = self.compare(config)?;
        self.check(&differences)?;
        let report = differences.report(dry_run);
        if !dry_run {
            self.apply(permit, &differences)?;
            tracing::info!(
                "{author}: the configuration is read again: {} devices added, {} removed, {} changed, {} unchanged",
                report.added.len(),
                report.removed.len(),
                report.changed.len(),
                report.unchanged.len()
            );
        }
        let body = serde_json::to_value(report);
        Ok(Changed {
            is_created: false,
            body: body.unwrap_or_default(),
            revision: None,
        })
    }

    fn compare(&self, config: Config) -> Result<Differences, Refusal> {
        let mut differences = Differences::default();
        let is_named = |device: &ServedDevice| {
            config
                .devices
                .iter()
                .any(|named| named.name == device.config.name)
        };
        for device in self.devices.all() {
            if !is_named(&device) && device.requested.lock().is_none() {
                differences.removed.push(device);
            }
        }
        for named in config.devices {
            match self.devices.find(&named.name) {
                None => differences.added.push(named),
                Some(device) if device.config == named => differences.unchanged.push(device),
                Some(device) if device.requested.lock().is_none() => {
                    differences.changed.push((device, named));
                }
                Some(_) => {
                    let message = format!(
                        "there is another device {}, which a request has added: remove it first, or choose another name",
                        named.name
                    );
                    return Err(Refusal::new(409, "device-exists", message));
                }
            }
        }
        Ok(differences)
    }

    /// Checks all that can be checked before something changes.
    fn check(&self, differences: &Differences) -> Result<(), Refusal> {
        let gone = differences.old_devices();
        let gone: Vec<String> = gone.map(|device| device.config.name.clone()).collect();
        let mut running = self.running(&gone);
        for device in differences.new_devices() {
            self.check_added(&running, device)?;
            running.devices.push(device.clone());
        }
        Ok(())
    }

    /// Applies the differences. If one fails, those before it are undone.
    fn apply(&self, permit: &Changing<'_>, differences: &Differences) -> Result<(), Refusal> {
        // What was removed, and what was added in its place or beside.
        let mut undo: Vec<(Option<DeviceConfig>, Option<Arc<ServedDevice>>)> = Vec::new();
        let result = self.apply_each(permit, differences, &mut undo);
        if result.is_err() {
            for (before, after) in undo.into_iter().rev() {
                if let Some(after) = after {
                    self.take_back(self.remove_entirely(permit, after), "remove");
                }
                if let Some(before) = before {
                    let restored = self.create(permit, before, None).map(drop);
                    self.take_back(restored.map_err(|error| not_added(&error)), "restore");
                }
            }
        }
        result
    }

    fn apply_each(
        &self,
        permit: &Changing<'_>,
        differences: &Differences,
        undo: &mut Vec<(Option<DeviceConfig>, Option<Arc<ServedDevice>>)>,
    ) -> Result<(), Refusal> {
        // A device that goes may have what another one is to get.
        for device in differences.old_devices() {
            self.remove_entirely(permit, Arc::clone(device))?;
            undo.push((Some(device.config.clone()), None));
        }
        for config in differences.new_devices() {
            let device = self.create(permit, config.clone(), None);
            undo.push((None, Some(device.map_err(|error| not_added(&error))?)));
        }
        for device in &differences.unchanged {
            // It is one of the configuration now.
            *device.requested.lock() = None;
        }
        Ok(())
    }

    /// Removes a device and its uplink.
    pub(crate) fn remove_entirely(
        &self,
        permit: &Changing<'_>,
        device: Arc<ServedDevice>,
    ) -> Result<(), Refusal> {
        let config = device.config.clone();
        self.remove(permit, &device)?;
        drop(device);
        self.release_uplink(&config.name, &config);
        Ok(())
    }

    /// Logs what could not be undone.
    fn take_back(&self, result: Result<(), Refusal>, verb: &str) {
        if let Err(refusal) = result {
            tracing::error!(
                "the reload failed, and this process cannot {verb} a device as it was: {}; restart virtionetd when that suits its guests",
                refusal.message
            );
        }
    }
}

impl Differences {
    /// The devices that are removed, for good or to be made anew.
    fn old_devices(&self) -> impl Iterator<Item = &Arc<ServedDevice>> {
        let changed = self.changed.iter().map(|(device, _)| device);
        self.removed.iter().chain(changed)
    }

    /// The configurations of the devices that are made.
    fn new_devices(&self) -> impl Iterator<Item = &DeviceConfig> {
        let changed = self.changed.iter().map(|(_, config)| config);
        changed.chain(&self.added)
    }

    fn report(&self, dry_run: bool) -> Reload {
        let names = |devices: &[Arc<ServedDevice>]| {
            devices
                .iter()
                .map(|device| device.config.name.clone())
                .collect()
        };
        Reload {
            dry_run,
            added: self
                .added
                .iter()
                .map(|config| config.name.clone())
                .collect(),
            removed: names(&self.removed),
            changed: self
                .changed
                .iter()
                .map(|(_, config)| config.name.clone())
                .collect(),
            unchanged: names(&self.unchanged),
        }
    }
}

/// The configuration of this process's command line, as it is now.
// syscalls: openat read
fn read() -> Result<Config, Refusal> {
    match cli::parse(std::env::args_os()) {
        Ok(Command::Serve(config)) => Ok(Config {
            state_folder: config.state_folder.clone().or_else(default_state_folder),
            ..*config
        }),
        Err(cli::CliError::Config(error)) => Err(unusable(&error)),
        Ok(Command::PrintCapabilities) | Err(_) => Err(Refusal::new(
            400,
            "command-line-unusable",
            "the command line of virtionetd cannot be read again: restart it".into(),
        )),
    }
}
