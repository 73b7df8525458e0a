//! The thread of a device: it serves one front-end after the other.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::iterator::Handle;
use virtionet_net_device::net_device::NetDevice;
use virtionet_net_device::stop::Stop;
use virtionet_process::panic_policy::{contain, contain_panics};
use virtionet_process::sandbox;
use virtionet_sandbox::ThreadKind;
use virtionet_vhost_user::{
    Served, SessionEnd, SessionError, SessionLog, SessionStart, serve_from,
};

use crate::device_failure::DeviceFailure;
use crate::device_set::DeviceSet;
use crate::frontend_source::FrontendSource;
use crate::run_error::RunError;
use crate::served_device::{ServedDevice, SuspendedSlot};

/// A session that ends sooner than this is followed by a pause of this length.
const MIN_SESSION_INTERVAL: Duration = Duration::from_millis(20);

/// The same for a session that no front-end of the same configuration could have used.
const UNUSABLE_SESSION_INTERVAL: Duration = Duration::from_secs(1);

/// How often a thread looks whether it may serve front-ends again. Meanwhile it refuses them at once.
const HELD_INTERVAL: Duration = Duration::from_millis(100);

/// The threads of the devices, which are confined and wait for the sources of their front-ends. While a
/// daemon takes over, all that can be done before the devices are paused is done before.
#[derive(Debug)]
pub struct WaitingDevices(Vec<WaitingDevice>);

/// A device whose thread waits for the source of its front-ends.
#[derive(Debug)]
pub struct WaitingDevice {
    device: Arc<ServedDevice>,
    source: Sender<FrontendSource>,
}

impl WaitingDevices {
    /// Lets the threads serve their devices.
    pub fn serve(self, sources: Vec<FrontendSource>, set: &DeviceSet) {
        for (device, source) in self.0.into_iter().zip(sources) {
            device.serve(source, set);
        }
    }
}

impl WaitingDevice {
    /// Starts the thread of `device`, one of `set`. `main` is closed when the last thread ends by
    /// itself and no device can be added.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub fn start(
        device: &Arc<ServedDevice>,
        set: &Arc<DeviceSet>,
        main: &Handle,
    ) -> Result<Self, RunError> {
        let (sender, receiver) = channel();
        let (own, set, main) = (Arc::clone(device), Arc::clone(set), main.clone());
        let is_only_device = set.is_single();
        let serve = move || {
            sandbox::confine_thread(ThreadKind::Session);
            // Without a source the program ends.
            let Ok(source) = receiver.recv() else {
                return Ok(());
            };
            let ServedDevice {
                net_device,
                suspended,
                stop,
                ..
            } = &*own;
            let ended = serve_device(net_device, suspended, source, stop, is_only_device);
            if set.note_end(&own) {
                main.close();
            }
            ended
        };
        let thread = std::thread::Builder::new()
            .name(device.name().to_owned())
            .spawn(serve)
            .map_err(|source| RunError::Host {
                operation: "start a thread",
                source,
            })?;
        *device.thread.lock() = Some(thread);
        Ok(Self {
            device: Arc::clone(device),
            source: sender,
        })
    }

    /// Lets the thread serve the device, one of `set`.
    pub fn serve(self, source: FrontendSource, set: &DeviceSet) {
        // A handover says if there was no descriptor left for the copy.
        if set.is_handed_over()
            && let Ok(image) = source.to_image()
        {
            self.device.source.get_or_init(|| image);
        }
        // A thread that has ended is noticed when it is joined.
        let _ = self.source.send(source);
    }
}

/// Starts a thread for each device of `set`.
///
/// # Errors
/// When the kernel refuses a thread.
pub fn start_devices(set: &Arc<DeviceSet>, main: &Handle) -> Result<WaitingDevices, RunError> {
    let devices = set.all();
    let waiting = devices
        .iter()
        .map(|device| WaitingDevice::start(device, set, main));
    waiting.collect::<Result<_, _>>().map(WaitingDevices)
}

/// A device's thread: serves one front-end after the other, until there will be none. A front-end
/// that fails costs its own session, and so does a panic. The program ends only if no other
/// front-end can come and there is no other device.
///
/// # Errors
/// When the device cannot continue.
pub(crate) fn serve_device(
    net_device: &NetDevice,
    suspended: &SuspendedSlot,
    mut source: FrontendSource,
    stop: &Stop,
    is_only_device: bool,
) -> Result<(), DeviceFailure> {
    let _participant = stop.enter();
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
        wait_while_held(stop, &source);
        let start = match next_session(net_device, suspended, &mut source, stop) {
            Ok(Some(start)) => start,
            Ok(None) if has_been_stopped(stop) => match may_continue(stop) {
                true => continue,
                false => return Ok(()),
            },
            Ok(None) => return Ok(()),
            Err(failure) => return fail(failure),
        };
        let started_at = Instant::now();
        let others = source.others();
        let mut interval = MIN_SESSION_INTERVAL;
        match contain(|| serve_from(start, net_device, stop, others, &log)) {
            Ok(Ok(Served::Suspended(session))) => {
                *suspended.lock() = Some(session);
                continue;
            }
            Ok(Ok(Served::Ended(SessionEnd::Disconnected))) => {}
            Ok(Ok(Served::Ended(SessionEnd::Stopped))) if stop.is_held() => continue,
            Ok(Ok(Served::Ended(SessionEnd::Stopped))) => return Ok(()),
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
        if elapsed < interval && pause(stop, interval - elapsed) && !may_continue(stop) {
            return Ok(());
        }
    }
}

/// For a thread that has stopped its work: waits while it is suspended. Returns false if it must end.
fn may_continue(stop: &Stop) -> bool {
    stop.is_held() || stop.wait_while_suspended()
}

/// Waits while the link is down. A front-end that finds it down must not wait for an answer: QEMU does so
/// in its main loop.
fn wait_while_held(stop: &Stop, source: &FrontendSource) {
    if stop.is_held() {
        let _stopped = stop.note_stopped();
        while stop.is_held() {
            source.refuse_next(HELD_INTERVAL, || stop.is_held());
        }
    }
}

/// The next session: one that was suspended, as soon as it may continue, or that of the next
/// front-end. `None` when threads must stop, or no front-end will come.
fn next_session(
    net_device: &NetDevice,
    suspended: &SuspendedSlot,
    source: &mut FrontendSource,
    stop: &Stop,
) -> Result<Option<SessionStart>, DeviceFailure> {
    let mut suspended = suspended.lock();
    if suspended.is_some() {
        let session = suspended.take_if(|_| !has_been_stopped(stop));
        return Ok(session.map(SessionStart::Suspended));
    }
    drop(suspended);
    let stream = source.next(stop.as_fd(), |reason| net_device.report_unconnected(reason))?;
    if stream.is_some() {
        net_device.report_connected();
    }
    Ok(stream.map(SessionStart::Connected))
}

fn has_been_stopped(stop: &Stop) -> bool {
    pause(stop, Duration::ZERO)
}

/// Waits before the next front-end: one that is refused may come again at once, and without end
/// (QEMU does when it asks for too many queue pairs). True when `stop` is readable.
pub(crate) fn pause(stop: &Stop, time: Duration) -> bool {
    let mut fds = [PollFd::new(stop, PollFlags::IN)];
    let timeout = Timespec::try_from(time).ok();
    matches!(poll(&mut fds, timeout.as_ref()), Ok(ready) if ready > 0)
}
