//! Named network namespaces. Each name contains the id of this process.

use std::ffi::OsStr;
use std::fs;
use std::process;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::cleanup::{self, Action, Entry, delete_netns};
use crate::paths::{PREFIX, is_orphan, require_root};
use crate::process::output;

/// A network namespace, which is deleted when this value is dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
    _entry: Entry,
}

impl Netns {
    /// Creates a namespace and sets its loopback interface up. The first call deletes the
    /// namespaces of processes that have ended.
    ///
    /// # Errors
    /// When this process is not root, or the namespace cannot be created.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static CLEAN_UP: Once = Once::new();
        require_root()?;
        CLEAN_UP.call_once(delete_orphans);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{n}", process::id());
        output("ip", ["netns", "add", &name]).context("a network namespace cannot be created")?;
        let netns = Self {
            _entry: cleanup::register(Action::Netns(name.clone())),
            name,
        };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// The name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip ARGS` in the namespace and returns its output. `args` is split at spaces.
    ///
    /// # Errors
    /// When `ip` fails. The error contains its message.
    pub fn ip(&self, args: &str) -> Result<String> {
        output("ip", ["-n", &self.name].into_iter().chain(args.split(' ')))
    }

    /// Runs a command in the namespace, waits for it and returns its standard output.
    ///
    /// # Errors
    /// When the command fails. The error contains its standard error.
    pub fn run<S: AsRef<OsStr>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<String> {
        let args: Vec<S> = args.into_iter().collect();
        let prefix = ["netns", "exec", &self.name, program].map(OsStr::new);
        output(
            "ip",
            prefix.into_iter().chain(args.iter().map(AsRef::as_ref)),
        )
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        _ = delete_netns(&self.name);
    }
}

/// Deletes the namespaces of processes that have ended.
fn delete_orphans() {
    let Ok(entries) = fs::read_dir("/run/netns") else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if let Some(name) = name.to_str()
            && is_orphan(name)
        {
            _ = delete_netns(name);
        }
    }
}
