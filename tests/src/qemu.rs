//! A QEMU machine: how it is put together, started, and looked at.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::accel::Accel;
use crate::guest::Guest;
use crate::netns::Netns;
pub use crate::nic::Nic;
use crate::paths::{RunDir, guest_image};
use crate::process::Proc;
use crate::qemu_version::PROGRAM;
pub use crate::qemu_version::version;
use crate::qmp::Qmp;
use crate::sched;

const START: Duration = Duration::from_secs(20);
/// A trial boot that takes longer than this has failed: KVM needs about 1 s.
const KVM_TRIAL: Duration = Duration::from_secs(20);

/// Further arguments for vCPUs that are plugged in under software emulation. QEMU's ACPI tables have
/// them as disabled processors, which newer kernels (6.12.117 and 7.2 do, 6.1 does not) ignore
/// unless they detect a hypervisor that they know. They do not know QEMU's software emulation, but
/// they detect VMware by the serial number and by QEMU's emulation of VMware's I/O port. This `-cpu`
/// overrides the one before it; this `-machine` adds to the one before it.
const PLUGGABLE_WITHOUT_KVM: [&str; 6] = [
    "-machine",
    "vmport=on",
    "-cpu",
    "qemu64,hypervisor=off",
    "-smbios",
    "type=1,serial=VMware-test",
];

/// How a machine is to be. The guest's image is `ci/guest-image`'s.
#[derive(Clone, Debug)]
pub struct Machine {
    vcpus: u32,
    max_vcpus: Option<u32>,
    memory_mib: u32,
    accel: Accel,
    shared: bool,
    no_reboot: bool,
    paused: bool,
    pinned: Option<Vec<usize>>,
    monitor: Option<PathBuf>,
    netns: Option<String>,
    nics: Vec<Nic>,
    command: Option<Vec<String>>,
    args: Vec<String>,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// One vCPU, 512 MiB of shareable memory, software emulation, no card.
    pub fn new() -> Self {
        Self {
            vcpus: 1,
            max_vcpus: None,
            memory_mib: 512,
            accel: Accel::Tcg,
            shared: true,
            no_reboot: false,
            paused: false,
            pinned: None,
            monitor: None,
            netns: None,
            nics: Vec::new(),
            command: None,
            args: Vec::new(),
        }
    }

    /// The number of vCPUs.
    #[must_use]
    pub fn vcpus(mut self, n: u32) -> Self {
        self.vcpus = n;
        self
    }

    /// The largest number of vCPUs: those beyond [`Machine::vcpus`] are plugged in later.
    #[must_use]
    pub fn max_vcpus(mut self, n: u32) -> Self {
        self.max_vcpus = Some(n);
        self
    }

    /// The guest's memory in MiB.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// The accelerator.
    #[must_use]
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = accel;
        self
    }

    /// Guest memory that QEMU does not share: a vhost-user back-end gets none.
    #[must_use]
    pub fn private_memory(mut self) -> Self {
        self.shared = false;
        self
    }

    /// A reboot in the guest ends QEMU.
    #[must_use]
    pub fn no_reboot(mut self) -> Self {
        self.no_reboot = true;
        self
    }

    /// The vCPUs stand still until [`Qemu::resume`].
    #[must_use]
    pub fn paused(mut self) -> Self {
        self.paused = true;
        self
    }

    /// Each vCPU is pinned ([`Qemu::pin_vcpus`]) before its first instruction:
    /// a back-end reads where they stand when the driver starts its rings.
    #[must_use]
    pub fn pinned(mut self) -> Self {
        self.pinned = Some(Vec::new());
        self
    }

    /// The same, to these CPUs in turn instead of all that this process has.
    #[must_use]
    pub fn pinned_to(mut self, cpus: &[usize]) -> Self {
        self.pinned = Some(cpus.to_vec());
        self
    }

    /// A second QMP monitor on which QEMU listens at `path`, for virtionetd.
    #[must_use]
    pub fn monitor(mut self, path: &Path) -> Self {
        self.monitor = Some(path.to_owned());
        self
    }

    /// QEMU runs in this network namespace.
    #[must_use]
    pub fn netns(mut self, netns: &Netns) -> Self {
        self.netns = Some(netns.name().to_owned());
        self
    }

    /// One more network card.
    #[must_use]
    pub fn nic(mut self, nic: Nic) -> Self {
        self.nics.push(nic);
        self
    }

    /// The machine that the words of this command line make, the program's name
    /// first, instead of one with the vCPUs, memory, accelerator and cards told
    /// here.
    #[must_use]
    pub fn command(mut self, words: &[String]) -> Self {
        self.command = Some(words.get(1..).unwrap_or_default().to_owned());
        self
    }

    /// Further arguments for QEMU, as they are.
    #[must_use]
    pub fn args<'a>(mut self, args: impl IntoIterator<Item = &'a str>) -> Self {
        self.args.extend(args.into_iter().map(str::to_owned));
        self
    }

    /// Starts it; its sockets and logs go to `dir` under `name`. The guest is
    /// not waited for: see [`Guest::wait_boot`].
    ///
    /// # Errors
    /// When QEMU is missing or ends at once: with its words.
    pub fn start(&self, dir: &RunDir, name: &str) -> Result<Qemu> {
        let serial = listen(&dir.join(&format!("{name}.serial")))?;
        let monitor = listen(&dir.join(&format!("{name}.qmp")))?;
        let started_at = Instant::now();
        let args = self.command_line(dir, name)?;
        let mut proc = Proc::spawn(dir, name, self.netns.as_deref(), PROGRAM, &args)?;
        let serial = accept(&serial, &mut proc)?;
        let monitor = accept(&monitor, &mut proc)?;
        let qemu = Qemu {
            guest: Guest::new(serial)?,
            qmp: Mutex::new(Qmp::new(monitor)),
            proc,
            started_at,
        };
        if let Some(cpus) = &self.pinned {
            match cpus.is_empty() {
                true => qemu.pin_vcpus()?,
                false => qemu.pin_vcpus_to(cpus)?,
            };
            if !self.paused {
                qemu.resume()?;
            }
        }
        Ok(qemu)
    }

    /// Starts it and waits until the guest is up; returns the time that took.
    ///
    /// # Errors
    /// As [`Machine::booted`].
    pub fn boot(&self, dir: &RunDir, name: &str, timeout: Duration) -> Result<(Qemu, Duration)> {
        self.booted(self.start(dir, name)?, dir, name, timeout)
    }

    /// Waits until `qemu`, which this has started under `name`, is up: several
    /// machines may boot at once. Returns the time that took.
    ///
    /// QEMU 10.0.2 under software emulation dies now and then of an assertion
    /// of its own while several vCPUs set up PCI (`msix_table_mmio_write`), with
    /// any card. Such a death by signal is said on stderr, and the machine is
    /// started anew, twice at most.
    ///
    /// # Errors
    /// When it is not up within `timeout`: with QEMU's words and the console's.
    pub fn booted(
        &self,
        mut qemu: Qemu,
        dir: &RunDir,
        name: &str,
        timeout: Duration,
    ) -> Result<(Qemu, Duration)> {
        let mut again = 2;
        loop {
            let error = match qemu.boot(timeout) {
                Ok(took) => return Ok((qemu, took)),
                Err(error) => error,
            };
            let status = qemu.proc.try_wait()?;
            let died = status.is_some_and(|s| s.signal().is_some());
            if !died || again == 0 || self.accel == Accel::Kvm {
                return Err(error);
            }
            again -= 1;
            eprintln!("QEMU itself died in the guest's boot and is started anew: {error:#}");
            qemu = self.start(dir, name)?;
        }
    }

    fn command_line(&self, dir: &RunDir, name: &str) -> Result<Vec<String>> {
        let (kernel, initrd) = guest_image()?;
        let mut args = match &self.command {
            Some(words) => words.clone(),
            None => self.hardware(name)?,
        };
        let harness = [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-kernel",
            &kernel.display().to_string(),
            "-initrd",
            &initrd.display().to_string(),
            "-append",
            "console=ttyS0 quiet panic=-1",
            "-chardev",
            &socket("serial", &dir.join(&format!("{name}.serial"))),
            "-serial",
            "chardev:serial",
            "-chardev",
            &socket("qmp", &dir.join(&format!("{name}.qmp"))),
            "-mon",
            "chardev=qmp,mode=control",
        ];
        args.extend(harness.map(str::to_owned));
        if let Some(path) = &self.monitor {
            let value = format!("unix:{},server=on,wait=off", path.display());
            args.extend(["-qmp".into(), value]);
        }
        let paused = self.paused || self.pinned.is_some();
        for (wanted, flag) in [(self.no_reboot, "-no-reboot"), (paused, "-S")] {
            args.extend(wanted.then(|| flag.to_owned()));
        }
        args.extend(self.args.iter().cloned());
        Ok(args)
    }

    /// Memory, vCPUs and cards.
    fn hardware(&self, name: &str) -> Result<Vec<String>> {
        let (accel, cpu) = match self.accel.resolve()? {
            Accel::Kvm => ("kvm", "host"),
            _ => ("tcg,thread=multi", "qemu64"),
        };
        let memory = self.memory_mib;
        let smp = match self.max_vcpus {
            Some(max) => format!("{},maxcpus={max}", self.vcpus),
            None => self.vcpus.to_string(),
        };
        let ram = if self.shared {
            format!("memory-backend-memfd,id=ram,size={memory}M,share=on")
        } else {
            format!("memory-backend-ram,id=ram,size={memory}M,share=off")
        };
        let mut args: Vec<String> = [
            "-name",
            &format!("{name},debug-threads=on"),
            "-machine",
            "q35,memory-backend=ram",
            "-object",
            &ram,
            "-m",
            &format!("{memory}M"),
            "-accel",
            accel,
            "-cpu",
            cpu,
            "-smp",
            &smp,
        ]
        .map(str::to_owned)
        .into();
        if self.max_vcpus.is_some() && accel != "kvm" {
            args.extend(PLUGGABLE_WITHOUT_KVM.map(str::to_owned));
        }
        for (n, nic) in self.nics.iter().enumerate() {
            args.extend(nic.args(n)?);
        }
        Ok(args)
    }
}

/// A running machine; dropping it kills QEMU.
#[derive(Debug)]
pub struct Qemu {
    guest: Guest,
    qmp: Mutex<Qmp>,
    proc: Proc,
    started_at: Instant,
}

impl Qemu {
    /// The guest's shell.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The process.
    pub fn proc(&mut self) -> &mut Proc {
        &mut self.proc
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.proc.pid()
    }

    /// Waits until the guest is up; returns the time since QEMU was started.
    ///
    /// # Errors
    /// When it is not within `timeout`: with QEMU's words and the console's.
    pub fn boot(&mut self, timeout: Duration) -> Result<Duration> {
        let up = self.guest.wait_boot(timeout);
        if up.is_err() {
            self.proc.check_alive()?;
        }
        up.with_context(|| format!("QEMU's stderr: {}", self.proc.stderr().trim()))?;
        Ok(self.started_at.elapsed())
    }

    /// Runs a QMP command.
    ///
    /// # Errors
    /// When QEMU answers with an error, or not at all.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        let mut qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner);
        qmp.execute(command, arguments)
            .with_context(|| format!("QEMU's stderr: {}", self.proc.stderr().trim()))
    }

    /// Waits for a QMP event.
    ///
    /// # Errors
    /// When none comes within `timeout`.
    pub fn wait_event(&self, name: &str, timeout: Duration) -> Result<Value> {
        let mut qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner);
        qmp.wait_event(name, timeout)
    }

    /// Lets the vCPUs of a paused machine run.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn resume(&self) -> Result<()> {
        self.qmp("cont", &Value::Null).map(drop)
    }

    /// The thread ids of the vCPUs, by index.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn vcpu_threads(&self) -> Result<Vec<i32>> {
        let cpus = self.qmp("query-cpus-fast", &json!({}))?;
        let cpus = cpus.as_array().context("query-cpus-fast gave no list")?;
        let mut threads = Vec::new();
        for cpu in cpus {
            let index = cpu["cpu-index"].as_i64().context("a vCPU without index")?;
            let tid = cpu["thread-id"].as_i64().context("a vCPU without thread")?;
            threads.push((index, i32::try_from(tid)?));
        }
        threads.sort_unstable();
        Ok(threads.into_iter().map(|(_, tid)| tid).collect())
    }

    /// Pins vCPU i to the i-th of this process's CPUs, round and round, as
    /// libvirt's vcpupin would; returns the CPU of each vCPU.
    ///
    /// # Errors
    /// When QEMU does not answer or a thread cannot be pinned.
    pub fn pin_vcpus(&self) -> Result<Vec<usize>> {
        self.pin_vcpus_to(&sched::allowed_cpus()?)
    }

    /// The same, to `cpus`.
    ///
    /// # Errors
    /// When QEMU does not answer or a thread cannot be pinned.
    pub fn pin_vcpus_to(&self, cpus: &[usize]) -> Result<Vec<usize>> {
        let threads = self.vcpu_threads()?;
        threads
            .into_iter()
            .zip(cpus.iter().cycle())
            .map(|(tid, cpu)| sched::pin(tid, *cpu).map(|()| *cpu))
            .collect()
    }
}

impl Accel {
    /// [`Accel::Kvm`] or [`Accel::Tcg`]. `Auto` boots the guest image once under KVM to find out, and
    /// remembers the result in `ci/cache` until the host reboots.
    ///
    /// # Errors
    /// When QEMU's version cannot be read.
    pub fn resolve(self) -> Result<Self> {
        self.resolve_with(kvm_boots)
    }
}

fn kvm_boots() -> bool {
    let trial = || -> Result<()> {
        let dir = RunDir::new()?;
        let machine = Machine::new().accel(Accel::Kvm).start(&dir, "trial")?;
        machine.guest().wait_boot(KVM_TRIAL)
    };
    trial().is_ok()
}

fn socket(id: &str, path: &Path) -> String {
    format!("socket,id={id},path={}", path.display())
}

/// We listen and QEMU connects, so that not a byte of its boot is missed.
fn listen(path: &Path) -> Result<UnixListener> {
    // A machine of this name that is gone may have left its own.
    _ = fs::remove_file(path);
    let listener = UnixListener::bind(path)
        .with_context(|| format!("{} cannot be listened on", path.display()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn accept(listener: &UnixListener, proc: &mut Proc) -> Result<UnixStream> {
    let until = Instant::now() + START;
    loop {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false)?;
            return Ok(stream);
        }
        proc.check_alive()?;
        anyhow::ensure!(
            Instant::now() < until,
            "QEMU did not connect in {START:?}; its stderr: {}",
            proc.stderr().trim()
        );
        sleep(Duration::from_millis(5));
    }
}
