//! A machine whose process 1 is systemd: a container of systemd-nspawn on this host's own `/usr`,
//! with a configuration of its own and without a network. It starts no service of the host.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::paths::RunDir;
use crate::process::{Proc, output, tail};

const PROBE_TIMEOUT: Duration = Duration::from_secs(20);
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(30);
const CGROUP_TIMEOUT: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The files of `/etc`. With a machine id it is no first boot, which would enable the services that
/// the host has.
const ETC: [(&str, &str); 4] = [
    ("os-release", "ID=virtionet-test\nNAME=test\n"),
    ("machine-id", "5bd1f1b34a1e4c2f9b9e6a6f3c1d2e00\n"),
    ("passwd", "root:x:0:0:root:/root:/bin/sh\n"),
    ("group", "root:x:0:\n"),
];

/// The root directory of a machine that is not running.
#[derive(Debug)]
pub struct MachineFiles<'a> {
    dir: &'a RunDir,
}

impl<'a> MachineFiles<'a> {
    /// Makes the root directory of a machine in `dir`.
    ///
    /// # Errors
    /// When a file cannot be created.
    pub fn new(dir: &'a RunDir) -> Result<Self> {
        let files = Self { dir };
        for (name, text) in ETC {
            files.write(&format!("etc/{name}"), text)?;
        }
        for folder in ["usr", "var", "run", "tmp", "dev", "proc", "sys", "root"] {
            fs::create_dir_all(files.root().join(folder))?;
        }
        for folder in ["bin", "sbin", "lib", "lib64"] {
            if Path::new("/usr").join(folder).exists() {
                symlink(format!("usr/{folder}"), files.root().join(folder))?;
            }
        }
        let units = files.root().join("etc/systemd/system");
        fs::create_dir_all(&units)?;
        // The basic services of systemd and nothing else.
        let target = "/usr/lib/systemd/system/basic.target";
        symlink(target, units.join("default.target"))?;
        fs::create_dir_all(files.added_to_usr().join("bin"))?;
        Ok(files)
    }

    /// Writes a file of the machine, whose path begins without `/`.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.root().join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))
    }

    /// Adds a user and a group of that name, with this number.
    ///
    /// # Errors
    /// When the user database cannot be written.
    pub fn add_user(&self, name: &str, number: u32) -> Result<()> {
        let user = format!("{name}:x:{number}:{number}::/:/usr/sbin/nologin\n");
        let group = format!("{name}:x:{number}:\n");
        for (file, line) in [("etc/passwd", user), ("etc/group", group)] {
            let text = fs::read_to_string(self.root().join(file))?;
            self.write(file, &(text + &line))?;
        }
        Ok(())
    }

    /// Installs `program` in `/usr/bin`.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn install_program(&self, program: &Path) -> Result<()> {
        let name = program.file_name().context("a program without a name")?;
        fs::copy(program, self.added_to_usr().join("bin").join(name))?;
        Ok(())
    }

    /// Why this host cannot run such a machine; `None` if it can.
    ///
    /// # Errors
    /// When the attempt cannot be made, or does not end in time.
    pub fn find_obstacle(&self) -> Result<Option<String>> {
        if !fs::symlink_metadata("/bin")?.is_symlink() {
            return Ok(Some("/bin of this host is not that of /usr".into()));
        }
        if output("systemd-nspawn", ["--version"]).is_err() {
            return Ok(Some("there is no systemd-nspawn".into()));
        }
        let _cgroups = Cgroups;
        let mut attempt = self.nspawn("probe", &["/usr/bin/true"])?;
        let status = attempt.wait(PROBE_TIMEOUT)?;
        let obstacle = || format!("systemd-nspawn {status}: {}", tail(&attempt.stderr()));
        Ok((!status.success()).then(obstacle))
    }

    /// Boots the machine, and waits until its basic services have started.
    ///
    /// # Errors
    /// When it does not boot in time. The error contains what it printed.
    pub fn boot(self) -> Result<Machine> {
        let cgroups = Cgroups;
        let mut nspawn = self.nspawn("machine", &["--boot"])?;
        let deadline = Instant::now() + BOOT_TIMEOUT;
        let booted = |init: &u32| {
            let target = ["is-active", "--quiet", "default.target"];
            output("nsenter", command_in(*init, "systemctl", target)).is_ok()
        };
        loop {
            if let Some(init) = find_init(nspawn.pid()).filter(booted) {
                return Ok(Machine {
                    nspawn,
                    init,
                    _cgroups: cgroups,
                });
            }
            nspawn.check_alive()?;
            ensure!(
                Instant::now() < deadline,
                "the machine did not boot within {BOOT_TIMEOUT:?}: {}",
                tail(&nspawn.stdout())
            );
            sleep(POLL_INTERVAL);
        }
    }

    fn nspawn(&self, name: &str, last: &[&str]) -> Result<Proc> {
        let root = self.root();
        let added = self.added_to_usr();
        let mut args = vec![
            // A container outlives a systemd-nspawn that is killed, but not the namespace in which
            // that is process 1.
            "--pid".to_owned(),
            "--mount-proc".to_owned(),
            "--fork".to_owned(),
            "--kill-child".to_owned(),
            "env".to_owned(),
            // Only cgroup v2 tells the systemd of a container that a service has no process left.
            "UNIFIED_CGROUP_HIERARCHY=1".to_owned(),
            "systemd-nspawn".to_owned(),
            format!("--directory={}", root.display()),
            format!("--overlay-ro=/usr:{}:/usr", added.display()),
            format!("--machine=virtionet-{}", std::process::id()),
        ];
        // Neither this host's systemd nor its machined need run.
        let others = [
            "--quiet",
            "--register=no",
            "--keep-unit",
            "--private-network",
            "--resolv-conf=off",
            "--timezone=off",
            "--link-journal=no",
            "--console=read-only",
        ];
        args.extend(others.iter().chain(last).map(ToString::to_string));
        Proc::spawn(self.dir, name, None, "unshare", args)
    }

    fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    fn added_to_usr(&self) -> PathBuf {
        self.dir.join("usr")
    }
}

/// A running machine. Dropping this value ends it at once.
#[derive(Debug)]
pub struct Machine {
    nspawn: Proc,
    /// Its process 1, by the number that it has on the host.
    init: u32,
    // After `nspawn`, because fields are dropped in this order.
    _cgroups: Cgroups,
}

impl Machine {
    /// Runs a program of the machine, and returns its standard output.
    ///
    /// # Errors
    /// When it fails. The error contains its standard error.
    pub fn run<'a>(
        &self,
        program: &'a str,
        args: impl IntoIterator<Item = &'a str>,
    ) -> Result<String> {
        output("nsenter", command_in(self.init, program, args))
    }

    /// The arguments of nsenter that run a program of the machine.
    #[must_use]
    pub fn command<'a>(
        &self,
        program: &'a str,
        args: impl IntoIterator<Item = &'a str>,
    ) -> Vec<String> {
        command_in(self.init, program, args)
    }

    /// The path on the host of the machine's file at `path`, which is absolute.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// A property of a unit, as `systemctl show` prints it.
    ///
    /// # Errors
    /// When systemctl fails.
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        let value = self.run("systemctl", ["show", "--value", "--property", name, unit])?;
        Ok(value.trim().to_owned())
    }

    /// The log lines of a unit.
    ///
    /// # Errors
    /// When journalctl fails.
    pub fn log(&self, unit: &str) -> Result<String> {
        self.run("journalctl", ["--no-pager", "--output=cat", "--unit", unit])
    }

    /// Powers the machine off and waits for that.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn power_off(mut self) -> Result<()> {
        self.run("systemctl", ["--no-block", "start", "poweroff.target"])?;
        let status = self.nspawn.wait(POWER_OFF_TIMEOUT)?;
        ensure!(
            status.success(),
            "systemd-nspawn ended with {status}: {}",
            tail(&self.nspawn.stderr())
        );
        Ok(())
    }
}

/// The cgroups that systemd-nspawn makes and leaves behind. Dropping this value removes them.
#[derive(Debug)]
struct Cgroups;

impl Drop for Cgroups {
    fn drop(&mut self) {
        let made = ["payload", "supervisor"];
        let own = own_cgroups();
        let deadline = Instant::now() + CGROUP_TIMEOUT;
        for path in own.iter().flat_map(|own| made.map(|name| own.join(name))) {
            // The processes in it may be ending.
            while path.exists() && !remove_cgroup(&path) && Instant::now() < deadline {
                sleep(POLL_INTERVAL);
            }
        }
    }
}

/// The cgroups of this process in which systemd-nspawn makes others.
fn own_cgroups() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut own = Vec::new();
    for line in text.lines() {
        let (mounts, path) = match line.splitn(3, ':').collect::<Vec<_>>()[..] {
            ["0", "", path] => (&["", "unified"][..], path),
            [_, "name=systemd", path] => (&["systemd"][..], path),
            _ => continue,
        };
        let mounts = mounts
            .iter()
            .map(|mount| Path::new("/sys/fs/cgroup").join(mount));
        own.extend(mounts.map(|mount| mount.join(path.trim_start_matches('/'))));
    }
    own
}

/// Removes a cgroup and those in it. Returns whether that was possible: it is not while a process
/// is in one of them.
fn remove_cgroup(path: &Path) -> bool {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    fs::remove_dir(path).is_ok()
}

/// The arguments of nsenter that run `program` in the namespaces of process `init`.
fn command_in<'a>(
    init: u32,
    program: &'a str,
    args: impl IntoIterator<Item = &'a str>,
) -> Vec<String> {
    let first = ["--target", &init.to_string(), "--all", "--", program].map(str::to_owned);
    let args = args.into_iter().map(str::to_owned);
    first.into_iter().chain(args).collect()
}

/// The process 1 of the container, if it has started already. `unshare` is the process that started
/// systemd-nspawn.
fn find_init(unshare: u32) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let parent = |pid: u32| field(pid, "PPid:")?.parse().ok();
    numbers
        .filter(|pid| is_init(*pid))
        .find(|pid| parent(*pid).and_then(parent) == Some(unshare))
}

/// Whether `pid` has the number 1 in a namespace of its own.
fn is_init(pid: u32) -> bool {
    let numbers = field(pid, "NSpid:").unwrap_or_default();
    numbers.split_whitespace().skip(1).last() == Some("1")
}

/// A field of /proc/PID/status.
fn field(pid: u32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().to_owned())
}
