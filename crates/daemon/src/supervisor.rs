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
//! | `placer` | one | checks, while a front-end is connected, whether workers must move |

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use virtionet_config::{Config, DeviceConfig, PollMode, Socket};
use virtionet_control::server::ControlServer;
use virtionet_placement::PlacementPlanner;
use virtionet_placement::interrupts::IrqAffinityManager;
use virtionet_uplink::switch::HostPortForwarder;
use virtionet_vhost_user::{SessionEnd, SessionError};

use crate::advice::Adviser;
use crate::frontend_source::FrontendSource;
use crate::host_cpus::HostCpus;
use crate::interrupts::Interrupts;
use crate::net_device::NetDevice;
use crate::placement_monitor;
use crate::placer::Placer;
use crate::report_builder::DeviceRegistry;
use crate::run_error::{DeviceFailure, RunError};
use crate::uplinks::Uplinks;
use crate::worker_pool::WorkerPool;

/// A session that ends sooner than this is followed by a pause of this length.
const MIN_SESSION_INTERVAL: Duration = Duration::from_millis(20);

/// Serves the devices of `config` until a signal ends the program.
///
/// # Errors
/// When something cannot be set up, or the only device cannot continue.
pub fn run(config: Config) -> Result<(), RunError> {
    let mut signals =
        Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(host_error("handle signals"))?;
    // Take inherited descriptors first, because anything that is opened before could get their
    // numbers.
    let sources = config
        .devices
        .iter()
        .map(open_source)
        .collect::<Result<Vec<_>, _>>()?;
    let host = Host::new()?;
    let mut uplinks = Uplinks::default();
    let net_devices = config
        .devices
        .iter()
        .map(|device| {
            Ok((
                device.clone(),
                host.create_net_device(device, &mut uplinks)?,
            ))
        })
        .collect::<Result<Vec<_>, RunError>>()?;
    let devices = net_devices
        .iter()
        .map(|(config, created)| (config.clone(), Arc::clone(&created.net_device)));
    let devices = Arc::new(DeviceRegistry(devices.collect()));
    let control = match &config.control {
        Some(path) => Some(ControlServer::start(path, Arc::clone(&devices) as _)?),
        None => None,
    };
    let stop = eventfd(0, EventfdFlags::CLOEXEC);
    let stop = Arc::new(stop.map_err(|error| host_error("make an eventfd")(error.into()))?);
    let mut helper_threads = start_host_port_forwarders(&uplinks, &stop)?;
    let followed = devices
        .0
        .iter()
        .map(|(_, net_device)| Arc::clone(net_device));
    let placer = placement_monitor::start(followed.collect(), host.cpus, Arc::clone(&stop));
    helper_threads.push((
        "placer".into(),
        placer.map_err(host_error("start a thread"))?,
    ));
    for ((device, created), source) in net_devices.iter().zip(&sources) {
        let summary = format!("{source}, {}", created.uplink_summary);
        log_start(&device.name, &summary, control.as_ref());
    }
    let device_threads = start_devices(&devices, sources, &stop, &signals.handle())?;
    wait_for_end(&mut signals);
    // The eventfd is never read, so it stays readable for every thread.
    let _ = rustix::io::write(&*stop, &1u64.to_ne_bytes());
    let ended = join_devices(device_threads);
    host.pool.stop();
    for switch in uplinks.switches() {
        tracing::info!("{switch}");
    }
    drop(control);
    ended.and(join_helpers(helper_threads))
}

/// Returns when a signal requests the end of the program, or when the signals' handle was closed.
fn wait_for_end(signals: &mut Signals) {
    for signal in signals.forever() {
        if signal == SIGHUP {
            tracing::info!(
                "SIGHUP ignored, because this version cannot reload its configuration; restart virtionetd to apply a change"
            );
            continue;
        }
        tracing::info!("signal {signal}: ending");
        return;
    }
}

fn log_start(device: &str, summary: &str, control: Option<&ControlServer>) {
    let control = control.map_or_else(
        || "no control socket".into(),
        |control| format!("control {}", control.path().display()),
    );
    tracing::info!("{device}: {summary}, {control}, waiting for a front-end");
}

/// The state that all devices of the process share.
struct Host {
    cpus: Arc<HostCpus>,
    irq_manager: Arc<IrqAffinityManager>,
    pool: Arc<WorkerPool>,
}

/// A device, and the objects that were created with it.
struct CreatedDevice {
    net_device: Arc<NetDevice>,
    uplink_summary: String,
}

impl Host {
    fn new() -> Result<Self, RunError> {
        Ok(Self {
            cpus: Arc::new(HostCpus::read()?),
            irq_manager: Arc::new(IrqAffinityManager::with_irqbalance()),
            pool: Arc::default(),
        })
    }

    /// Creates a device. Its uplink is opened now, so that an error is reported at the start.
    fn create_net_device(
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
            .open(&device.uplink)
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

fn open_source(device: &DeviceConfig) -> Result<FrontendSource, RunError> {
    FrontendSource::open(&device.socket).map_err(|source| RunError::Socket {
        device: device.name.clone(),
        source,
    })
}

fn host_error(operation: &'static str) -> impl Fn(std::io::Error) -> RunError {
    move |source| RunError::Host { operation, source }
}

/// A thread that serves a device, and the device's name.
type DeviceThread = (String, JoinHandle<Result<(), DeviceFailure>>);

/// A thread beside those of the devices, and its name.
type HelperThread = (String, JoinHandle<()>);

/// Starts a thread for each device. `main` is closed when the last of them ends.
fn start_devices(
    devices: &DeviceRegistry,
    sources: Vec<FrontendSource>,
    stop: &Arc<OwnedFd>,
    main: &Handle,
) -> Result<Vec<DeviceThread>, RunError> {
    let is_only_device = devices.0.len() == 1;
    let running_devices = Arc::new(AtomicUsize::new(devices.0.len()));
    let mut threads = Vec::new();
    for ((_, net_device), source) in devices.0.iter().zip(sources) {
        let (net_device, stop, main) = (Arc::clone(net_device), Arc::clone(stop), main.clone());
        let name = net_device.name().to_owned();
        let running_devices = Arc::clone(&running_devices);
        let serve = move || {
            let ended = serve_device(&net_device, source, stop.as_fd(), is_only_device);
            if running_devices.fetch_sub(1, Ordering::Relaxed) == 1 {
                main.close();
            }
            ended
        };
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(serve)
            .map_err(host_error("start a thread"))?;
        threads.push((name, thread));
    }
    Ok(threads)
}

/// Starts the threads that forward the host's frames to switches.
fn start_host_port_forwarders(
    uplinks: &Uplinks,
    stop: &Arc<OwnedFd>,
) -> Result<Vec<HelperThread>, RunError> {
    let start = |forwarder: HostPortForwarder| {
        let stop = Arc::clone(stop);
        let name = format!("switch {}", forwarder.switch());
        let thread = std::thread::Builder::new()
            .name(format!("sw-{}", forwarder.switch()))
            .spawn(move || forwarder.run(stop.as_fd()))
            .map_err(host_error("start a thread"))?;
        Ok((name, thread))
    };
    uplinks
        .host_port_forwarders()
        .into_iter()
        .map(start)
        .collect()
}

/// Waits for all threads. Returns the last error.
fn join_devices(threads: Vec<DeviceThread>) -> Result<(), RunError> {
    let mut result = Ok(());
    for (name, thread) in threads {
        match thread.join() {
            Ok(Ok(())) => {}
            Ok(Err(source)) => {
                let device = name;
                result = Err(RunError::DeviceFailed { device, source });
            }
            Err(_) => result = Err(RunError::Panic { name }),
        }
    }
    result
}

fn join_helpers(threads: Vec<HelperThread>) -> Result<(), RunError> {
    let mut result = Ok(());
    for (name, thread) in threads {
        if thread.join().is_err() {
            result = Err(RunError::Panic { name });
        }
    }
    result
}

/// The main function of a device's thread: serves one front-end after the other, until no further
/// one can come. A front-end that fails ends only its own session. The program ends only if no
/// later front-end can succeed and there is no other device.
///
/// # Errors
/// When the device cannot continue.
fn serve_device(
    net_device: &NetDevice,
    mut source: FrontendSource,
    stop: BorrowedFd<'_>,
    is_only_device: bool,
) -> Result<(), DeviceFailure> {
    // A program that continues with other devices must log the failure now; one that ends reports
    // it at its end.
    let fail = |failure: DeviceFailure| {
        if !is_only_device {
            tracing::error!("{}: {failure}", net_device.name());
        }
        Err(failure)
    };
    loop {
        let stream = match source.next(stop) {
            Ok(Some(stream)) => stream,
            Ok(None) => return Ok(()),
            Err(error) => return fail(error.into()),
        };
        let started_at = Instant::now();
        match virtionet_vhost_user::serve(stream, net_device, stop) {
            Ok(SessionEnd::Disconnected) => {}
            Ok(SessionEnd::Stopped) => return Ok(()),
            Err(error @ SessionError::NotShared) if is_only_device => return fail(error.into()),
            Err(error) => tracing::error!("{}: {error}", net_device.name()),
        }
        if started_at.elapsed() < MIN_SESSION_INTERVAL && pause(stop) {
            return Ok(());
        }
    }
}

/// Waits a moment before the next front-end, because one that is refused may connect again at once
/// and repeatedly, as QEMU does when it needs too many queue pairs. Returns true when `stop` is
/// readable.
fn pause(stop: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN)];
    let timeout = Timespec::try_from(MIN_SESSION_INTERVAL).ok();
    matches!(poll(&mut fds, timeout.as_ref()), Ok(ready) if ready > 0)
}
