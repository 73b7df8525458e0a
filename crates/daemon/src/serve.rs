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
use virtionet_placement::Planner;
use virtionet_placement::interrupts::Ledger;
use virtionet_vhost_user::listen::{Access, Inherited, ListenError, Listener, connect};
use virtionet_vhost_user::{Ended, SessionError, take_fd};
use virtionet_uplink::switch::Pump;
use virtionet_uplink::{UplinkSpec, Uplinks};

use crate::advice::Adviser;
use crate::card::Card;
use crate::config::{Config, DeviceConfig, Poll, Socket};
use crate::control::ControlServer;
use crate::follow;
use crate::host::{Host, HostError};
use crate::interrupts::Interrupts;
use crate::inventory::Devices;
use crate::placer::Placer;

/// A session that ends sooner than this is followed by a pause of this length.
const SHORT: Duration = Duration::from_millis(20);

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
    Control(#[from] crate::control::ControlError),
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
    Cpus(#[from] HostError),
    /// A device cannot go on.
    #[error("{0}: {1}")]
    Ended(String, String),
}

/// Serves the devices of `config` until a signal asks to end.
///
/// # Errors
/// When something cannot be set up, or a device that is alone cannot go on.
pub fn run(config: Config) -> Result<(), RunError> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(host("handle signals"))?;
    // Inherited descriptors are taken before anything else is opened in their place.
    let doors = config
        .devices
        .iter()
        .map(|device| Door::open(&device.socket).map_err(|e| device_error(device, e)))
        .collect::<Result<Vec<_>, _>>()?;
    let cpus = Arc::new(Host::read()?);
    let mut uplinks = Uplinks::default();
    let ledger = Arc::new(Ledger::with_irqbalance());
    let cards = config
        .devices
        .iter()
        .map(|device| {
            let card = card(device, &cpus, &mut uplinks, &ledger)?;
            Ok((device.clone(), Arc::new(card)))
        })
        .collect::<Result<Vec<_>, RunError>>()?;
    let devices = Arc::new(Devices(cards));
    let control = match &config.control {
        Some(path) => Some(ControlServer::start(path, Arc::clone(&devices) as _)?),
        None => None,
    };
    let stop =
        Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| host("make an eventfd")(e.into()))?);
    let mut pumps = start_pumps(&uplinks, &stop)?;
    let followed = devices.0.iter().map(|(_, card)| Arc::clone(card));
    let placer = follow::start(followed.collect(), cpus, Arc::clone(&stop), Ok(()));
    pumps.push(("placer".into(), placer.map_err(host("start a thread"))?));
    let alone = devices.0.len() == 1;
    let left = Arc::new(AtomicUsize::new(devices.0.len()));
    let mut threads = Vec::new();
    for ((_, card), door) in devices.0.iter().zip(doors) {
        let (card, stop, main) = (Arc::clone(card), Arc::clone(&stop), signals.handle());
        let name = card.name().to_owned();
        let left = Arc::clone(&left);
        let serve = move || {
            let ended = serve(&card, door, stop.as_fd(), alone);
            if left.fetch_sub(1, Ordering::Relaxed) == 1 {
                main.close();
            }
            ended
        };
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(serve)
            .map_err(host("start a thread"))?;
        threads.push((name, thread));
    }
    if let Some(signal) = signals.forever().next() {
        tracing::info!("signal {signal}: ending");
    }
    // It is never read, so it stays readable for every thread.
    let _ = rustix::io::write(&*stop, &1u64.to_ne_bytes());
    let ended = join(threads);
    for switch in uplinks.switches() {
        tracing::info!("{switch}");
    }
    drop(control);
    ended.and(join(pumps))
}

/// Starts what switches need beside the devices' workers.
fn start_pumps(uplinks: &Uplinks, stop: &Arc<OwnedFd>) -> Result<Vec<Thread>, RunError> {
    let start = |pump: Pump| {
        let stop = Arc::clone(stop);
        let name = format!("switch {}", pump.switch());
        let thread = std::thread::Builder::new()
            .name(format!("sw-{}", pump.switch()))
            .spawn(move || {
                pump.run(stop.as_fd());
                Ok(())
            })
            .map_err(host("start a thread"))?;
        Ok((name, thread))
    };
    uplinks.pumps().into_iter().map(start).collect()
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
            result = Err(RunError::Ended(name, why));
        }
    }
    result
}

/// Sets one device up: its uplink is opened now, so that what is wrong with it shows at start.
fn card(
    device: &DeviceConfig,
    cpus: &Arc<Host>,
    uplinks: &mut Uplinks,
    ledger: &Arc<Ledger>,
) -> Result<Card, RunError> {
    let spec: UplinkSpec = device.uplink.parse().map_err(|e| usage(device, e))?;
    let mode = device.placement.parse().map_err(|e| usage(device, e))?;
    let planner =
        Planner::new(mode, cpus.allowed(), device.qmp.clone()).map_err(|e| usage(device, e))?;
    let irq_affinity = device.irq_affinity.parse().map_err(|e| usage(device, e))?;
    let uplink = uplinks.open(&spec).map_err(|e| device_error(device, e))?;
    let socket = match &device.socket {
        Socket::Listen { path, .. } | Socket::Connect { path } => Some(path.clone()),
        Socket::Inherited(_) => None,
    };
    let card = Card::new(
        &device.name,
        device.queues.max(),
        uplink,
        Placer::new(
            &device.name,
            planner.polling(device.poll != Poll::Off),
            Arc::clone(cpus),
        ),
        device.poll,
    );
    Ok(card.with(
        Interrupts::new(&device.name, irq_affinity, Arc::clone(ledger)),
        Adviser::new(&device.name, device.qmp.clone(), socket),
    ))
}

fn usage(device: &DeviceConfig, error: impl ToString) -> RunError {
    RunError::Usage(device.name.clone(), error.to_string())
}

fn device_error(device: &DeviceConfig, error: impl ToString) -> RunError {
    RunError::Device(device.name.clone(), error.to_string())
}

fn host(what: &'static str) -> impl Fn(std::io::Error) -> RunError {
    move |error| RunError::Host { what, error }
}

/// Where front-ends come from.
enum Door {
    Listener(Listener),
    Connect(PathBuf),
    /// One connection, already made.
    Once(Option<UnixStream>),
}

impl Door {
    fn open(socket: &Socket) -> Result<Self, ListenError> {
        Ok(match socket {
            Socket::Listen { path, mode, group } => {
                let access = Access {
                    mode: Some(*mode),
                    group: group.clone(),
                };
                Self::Listener(Listener::bind(path, &access)?)
            }
            Socket::Connect { path } => Self::Connect(path.clone()),
            Socket::Inherited(number) => {
                let fd = take_fd(*number).map_err(|e| ListenError::WrongKind(e.to_string()))?;
                match Inherited::new(fd)? {
                    Inherited::Listening(listener) => Self::Listener(listener),
                    Inherited::Connected(stream) => Self::Once(Some(stream)),
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
fn serve(card: &Card, mut door: Door, stop: BorrowedFd<'_>, alone: bool) -> Result<(), String> {
    // A program that goes on with other devices must tell now, one that ends tells with its end.
    let cannot_go_on = |why: String| {
        if !alone {
            tracing::error!("{}: {why}", card.name());
        }
        Err(why)
    };
    loop {
        let stream = match door.next(stop) {
            Ok(Some(stream)) => stream,
            Ok(None) => return Ok(()),
            Err(error) => return cannot_go_on(error.to_string()),
        };
        let began = Instant::now();
        match virtionet_vhost_user::serve(stream, card, stop) {
            Ok(Ended::Disconnected) => {}
            Ok(Ended::Stopped) => return Ok(()),
            Err(error @ SessionError::NotShared) if alone => {
                return cannot_go_on(error.to_string());
            }
            Err(error) => tracing::error!("{}: {error}", card.name()),
        }
        if began.elapsed() < SHORT && pause(stop) {
            return Ok(());
        }
    }
}

/// Lets a moment pass before the next front-end: one that is refused may come again at once, and
/// without end (QEMU does when it asks for too many queue pairs). True when `stop` is readable.
fn pause(stop: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN)];
    let timeout = Timespec::try_from(SHORT).ok();
    matches!(poll(&mut fds, timeout.as_ref()), Ok(ready) if ready > 0)
}
