//! QEMU machines: configuring, starting and controlling them.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::accel::Accel;
use crate::guest::Guest;
use crate::hardware::{INTEL_IOMMU, PLUGGABLE_WITHOUT_KVM, SLOT};
use crate::netns::Netns;
pub use crate::nic::Nic;
use crate::paths::{RunDir, guest_image};
use crate::process::Proc;
use crate::qemu_socket::{accept, listen, socket};
use crate::qemu_version::PROGRAM;
pub use crate::qemu_version::version;
use crate::qmp::Qmp;
use crate::sched;

/// The time that a trial boot under KVM may take. A working KVM needs about 1 s.
const KVM_TRIAL_TIMEOUT: Duration = Duration::from_secs(20);

/// The configuration of a machine, which boots the image that `ci/guest-image` has built.
#[derive(Clone, Debug)]
pub struct Machine {
    vcpus: u32,
    max_vcpus: Option<u32>,
    memory_mib: u32,
    accel: Accel,
    is_memory_shared: bool,
    is_reboot_disabled: bool,
    is_paused: bool,
    /// The CPUs for the vCPUs; if empty, all that this process may use.
    pinned_cpus: Option<Vec<usize>>,
    monitor: Option<PathBuf>,
    netns: Option<String>,
    nics: Vec<Nic>,
    command: Option<Vec<String>>,
    args: Vec<String>,
    /// Arguments of the guest's kernel for its IOMMU, if it has one.
    iommu: Option<String>,
    has_slot: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// Creates a machine with one vCPU, 512 MiB of shared memory, TCG and no network device.
    pub fn new() -> Self {
        Self {
            vcpus: 1,
            max_vcpus: None,
            memory_mib: 512,
            accel: Accel::Tcg,
            is_memory_shared: true,
            is_reboot_disabled: false,
            is_paused: false,
            pinned_cpus: None,
            monitor: None,
            netns: None,
            nics: Vec::new(),
            command: None,
            args: Vec::new(),
            iommu: None,
            has_slot: false,
        }
    }

    /// Sets the number of vCPUs.
    #[must_use]
    pub fn vcpus(mut self, n: u32) -> Self {
        self.vcpus = n;
        self
    }

    /// Sets the maximum number of vCPUs. Those above [`Machine::vcpus`] can be plugged in later.
    #[must_use]
    pub fn max_vcpus(mut self, n: u32) -> Self {
        self.max_vcpus = Some(n);
        self
    }

    /// Sets the guest's memory in MiB.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Sets the accelerator.
    #[must_use]
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = accel;
        self
    }

    /// Uses private guest memory, which a vhost-user back-end cannot map.
    #[must_use]
    pub fn private_memory(mut self) -> Self {
        self.is_memory_shared = false;
        self
    }

    /// Makes QEMU exit when the guest reboots.
    #[must_use]
    pub fn no_reboot(mut self) -> Self {
        self.is_reboot_disabled = true;
        self
    }

    /// Starts the machine with its vCPUs stopped until [`Qemu::resume`].
    #[must_use]
    pub fn paused(mut self) -> Self {
        self.is_paused = true;
        self
    }

    /// Pins each vCPU as [`Qemu::pin_vcpus`] does before the guest boots, because a back-end reads
    /// the affinity of the vCPUs when the driver starts its vrings.
    #[must_use]
    pub fn pinned(mut self) -> Self {
        self.pinned_cpus = Some(Vec::new());
        self
    }

    /// Does the same as [`Machine::pinned`], but uses only `cpus`.
    #[must_use]
    pub fn pinned_to(mut self, cpus: &[usize]) -> Self {
        self.pinned_cpus = Some(cpus.to_vec());
        self
    }

    /// Gives the guest an emulated Intel IOMMU, which translates for all devices whose property
    /// `iommu_platform` is on, and adds `kernel_args` to the arguments of its kernel.
    #[must_use]
    pub fn intel_iommu(mut self, kernel_args: &str) -> Self {
        self.iommu = Some(kernel_args.to_owned());
        self
    }

    /// Gives the machine a slot for a device with the property `bus=hot`, which can then be plugged
    /// out and in.
    #[must_use]
    pub fn slot(mut self) -> Self {
        self.has_slot = true;
        self
    }

    /// Adds a second QMP monitor, which listens on `path`, for virtionetd.
    #[must_use]
    pub fn monitor(mut self, path: &Path) -> Self {
        self.monitor = Some(path.to_owned());
        self
    }

    /// Runs QEMU in this network namespace.
    #[must_use]
    pub fn netns(mut self, netns: &Netns) -> Self {
        self.netns = Some(netns.name().to_owned());
        self
    }

    /// Adds a network device.
    #[must_use]
    pub fn nic(mut self, nic: Nic) -> Self {
        self.nics.push(nic);
        self
    }

    /// Uses the arguments of this command line, whose first word is the program's name. They
    /// replace the configured vCPUs, memory, accelerator and network devices.
    #[must_use]
    pub fn command(mut self, words: &[String]) -> Self {
        self.command = Some(words.get(1..).unwrap_or_default().to_owned());
        self
    }

    /// Adds arguments for QEMU.
    #[must_use]
    pub fn args<'a>(mut self, args: impl IntoIterator<Item = &'a str>) -> Self {
        self.args.extend(args.into_iter().map(str::to_owned));
        self
    }

    /// Starts the machine without waiting for the guest (see [`Guest::wait_boot`]). Its sockets and
    /// logs are files in `dir` whose names begin with `name`.
    ///
    /// # Errors
    /// When QEMU is not installed, or exits. The error contains its standard error.
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
        if let Some(cpus) = &self.pinned_cpus {
            match cpus.is_empty() {
                true => qemu.pin_vcpus()?,
                false => qemu.pin_vcpus_to(cpus)?,
            };
            if !self.is_paused {
                qemu.resume()?;
            }
        }
        Ok(qemu)
    }

    /// Starts the machine and waits until the guest has booted. Returns the time that this took.
    ///
    /// # Errors
    /// The same as those of [`Machine::wait_boot_or_restart`].
    pub fn boot(&self, dir: &RunDir, name: &str, timeout: Duration) -> Result<(Qemu, Duration)> {
        self.wait_boot_or_restart(self.start(dir, name)?, dir, name, timeout)
    }

    /// Waits until the guest of `qemu` has booted, which [`Machine::start`] has started as `name`.
    /// This allows several machines to boot at the same time. Returns the time from QEMU's start.
    ///
    /// Under software emulation, an assertion in QEMU 10.0.2 sometimes fails while several vCPUs
    /// set up PCI (`msix_table_mmio_write`), with any network device. If a signal ends QEMU, this
    /// function prints a message and starts the machine again, at most twice.
    ///
    /// # Errors
    /// When the guest does not boot within `timeout`. The error contains QEMU's standard error and
    /// the end of the console.
    pub fn wait_boot_or_restart(
        &self,
        mut qemu: Qemu,
        dir: &RunDir,
        name: &str,
        timeout: Duration,
    ) -> Result<(Qemu, Duration)> {
        let mut restarts_left = 2;
        loop {
            let error = match qemu.boot(timeout) {
                Ok(boot_time) => return Ok((qemu, boot_time)),
                Err(error) => error,
            };
            let status = qemu.proc.try_wait()?;
            let has_crashed = status.is_some_and(|s| s.signal().is_some());
            if !has_crashed || restarts_left == 0 || self.accel == Accel::Kvm {
                return Err(error);
            }
            restarts_left -= 1;
            eprintln!("QEMU crashed while the guest booted and is started again: {error:#}");
            qemu = self.start(dir, name)?;
        }
    }

    fn command_line(&self, dir: &RunDir, name: &str) -> Result<Vec<String>> {
        let (kernel, initrd) = guest_image()?;
        let mut args = match &self.command {
            Some(words) => words.clone(),
            None => self.hardware_args(name)?,
        };
        let kernel_args = self.iommu.as_deref().unwrap_or_default();
        let common = [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-kernel",
            &kernel.display().to_string(),
            "-initrd",
            &initrd.display().to_string(),
            "-append",
            &format!("console=ttyS0 quiet panic=-1 {kernel_args}"),
            "-chardev",
            &socket("serial", &dir.join(&format!("{name}.serial"))),
            "-serial",
            "chardev:serial",
            "-chardev",
            &socket("qmp", &dir.join(&format!("{name}.qmp"))),
            "-mon",
            "chardev=qmp,mode=control",
        ];
        args.extend(common.map(str::to_owned));
        if let Some(path) = &self.monitor {
            let value = format!("unix:{},server=on,wait=off", path.display());
            args.extend(["-qmp".into(), value]);
        }
        let is_paused = self.is_paused || self.pinned_cpus.is_some();
        for (is_set, flag) in [(self.is_reboot_disabled, "-no-reboot"), (is_paused, "-S")] {
            args.extend(is_set.then(|| flag.to_owned()));
        }
        args.extend(self.args.iter().cloned());
        Ok(args)
    }

    /// Returns the arguments for the memory, the vCPUs and the network devices.
    fn hardware_args(&self, name: &str) -> Result<Vec<String>> {
        let (accel, cpu) = match self.accel.resolve()? {
            Accel::Kvm => ("kvm", "host"),
            _ => ("tcg,thread=multi", "qemu64"),
        };
        let memory = self.memory_mib;
        let smp = match self.max_vcpus {
            Some(max) => format!("{},maxcpus={max}", self.vcpus),
            None => self.vcpus.to_string(),
        };
        let ram = if self.is_memory_shared {
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
        if self.iommu.is_some() {
            args.extend(INTEL_IOMMU.map(str::to_owned));
        }
        if self.has_slot {
            args.extend(SLOT.map(str::to_owned));
        }
        for (n, nic) in self.nics.iter().enumerate() {
            args.extend(nic.args(n)?);
        }
        Ok(args)
    }
}

/// A running machine. Dropping this value kills QEMU.
#[derive(Debug)]
pub struct Qemu {
    guest: Guest,
    qmp: Mutex<Qmp>,
    proc: Proc,
    started_at: Instant,
}

impl Qemu {
    /// The shell of the guest.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The QEMU process.
    pub fn proc(&mut self) -> &mut Proc {
        &mut self.proc
    }

    /// The process id of QEMU.
    pub fn pid(&self) -> u32 {
        self.proc.pid()
    }

    /// Waits until the guest has booted. Returns the time from the start of QEMU.
    ///
    /// # Errors
    /// When the guest does not boot within `timeout`. The error contains QEMU's standard error and
    /// the end of the console.
    pub fn boot(&mut self, timeout: Duration) -> Result<Duration> {
        let booted = self.guest.wait_boot(timeout);
        if booted.is_err() {
            self.proc.check_alive()?;
        }
        booted.with_context(|| format!("QEMU's stderr: {}", self.proc.stderr().trim()))?;
        Ok(self.started_at.elapsed())
    }

    /// Runs a QMP command and returns its result.
    ///
    /// # Errors
    /// When QEMU returns an error or does not answer.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        let mut qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner);
        qmp.execute(command, arguments)
            .with_context(|| format!("QEMU's stderr: {}", self.proc.stderr().trim()))
    }

    /// Waits for the QMP event `name` and returns its data.
    ///
    /// # Errors
    /// When the event does not arrive within `timeout`.
    pub fn wait_event(&self, name: &str, timeout: Duration) -> Result<Value> {
        let mut qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner);
        qmp.wait_event(name, timeout)
    }

    /// Starts the vCPUs of a paused machine.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn resume(&self) -> Result<()> {
        self.qmp("cont", &Value::Null).map(drop)
    }

    /// Returns the thread ids of the vCPUs, in the order of the vCPUs' indices.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn vcpu_threads(&self) -> Result<Vec<i32>> {
        let cpus = self.qmp("query-cpus-fast", &json!({}))?;
        let cpus = cpus.as_array().context("query-cpus-fast sent no list")?;
        let mut threads = Vec::new();
        for cpu in cpus {
            let index = cpu["cpu-index"].as_i64().context("a vCPU has no index")?;
            let tid = cpu["thread-id"].as_i64().context("a vCPU has no thread")?;
            threads.push((index, i32::try_from(tid)?));
        }
        threads.sort_unstable();
        Ok(threads.into_iter().map(|(_, tid)| tid).collect())
    }

    /// Pins vCPU i to the i-th CPU that this process may use, modulo the number of these CPUs, as
    /// libvirt's vcpupin does. Returns the CPU of each vCPU.
    ///
    /// # Errors
    /// When QEMU does not answer or a thread cannot be pinned.
    pub fn pin_vcpus(&self) -> Result<Vec<usize>> {
        self.pin_vcpus_to(&sched::allowed_cpus()?)
    }

    /// Does the same as [`Qemu::pin_vcpus`], but uses only `cpus`.
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
    /// Returns [`Accel::Kvm`] or [`Accel::Tcg`]. For `Auto`, boots the guest image under KVM once,
    /// and stores the result in `ci/cache` until the host reboots or QEMU's version changes.
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
        machine.guest().wait_boot(KVM_TRIAL_TIMEOUT)
    };
    trial().is_ok()
}
