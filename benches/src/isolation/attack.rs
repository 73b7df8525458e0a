//! The hostile driver and front-end of the attacked device, in a thread of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::unistd::gettid;
use virtionet_guest::frame::{Frame, FrameSpec, Transport};
use virtionet_guest::net::{MODERN, TxLayout};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::sched;

/// The time within which the daemon must answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Kicks or frames between two looks at whether the attack goes on.
const BATCH: u16 = 64;
/// Bytes in a segment of the flood, so that a frame of 1,514 bytes is a chain of 763 segments.
const SEGMENT_LEN: u32 = 2;

/// What is done to the attacked device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attack {
    /// Kicks of an empty transmitq.
    KickStorm,
    /// TX frames in chains of hundreds of segments.
    Flood,
    /// A front-end that connects, starts its vrings and dies.
    Reconnects,
    /// A vring that is made faulty, quarantined and started again.
    Quarantines,
}

impl Attack {
    /// All attacks.
    pub const ALL: [Self; 4] = [
        Self::KickStorm,
        Self::Flood,
        Self::Reconnects,
        Self::Quarantines,
    ];

    /// The name in the results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KickStorm => "kick storm",
            Self::Flood => "TX flood",
            Self::Reconnects => "reconnects",
            Self::Quarantines => "quarantines",
        }
    }
}

/// A thread that attacks a device until it is stopped.
#[derive(Debug)]
pub struct AttackThread {
    is_active: Arc<AtomicBool>,
    should_stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
    tid: i32,
}

impl AttackThread {
    /// Starts the thread on `cpu`. It connects, and does nothing else yet.
    ///
    /// # Errors
    /// When the device cannot be used.
    pub fn start(attack: Attack, socket: &Path, cpu: usize) -> Result<Self> {
        let (is_active, should_stop) = (Arc::default(), Arc::default());
        let (ready, started): (_, Receiver<i32>) = channel();
        let flags: [Arc<AtomicBool>; 2] = [Arc::clone(&is_active), Arc::clone(&should_stop)];
        let socket = socket.to_owned();
        let thread = thread::Builder::new()
            .name("attack".into())
            .spawn(move || {
                sched::pin(0, cpu)?;
                let mut attacker = Attacker::new(attack, socket)?;
                ready.send(gettid().as_raw())?;
                let [is_active, should_stop] = flags;
                while !should_stop.load(Ordering::Relaxed) {
                    match is_active.load(Ordering::Relaxed) {
                        true => attacker.step()?,
                        false => thread::sleep(Duration::from_millis(1)),
                    }
                }
                Ok(())
            })?;
        let mut attack = Self {
            is_active,
            should_stop,
            thread: Some(thread),
            tid: 0,
        };
        match started.recv() {
            Ok(tid) => attack.tid = tid,
            Err(_) => attack.check()?,
        }
        Ok(attack)
    }

    /// Starts or stops the attack.
    pub fn set_active(&self, is_active: bool) {
        self.is_active.store(is_active, Ordering::Relaxed);
    }

    /// The thread id.
    #[must_use]
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Checks that the attack goes on.
    ///
    /// # Errors
    /// The error that ended the thread.
    pub fn check(&mut self) -> Result<()> {
        match self.thread.take_if(|thread| thread.is_finished()) {
            Some(thread) => join(thread).and(Err(anyhow!("the attack has ended"))),
            None => Ok(()),
        }
    }
}

impl Drop for AttackThread {
    fn drop(&mut self) {
        self.should_stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // `check` reports the errors that matter.
            _ = join(thread);
        }
    }
}

fn join(thread: JoinHandle<Result<()>>) -> Result<()> {
    let result = thread.join();
    result.map_err(|_| anyhow!("the thread of the attack panicked"))?
}

struct Attacker {
    attack: Attack,
    socket: PathBuf,
    config: TestFrontendConfig,
    frontend: Option<TestFrontend>,
    frame: Frame,
}

impl Attacker {
    fn new(attack: Attack, socket: PathBuf) -> Result<Self> {
        let mut config = TestFrontendConfig::new(1, 256, MODERN);
        if attack == Attack::Flood {
            config.queues.tx_layout = TxLayout::Segments(SEGMENT_LEN);
        }
        let mut attacker = Self {
            attack,
            socket,
            config,
            frontend: None,
            frame: FrameSpec::v4(Transport::Udp).build(&[0x5a; 1472])?,
        };
        if attack != Attack::Reconnects {
            let mut frontend = attacker.connect()?;
            frontend.pairs[0].tx.prefill(&attacker.frame)?;
            attacker.frontend = Some(frontend);
        }
        Ok(attacker)
    }

    fn connect(&self) -> Result<TestFrontend> {
        TestFrontend::connect(&self.socket, &self.config)
            .context("the attacked device does not take its front-end")
    }

    fn step(&mut self) -> Result<()> {
        let Some(frontend) = &mut self.frontend else {
            let mut frontend = self.connect()?;
            frontend.pairs[0].tx.send(&self.frame)?;
            return Ok(());
        };
        match self.attack {
            Attack::KickStorm => {
                for _ in 0..BATCH {
                    frontend.pairs[0].tx.queue.kick_now()?;
                }
                Ok(())
            }
            Attack::Flood => {
                let tx = &mut frontend.pairs[0].tx;
                match tx.queue_prefilled(BATCH)? {
                    0 => thread::yield_now(),
                    _ => tx.flush()?,
                }
                Ok(())
            }
            Attack::Quarantines | Attack::Reconnects => quarantine(frontend),
        }
    }
}

/// Makes the transmitq faulty, waits until the device has quarantined it, and starts it again.
fn quarantine(frontend: &mut TestFrontend) -> Result<()> {
    let queue = &mut frontend.pairs[0].tx.queue;
    let jump = queue.ring.size() + 1;
    let ring = queue.ring.as_split().context("the virtqueue is packed")?;
    ring.set_avail_index(ring.avail_index().wrapping_add(jump));
    queue.kick_now()?;
    ensure!(
        queue.err.wait(TIMEOUT)? > 0,
        "a faulty vring is not quarantined within {TIMEOUT:?}"
    );
    frontend.stop()?;
    frontend.reset()?;
    Ok(frontend.start()?)
}
