//! DPDK's testpmd: as a front-end it drives virtio-net cards (virtio-user), as a back-end it is
//! the card (the vhost PMD). It forwards frames on one CPU and takes commands on its standard
//! input.

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
const POLL: Duration = Duration::from_millis(2);
const ANSWER: Duration = Duration::from_secs(20);
const END: Duration = Duration::from_secs(10);
/// A huge page.
const PAGE_MIB: u32 = 2;

/// The version of the installed DPDK, such as `22.11.11`.
///
/// # Errors
/// When there is none.
pub fn version() -> Result<String> {
    installed()?;
    let dir = RunDir::new()?;
    let ask = format!("{PROGRAM} --in-memory -v -h 2>&1");
    let runtime = format!("RUNTIME_DIRECTORY={}", dir.join("").display());
    let text = output("env", [&runtime, "sh", "-c", &ask])?;
    text.split_once("'DPDK ")
        .and_then(|(_, rest)| rest.split_once('\''))
        .map(|(version, _)| version.to_owned())
        .with_context(|| format!("{PROGRAM} does not tell its version: {text}"))
}

fn installed() -> Result<()> {
    let look = format!("command -v {PROGRAM}");
    output("sh", ["-c", &look])
        .map(drop)
        .with_context(|| format!("there is no {PROGRAM}: run ci/setup, which installs dpdk-dev"))
}

/// A card driven by virtio-user, as words of its `--vdev`.
#[derive(Clone, Debug)]
pub struct VirtioUser {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// The card's MAC address.
    pub mac: String,
    /// Queue pairs.
    pub queues: u16,
    /// Descriptors a ring.
    pub queue_size: u16,
    /// Packed rings instead of split ones.
    pub packed: bool,
    /// Mergeable RX buffers.
    pub mergeable: bool,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// The vectorized paths, where the other words allow them.
    pub vectorized: bool,
    /// It listens on the socket and the back-end connects.
    pub server: bool,
}

impl VirtioUser {
    /// A card with one pair of split rings of 256 and mergeable buffers that connects.
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
        let on = u8::from;
        format!(
            "net_virtio_user{number},path={},mac={},queues={},queue_size={},packed_vq={},mrg_rxbuf={},in_order={},vectorized={},server={}",
            self.socket.display(),
            self.mac,
            self.queues,
            self.queue_size,
            on(self.packed),
            on(self.mergeable),
            on(self.in_order),
            on(self.vectorized),
            on(self.server)
        )
    }
}

/// How a testpmd is to be started.
#[derive(Clone, Debug)]
pub struct TestpmdConfig {
    vdevs: Vec<String>,
    /// EAL's words.
    eal: Vec<String>,
    /// testpmd's own words.
    args: Vec<String>,
    /// Where commands are read.
    main_cpu: usize,
    /// Where frames are forwarded.
    cpu: usize,
    queues: u16,
    memory_mib: u32,
    mbufs: u32,
}

impl TestpmdConfig {
    /// A front-end that drives `cards`, all with as many queues as the first, on `cpu`.
    #[must_use]
    pub fn front_end(cards: &[VirtioUser], cpu: usize) -> Self {
        let vdevs = cards.iter().enumerate().map(|(n, card)| card.vdev(n));
        let queues = cards.first().map_or(1, |card| card.queues);
        let mut config = Self::new(vdevs.collect(), queues, cpu);
        // Back-ends take few memory regions; the vectorized packed path wants AVX-512.
        config.eal.push("--single-file-segments".to_owned());
        config.eal.push("--force-max-simd-bitwidth=512".to_owned());
        config
    }

    /// A back-end that listens on `sockets` with `queues` pairs each, on `cpu`.
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
            eal: Vec::new(),
            args: Vec::new(),
            main_cpu: cpu,
            cpu,
            queues,
            memory_mib: 256,
            mbufs: 65_536,
        }
    }

    /// Commands are read on another CPU than the one that forwards.
    #[must_use]
    pub fn main_cpu(mut self, cpu: usize) -> Self {
        self.main_cpu = cpu;
        self
    }

    /// This much memory, and this many packet buffers in it (some 2.4 KiB each).
    #[must_use]
    pub fn memory(mut self, mib: u32, mbufs: u32) -> Self {
        self.memory_mib = mib;
        self.mbufs = mbufs;
        self
    }

    /// A further word of testpmd's own, such as `--txonly-multi-flow`.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Huge pages of 2 MiB that it takes.
    #[must_use]
    pub fn pages(&self) -> u64 {
        u64::from(self.memory_mib.div_ceil(PAGE_MIB))
    }

    /// Starts it and waits until its ports are set up and it takes commands. It does not forward
    /// yet. A front-end whose cards listen waits for its back-ends.
    ///
    /// # Errors
    /// When DPDK is not installed, or it ends at once: with its words.
    pub fn start(&self, dir: &RunDir, name: &str) -> Result<Testpmd> {
        let mut testpmd = self.spawn(dir, name)?;
        testpmd.answer(0)?;
        Ok(testpmd)
    }

    /// The same without waiting: call [`Testpmd::ready`] once its back-ends are there.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, dir: &RunDir, name: &str) -> Result<Testpmd> {
        installed()?;
        let commands = dir.join(&format!("{name}.commands"));
        output("mkfifo", [&commands])?;
        // Open for both, so that neither side waits for the other, and that it never ends.
        let stdin = OpenOptions::new().read(true).write(true).open(&commands)?;
        // Its output goes to a file line by line; what it leaves in the file system, to the run's
        // directory.
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
        words.extend(self.eal.iter().cloned());
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

/// A running testpmd; it is killed when dropped.
#[derive(Debug)]
pub struct Testpmd {
    proc: Proc,
    name: String,
    stdin: File,
}

impl Testpmd {
    /// Its process.
    pub fn proc(&mut self) -> &mut Proc {
        &mut self.proc
    }

    /// Waits until it takes commands, after it was started.
    ///
    /// # Errors
    /// When it ends instead, or its back-ends do not come.
    pub fn ready(&mut self) -> Result<()> {
        self.answer(0).map(drop)
    }

    /// Gives it one command and returns what it says.
    ///
    /// # Errors
    /// When it does not answer, or does not know the command.
    pub fn command(&mut self, command: &str) -> Result<String> {
        let from = self.proc.stdout().len();
        writeln!(self.stdin, "{command}")
            .with_context(|| format!("{} takes no commands", self.name))?;
        let answer = self
            .answer(from)
            .with_context(|| format!("in reply to '{command}'"))?;
        for complaint in ["Bad arguments", "Command not found", "Ambiguous command"] {
            ensure!(
                !answer.contains(complaint),
                "{} does not understand '{command}': {}",
                self.name,
                answer.trim()
            );
        }
        Ok(answer)
    }

    /// Starts forwarding; with `bursts` bursts of 32 frames of its own sent on each queue first.
    ///
    /// # Errors
    /// As [`Testpmd::command`].
    pub fn forward(&mut self, bursts: u32) -> Result<()> {
        match bursts {
            0 => self.command("start"),
            n => self.command(&format!("start tx_first {n}")),
        }
        .map(drop)
    }

    /// The ports' counters since they were cleared, and rates since the last call.
    ///
    /// # Errors
    /// When it does not answer as DPDK 22.11 does.
    pub fn port_stats(&mut self) -> Result<Vec<PortStats>> {
        let text = self.command("show port stats all")?;
        stats::ports(&text)
    }

    /// What all its ports together have forwarded since it started to.
    ///
    /// # Errors
    /// When it does not answer as DPDK 22.11 does, or does not forward.
    pub fn forwarded(&mut self) -> Result<ForwardStats> {
        let text = self.command("show fwd stats all")?;
        stats::forwarded(&text)
    }

    /// Halts the whole process where it stands, or lets it go on: nothing it uses is given up, and
    /// it uses no CPU meanwhile.
    ///
    /// # Errors
    /// When it has ended.
    pub fn halt(&mut self, halted: bool) -> Result<()> {
        let signal = match halted {
            true => Signal::SIGSTOP,
            false => Signal::SIGCONT,
        };
        self.proc.signal(signal)
    }

    /// Ends it in an orderly way: the ports are closed, front-end and back-end part.
    ///
    /// # Errors
    /// When it does not end within 10 s, or fails.
    pub fn quit(mut self) -> Result<()> {
        writeln!(self.stdin, "quit")?;
        let status = self.proc.wait(END)?;
        ensure!(status.success(), "{} ended with {status}", self.name);
        Ok(())
    }

    /// What it printed from `from` on, once it asks for the next command.
    fn answer(&mut self, from: usize) -> Result<String> {
        let until = Instant::now() + ANSWER;
        loop {
            let text = self.proc.stdout();
            let new = text.get(from..).unwrap_or_default();
            if let Some((answer, _)) = new.rsplit_once(PROMPT) {
                return Ok(answer.to_owned());
            }
            self.proc.check_alive()?;
            if Instant::now() >= until {
                let said = self.proc.stderr();
                bail!(
                    "{} did not answer within {ANSWER:?}; its stderr: {}",
                    self.name,
                    crate::process::tail(&said)
                );
            }
            sleep(POLL);
        }
    }
}
