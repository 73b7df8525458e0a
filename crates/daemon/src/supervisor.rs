//! The program's run: devices are set up, each gets a thread for its vhost-user socket, and the
//! main thread waits for a signal.
//!
//! Threads: `main` (signals), `NAME` (one a device: accepts front-ends and answers them),
//! `NAME-qK` (one a queue pair: frames), `sw-NAME` (one a switch with a TAP: the host's frames),
//! `control` (the HTTP socket, if asked for), `placer` (while a front-end is connected: looks now
//! and then whether workers should stand elsewhere, and how the devices are).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use virtionet_placement::PlacementPlanner;
use virtionet_placement::interrupts::IrqAffinityManager;
use virtionet_vhost_user::listen::{SocketPermissions, InheritedSocket, ListenError, Listener, connect};
use virtionet_vhost_user::{SessionEnd, SessionError, take_fd};
use virtionet_uplink::switch::HostPortForwarder;

use crate::advice::Adviser;
use crate::net_device::NetDevice;
use virtionet_config::{Config, DeviceConfig, PollMode, Socket};
use virtionet_control::server::ControlServer;
use crate::placement_monitor;
use crate::host_cpus::{HostCpus, HostCpusError};
use crate::interrupts::Interrupts;
use crate::uplinks::Uplinks;
use crate::report_builder::DeviceRegistry;
use crate::placer::Placer;

/// A session that ends sooner than this is followed by a pause of this length.
const MIN_SESSION_INTERVAL: Duration = Duration::from_millis(20);

/// Why the program cannot start, or had to end: one sentence.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A device cannot be set up.
    #[error("{0}: {1}")]
    Device(String, String),
    /// A device is described in a way that means nothing: the command line is wrong.
    #[error("{0}: {1}")]
    Usage(String, String),
    /// The control socket cannot be made.
    #[error(transparent)]
    Control(#[from] virtionet_control::server::ControlError),
    /// The host lacks something that every process needs.
    #[error("cannot {what}: {error}; check the limits of this process")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// The CPUs of this process cannot be read.
    #[error(transparent)]
    Cpus(#[from] HostCpusError),
    /// A device cannot go on.
    #[error("{0}: {1}")]
    DeviceFailed(String, String),
}

/// Serves the devices of `config` until a signal asks to end.
///
/// # Errors
/// When something cannot be set up, or a device that is alone cannot go on.
pub fn run(config: Config) -> Result<(), RunError> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(host_error("handle signals"))?;
    // Inherited descriptors are taken before anything else is opened in their place.
    let sources = config
        .devices
        .iter()
        .map(|device| FrontendSource::open(&device.socket).map_err(|e| device_error(device, e)))
        .collect::<Result<Vec<_>, _>>()?;
    let cpus = Arc::new(HostCpus::read()?);
    let mut uplinks = Uplinks::default();
    let irq_manager = Arc::new(IrqAffinityManager::with_irqbalance());
    let net_devices = config
        .devices
        .iter()
        .map(|device| {
            let net_device = create_net_device(device, &cpus, &mut uplinks, &irq_manager)?;
            Ok((device.clone(), Arc::new(net_device)))
        })
        .collect::<Result<Vec<_>, RunError>>()?;
    let devices = Arc::new(DeviceRegistry(net_devices));
    let control = match &config.control {
        Some(path) => Some(ControlServer::start(path, Arc::clone(&devices) as _)?),
        None => None,
    };
    let stop =
        Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| host_error("make an eventfd")(e.into()))?);
    let mut helper_threads = start_host_port_forwarders(&uplinks, &stop)?;
    let followed = devices.0.iter().map(|(_, net_device)| Arc::clone(net_device));
    let placer = placement_monitor::start(followed.collect(), cpus, Arc::clone(&stop), Ok(()));
    helper_threads.push(("placer".into(), placer.map_err(host_error("start a thread"))?));
    let is_only_device = devices.0.len() == 1;
    let running_devices = Arc::new(AtomicUsize::new(devices.0.len()));
    let mut device_threads = Vec::new();
    for ((_, net_device), source) in devices.0.iter().zip(sources) {
        let (net_device, stop, main) = (Arc::clone(net_device), Arc::clone(&stop), signals.handle());
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
        device_threads.push((name, thread));
    }
    if let Some(signal) = signals.forever().next() {
        tracing::info!("signal {signal}: ending");
    }
    // It is never read, so it stays readable for every thread.
    let _ = rustix::io::write(&*stop, &1u64.to_ne_bytes());
    let ended = join(device_threads);
    for switch in uplinks.switches() {
        tracing::info!("{switch}");
    }
    drop(control);
    ended.and(join(helper_threads))
}

/// Starts what switches need beside the devices' workers.
fn start_host_port_forwarders(uplinks: &Uplinks, stop: &Arc<OwnedFd>) -> Result<Vec<Thread>, RunError> {
    let start = |forwarder: HostPortForwarder| {
        let stop = Arc::clone(stop);
        let name = format!("switch {}", forwarder.switch());
        let thread = std::thread::Builder::new()
            .name(format!("sw-{}", forwarder.switch()))
            .spawn(move || {
                forwarder.run(stop.as_fd());
                Ok(())
            })
            .map_err(host_error("start a thread"))?;
        Ok((name, thread))
    };
    uplinks.host_port_forwarders().into_iter().map(start).collect()
}

/// A thread and whose it is.
type Thread = (String, JoinHandle<Result<(), String>>);

fn join(threads: Vec<Thread>) -> Result<(), RunError> {
    let mut result = Ok(());
    for (name, thread) in threads {
        let ended = thread
            .join()
            .unwrap_or_else(|_| Err("its thread ended by a panic, which is a bug".into()));
        if let Err(why) = ended {
            result = Err(RunError::DeviceFailed(name, why));
        }
    }
    result
}

/// Sets one device up: its uplink is opened now, so that what is wrong with it shows at start.
fn create_net_device(
    device: &DeviceConfig,
    cpus: &Arc<HostCpus>,
    uplinks: &mut Uplinks,
    irq_manager: &Arc<IrqAffinityManager>,
) -> Result<NetDevice, RunError> {
    let mode = device.placement.clone();
    let planner =
        PlacementPlanner::new(mode, cpus.allowed(), device.qmp.clone()).map_err(|e| usage(device, e))?;
    let uplink = uplinks.open(&device.uplink).map_err(|e| device_error(device, e))?;
    let socket = match &device.socket {
        Socket::Listen { path, .. } | Socket::Connect { path } => Some(path.clone()),
        Socket::Inherited(_) => None,
    };
    let net_device = NetDevice::new(
        &device.name,
        device.queues.max(),
        uplink,
        Placer::new(
            &device.name,
            planner.with_polling(device.poll != PollMode::Off),
            Arc::clone(cpus),
        ),
        device.poll,
    );
    Ok(net_device.with(
        Interrupts::new(&device.name, device.irq_affinity, Arc::clone(irq_manager)),
        Adviser::new(&device.name, device.qmp.clone(), socket),
    ))
}

fn usage(device: &DeviceConfig, error: impl ToString) -> RunError {
    RunError::Usage(device.name.clone(), error.to_string())
}

fn device_error(device: &DeviceConfig, error: impl ToString) -> RunError {
    RunError::Device(device.name.clone(), error.to_string())
}

fn host_error(what: &'static str) -> impl Fn(std::io::Error) -> RunError {
    move |error| RunError::Host { what, error }
}

/// Where front-ends come from.
enum FrontendSource {
    Listener(Listener),
    Connect(PathBuf),
    /// One connection, already made.
    Once(Option<UnixStream>),
}

impl FrontendSource {
    fn open(socket: &Socket) -> Result<Self, ListenError> {
        Ok(match socket {
            Socket::Listen { path, mode, group } => {
                let access = SocketPermissions {
                    mode: Some(*mode),
                    group: group.clone(),
                };
                Self::Listener(Listener::bind(path, &access)?)
            }
            Socket::Connect { path } => Self::Connect(path.clone()),
            Socket::Inherited(number) => {
                let fd = take_fd(*number).map_err(|e| ListenError::WrongKind(e.to_string()))?;
                match InheritedSocket::new(fd)? {
                    InheritedSocket::Listening(listener) => Self::Listener(listener),
                    InheritedSocket::Connected(stream) => Self::Once(Some(stream)),
                }
            }
        })
    }

    /// The next front-end; `None` when there will be none, or `stop` is readable.
    fn next(&mut self, stop: BorrowedFd<'_>) -> Result<Option<UnixStream>, ListenError> {
        match self {
            Self::Listener(listener) => listener.accept(stop),
            Self::Connect(path) => connect(path, stop),
            Self::Once(stream) => Ok(stream.take()),
        }
    }
}

/// A device's thread: one front-end after the other, until there will be none. A front-end that
/// fails costs its own session; only where nothing can mend it, and there is no other device, the
/// program ends.
///
/// # Errors
/// Why the device cannot go on.
fn serve_device(net_device: &NetDevice, mut source: FrontendSource, stop: BorrowedFd<'_>, is_only_device: bool) -> Result<(), String> {
    // A program that goes on with other devices must tell now, one that ends tells with its end.
    let cannot_go_on = |why: String| {
        if !is_only_device {
            tracing::error!("{}: {why}", net_device.name());
        }
        Err(why)
    };
    loop {
        let stream = match source.next(stop) {
            Ok(Some(stream)) => stream,
            Ok(None) => return Ok(()),
            Err(error) => return cannot_go_on(error.to_string()),
        };
        let began = Instant::now();
        match virtionet_vhost_user::serve(stream, net_device, stop) {
            Ok(SessionEnd::Disconnected) => {}
            Ok(SessionEnd::Stopped) => return Ok(()),
            Err(error @ SessionError::NotShared) if is_only_device => {
                return cannot_go_on(error.to_string());
            }
            Err(error) => tracing::error!("{}: {error}", net_device.name()),
        }
        if began.elapsed() < MIN_SESSION_INTERVAL && pause(stop) {
            return Ok(());
        }
    }
}

/// Lets a moment pass before the next front-end: one that is refused may come again at once, and
/// without end (QEMU does when it asks for too many queue pairs). True when `stop` is readable.
fn pause(stop: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN)];
    let timeout = Timespec::try_from(MIN_SESSION_INTERVAL).ok();
    matches!(poll(&mut fds, timeout.as_ref()), Ok(ready) if ready > 0)
}
