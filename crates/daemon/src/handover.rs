//! Handing the devices over to the next daemon ([`virtionet_handover`]).
//!
//! A thread waits for the next daemon and wakes the main thread, which does the rest. The devices
//! are paused in this order: the forwarders of switches and the workers stop first, so that none finds a
//! vring stopped and drops a frame; then the sessions stop the vrings. If anything fails
//! before the commit, all of them go on.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use parking_lot::Mutex;
use virtionet_handover::{
    DeviceImage, DeviceOffer, HandoverError, HandoverState, ListenerImage, Offer, OldSide, SharedFd,
};
use virtionet_net_device::stop::Stop;
use virtionet_net_device::worker_pool::WorkerPool;
use virtionet_placement::interrupts::IrqAffinityManager;
use virtionet_process::sandbox;
use virtionet_sandbox::ThreadKind;
use virtionet_vhost_user::{ImageError, peer_uid};

use crate::device_set::DeviceSet;
use crate::served_device::count_suspended;
use crate::uplinks::Uplinks;

/// The signal that tells the main thread of a successor. SIGUSR2 is the watchdog's.
pub const SUCCESSOR_SIGNAL: Signal = Signal::SIGUSR1;

/// How long forwarders, then workers, and then sessions may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(1);
/// The pause after a successor could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Why the devices are not handed over. They go on.
#[derive(Debug, thiserror::Error)]
pub enum HandoverFailure {
    /// The successor, or the connection with it.
    #[error(transparent)]
    Successor(#[from] HandoverError),
    /// A session cannot be handed over now.
    #[error("{device}: {source}")]
    Session {
        /// The device's name.
        device: String,
        /// The cause.
        source: ImageError,
    },
    /// The devices change at this moment.
    #[error("a device is being added, removed or changed; try again")]
    Changing,
    /// A thread did not stop.
    #[error("{0} did not stop within a second; try again")]
    Busy(String),
    /// There are no descriptors left for copies.
    #[error("descriptors cannot be copied ({0}); raise the limit of open files")]
    Descriptors(#[from] io::Error),
}

/// The connection of a successor that waits to be served.
#[derive(Debug, Clone, Default)]
pub struct Successor(Arc<Mutex<Option<UnixStream>>>);

impl Successor {
    /// Takes the connection, if there is one.
    #[must_use]
    pub fn take(&self) -> Option<UnixStream> {
        self.0.lock().take()
    }

    /// Starts the thread that waits for successors at `listener`, and sends the calling thread
    /// [`SUCCESSOR_SIGNAL`] when there is one. Only processes of this user and of root are served.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub fn listen(&self, listener: UnixListener) -> io::Result<()> {
        listener.set_nonblocking(false)?;
        let (successor, main) = (self.clone(), pthread_self());
        let thread = std::thread::Builder::new().name("handover".into());
        thread
            .spawn(move || {
                sandbox::confine_thread(ThreadKind::Handover);
                loop {
                    successor.wait_for_one(&listener, main);
                }
            })
            .map(|_| ())
    }

    // syscalls: accept4 getsockopt tgkill
    fn wait_for_one(&self, listener: &UnixListener, main: Pthread) {
        let own_uid = rustix::process::geteuid().as_raw();
        match listener.accept() {
            Ok((stream, _)) if peer_uid(&stream).is_some_and(|uid| uid == own_uid || uid == 0) => {
                *self.0.lock() = Some(stream);
                let _ = pthread_kill(main, SUCCESSOR_SIGNAL);
            }
            Ok(_) => tracing::warn!(
                "a process of another user asked to take the devices over and was refused"
            ),
            Err(error) => {
                tracing::warn!("a successor cannot be accepted ({error}); will try again");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

/// What is handed over.
#[derive(Debug)]
pub struct Handover {
    /// The devices.
    pub devices: Arc<DeviceSet>,
    /// Their uplinks.
    pub uplinks: Arc<Mutex<Uplinks>>,
    /// The control socket.
    pub control: Option<ListenerImage<SharedFd>>,
    /// The control socket that takes no changes.
    pub control_read_only: Option<ListenerImage<SharedFd>>,
    /// The socket at which successors connect.
    pub handover: ListenerImage<SharedFd>,
    /// The masks that are set for them.
    pub irq_manager: Arc<IrqAffinityManager>,
    /// The workers.
    pub pool: Arc<WorkerPool>,
    /// Stops the forwarders of switches.
    pub forwarders: Arc<Stop>,
}

impl Handover {
    /// Hands everything over to the successor at `stream`. After that this process must end at once,
    /// and touch nothing. Returns the successor's version, and how long the devices were paused.
    ///
    /// # Errors
    /// When it fails; the devices then go on in this process.
    pub fn hand_over(&self, stream: UnixStream) -> Result<(String, Duration), HandoverFailure> {
        let (successor, program) = OldSide::accept(stream)?;
        let refuse = |failure: &HandoverFailure| successor.refuse(&failure.to_string());
        let permit = self.devices.try_change().ok_or(HandoverFailure::Changing);
        let _permit = permit.inspect_err(refuse)?;
        let offer = self.offer().inspect_err(refuse)?;
        successor.offer(offer)?;
        let paused_at = Instant::now();
        let state = self.suspend().and_then(|()| self.state());
        let sent = match state.inspect_err(refuse) {
            Ok(state) => successor.send_state(state).map_err(HandoverFailure::from),
            Err(failure) => Err(failure),
        };
        match sent.and_then(|()| Ok(successor.commit()?)) {
            Ok(handed_over) => {
                let paused_for = paused_at.elapsed();
                handed_over.wait_until_served();
                Ok((program, paused_for))
            }
            Err(failure) => {
                self.resume();
                Err(failure)
            }
        }
    }

    fn offer(&self) -> Result<Offer<SharedFd>, HandoverFailure> {
        let mut devices = Vec::new();
        for device in self.devices.all() {
            let net_device = &device.net_device;
            let crash_records = net_device.crash_records();
            let source = device.source.get().cloned();
            devices.push(DeviceOffer {
                name: net_device.name().to_owned(),
                source: source.ok_or_else(|| io::Error::from(rustix::io::Errno::MFILE))?,
                requested: device.requested.lock().clone(),
                is_link_down: device.stop.is_held(),
                uplink: net_device.uplink_text(),
                crash_records: crash_records
                    .map(|records| records.copy_of_file().map(Arc::new))
                    .transpose()?,
            });
        }
        let uplinks = self.uplinks.lock();
        Ok(Offer {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            devices,
            taps: uplinks.tap_images()?,
            switch_seeds: uplinks.switch_seeds(),
            control: self.control.clone(),
            control_read_only: self.control_read_only.clone(),
            removed: self.devices.removed(),
            handover: self.handover.clone(),
        })
    }

    fn suspend(&self) -> Result<(), HandoverFailure> {
        if !self.forwarders.suspend(STOP_LIMIT) {
            return Err(HandoverFailure::Busy("the thread of a switch".into()));
        }
        self.pool.request_stop();
        let stuck = self.pool.join(Instant::now() + STOP_LIMIT);
        if !stuck.is_empty() {
            return Err(HandoverFailure::Busy(stuck.join(", ")));
        }
        match self.devices.suspend(STOP_LIMIT) {
            true => Ok(()),
            false => Err(HandoverFailure::Busy("the thread of a device".into())),
        }
    }

    fn resume(&self) {
        let suspended = count_suspended(&self.devices.all());
        self.pool.gate().hold_for(suspended);
        self.devices.resume();
        self.forwarders.resume();
        // Those of sessions that were not suspended go on. The others have ended, and their sessions
        // start them.
        self.pool.resume();
    }

    fn state(&self) -> Result<HandoverState<SharedFd>, HandoverFailure> {
        let mut devices = Vec::new();
        for device in self.devices.all() {
            let net_device = &device.net_device;
            let session = match &*device.suspended.lock() {
                Some(session) => {
                    let failed = |source| HandoverFailure::Session {
                        device: net_device.name().to_owned(),
                        source,
                    };
                    let stream = session.stream().as_fd().try_clone_to_owned()?;
                    Some((Arc::new(stream), session.to_image().map_err(failed)?))
                }
                None => None,
            };
            devices.push(DeviceImage {
                session,
                counters: net_device.counters(),
            });
        }
        let uplinks = self.uplinks.lock();
        Ok(HandoverState {
            devices,
            taps: uplinks.tap_images()?,
            switches: uplinks.switch_images(),
            affinity: self.irq_manager.to_image(),
        })
    }
}
