//! Named network namespaces, each with this process's id in its name.

use std::ffi::OsStr;
use std::fs;
use std::process;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::cleanup::{self, Action, Entry, delete_netns};
use crate::paths::{PREFIX, is_orphan, require_root};
use crate::process::output;

/// A network namespace of its own, deleted when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
    _entry: Entry,
}

impl Netns {
    /// Makes one, with its loopback interface up. Namespaces that a killed
    /// run left behind are deleted first.
    ///
    /// # Errors
    /// When this process is not root, or the kernel refuses.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        require_root()?;
        SWEEP.call_once(sweep);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{n}", process::id());
        output("ip", ["netns", "add", &name]).context("a network namespace cannot be made")?;
        let netns = Self {
            _entry: cleanup::register(Action::Netns(name.clone())),
            name,
        };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip ARGS` in it; the arguments are split at spaces.
    ///
    /// # Errors
    /// When `ip` fails: with its words.
    pub fn ip(&self, args: &str) -> Result<String> {
        output("ip", ["-n", &self.name].into_iter().chain(args.split(' ')))
    }

    /// Runs a short command in it and returns its standard output.
    ///
    /// # Errors
    /// When the command fails: with its words.
    pub fn run<S: AsRef<OsStr>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<String> {
        let args: Vec<S> = args.into_iter().collect();
        let front = ["netns", "exec", &self.name, program].map(OsStr::new);
        output(
            "ip",
            front.into_iter().chain(args.iter().map(AsRef::as_ref)),
        )
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        _ = delete_netns(&self.name);
    }
}

/// Deletes the namespaces of processes that are gone.
fn sweep() {
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
