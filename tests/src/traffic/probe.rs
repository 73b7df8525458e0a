//! A frame on each flow every 100 µs, by a thread of its own, which measures for how long no frame
//! arrives.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::unistd::gettid;

use super::Traffic;
use crate::sched::set_real_time;

/// The time between two frames of a flow.
pub const INTERVAL: Duration = Duration::from_micros(100);

/// What was measured since the last call of [`Probe::take_round`].
#[derive(Debug)]
pub struct Round {
    /// The longest time without a frame, for each flow.
    pub gaps: Vec<Duration>,
    /// The longest time for which the probe itself did not run. It is part of the gaps.
    pub own_gap: Duration,
}

#[derive(Debug)]
enum Command {
    TakeRound(Sender<Round>),
    Stop,
}

/// The thread.
#[derive(Debug)]
pub struct Probe {
    commands: Sender<Command>,
    thread: JoinHandle<Result<Traffic>>,
}

impl Probe {
    /// Starts to send.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start(traffic: Traffic) -> Result<Self> {
        let (commands, receiver) = channel();
        let thread = thread::Builder::new()
            .name("probe".into())
            .spawn(move || run(traffic, &receiver))?;
        Ok(Self { commands, thread })
    }

    /// What was measured since the last call.
    ///
    /// # Errors
    /// When the thread has ended.
    pub fn take_round(&self) -> Result<Round> {
        let (sender, receiver) = channel();
        let sent = self.commands.send(Command::TakeRound(sender));
        sent.map_err(|_| anyhow!("the probe has ended"))?;
        receiver.recv().context("the probe has ended")
    }

    /// Ends the thread. All frames have arrived then, or none came for a second.
    ///
    /// # Errors
    /// When a device broke a rule of virtqueues, or a frame has not arrived.
    pub fn stop(self) -> Result<Traffic> {
        _ = self.commands.send(Command::Stop);
        let ended = self.thread.join();
        ended.map_err(|_| anyhow!("the probe panicked"))?
    }
}

fn run(mut traffic: Traffic, commands: &Receiver<Command>) -> Result<Traffic> {
    // Without it another thread may run for milliseconds when the next frame is due.
    set_real_time(gettid().as_raw())?;
    let mut due = Instant::now();
    let mut ran_at = due;
    let mut own_gap = Duration::ZERO;
    loop {
        match commands.try_recv() {
            Ok(Command::TakeRound(sender)) => {
                let gaps = traffic.take_gaps();
                let own_gap = std::mem::take(&mut own_gap);
                _ = sender.send(Round { gaps, own_gap });
            }
            Err(TryRecvError::Empty) => {}
            Ok(Command::Stop) | Err(TryRecvError::Disconnected) => break,
        }
        traffic.exchange(1)?;
        due += INTERVAL;
        let now = Instant::now();
        match due.checked_duration_since(now) {
            Some(left) => thread::sleep(left),
            // What is late is left out.
            None => due = now,
        }
        let now = Instant::now();
        own_gap = own_gap.max(now - ran_at);
        ran_at = now;
    }
    traffic.drain(Duration::from_secs(1))?;
    Ok(traffic)
}
