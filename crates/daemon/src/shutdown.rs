//! The end of the program: its threads are waited for, but not long.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtionet_control::server::ControlServer;
use virtionet_net_device::worker_pool::WorkerPool;

use crate::device_set::DeviceSet;
use crate::run_error::RunError;
use crate::served_device::DeviceThread;

/// How long all threads together may take to end.
pub(crate) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause between two checks of whether a thread has ended.
const JOIN_INTERVAL: Duration = Duration::from_millis(1);

/// A thread beside those of the devices, and its name.
pub(crate) type HelperThread = (String, JoinHandle<()>);

/// The threads of the devices, with the devices' names.
pub(crate) fn take_threads(devices: &DeviceSet) -> Vec<(String, DeviceThread)> {
    let devices = devices.all();
    let threads = devices.iter().filter_map(|device| {
        let thread = device.thread.lock().take()?;
        Some((device.name().to_owned(), thread))
    });
    threads.collect()
}

/// Waits until all threads, which have been asked to stop, have ended, or [`SHUTDOWN_TIMEOUT`] has
/// passed. The result is the last error.
pub(crate) fn end_threads(
    pool: &WorkerPool,
    control: Option<ControlServer>,
    device_threads: Vec<(String, DeviceThread)>,
    mut helper_threads: Vec<HelperThread>,
) -> Result<(), RunError> {
    let deadline = Instant::now() + SHUTDOWN_TIMEOUT;
    pool.request_stop();
    let stop_control = std::thread::Builder::new().spawn(move || drop(control));
    helper_threads.push((
        "control".into(),
        stop_control.map_err(|source| RunError::Host {
            operation: "start a thread",
            source,
        })?,
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
    threads: Vec<(String, DeviceThread)>,
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
