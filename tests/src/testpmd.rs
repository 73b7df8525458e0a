//! DPDK's testpmd. As a front-end, it drives virtio-net devices (virtio-user); as a back-end, it
//! provides them (the vhost PMD). It forwards frames on one CPU and reads commands from its
//! standard input.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::paths::RunDir;
use crate::process::{Proc, output};

mod stats;

pub use stats::{ForwardStats, PortStats};

const PROGRAM: &str = "dpdk-testpmd";
const PROMPT: &str = "testpmd> ";
const POLL_INTERVAL: Duration = Duration::from_millis(2);
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);
/// The size of a huge page in MiB.
const PAGE_MIB: u32 = 2;

/// Returns the version of the installed DPDK, such as `22.11.11`.
///
/// # Errors
/// When DPDK is not installed, or prints no version.
pub fn version() -> Result<String> {
    check_installed()?;
    let dir = RunDir::new()?;
    let command = format!("{PROGRAM} --in-memory -v -h 2>&1");
    let runtime = format!("RUNTIME_DIRECTORY={}", dir.join("").display());
    let text = output("env", [&runtime, "sh", "-c", &command])?;
    text.split_once("'DPDK ")
        .and_then(|(_, rest)| rest.split_once('\''))
        .map(|(version, _)| version.to_owned())
        .with_context(|| format!("{PROGRAM} does not print its version: {text}"))
}

fn check_installed() -> Result<()> {
    let command = format!("command -v {PROGRAM}");
    output("sh", ["-c", &command]).map(drop).with_context(|| {
        format!("{PROGRAM} is not installed: run ci/setup, which installs dpdk-dev")
    })
}

/// A network device that virtio-user drives: the options of its `--vdev`.
#[derive(Clone, Debug)]
pub struct VirtioUser {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// The MAC address.
    pub mac: String,
    /// The number of queue pairs.
    pub queues: u16,
    /// The number of descriptors of each vring.
    pub queue_size: u16,
    /// Whether it uses packed virtqueues instead of split ones.
    pub packed: bool,
    /// Whether it uses mergeable RX buffers.
    pub mergeable: bool,
    /// Whether it negotiates VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// Whether it uses the vectorized data paths, if the other options allow them.
    pub vectorized: bool,
    /// Whether it listens on the socket, so that the back-end connects.
    pub server: bool,
}

impl VirtioUser {
    /// Creates a device that connects to `socket`. It has one queue pair, split virtqueues of 256
    /// descriptors, and mergeable buffers.
    #[must_use]
    pub fn new(socket: &Path, mac: &str) -> Self {
        Self {
            socket: socket.to_owned(),
            mac: mac.to_owned(),
            queues: 1,
            queue_size: 256,
            packed: false,
            mergeable: true,
            in_order: false,
            vectorized: false,
            server: false,
        }
    }

    fn vdev(&self, number: usize) -> String {
        let flag = u8::from;
        format!(
            "net_virtio_user{number},path={},mac={},queues={},queue_size={},packed_vq={},mrg_rxbuf={},in_order={},vectorized={},server={}",
            self.socket.display(),
            self.mac,
            self.queues,
            self.queue_size,
            flag(self.packed),
            flag(self.mergeable),
            flag(self.in_order),
            flag(self.vectorized),
            flag(self.server)
        )
    }
}

/// The configuration of a testpmd.
#[derive(Clone, Debug)]
pub struct TestpmdConfig {
    vdevs: Vec<String>,
    /// The arguments of DPDK's environment abstraction layer (EAL).
    eal_args: Vec<String>,
    /// The arguments of testpmd itself.
    args: Vec<String>,
    /// The CPU of the thread that reads commands.
    main_cpu: usize,
    /// The CPU of the thread that forwards frames.
    cpu: usize,
    queues: u16,
    memory_mib: u32,
    mbufs: u32,
}

impl TestpmdConfig {
    /// Configures a front-end that drives `devices` on `cpu`. All devices must have as many queue
    /// pairs as the first one.
    #[must_use]
    pub fn front_end(devices: &[VirtioUser], cpu: usize) -> Self {
        let vdevs = devices.iter().enumerate().map(|(n, device)| device.vdev(n));
        let queues = devices.first().map_or(1, |device| device.queues);
        let mut config = Self::new(vdevs.collect(), queues, cpu);
        // A back-end accepts only a few memory regions, so all segments share one file. The
        // vectorized path for packed virtqueues requires AVX-512.
        config.eal_args.push("--single-file-segments".to_owned());
        config
            .eal_args
            .push("--force-max-simd-bitwidth=512".to_owned());
        config
    }

    /// Configures a back-end on `cpu` that listens on `sockets` and has `queues` queue pairs on
    /// each.
    #[must_use]
    pub fn back_end(sockets: &[PathBuf], queues: u16, cpu: usize) -> Self {
        let vdev = |(n, socket): (usize, &PathBuf)| {
            format!("net_vhost{n},iface={},queues={queues}", socket.display())
        };
        Self::new(sockets.iter().enumerate().map(vdev).collect(), queues, cpu)
    }

    fn new(vdevs: Vec<String>, queues: u16, cpu: usize) -> Self {
        Self {
            vdevs,
            eal_args: Vec::new(),
            args: Vec::new(),
            main_cpu: cpu,
            cpu,
            queues,
            memory_mib: 256,
            mbufs: 65_536,
        }
    }

    /// Sets the CPU on which commands are read, if it differs from the one that forwards.
    #[must_use]
    pub fn main_cpu(mut self, cpu: usize) -> Self {
        self.main_cpu = cpu;
        self
    }

    /// Sets the memory in MiB, and the number of packet buffers in it (about 2.4 KiB each).
    #[must_use]
    pub fn memory(mut self, mib: u32, mbufs: u32) -> Self {
        self.memory_mib = mib;
        self.mbufs = mbufs;
        self
    }

    /// Adds an argument of testpmd itself, such as `--txonly-multi-flow`.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Returns the number of huge pages of 2 MiB that the testpmd needs.
    #[must_use]
    pub fn pages(&self) -> u64 {
        u64::from(self.memory_mib.div_ceil(PAGE_MIB))
    }

    /// Starts the testpmd and waits until its ports are configured and it accepts commands. It does
    /// not forward frames yet. A front-end whose devices listen waits for its back-ends.
    ///
    /// # Errors
    /// When DPDK is not installed, or testpmd exits. The error contains its standard error.
    pub fn start(&self, dir: &RunDir, name: &str) -> Result<Testpmd> {
        let mut testpmd = self.spawn(dir, name)?;
        testpmd.read_reply(0)?;
        Ok(testpmd)
    }

    /// Starts the testpmd without waiting. Call [`Testpmd::wait_ready`] when its back-ends run.
    ///
    /// # Errors
    /// When testpmd cannot be started.
    pub fn spawn(&self, dir: &RunDir, name: &str) -> Result<Testpmd> {
        check_installed()?;
        let commands = dir.join(&format!("{name}.commands"));
        output("mkfifo", [&commands])?;
        // A FIFO that is open for reading and writing does not block when it is opened, and its
        // reader never sees an end of file.
        let stdin = OpenOptions::new().read(true).write(true).open(&commands)?;
        // stdbuf makes testpmd write its output line by line. RUNTIME_DIRECTORY puts the files that
        // testpmd creates into the run's directory.
        let mut words: Vec<String> = ["-oL", "sh", "-c", "exec \"$@\" <\"$0\""]
            .map(str::to_owned)
            .into();
        words.push(commands.display().to_string());
        words.push("env".to_owned());
        words.push(format!("RUNTIME_DIRECTORY={}", dir.join("").display()));
        words.push(PROGRAM.to_owned());
        words.extend(self.words(name));
        let proc = Proc::spawn(dir, name, None, "stdbuf", words)?;
        Ok(Testpmd {
            proc,
            name: name.to_owned(),
            stdin,
        })
    }

    fn words(&self, name: &str) -> Vec<String> {
        let mut words = vec![
            "--lcores".to_owned(),
            format!("0@{},1@{}", self.main_cpu, self.cpu),
            "-n1".to_owned(),
            "--iova-mode=va".to_owned(),
            "--in-memory".to_owned(),
            "--no-pci".to_owned(),
            "--no-telemetry".to_owned(),
            format!("--file-prefix={name}"),
            "-m".to_owned(),
            self.memory_mib.to_string(),
        ];
        words.extend(self.eal_args.iter().cloned());
        for vdev in &self.vdevs {
            words.extend(["--vdev".to_owned(), vdev.clone()]);
        }
        words.extend(["--", "-i", "--nb-cores=1", "--record-core-cycles"].map(str::to_owned));
        words.push(format!("--rxq={}", self.queues));
        words.push(format!("--txq={}", self.queues));
        words.push(format!("--total-num-mbufs={}", self.mbufs));
        words.extend(self.args.iter().cloned());
        words
    }
}

/// A running testpmd. Dropping this value kills it.
#[derive(Debug)]
pub struct Testpmd {
    proc: Proc,
    name: String,
    stdin: File,
}

impl Testpmd {
    /// The process.
    pub fn proc(&mut self) -> &mut Proc {
        &mut self.proc
    }

    /// Waits until a testpmd that was started with [`TestpmdConfig::spawn`] accepts commands.
    ///
    /// # Errors
    /// When testpmd exits, or does not accept commands within 20 s.
    pub fn wait_ready(&mut self) -> Result<()> {
        self.read_reply(0).map(drop)
    }

    /// Runs one command and returns its output.
    ///
    /// # Errors
    /// When testpmd does not answer within 20 s, or rejects the command.
    pub fn command(&mut self, command: &str) -> Result<String> {
        let from = self.proc.stdout().len();
        writeln!(self.stdin, "{command}")
            .with_context(|| format!("'{command}' cannot be sent to {}", self.name))?;
        let reply = self
            .read_reply(from)
            .with_context(|| format!("the command '{command}' has no reply"))?;
        for message in ["Bad arguments", "Command not found", "Ambiguous command"] {
            ensure!(
                !reply.contains(message),
                "{} rejects '{command}': {}",
                self.name,
                reply.trim()
            );
        }
        Ok(reply)
    }

    /// Starts to forward frames. Sends `bursts` bursts of 32 generated frames on each queue first.
    ///
    /// # Errors
    /// The same as those of [`Testpmd::command`].
    pub fn forward(&mut self, bursts: u32) -> Result<()> {
        match bursts {
            0 => self.command("start"),
            n => self.command(&format!("start tx_first {n}")),
        }
        .map(drop)
    }

    /// Returns the counters of each port since they were cleared, and the rates since the previous
    /// call.
    ///
    /// # Errors
    /// When the reply does not have the format of DPDK 22.11.
    pub fn port_stats(&mut self) -> Result<Vec<PortStats>> {
        let text = self.command("show port stats all")?;
        stats::parse_ports(&text)
    }

    /// Returns the counters of all ports together since forwarding was started.
    ///
    /// # Errors
    /// When the reply does not have the format of DPDK 22.11, or forwarding is not started.
    pub fn forwarded(&mut self) -> Result<ForwardStats> {
        let text = self.command("show fwd stats all")?;
        stats::parse_forwarded(&text)
    }

    /// Stops the process with SIGSTOP if `should_halt` is true, or continues it with SIGCONT. A
    /// halted process keeps its resources and uses no CPU time.
    ///
    /// # Errors
    /// When the process has exited.
    pub fn halt(&mut self, should_halt: bool) -> Result<()> {
        let signal = match should_halt {
            true => Signal::SIGSTOP,
            false => Signal::SIGCONT,
        };
        self.proc.signal(signal)
    }

    /// Makes testpmd close its ports, which disconnects front-end and back-end, and waits for its
    /// exit.
    ///
    /// # Errors
    /// When testpmd does not exit within 10 s, or fails.
    pub fn quit(mut self) -> Result<()> {
        writeln!(self.stdin, "quit")?;
        let status = self.proc.wait(QUIT_TIMEOUT)?;
        ensure!(status.success(), "{} failed ({status})", self.name);
        Ok(())
    }

    /// Waits for the next prompt, and returns the output between byte `from` and the prompt.
    fn read_reply(&mut self, from: usize) -> Result<String> {
        let until = Instant::now() + REPLY_TIMEOUT;
        loop {
            let text = self.proc.stdout();
            let new = text.get(from..).unwrap_or_default();
            if let Some((reply, _)) = new.rsplit_once(PROMPT) {
                return Ok(reply.to_owned());
            }
            self.proc.check_alive()?;
            if Instant::now() >= until {
                let stderr = self.proc.stderr();
                bail!(
                    "{} did not answer within {REPLY_TIMEOUT:?}; its stderr: {}",
                    self.name,
                    crate::process::tail(&stderr)
                );
            }
            sleep(POLL_INTERVAL);
        }
    }
}
