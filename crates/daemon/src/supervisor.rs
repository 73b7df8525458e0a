//! The run of the program: it creates the devices and gives each a thread for its vhost-user
//! socket, and the main thread waits for a signal.
//!
//! | thread | number | does |
//! |---|---|---|
//! | `main` | one | waits for signals |
//! | `NAME` | one a device | accepts front-ends and answers them |
//! | `NAME-qK` | one a queue pair | carries frames |
//! | `sw-NAME` | one a switch with a TAP | carries the host's frames |
//! | `control` | one, with `--control` | answers HTTP requests |
//! | `manager` | one | adds, removes and changes devices |
//! | `placer` | one | decides, while a front-end is connected, on which CPUs workers run |
//! | `log` | one | writes log lines |
//! | `watchdog` | one | bounds writes to eventfds of front-ends |
//! | `closer` | one | closes descriptors of front-ends that are not kept |
//!
//! At the end every thread is asked to stop. One that does not within 2 s is named in the log, and
//! the process ends without it.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::Arc;

use parking_lot::Mutex;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGUSR1};
use signal_hook::iterator::Signals;
use virtionet_config::{Config, DeviceConfig, Socket};
use virtionet_control::server::ControlServer;
use virtionet_net_device::call_watchdog;
use virtionet_net_device::placement_monitor;
use virtionet_net_device::start_gate::StartGate;
use virtionet_net_device::stop::Stop;
use virtionet_process::logging;
use virtionet_process::sandbox;
use virtionet_sandbox::ThreadKind;
use virtionet_uplink::switch::HostPortForwarder;
use virtionet_vhost_user::start_closer;
use virtionet_virtqueue::memory::survive_lost_memory;

use crate::descriptor_budget;
use crate::device_set::DeviceSet;
use crate::device_thread::{WaitingDevices, start_devices};
use crate::frontend_source::FrontendSource;
use crate::handover::{Handover, Successor};
use crate::helper_process::HelperProcess;
use crate::host::{CreatedDevice, Host};
use crate::kept_taps::{KeptTaps, PassedDescriptors};
use crate::manager::{ChangeQueue, ChangeReceiver, Manager};
use crate::process_sockets::ProcessSockets;
use crate::report_builder::DeviceRegistry;
use crate::run_error::RunError;
use crate::served_device::{ServedDevice, count_suspended};
use crate::service_manager::ServiceManager;
use crate::shutdown::{HelperThread, SHUTDOWN_TIMEOUT, end_threads, take_threads};
use crate::signals;
use crate::take_over::{OfferedDevices, Predecessor, socket_file};
use crate::uplinks::Uplinks;

/// Serves the devices of `config` until a signal asks to end, or the next daemon has taken over.
/// `passed` are the descriptors of the service manager.
///
/// # Errors
/// When something cannot be set up, or the only device cannot continue.
pub fn run(config: Config, passed: PassedDescriptors) -> Result<(), RunError> {
    let limit = descriptor_budget::prepare(&config)?;
    let mut config = config;
    let signals = Signals::new(signals::HANDLED.map(|signal| signal as i32));
    let signals = signals.map_err(host_error("handle signals"))?;
    let mut parts = Parts::open(&mut config, passed)?;
    // From here on nothing is opened that needs a right of this process.
    sandbox::confine_process()?;
    protect_threads()?;
    let devices = Arc::new(parts.device_set(&config)?);
    let waiting = start_devices(&devices, &signals.handle())?;
    let predecessor = match parts.offered.take() {
        Some(offered) => Some(parts.take_over(offered, &config, &devices.all())?),
        None => None,
    };
    let (queue, changes) = ChangeQueue::new();
    let manager = Manager {
        config,
        limit,
        host: Arc::clone(&parts.host),
        uplinks: Arc::clone(&parts.uplinks),
        devices: Arc::clone(&devices),
        main: signals.handle(),
    };
    let changes = Changes {
        queue,
        manager,
        receiver: changes,
    };
    parts.serve(devices, waiting, predecessor, signals, changes)
}

/// What changes devices while the process runs.
struct Changes {
    queue: ChangeQueue,
    manager: Manager,
    receiver: ChangeReceiver,
}

/// What the process has opened.
struct Parts {
    manager: Arc<ServiceManager>,
    /// What the daemon before this one offers.
    offered: Option<OfferedDevices>,
    sources: Vec<FrontendSource>,
    helper: Option<Arc<HelperProcess>>,
    host: Arc<Host>,
    uplinks: Arc<Mutex<Uplinks>>,
    created: Vec<CreatedDevice>,
    sockets: ProcessSockets,
    stops: Stops,
}

impl Parts {
    /// Opens what `config` names, or has it offered by the daemon before this one. The devices of that
    /// become those of `config`.
    fn open(config: &mut Config, passed: PassedDescriptors) -> Result<Self, RunError> {
        let offered = match &config.handover {
            Some(path) if config.take_over => Some(OfferedDevices::request(path, config)?),
            _ => None,
        };
        if let Some(offered) = &offered {
            config.devices = offered.devices(config)?;
        }
        let config = &*config;
        // Take inherited descriptors first, because anything that is opened before could get their
        // numbers.
        let sources = open_sources(config, offered.as_ref())?;
        let manager = Arc::new(ServiceManager::from_environment());
        let helper = HelperProcess::start(config).map_err(RunError::Helper)?;
        let host = Host::new(config)?;
        let kept = KeptTaps::new(Arc::clone(&manager), passed, config);
        let mut uplinks = Uplinks::new(kept);
        if let Some(offered) = &offered {
            uplinks = uplinks.inheriting(offered.taps(), offered.switch_seeds());
        }
        let created = host.create_net_devices(config, &mut uplinks, offered.as_ref())?;
        Ok(Self {
            manager,
            sockets: match offered {
                Some(_) => ProcessSockets::default(),
                None => ProcessSockets::open(config)?,
            },
            offered,
            sources,
            helper: helper.map(Arc::new),
            host: Arc::new(host),
            uplinks: Arc::new(Mutex::new(uplinks)),
            created,
            stops: Stops::new().map_err(host_error("make an eventfd"))?,
        })
    }

    /// The devices, without threads.
    fn device_set(&self, config: &Config) -> Result<DeviceSet, RunError> {
        let offered = self.offered.as_ref();
        let mut requests = offered.map(|offered| offered.requests());
        let mut devices = Vec::new();
        for (config, created) in config.devices.iter().zip(&self.created) {
            let request = requests.as_mut().and_then(Iterator::next);
            let (requested, is_link_down) = request.unwrap_or_default();
            let net_device = Arc::clone(&created.net_device);
            let device = ServedDevice::new(config.clone(), requested, net_device);
            let device = device.map_err(host_error("make an eventfd"))?;
            device.stop.hold(is_link_down);
            devices.push(Arc::new(device));
        }
        let removed = offered.map(OfferedDevices::removed).unwrap_or_default();
        Ok(DeviceSet::new(devices, removed, config))
    }

    /// Takes the sessions over, and with them all that the daemon before this one owned.
    fn take_over(
        &mut self,
        offered: OfferedDevices,
        config: &Config,
        devices: &[Arc<ServedDevice>],
    ) -> Result<Predecessor, RunError> {
        let (taken, predecessor) = offered.take(devices, &self.uplinks, &self.host.irq_manager)?;
        self.host.pool.gate().hold_for(count_suspended(devices));
        let program = predecessor.program();
        tracing::info!("the devices of virtionetd {program} are taken over");
        let sources = std::mem::take(&mut self.sources).into_iter();
        let owned = sources.zip(&config.devices).zip(&taken.socket_files);
        let owned = owned.map(|((source, device), numbers)| match &device.socket {
            Socket::Listen { path, .. } => source.own_file(Some(socket_file(*numbers, path))),
            Socket::Connect { .. } | Socket::Inherited(_) => source,
        });
        self.sources = owned.collect();
        self.sockets = ProcessSockets::taken(config, taken);
        Ok(predecessor)
    }

    /// Starts all other threads, and returns when they have ended.
    fn serve(
        mut self,
        devices: Arc<DeviceSet>,
        waiting: WaitingDevices,
        predecessor: Option<Predecessor>,
        mut signals: Signals,
        changes: Changes,
    ) -> Result<(), RunError> {
        // A daemon that has taken over must not end for this.
        let handover = self.handover(&devices).unwrap_or_else(|error| {
            tracing::error!(
                "no other daemon can take over from this one ({error}); raise the limit of open files"
            );
            None
        });
        let registry = Arc::new(self.registry(&devices, &changes.queue));
        let summaries = self.summaries(&devices);
        // First, because the frames of devices that are taken over wait for it.
        waiting.serve(std::mem::take(&mut self.sources), &devices);
        let stops = &self.stops;
        let mut helper_threads = start_host_port_forwarders(
            &self.uplinks.lock(),
            &stops.forwarders,
            self.host.pool.gate(),
        )?;
        // What follows, and the end of the daemon before this one, would take the CPUs from them.
        self.host.pool.gate().wait();
        let successor = Successor::default();
        let served = self.sockets.serve(&registry, &successor)?;
        let stop = Arc::clone(&stops.placer);
        let cpus = Arc::clone(&self.host.cpus);
        let placer = placement_monitor::start(devices.list(), cpus, stop);
        helper_threads.push((
            "placer".into(),
            placer.map_err(host_error("start a thread"))?,
        ));
        for (device, summary) in &summaries {
            log_start(device, summary, served.control.as_ref());
        }
        predecessor.iter().for_each(|p| registry.set_predecessor(p));
        self.uplinks.lock().keep();
        let Changes {
            queue,
            manager,
            receiver,
        } = changes;
        // Its threads inherit its limits, so it must not have those of the main thread.
        manager
            .start(receiver)
            .map_err(host_error("start a thread"))?;
        let helper = self.helper.as_deref();
        // Until the end the main thread has nothing else to do than to hand over.
        signals::take().map_err(host_error("handle signals"))?;
        sandbox::confine_main();
        announce(&self.manager, predecessor);
        wait_for_end(&mut signals, helper, &successor, handover.as_ref(), &queue);
        self.manager.stopping();
        // A change that takes longer does not matter any more.
        let _no_changes = devices.change_within(SHUTDOWN_TIMEOUT);
        stops.end();
        devices.end();
        let ended = end_threads(
            &self.host.pool,
            served.control,
            take_threads(&devices),
            helper_threads,
        );
        drop(served.handover);
        helper.inspect(|helper| helper.end());
        if !matches!(ended, Err(RunError::Stuck { .. })) {
            for switch in self.uplinks.lock().switches() {
                tracing::info!("{switch}");
            }
        }
        ended
    }

    /// What the next daemon can take over; `None` if it has no socket for that.
    fn handover(&self, devices: &Arc<DeviceSet>) -> io::Result<Option<Handover>> {
        let [control, control_read_only, Some(handover)] = self.sockets.images()? else {
            return Ok(None);
        };
        Ok(Some(Handover {
            devices: Arc::clone(devices),
            uplinks: Arc::clone(&self.uplinks),
            control,
            control_read_only,
            handover,
            irq_manager: Arc::clone(&self.host.irq_manager),
            pool: Arc::clone(&self.host.pool),
            forwarders: Arc::clone(&self.stops.forwarders),
        }))
    }

    /// For the log: the name of each device, its socket and its uplink.
    fn summaries(&mut self, devices: &DeviceSet) -> Vec<(String, String)> {
        // What is created belongs to the devices, and is closed with them.
        let created = std::mem::take(&mut self.created);
        let devices = devices.all();
        let devices = devices.iter().zip(created).zip(&self.sources);
        let summary = |((device, created), source): ((&Arc<ServedDevice>, CreatedDevice), _)| {
            let summary = format!("{source}, {}", created.uplink_summary);
            (device.name().to_owned(), summary)
        };
        devices.map(summary).collect()
    }

    fn registry(&self, devices: &Arc<DeviceSet>, queue: &ChangeQueue) -> DeviceRegistry {
        DeviceRegistry::new(
            Arc::clone(devices),
            self.helper.clone(),
            self.sockets.handover_path(),
        )
        .with_changes(queue.clone(), Arc::clone(&self.uplinks))
    }
}

/// What stops the threads.
struct Stops {
    /// Those that carry frames from a TAP to a switch.
    forwarders: Arc<Stop>,
    /// That of the placer.
    placer: Arc<Stop>,
}

impl Stops {
    fn new() -> io::Result<Self> {
        Ok(Self {
            forwarders: Arc::new(Stop::new()?),
            placer: Arc::new(Stop::new()?),
        })
    }

    fn end(&self) {
        for stop in [&self.forwarders, &self.placer] {
            stop.end();
        }
    }
}

/// Leaves the signals that end the program to the main thread.
///
/// # Errors
/// When the kernel refuses it.
pub fn reserve_signals() -> Result<(), RunError> {
    signals::reserve().map_err(host_error("handle signals"))
}

/// Tells the service manager, and then the daemon before this one, that this one serves the devices.
fn announce(manager: &ServiceManager, predecessor: Option<Predecessor>) {
    match predecessor {
        Some(predecessor) => {
            manager.ready_as_successor();
            predecessor.let_end();
        }
        None => manager.ready(),
    }
}

/// Returns when a signal requests the end of the program, or when the signals' handle was closed.
fn wait_for_end(
    signals: &mut Signals,
    helper: Option<&HelperProcess>,
    successor: &Successor,
    handover: Option<&Handover>,
    changes: &ChangeQueue,
) {
    for signal in signals.forever() {
        match signal {
            SIGCHLD => {
                helper.inspect(|helper| helper.check());
            }
            SIGHUP => changes.submit_reload_by_signal(),
            SIGUSR1 => {
                if let Some((handover, stream)) = handover.zip(successor.take()) {
                    hand_over(handover, stream);
                }
            }
            signal => {
                tracing::info!("signal {signal}: ending");
                break;
            }
        }
    }
}

/// Hands over and ends the process, or returns if that fails.
fn hand_over(handover: &Handover, stream: UnixStream) {
    match handover.hand_over(stream) {
        Ok((program, paused_for)) => {
            tracing::info!(
                "all devices are handed over to virtionetd {program}; they were paused for {paused_for:?}"
            );
            logging::flush();
            // No destructor may run: files, queues and masks belong to the other process.
            process::exit(0);
        }
        Err(failure) => {
            tracing::error!("the devices are not handed over, and go on here: {failure}");
        }
    }
}

fn log_start(device: &str, summary: &str, control: Option<&ControlServer>) {
    let control = control.map_or_else(
        || "no control socket".into(),
        |control| format!("control {}", control.path().display()),
    );
    tracing::info!("{device}: {summary}, {control}, waiting for a front-end");
}

/// Bounds what guests and front-ends can do to the threads of this process.
fn protect_threads() -> Result<(), RunError> {
    start_closer(|| sandbox::confine_thread(ThreadKind::Closer));
    survive_lost_memory().map_err(host_error("handle signals"))?;
    call_watchdog::start().map_err(host_error("start the watchdog"))
}

fn open_sources(
    config: &Config,
    offered: Option<&OfferedDevices>,
) -> Result<Vec<FrontendSource>, RunError> {
    let open = |(index, device): (usize, &DeviceConfig)| match offered {
        Some(offered) => Ok(offered.source(index, &device.name, &device.socket)?),
        None => FrontendSource::open(&device.socket).map_err(|source| RunError::Socket {
            device: device.name.clone(),
            source,
        }),
    };
    config.devices.iter().enumerate().map(open).collect()
}

fn host_error(operation: &'static str) -> impl Fn(io::Error) -> RunError {
    move |source| RunError::Host { operation, source }
}

/// Starts the threads that forward the host's frames to switches.
fn start_host_port_forwarders(
    uplinks: &Uplinks,
    stop: &Arc<Stop>,
    gate: &Arc<StartGate>,
) -> Result<Vec<HelperThread>, RunError> {
    let start = |forwarder: HostPortForwarder| {
        let (stop, gate) = (Arc::clone(stop), Arc::clone(gate));
        let name = format!("switch {}", forwarder.switch());
        let thread = std::thread::Builder::new()
            .name(format!("sw-{}", forwarder.switch()))
            .spawn(move || {
                sandbox::confine_thread(ThreadKind::SwitchForwarder);
                let _participant = stop.enter();
                loop {
                    gate.wait();
                    forwarder.run(stop.as_fd());
                    if !stop.wait_while_suspended() {
                        break;
                    }
                }
            })
            .map_err(host_error("start a thread"))?;
        Ok((name, thread))
    };
    uplinks
        .host_port_forwarders()
        .into_iter()
        .map(start)
        .collect()
}

#[cfg(test)]
mod tests;
