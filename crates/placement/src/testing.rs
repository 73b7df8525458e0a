//! What several tests of this crate use: a temporary directory, fake procfs and sysfs trees, maps
//! of vCPUs, and a QMP server on a real socket.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use serde_json::Value;

use crate::cpuset::CpuSet;
use crate::vcpus::{Vcpu, VcpuMap, VcpuSource};

/// QEMU 10's greeting.
pub(crate) const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \"package\": \"\"}, \"capabilities\": [\"oob\"]}}\r\n";

/// The set of a valid CPU list.
pub(crate) fn set(list: &str) -> CpuSet {
    list.parse().unwrap()
}

/// A map of vCPUs 0.. with threads 100.. that may run on these CPUs; `?` stands for unreadable
/// CPUs.
pub(crate) fn map(cpus: &[&str]) -> VcpuMap {
    let vcpus = (0..).zip(100..).zip(cpus).map(|((index, tid), cpus)| Vcpu {
        index,
        tid,
        cpus: (*cpus != "?").then(|| set(cpus)),
    });
    VcpuMap {
        vcpus: vcpus.collect(),
        source: VcpuSource::ThreadNames,
        notes: vec![],
    }
}

/// A directory that is removed when the value is dropped.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("placement-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Creates the files of thread `tid` of process `pid` as procfs has them.
    pub(crate) fn thread(&self, pid: i32, tid: i32, comm: &str, cpus: &str) {
        let status =
            format!("Name:\t{comm}\nTgid:\t{pid}\nPid:\t{tid}\nCpus_allowed_list:\t{cpus}\n");
        for thread in [
            self.0.join(format!("{pid}/task/{tid}")),
            self.0.join(tid.to_string()),
        ] {
            fs::create_dir_all(&thread).unwrap();
            fs::write(thread.join("comm"), format!("{comm}\n")).unwrap();
            fs::write(thread.join("status"), &status).unwrap();
        }
    }
}

/// A fake sysfs tree that is being created.
pub(crate) struct SysFs<'a>(&'a Path);

/// Creates a fake sysfs tree under `root`.
pub(crate) fn sysfs(root: &Path) -> SysFs<'_> {
    SysFs(root)
}

impl SysFs<'_> {
    pub(crate) fn online(self, list: &str) -> Self {
        self.put("devices/system/cpu/online", list)
    }

    pub(crate) fn isolated(self, list: &str) -> Self {
        self.put("devices/system/cpu/isolated", list)
    }

    /// Each list is one core.
    pub(crate) fn cores(self, lists: &[&str]) -> Self {
        self.each(lists, "topology/core_cpus_list", |_, _, list| list.into())
    }

    /// Each list is one L3 cache; the other caches are each CPU's own.
    pub(crate) fn caches(self, lists: &[&str]) -> Self {
        let own = |_: &str, cpu: u32, _: &str| cpu.to_string();
        self.each(lists, "cache/index0/level", |_, _, _| "1".into())
            .each(lists, "cache/index0/shared_cpu_list", own)
            .each(lists, "cache/index2/level", |_, _, _| "2".into())
            .each(lists, "cache/index2/shared_cpu_list", own)
            .each(lists, "cache/index3/level", |_, _, _| "3".into())
            .each(lists, "cache/index3/shared_cpu_list", |_, _, list| {
                list.into()
            })
    }

    /// Each list is one node.
    pub(crate) fn nodes(mut self, lists: &[&str]) -> Self {
        for (node, list) in lists.iter().enumerate() {
            self = self.put(&format!("devices/system/node/node{node}/cpulist"), list);
        }
        self
    }

    fn each(mut self, lists: &[&str], file: &str, text: fn(&str, u32, &str) -> String) -> Self {
        for list in lists {
            for cpu in list.parse::<CpuSet>().unwrap().iter() {
                let path = format!("devices/system/cpu/cpu{cpu}/{file}");
                self = self.put(&path, &text(file, cpu, list));
            }
        }
        self
    }

    fn put(self, path: &str, text: &str) -> Self {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
        self
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        _ = fs::remove_dir_all(&self.0);
    }
}

/// A QMP server for one client. It sends the first text of its script, then one more after each
/// request, and closes the connection after the last.
pub(crate) struct FakeQmp {
    pub(crate) path: PathBuf,
    thread: JoinHandle<Vec<Value>>,
}

impl FakeQmp {
    pub(crate) fn start(dir: &TempDir, script: Vec<String>) -> Self {
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let mut requests = Vec::new();
            for (at, text) in script.iter().enumerate() {
                if at > 0 {
                    let Some(Ok(line)) = lines.next() else { break };
                    requests.push(serde_json::from_str(&line).unwrap());
                }
                // The client may close the connection because of this text.
                _ = stream.write_all(text.as_bytes());
            }
            requests
        });
        Self { path, thread }
    }

    /// All requests of the client, after it has closed the connection.
    pub(crate) fn requests(self) -> Vec<Value> {
        self.thread.join().unwrap()
    }
}
