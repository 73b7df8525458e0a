//! The devices of the process, and what they share.

use std::env;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use virtionet_config::{Config, DeviceConfig, PollMode, Socket, WorkersConfig};
use virtionet_net_device::advice::Adviser;
use virtionet_net_device::crash_records::CrashRecords;
use virtionet_net_device::feature_set::FeatureSet;
use virtionet_net_device::host_cpus::HostCpus;
use virtionet_net_device::interrupts::Interrupts;
use virtionet_net_device::net_device::NetDevice;
use virtionet_net_device::placer::Placer;
use virtionet_net_device::worker_pool::WorkerPool;
use virtionet_placement::interrupts::IrqAffinityManager;
use virtionet_placement::{Placement, PlacementPlanner};

use crate::run_error::RunError;
use crate::take_over::OfferedDevices;
use crate::uplinks::Uplinks;

/// The state that all devices of the process share.
pub struct Host {
    /// The CPUs of this process.
    pub cpus: Arc<HostCpus>,
    /// The masks of interrupts and queues that this process has set.
    pub irq_manager: Arc<IrqAffinityManager>,
    /// The workers.
    pub pool: Arc<WorkerPool>,
    /// The folder for what must outlive the process, if there is one.
    state_folder: Option<PathBuf>,
}

/// A device, and the objects that were created with it.
pub struct CreatedDevice {
    /// The device.
    pub net_device: Arc<NetDevice>,
    /// What was created or opened for its uplink, for the log.
    pub uplink_summary: String,
}

impl Host {
    /// Reads the host's state.
    ///
    /// # Errors
    /// When the CPUs of this process cannot be read, or the workers cannot run on those of the
    /// configuration.
    pub fn new(config: &Config) -> Result<Self, RunError> {
        let cpus = HostCpus::read()?;
        if let (Some(folder), Some(_)) = (&config.state_folder, &config.allow_add) {
            // A device that is added later says if it is not there.
            let _ = DirBuilder::new().recursive(true).mode(0o755).create(folder);
        }
        Ok(Self {
            pool: Arc::new(worker_pool(config, &cpus)?),
            cpus: Arc::new(cpus),
            irq_manager: Arc::new(IrqAffinityManager::with_irqbalance()),
            state_folder: config.state_folder.clone(),
        })
    }

    /// Creates the devices of `config`, in its order.
    ///
    /// # Errors
    /// When an uplink cannot be opened, or a placement is not possible.
    pub fn create_net_devices(
        &self,
        config: &Config,
        uplinks: &mut Uplinks,
        offered: Option<&OfferedDevices>,
    ) -> Result<Vec<CreatedDevice>, RunError> {
        let mut created = Vec::new();
        for (index, device) in config.devices.iter().enumerate() {
            let records = match offered {
                Some(offered) => offered.crash_records(index)?,
                None => None,
            };
            created.push(self.create_net_device(device, uplinks, records)?);
        }
        Ok(created)
    }

    /// Creates a device. Its uplink is opened now, so that an error is reported at the start.
    /// `records` are those of the daemon before this one.
    pub(crate) fn create_net_device(
        &self,
        device: &DeviceConfig,
        uplinks: &mut Uplinks,
        records: Option<CrashRecords>,
    ) -> Result<CreatedDevice, RunError> {
        let mode = device.placement.clone();
        let planner = PlacementPlanner::new(mode, self.cpus.allowed(), device.qmp.clone())
            .map_err(|source| RunError::Usage {
                device: device.name.clone(),
                source,
            })?
            .with_polling(device.poll != PollMode::Off);
        let opened = uplinks
            .open(&device.name, &device.uplink)
            .map_err(|source| RunError::Uplink {
                device: device.name.clone(),
                source,
            })?;
        let socket = match &device.socket {
            Socket::Listen { path, .. } | Socket::Connect { path } => Some(path.clone()),
            Socket::Inherited(_) => None,
        };
        let interrupts = Interrupts::new(
            &device.name,
            device.irq_affinity,
            Arc::clone(&self.irq_manager),
        );
        let mut net_device = NetDevice::new(
            &device.name,
            device.queues.max(),
            opened.uplink,
            Placer::new(&device.name, planner, Arc::clone(&self.cpus)),
            device.poll,
            Arc::clone(&self.pool),
        )
        .with(
            interrupts,
            Adviser::new(&device.name, device.qmp.clone(), socket.clone()),
        )
        .with_feature_set(FeatureSet::of(device.features_compat))
        .with_postcopy(device.postcopy);
        let (records, problem) = match records {
            Some(records) => (Some(records), None),
            None => open_crash_records(self.state_folder.as_deref(), socket.as_deref()),
        };
        if let Some(records) = records {
            net_device = net_device.with_crash_records(records);
        }
        if let Some(problem) = problem {
            net_device.note_no_crash_records(&problem);
        }
        Ok(CreatedDevice {
            net_device: Arc::new(net_device),
            uplink_summary: opened.summary,
        })
    }
}

fn worker_pool(config: &Config, cpus: &HostCpus) -> Result<WorkerPool, RunError> {
    let WorkersConfig::Shared(shared) = &config.workers else {
        return Ok(WorkerPool::default());
    };
    let list = Placement::List(shared.iter().collect());
    PlacementPlanner::new(list, cpus.allowed(), None).map_err(RunError::Workers)?;
    // It is the same for all devices.
    let poll = config.devices.first().map(|device| device.poll);
    Ok(WorkerPool::shared(shared, poll.unwrap_or(PollMode::Off)))
}

/// The folder for what must outlive the process where none is configured: that of the service manager,
/// or the one that the file system hierarchy has for this user.
#[must_use]
pub fn default_state_folder() -> Option<PathBuf> {
    if let Some(folders) = env::var_os("RUNTIME_DIRECTORY") {
        return env::split_paths(&folders).next();
    }
    if rustix::process::geteuid().is_root() {
        return Some("/run/virtionetd".into());
    }
    let folder = env::var_os("XDG_RUNTIME_DIR")?;
    Some(Path::new(&folder).join("virtionetd"))
}

/// The crash records of the device with the vhost-user socket `socket`, and what is wrong with them.
/// A device whose socket was inherited has records that last as long as this process, because the
/// next process cannot have the same socket.
fn open_crash_records(
    folder: Option<&Path>,
    socket: Option<&Path>,
) -> (Option<CrashRecords>, Option<String>) {
    let problem = match (folder, socket) {
        (Some(folder), Some(socket)) => match CrashRecords::open(folder, socket) {
            Ok(records) => return (Some(records), None),
            Err(error) => Some(format!(
                "a guest with packed virtqueues does not continue after a crash of virtionetd, because there can be no state in {}: {error}; name another folder with --state-dir",
                folder.display()
            )),
        },
        _ => None,
    };
    match CrashRecords::in_memory() {
        Ok(records) => (Some(records), problem),
        Err(error) => (None, Some(problem.unwrap_or_else(|| error.to_string()))),
    }
}
