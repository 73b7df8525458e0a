//! virtionetd as a service of a [`systemd_machine`](crate::systemd_machine), by the unit file of the
//! documentation.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::http;
use crate::paths::{RunDir, virtionetctl, virtionetd};
use crate::systemd_machine::{Machine, MachineFiles};

/// The unit file of the documentation.
pub const UNIT: &str = include_str!("../../docs/systemd/virtionetd.service");
/// The number of the user as which it runs.
pub const USER: u32 = 990;

const SERVICE: &str = "virtionetd.service";
const CONFIG: &str = "/etc/virtionetd.toml";
/// The path that the unit file has.
const CONTROL: &str = "/run/virtionetd/control.sock";

/// The service, in a machine of its own. Dropping this value ends the machine.
#[derive(Debug)]
pub struct Service {
    machine: Machine,
}

impl Service {
    /// Boots a machine with this configuration of virtionetd, and does not start the service. Returns
    /// `None` where no such machine can be made, and prints why.
    ///
    /// # Errors
    /// When the machine does not boot.
    pub fn boot(dir: &RunDir, config: &str) -> Result<Option<Self>> {
        let files = MachineFiles::new(dir)?;
        files.install_program(&virtionetd()?)?;
        files.install_program(&virtionetctl()?)?;
        files.add_user("virtionetd", USER)?;
        files.write(CONFIG.trim_start_matches('/'), config)?;
        files.write(&format!("etc/systemd/system/{SERVICE}"), UNIT)?;
        if let Some(obstacle) = files.find_obstacle()? {
            eprintln!("skipped: no machine with systemd can be made here: {obstacle}");
            return Ok(None);
        }
        let machine = files.boot()?;
        Ok(Some(Self { machine }))
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Runs `systemctl VERB` for the service, which waits until that is done.
    ///
    /// # Errors
    /// When it fails. The error contains the log of the service.
    pub fn systemctl(&self, verb: &str) -> Result<()> {
        let done = self.machine.run("systemctl", [verb, SERVICE]);
        done.with_context(|| self.log()).map(|_| ())
    }

    /// A property of the service, as `systemctl show` prints it.
    ///
    /// # Errors
    /// When systemctl fails.
    pub fn property(&self, name: &str) -> Result<String> {
        self.machine.property(SERVICE, name)
    }

    /// The report of the daemon.
    ///
    /// # Errors
    /// When it does not answer. The error contains the log of the service.
    pub fn report(&self) -> Result<Value> {
        let control = self.path(CONTROL);
        let response = http::request(&control, "GET", "/v1/devices", "");
        let response = response.with_context(|| self.log())?;
        ensure!(response.status == 200, "{response:?}");
        Ok(serde_json::from_str(&response.body)?)
    }

    /// The control socket, by its path on the host.
    pub fn control(&self) -> PathBuf {
        self.path(CONTROL)
    }

    /// The path on the host of the machine's file at `path`, which is absolute.
    pub fn path(&self, path: &str) -> PathBuf {
        self.machine.path(path)
    }

    /// Replaces the configuration.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configure(&self, config: &str) -> Result<()> {
        let path = self.path(CONFIG);
        fs::write(&path, config).with_context(|| format!("{}", path.display()))
    }

    /// Whether the machine has a process of this number.
    pub fn has_process(&self, pid: &str) -> bool {
        self.machine
            .run("test", ["-d", &format!("/proc/{pid}")])
            .is_ok()
    }

    /// The log lines of the service, those of systemd about it included.
    pub fn log(&self) -> String {
        let log = self.machine.log(SERVICE);
        log.unwrap_or_else(|error| format!("no log: {error}"))
    }

    /// The log line of systemd about a service whose status is 0 and of which no process had to be
    /// killed.
    pub fn success() -> String {
        format!("{SERVICE}: Deactivated successfully.")
    }

    /// Powers the machine off, and waits for that.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn power_off(self) -> Result<()> {
        self.machine.power_off()
    }
}

/// The path of the unit file of the documentation.
pub fn unit_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/systemd/virtionetd.service")
}
