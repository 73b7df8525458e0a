//! The configuration: the flags of [`cli`] and the file that they name, checked as a whole
//! and complete.
//!
//! [`layers`] says what wins over what, [`device`] what the keys of a device mean, [`sharing`] what
//! no two devices may have. Specifications of uplinks, placements and interrupts stay text here:
//! the crates that implement them read them, and are asked whether they can.

pub mod cli;
pub mod device;
pub mod file;
#[cfg(test)]
mod file_tests;
pub mod settings;
pub mod inline;
pub mod keys;
pub mod layers;
pub mod problem;
pub mod ownership;
#[cfg(test)]
mod tests;
pub mod uplink;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use cli::Cli;
use device::check_path;
use settings::{SettingValue, Origin};
pub use problem::ConfigError;
use problem::Problems;
use ownership::ResourceOwners;
use virtionet_base::MAX_QUEUE_PAIRS;
use virtionet_placement::Placement;
use virtionet_placement::interrupts::IrqAffinity;

use crate::uplink::UplinkConfig;

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `--print-capabilities`.
    PrintCapabilities,
    /// Serve these devices.
    Serve(Config),
}

/// All that the daemon is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The devices, at least one.
    pub devices: Vec<DeviceConfig>,
    /// Where the control server answers.
    pub control: Option<PathBuf>,
    /// How often `-v` was given.
    pub verbosity: u8,
}

/// All that is told of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Its name, unlike any other device's: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// How it meets its front-end.
    pub socket: Socket,
    /// Its queue pairs.
    pub queues: Queues,
    /// Its uplink.
    pub uplink: UplinkConfig,
    /// The placement of its workers.
    pub placement: Placement,
    /// What becomes of interrupts and steering masks.
    pub irq_affinity: IrqAffinity,
    /// The front-end's QMP socket.
    pub qmp: Option<PathBuf>,
    /// How its workers wait.
    pub poll: Poll,
}

/// How a device meets its front-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Socket {
    /// Create a socket and wait for the front-end.
    Listen {
        /// Where.
        path: PathBuf,
        /// The file's mode.
        mode: u32,
        /// The file's group, by name or number, where it is not the process's.
        group: Option<String>,
    },
    /// Connect to a front-end that listens, until it does.
    Connect {
        /// Where.
        path: PathBuf,
    },
    /// Use a descriptor from the parent process.
    Inherited(RawFd),
}

/// How many queue pairs a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queues {
    /// As many as the front-end asks for, up to [`MAX_QUEUE_PAIRS`].
    Auto,
    /// At most this many, 1 to [`MAX_QUEUE_PAIRS`].
    AtMost(u16),
}

impl Queues {
    /// Most pairs that the front-end may ask for.
    #[must_use]
    pub fn max(self) -> u16 {
        match self {
            Self::Auto => MAX_QUEUE_PAIRS,
            Self::AtMost(pairs) => pairs,
        }
    }
}

/// How a worker waits for frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poll {
    /// It sleeps.
    Off,
    /// It looks on for up to this long before it sleeps.
    Adaptive(Duration),
    /// It never sleeps.
    Always,
}

impl Config {
    /// What `cli` means, together with the file that it names. Nothing but that file is opened.
    ///
    /// # Errors
    /// All conflicts and meaningless values.
    pub fn resolve(cli: Cli) -> Result<Self, ConfigError> {
        let mut problems = Problems::default();
        let mut control = cli.control.map(|path| SettingValue::new(path, &Origin::Flag));
        let flags = cli.device.settings();
        let described = match cli.config {
            None => layers::devices_of_command_line(flags, &cli.devices, &mut problems),
            Some(path) => {
                let mut file = file::read(&path, &mut problems);
                control = control.or(file.control.take());
                match file.is_complete {
                    true => layers::devices_of_file(&path, file, flags, &cli.devices, &mut problems),
                    false => Vec::new(),
                }
            }
        };
        let mut owners = ResourceOwners::default();
        let control_path = control.as_ref().and_then(|given| {
            let path = problems.record(check_path("control", given))?;
            owners.add_control(&path, given);
            Some(path)
        });
        let mut devices = Vec::new();
        for described in &described {
            if let Some(device) = described.resolve(&mut problems) {
                owners.add(described, &device, &mut problems);
                devices.push(device);
            }
        }
        problems.into_result()?;
        Ok(Self {
            devices,
            control: control_path,
            verbosity: cli.verbose,
        })
    }
}
