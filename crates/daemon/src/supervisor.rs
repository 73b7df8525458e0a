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
//! | `placer` | one | decides, while a front-end is connected, on which CPUs workers run |
//! | `log` | one | writes log lines |
//! | `watchdog` | one | bounds writes to eventfds of front-ends |
//! | `closer` | one | closes descriptors of front-ends that are not kept |
//!
//! At the end every thread is asked to stop. One that does not within 2 s is named in the log, and
//! the process ends without it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use virtionet_config::{Config, ControlSocket, DeviceConfig};
use virtionet_control::server::{ControlError, ControlServer, SocketPermissions};
use virtionet_sandbox::ThreadKind;
use virtionet_uplink::switch::HostPortForwarder;
use virtionet_vhost_user::{SessionEnd, SessionError, SessionLog, start_closer};
use virtionet_virtqueue::memory::survive_lost_memory;

use crate::call_watchdog;
use crate::descriptor_budget;
use crate::frontend_source::FrontendSource;
use crate::helper_process::HelperProcess;
use crate::host::Host;
use crate::net_device::NetDevice;
use crate::panic_policy::{contain, contain_panics};
use crate::placement_monitor;
use crate::report_builder::DeviceRegistry;
use crate::run_error::{DeviceFailure, RunError};
use crate::sandbox;
use crate::uplinks::Uplinks;
use crate::worker_pool::WorkerPool;

/// A session that ends sooner than this is followed by a pause of this length.
const MIN_SESSION_INTERVAL: Duration = Duration::from_millis(20);

/// The same for a session that no front-end of the same configuration could have used.
const UNUSABLE_SESSION_INTERVAL: Duration = Duration::from_secs(1);

/// How long all threads together may take to end.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause between two checks of whether a thread has ended.
const JOIN_INTERVAL: Duration = Duration::from_millis(1);

/// Serves the devices of `config` until a signal asks to end.
///
/// # Errors
/// When something cannot be set up, or the only device cannot continue.
pub fn run(config: Config) -> Result<(), RunError> {
    descriptor_budget::prepare(&config)?;
    let mut signals =
        Signals::new([SIGTERM, SIGINT, SIGHUP, SIGCHLD]).map_err(host_error("handle signals"))?;
    // Take inherited descriptors first, because anything that is opened before could get their
    // numbers.
    let sources = config
        .devices
        .iter()
        .map(open_source)
        .collect::<Result<Vec<_>, _>>()?;
    let helper = HelperProcess::start(&config).map_err(RunError::Helper)?;
    let helper = helper.map(Arc::new);
    let host = Host::new(config.state_folder.as_deref())?;
    let mut uplinks = Uplinks::default();
    let net_devices = host.create_net_devices(&config, &mut uplinks)?;
    let devices = net_devices
        .iter()
        .map(|(config, created)| (config.clone(), Arc::clone(&created.net_device)));
    let devices = Arc::new(DeviceRegistry {
        devices: devices.collect(),
        helper: helper.clone(),
    });
    let control = config
        .control
        .as_ref()
        .map(|socket| start_control(socket, &devices))
        .transpose()?;
    // From here on nothing is opened that needs a right of this process.
    sandbox::confine_process()?;
    protect_threads()?;
    let stop = create_stop()?;
    let mut helper_threads = start_host_port_forwarders(&uplinks, &stop)?;
    let followed = devices
        .devices
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
    wait_for_end(&mut signals, helper.as_deref())?;
    // The eventfd is never read, so it stays readable for every thread.
    let _ = rustix::io::write(&*stop, &1u64.to_ne_bytes());
    let ended = end_threads(&host.pool, control, device_threads, helper_threads);
    helper.inspect(|helper| helper.end());
    if !matches!(ended, Err(RunError::Stuck { .. })) {
        for switch in uplinks.switches() {
            tracing::info!("{switch}");
        }
    }
    ended
}

/// Waits until all threads, which have been asked to stop, have ended, or [`SHUTDOWN_TIMEOUT`] has
/// passed. The result is the last error.
fn end_threads(
    pool: &WorkerPool,
    control: Option<ControlServer>,
    device_threads: Vec<DeviceThread>,
    mut helper_threads: Vec<HelperThread>,
) -> Result<(), RunError> {
    let deadline = Instant::now() + SHUTDOWN_TIMEOUT;
    pool.request_stop();
    let stop_control = std::thread::Builder::new().spawn(move || drop(control));
    helper_threads.push((
        "control".into(),
        stop_control.map_err(host_error("start a thread"))?,
    ));
    let mut stuck = Vec::new();
    let ended = join_devices(device_threads, deadline, &mut stuck);
    let helpers_ended = join_helpers(helper_threads, deadline, &mut stuck);
    stuck.extend(pool.join(deadline));
    if !stuck.is_empty() {
        let threads = stuck.join(", ");
        return Err(RunError::Stuck { threads });
    }
    ended.and(helpers_ended)
}

fn start_control(
    socket: &ControlSocket,
    devices: &Arc<DeviceRegistry>,
) -> Result<ControlServer, ControlError> {
    let access = SocketPermissions {
        mode: Some(socket.mode),
        group: socket.group.clone(),
    };
    ControlServer::start(&socket.path, &access, Arc::clone(devices) as _, || {
        sandbox::confine_early_thread(ThreadKind::Control);
    })
}

/// Leaves the signals that end the program to the main thread, which takes them once it has started
/// all others. No other thread may wake it: see the lists of [`virtionet_sandbox`].
///
/// # Errors
/// When the kernel refuses it.
pub fn reserve_signals() -> Result<(), RunError> {
    let blocked = handled_signals().thread_block();
    blocked.map_err(|error| host_error("handle signals")(error.into()))
}

/// Takes them in the calling thread, those that came meanwhile included.
fn take_signals() -> Result<(), RunError> {
    let taken = handled_signals().thread_unblock();
    taken.map_err(|error| host_error("handle signals")(error.into()))
}

fn handled_signals() -> SigSet {
    let signals = [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGCHLD,
    ];
    signals.into_iter().collect()
}

/// Returns when a signal requests the end of the program, or when the signals' handle was closed.
/// Until then the main thread has nothing else to do, so it confines itself.
fn wait_for_end(signals: &mut Signals, helper: Option<&HelperProcess>) -> Result<(), RunError> {
    take_signals()?;
    sandbox::confine_main();
    for signal in signals.forever() {
        if signal == SIGCHLD {
            helper.inspect(|helper| helper.check());
            continue;
        }
        if signal == SIGHUP {
            tracing::info!(
                "SIGHUP ignored, because this version cannot reload its configuration; restart virtionetd to apply a change"
            );
            continue;
        }
        tracing::info!("signal {signal}: ending");
        break;
    }
    Ok(())
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

/// The eventfd that is readable once all threads must end.
fn create_stop() -> Result<Arc<OwnedFd>, RunError> {
    let stop = eventfd(0, EventfdFlags::CLOEXEC);
    let stop = stop.map_err(|error| host_error("make an eventfd")(error.into()))?;
    Ok(Arc::new(stop))
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
    let is_only_device = devices.devices.len() == 1;
    let running_devices = Arc::new(AtomicUsize::new(devices.devices.len()));
    let mut threads = Vec::new();
    for ((_, net_device), source) in devices.devices.iter().zip(sources) {
        let (net_device, stop, main) = (Arc::clone(net_device), Arc::clone(stop), main.clone());
        let name = net_device.name().to_owned();
        let running_devices = Arc::clone(&running_devices);
        let serve = move || {
            sandbox::confine_thread(ThreadKind::Session);
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
            .spawn(move || {
                sandbox::confine_thread(ThreadKind::SwitchForwarder);
                forwarder.run(stop.as_fd());
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

/// Waits until `thread` has ended, or `deadline` has passed; it is then `stuck`.
fn join<T>(
    name: &str,
    thread: JoinHandle<T>,
    deadline: Instant,
    stuck: &mut Vec<String>,
) -> Option<Result<T, RunError>> {
    while !thread.is_finished() {
        if Instant::now() >= deadline {
            stuck.push(name.to_owned());
            return None;
        }
        std::thread::sleep(JOIN_INTERVAL);
    }
    let name = name.to_owned();
    Some(thread.join().map_err(|_| RunError::Panic { name }))
}

/// Waits for all devices' threads; the result is the last error.
fn join_devices(
    threads: Vec<DeviceThread>,
    deadline: Instant,
    stuck: &mut Vec<String>,
) -> Result<(), RunError> {
    let mut result = Ok(());
    for (device, thread) in threads {
        match join(&device, thread, deadline, stuck) {
            None | Some(Ok(Ok(()))) => {}
            Some(Ok(Err(source))) => result = Err(RunError::DeviceFailed { device, source }),
            Some(Err(panic)) => result = Err(panic),
        }
    }
    result
}

fn join_helpers(
    threads: Vec<HelperThread>,
    deadline: Instant,
    stuck: &mut Vec<String>,
) -> Result<(), RunError> {
    let mut result = Ok(());
    for (name, thread) in threads {
        if let Some(Err(panic)) = join(&name, thread, deadline, stuck) {
            result = Err(panic);
        }
    }
    result
}

/// A device's thread: serves one front-end after the other, until there will be none. A front-end
/// that fails costs its own session, and so does a panic. The program ends only if no other
/// front-end can come and there is no other device.
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
    contain_panics();
    let log = SessionLog::default();
    loop {
        let stream = match source.next(stop, |reason| net_device.report_unconnected(reason)) {
            Ok(Some(stream)) => stream,
            Ok(None) => return Ok(()),
            Err(error) => return fail(error.into()),
        };
        net_device.report_connected();
        let started_at = Instant::now();
        let others = source.others();
        let mut interval = MIN_SESSION_INTERVAL;
        match contain(|| virtionet_vhost_user::serve(stream, net_device, stop, others, &log)) {
            Ok(Ok(SessionEnd::Disconnected)) => {}
            Ok(Ok(SessionEnd::Stopped)) => return Ok(()),
            Ok(Err(error @ SessionError::NotShared)) => {
                if is_only_device && source.is_finished() {
                    return fail(error.into());
                }
                net_device.report_memory_not_shared(&error);
                interval = UNUSABLE_SESSION_INTERVAL;
            }
            Ok(Err(error)) => net_device.report_session_error(&error),
            Err(panic) => tracing::error!("{}: the session ended: {panic}", net_device.name()),
        }
        let elapsed = started_at.elapsed();
        if elapsed < interval && pause(stop, interval - elapsed) {
            return Ok(());
        }
    }
}

/// Waits before the next front-end: one that is refused may come again at once, and without end
/// (QEMU does when it asks for too many queue pairs). True when `stop` is readable.
fn pause(stop: BorrowedFd<'_>, time: Duration) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN)];
    let timeout = Timespec::try_from(time).ok();
    matches!(poll(&mut fds, timeout.as_ref()), Ok(ready) if ready > 0)
}

#[cfg(test)]
mod tests;
