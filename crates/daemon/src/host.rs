//! The devices of the process, and what they share.

use std::sync::Arc;

use virtionet_config::{Config, DeviceConfig, PollMode, Socket};
use virtionet_placement::PlacementPlanner;
use virtionet_placement::interrupts::IrqAffinityManager;

use crate::advice::Adviser;
use crate::host_cpus::HostCpus;
use crate::interrupts::Interrupts;
use crate::net_device::NetDevice;
use crate::placer::Placer;
use crate::run_error::RunError;
use crate::uplinks::Uplinks;
use crate::worker_pool::WorkerPool;

/// The state that all devices of the process share.
pub struct Host {
    /// The CPUs of this process.
    pub cpus: Arc<HostCpus>,
    irq_manager: Arc<IrqAffinityManager>,
    /// The workers.
    pub pool: Arc<WorkerPool>,
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
    /// When the CPUs of this process cannot be read.
    pub fn new() -> Result<Self, RunError> {
        Ok(Self {
            cpus: Arc::new(HostCpus::read()?),
            irq_manager: Arc::new(IrqAffinityManager::with_irqbalance()),
            pool: Arc::default(),
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
    ) -> Result<Vec<(DeviceConfig, CreatedDevice)>, RunError> {
        let create = |device: &DeviceConfig| {
            let created = self.create_net_device(device, uplinks)?;
            Ok((device.clone(), created))
        };
        config.devices.iter().map(create).collect()
    }

    /// Creates a device. Its uplink is opened now, so that an error is reported at the start.
    pub(crate) fn create_net_device(
        &self,
        device: &DeviceConfig,
        uplinks: &mut Uplinks,
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
        let net_device = NetDevice::new(
            &device.name,
            device.queues.max(),
            opened.uplink,
            Placer::new(&device.name, planner, Arc::clone(&self.cpus)),
            device.poll,
            Arc::clone(&self.pool),
        )
        .with(
            interrupts,
            Adviser::new(&device.name, device.qmp.clone(), socket),
        );
        Ok(CreatedDevice {
            net_device: Arc::new(net_device),
            uplink_summary: opened.summary,
        })
    }
}
