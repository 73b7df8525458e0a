//! The thread `manager`: it adds, removes and changes devices while the process runs.
//!
//! It is started before the main thread is confined, and confined as what it does needs: a session's
//! thread inherits its limits, and the thread of the control server has narrower ones. It carries out one
//! change after the other, which come from the control server and from SIGHUP.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};
use signal_hook::iterator::Handle;
use virtionet_config::{Config, ConfigError, DeviceConfig, GivenValue, Requested, Socket};
use virtionet_control::v1::{
    Change, ChangeRequest, Changed, Condition, DeviceSettings, LinkState, Refusal, Reply,
};
use virtionet_net_device::net_device::NetDevice;
use virtionet_process::sandbox;
use virtionet_sandbox::ThreadKind;

use crate::descriptor_budget::DescriptorLimit;
use crate::device_set::{Changing, DeviceSet};
use crate::device_thread::WaitingDevice;
use crate::frontend_source::FrontendSource;
use crate::host::Host;
use crate::run_error::RunError;
use crate::served_device::ServedDevice;
use crate::uplinks::Uplinks;

/// How many changes may wait.
const MAX_WAITING: usize = 64;
/// How long a device that is removed may take to send what its guest has given it.
const DRAIN_LIMIT: Duration = Duration::from_millis(200);
/// How long its thread, and those that look at it, may take to end.
const END_LIMIT: Duration = Duration::from_secs(2);
/// The pause between two checks of that.
const CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// Who asks for a change, for the log.
pub type Author = Box<dyn fmt::Display + Send>;

/// A change, and what becomes of it.
struct Job {
    change: Change,
    condition: Condition,
    author: Author,
    reply: Reply,
}

/// Where changes are handed in.
#[derive(Debug, Clone)]
pub struct ChangeQueue(SyncSender<Job>);

/// The other end of a [`ChangeQueue`].
pub struct ChangeReceiver(Receiver<Job>);

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} by {}", self.change, self.author)
    }
}

impl ChangeQueue {
    /// A queue, and its other end.
    #[must_use]
    pub fn new() -> (Self, ChangeReceiver) {
        let (sender, receiver) = sync_channel(MAX_WAITING);
        (Self(sender), ChangeReceiver(receiver))
    }

    /// Hands a client's request in.
    pub fn submit(&self, request: ChangeRequest, reply: Reply) {
        self.send(Job {
            change: request.change,
            condition: request.condition,
            author: Box::new(request.peer),
            reply,
        });
    }

    /// Hands a reload in that the signal asks for. Its result is logged.
    pub fn submit_reload_by_signal(&self) {
        let reply = |result: Result<Changed, Refusal>| {
            if let Err(refusal) = result {
                tracing::error!(
                    "SIGHUP: the configuration is not read again: {}",
                    refusal.message
                );
            }
        };
        self.send(Job {
            change: Change::Reload { dry_run: false },
            condition: Condition::Always,
            author: Box::new("SIGHUP"),
            reply: Box::new(reply),
        });
    }

    fn send(&self, job: Job) {
        let (job, code, message) = match self.0.try_send(job) {
            Ok(()) => return,
            Err(TrySendError::Full(job)) => (
                job,
                "too-many-changes",
                format!("{MAX_WAITING} changes wait already: try again"),
            ),
            Err(TrySendError::Disconnected(job)) => {
                (job, "ending", "virtionetd ends: try again later".into())
            }
        };
        (job.reply)(Err(Refusal::new(503, code, message)));
    }
}

/// What the changes need.
pub struct Manager {
    /// The configuration of the process. Its devices have no meaning here.
    pub config: Config,
    /// The limit of open files.
    pub limit: DescriptorLimit,
    /// What devices share.
    pub host: Arc<Host>,
    /// The uplinks.
    pub uplinks: Arc<Mutex<Uplinks>>,
    /// The devices.
    pub devices: Arc<DeviceSet>,
    /// Closed when the program has nothing to do any more.
    pub main: Handle,
}

impl Manager {
    /// Starts the thread, which ends when the last [`ChangeQueue`] is dropped.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub fn start(self, changes: ChangeReceiver) -> io::Result<()> {
        let thread = std::thread::Builder::new().name("manager".into());
        thread
            .spawn(move || {
                sandbox::confine_thread(ThreadKind::Manager);
                for job in changes.0 {
                    let result = self.carry_out(job.change, job.condition, &job.author);
                    (job.reply)(result);
                }
            })
            .map(|_| ())
    }

    fn carry_out(
        &self,
        change: Change,
        condition: Condition,
        author: &Author,
    ) -> Result<Changed, Refusal> {
        let Some(permit) = self.devices.try_change() else {
            let message = "virtionetd hands its devices over or ends at this moment: try again";
            return Err(Refusal::new(409, "handover-in-progress", message.into()));
        };
        match change {
            Change::Add(values) => {
                let given = values
                    .iter()
                    .map(|(key, value)| (key.clone(), given(value)));
                let requested = Requested::new(&given.collect()).map_err(|e| unusable(&e))?;
                self.check_condition(&requested.config.name, condition)?;
                self.add(&permit, requested, author)
            }
            Change::Remove(name) => {
                self.check_condition(&name, condition)?;
                self.remove_entirely(&permit, self.find(&name)?)?;
                tracing::info!("{author}: device {name} is removed");
                Ok(Changed {
                    is_created: false,
                    body: json!({ "removed": name }),
                    revision: None,
                })
            }
            Change::Set(name, settings) => {
                self.check_condition(&name, condition)?;
                self.set(&self.find(&name)?, settings, author)
            }
            Change::Reload { dry_run } => self.reload(&permit, dry_run, author),
        }
    }

    fn find(&self, name: &str) -> Result<Arc<ServedDevice>, Refusal> {
        self.devices.find(name).ok_or_else(|| {
            let message = format!("there is no device {name:?}: GET /v1/devices lists them");
            Refusal::new(404, "no-such-device", message)
        })
    }

    fn check_condition(&self, name: &str, condition: Condition) -> Result<(), Refusal> {
        let device = self.devices.find(name);
        let holds = match condition {
            Condition::Always => true,
            Condition::Exists => device.is_some(),
            Condition::Absent => device.is_none(),
            Condition::Revision(revision) => {
                device.is_some_and(|device| device.revision() == revision)
            }
        };
        match holds {
            true => Ok(()),
            false => Err(Refusal::new(
                412,
                "changed-meanwhile",
                format!("device {name} was changed, added or removed meanwhile: read it again"),
            )),
        }
    }

    fn add(
        &self,
        permit: &Changing<'_>,
        requested: Requested,
        author: &Author,
    ) -> Result<Changed, Refusal> {
        let Requested { settings, config } = requested;
        if let Some(device) = self.devices.find(&config.name) {
            return match device.config == config {
                true => Ok(state_of(&device, false)),
                false => Err(Refusal::new(
                    409,
                    "device-exists",
                    format!(
                        "there is another device {}: remove it first, or choose another name",
                        config.name
                    ),
                )),
            };
        }
        self.check_added(&self.running(&[]), &config)?;
        let device = self.create(permit, config, Some(settings));
        let device = device.map_err(|error| not_added(&error))?;
        let name = device.name();
        tracing::info!("{author}: device {name} is added, waiting for a front-end");
        Ok(state_of(&device, true))
    }

    /// The configuration of the process with the devices that it has now, less those of these names.
    pub(crate) fn running(&self, without: &[String]) -> Config {
        let devices = self.devices.all();
        let kept = devices.iter().filter(|d| !without.contains(&d.config.name));
        Config {
            devices: kept.map(|device| device.config.clone()).collect(),
            ..self.config.clone()
        }
    }

    /// Checks that `device` can be added to the devices of `running`.
    pub(crate) fn check_added(
        &self,
        running: &Config,
        device: &DeviceConfig,
    ) -> Result<(), Refusal> {
        running.check_added(device).map_err(|e| unusable(&e))?;
        if !self.uplinks.lock().can_be_added(&device.uplink) {
            let message = format!(
                "{}: a switch gets its TAP when virtionetd starts: restart it, or name a switch without a TAP",
                device.name
            );
            return Err(Refusal::new(409, "switch-tap-not-added", message));
        }
        let mut all = running.clone();
        all.devices.push(device.clone());
        self.limit.check(&all).map_err(|error| not_added(&error))
    }

    /// Makes a device and starts its thread.
    pub(crate) fn create(
        &self,
        permit: &Changing<'_>,
        config: DeviceConfig,
        requested: Option<BTreeMap<String, String>>,
    ) -> Result<Arc<ServedDevice>, RunError> {
        let name = config.name.clone();
        let source = FrontendSource::open(&config.socket).map_err(|source| RunError::Socket {
            device: name.clone(),
            source,
        })?;
        let created = {
            let mut uplinks = self.uplinks.lock();
            let created = self.host.create_net_device(&config, &mut uplinks, None);
            created.inspect_err(|_| uplinks.release(&name, &config.uplink))?
        };
        let uplink = config.uplink.clone();
        let started = self.start_thread(config, requested, created.net_device);
        let (device, waiting) =
            started.inspect_err(|_| self.uplinks.lock().release(&name, &uplink))?;
        let summary = &created.uplink_summary;
        tracing::debug!("{name}: {source}, {summary}");
        self.devices.add(permit, Arc::clone(&device));
        waiting.serve(source, &self.devices);
        Ok(device)
    }

    fn start_thread(
        &self,
        config: DeviceConfig,
        requested: Option<BTreeMap<String, String>>,
        net_device: Arc<NetDevice>,
    ) -> Result<(Arc<ServedDevice>, WaitingDevice), RunError> {
        let device = ServedDevice::new(config, requested, net_device);
        let device = Arc::new(device.map_err(|source| RunError::Host {
            operation: "make an eventfd",
            source,
        })?);
        let waiting = WaitingDevice::start(&device, &self.devices, &self.main)?;
        Ok((device, waiting))
    }

    /// Removes a device: what its guest has sent is sent, its session ends, then its thread, and then
    /// nothing of it is left.
    pub(crate) fn remove(
        &self,
        permit: &Changing<'_>,
        device: &Arc<ServedDevice>,
    ) -> Result<(), Refusal> {
        let name = device.name();
        if !device.net_device.drain(DRAIN_LIMIT) {
            tracing::debug!("{name}: its guest goes on sending while it is removed");
        }
        device.end_for_removal();
        if !wait_until(END_LIMIT, || !device.has_thread()) {
            let message = format!(
                "device {name} does not end, because something outside holds its thread up: ask again to go on"
            );
            return Err(Refusal::new(503, "device-not-ended", message));
        }
        if let Some(thread) = device.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("{name}: its thread ended by a panic; please report this as a bug");
        }
        device.net_device.leave_workers();
        self.devices.remove(permit, device);
        // The threads that look at all devices may be at this one.
        let is_released = wait_until(END_LIMIT, || Arc::strong_count(&device.net_device) == 1);
        if !is_released {
            tracing::debug!("{name}: something still looks at the device that was removed");
        }
        Ok(())
    }

    /// Forgets the uplinks of devices that are gone.
    pub(crate) fn release_uplink(&self, name: &str, config: &DeviceConfig) {
        self.uplinks.lock().release(name, &config.uplink);
    }

    fn set(
        &self,
        device: &Arc<ServedDevice>,
        settings: DeviceSettings,
        author: &Author,
    ) -> Result<Changed, Refusal> {
        let (name, is_down) = (device.name(), device.stop.is_held());
        let Some(link) = settings
            .link
            .filter(|link| (*link == LinkState::Down) != is_down)
        else {
            return Ok(state_of(device, false));
        };
        if link == LinkState::Down && matches!(device.config.socket, Socket::Inherited(_)) {
            let message = format!(
                "the connection of {name} was inherited and cannot be made again: set its link down in the front-end"
            );
            return Err(Refusal::new(409, "socket-inherited", message));
        }
        device.stop.hold(link == LinkState::Down);
        self.devices.note_change(device);
        tracing::info!("{author}: the link of device {name} is {link}");
        if link == LinkState::Down {
            // It ends in any case, but a thread may be held up for a moment.
            wait_until(END_LIMIT, || !device.net_device.frontend().connected);
        }
        Ok(state_of(device, false))
    }
}

/// The answer to a change after which there is this device.
fn state_of(device: &ServedDevice, is_created: bool) -> Changed {
    let link = match device.stop.is_held() {
        true => LinkState::Down,
        false => LinkState::Up,
    };
    Changed {
        is_created,
        body: json!({
            "name": device.name(),
            "link": link,
            "revision": device.revision(),
        }),
        revision: Some(device.revision()),
    }
}

/// A value of a request.
fn given(value: &Value) -> GivenValue {
    match value {
        Value::String(text) => GivenValue::Text(text.clone()),
        Value::Bool(is_on) => GivenValue::Switch(*is_on),
        Value::Number(number) => number
            .as_u64()
            .map_or(GivenValue::Other, GivenValue::Number),
        _ => GivenValue::Other,
    }
}

/// The refusal of a description that cannot be used.
pub(crate) fn unusable(error: &ConfigError) -> Refusal {
    let problems: Vec<String> = error.problems().map(ToString::to_string).collect();
    let code = error
        .problems()
        .next()
        .map_or("value-invalid", |first| first.code());
    let status = match code {
        "not-allowed" => 403,
        "resource-shared" => 409,
        _ => 400,
    };
    Refusal::new(status, code, problems.join("; "))
}

/// The refusal of a device that this host cannot have now.
pub(crate) fn not_added(error: &RunError) -> Refusal {
    Refusal::new(409, error.code(), error.to_string())
}

/// Waits until `is_done`, for at most `limit`.
fn wait_until(limit: Duration, is_done: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !is_done() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(CHECK_INTERVAL);
    }
    true
}
