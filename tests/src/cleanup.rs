//! The cleanup actions that a signal handler runs when a signal ends this process. `Drop` covers
//! the ordinary exit and a panic.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio, exit};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

static LIST: Mutex<List> = Mutex::new(List {
    next: 0,
    actions: BTreeMap::new(),
});

struct List {
    next: u64,
    actions: BTreeMap<u64, Action>,
}

/// An action that undoes a change to the host.
#[derive(Clone, Debug)]
pub enum Action {
    /// Kill this child process.
    Kill(i32),
    /// Delete this named network namespace.
    Netns(String),
    /// Remove this directory and everything in it.
    Remove(PathBuf),
    /// Call this function with this number, which is a number of huge pages or the number of a CPU.
    CallWithNumber(fn(u64), u64),
    /// Call this function with this path, which is that of a cpuset.
    CallWithPath(fn(&Path), PathBuf),
}

impl Action {
    fn run(&self) {
        // The process is about to exit, so a failure cannot be handled.
        match self {
            Self::Kill(pid) => _ = kill(Pid::from_raw(*pid), Signal::SIGKILL),
            Self::Netns(name) => _ = delete_netns(name),
            Self::Remove(path) => _ = fs::remove_dir_all(path),
            Self::CallWithNumber(function, number) => function(*number),
            Self::CallWithPath(function, path) => function(path),
        }
    }
}

/// Keeps an [`Action`] registered. Dropping it removes the action without running it.
#[derive(Debug)]
pub struct Entry(u64);

impl Drop for Entry {
    fn drop(&mut self) {
        list().actions.remove(&self.0);
    }
}

/// Registers `action`, which runs if SIGINT, SIGTERM or SIGHUP ends this process.
pub fn register(action: Action) -> Entry {
    static WATCH: Once = Once::new();
    WATCH.call_once(watch_signals);
    let mut list = list();
    let id = list.next;
    list.next += 1;
    list.actions.insert(id, action);
    Entry(id)
}

/// Deletes a named network namespace and the interfaces in it. Returns whether it existed and was
/// deleted.
pub(crate) fn delete_netns(name: &str) -> std::io::Result<bool> {
    let status = Command::new("ip")
        .args(["netns", "delete", name])
        .stderr(Stdio::null())
        .status()?;
    Ok(status.success())
}

fn list() -> MutexGuard<'static, List> {
    LIST.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch_signals() {
    // Without a handler, the default action ends this process, and the kernel kills its children.
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) else {
        return;
    };
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let list = list();
            // The newest action runs first, so that processes end before their namespace is
            // deleted.
            for action in list.actions.values().rev() {
                action.run();
            }
            exit(128 + signal);
        }
    });
}
