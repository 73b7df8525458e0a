//! Two network devices of a back-end, and their driver, which sends one frame to and fro.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtionet_guest::frame::{Frame, FrameSpec, Transport};
use virtionet_guest::net::{MODERN, PACKED};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::paths::RunDir;

use super::distribution::Distribution;
use crate::peers::back_end::{BackEnd, BackEndKind, WorkerPollMode};
use crate::peers::load::{Cpus, ForwardingLoad, QUEUE_SIZE, TrafficPattern};
use crate::peers::under_test::cpu_time;

/// The device status of a driver that is ready: ACKNOWLEDGE, DRIVER, FEATURES_OK and DRIVER_OK (virtio
/// 1.3 §2.1).
const DRIVER_OK: u64 = 1 | 2 | 8 | 4;
/// The length of the Ethernet, IPv4 and UDP headers.
const HEADERS_LEN: usize = 42;
/// The time without the frame after which it counts as lost.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The time between two attempts to send a frame through devices that have just started.
const CONNECTION_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How the driver waits for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverWait {
    /// It asks for a call and sleeps.
    Sleep,
    /// It looks at the ring all the time, and asks for no calls.
    Poll,
}

/// A back-end and the driver of its two devices. Between measurements, the back-end is halted. The
/// driver runs in the thread that measures.
#[derive(Debug)]
pub struct RoundTrips {
    devices: [TestFrontend; 2],
    frames: [Frame; 2],
    wait: DriverWait,
    back_end: BackEnd,
    _dir: RunDir,
}

impl RoundTrips {
    /// Starts the back-end, connects both devices and halts the back-end.
    ///
    /// # Errors
    /// When a program is missing, or refuses a front-end.
    pub fn start(
        kind: BackEndKind,
        poll: WorkerPollMode,
        wait: DriverWait,
        frame_len: usize,
        is_packed: bool,
        cpus: Cpus,
    ) -> Result<Self> {
        let dir = RunDir::new()?;
        let load = ForwardingLoad {
            traffic: TrafficPattern::Forward,
            frame_len: u16::try_from(frame_len)?,
            queue_pairs: 1,
            is_packed,
            bursts: 1,
        };
        let sockets = load.sockets(&dir);
        let back_end = BackEnd::start(kind, &dir, &sockets, load, poll, cpus)?;
        let features = if is_packed { MODERN | PACKED } else { MODERN };
        let config = TestFrontendConfig::new(1, QUEUE_SIZE, features);
        let connect = |n: usize| TestFrontend::connect(&sockets[n], &config);
        let there = FrameSpec::v4(Transport::Udp);
        let back = FrameSpec {
            source_mac: there.target_mac,
            target_mac: there.source_mac,
            ..there.clone()
        };
        let payload = vec![0x5a; frame_len.saturating_sub(HEADERS_LEN)];
        let mut round_trips = Self {
            devices: [connect(0)?, connect(1)?],
            frames: [there.build(&payload)?, back.build(&payload)?],
            wait,
            back_end,
            _dir: dir,
        };
        round_trips.wait_until_connected()?;
        round_trips.halt(true)?;
        Ok(round_trips)
    }

    /// Sends frames from each device until one arrives, so that a switch knows where both are, and
    /// DPDK has noticed that they have started.
    fn wait_until_connected(&mut self) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        for device in &mut self.devices {
            // DPDK does not look at the vrings before.
            if device.connection.has_feature(Protocol::STATUS) {
                device.connection.set_status(DRIVER_OK)?;
            }
        }
        for from in [0, 1] {
            loop {
                let tx = &mut self.devices[from].pairs[0].tx;
                tx.reclaim()?;
                tx.send(&self.frames[from])?;
                sleep(CONNECTION_POLL_INTERVAL);
                if self.devices[1 - from].pairs[0]
                    .rx
                    .receive(QUEUE_SIZE.into(), |_| ())?
                    > 0
                {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "no frame has passed for {TIMEOUT:?}; stderr of the back-end: {}",
                    self.back_end.proc().stderr().trim()
                );
            }
        }
        // No frame of these is on its way any more when the measurement starts.
        sleep(CONNECTION_POLL_INTERVAL);
        for device in &mut self.devices {
            device.pairs[0].rx.receive(QUEUE_SIZE.into(), |_| ())?;
        }
        Ok(())
    }

    /// Makes round trips, one after the other, for `interval`.
    ///
    /// # Errors
    /// When the frame is lost.
    pub fn measure(&mut self, interval: Duration) -> Result<Distribution> {
        self.measure_paced(interval, Duration::ZERO)
    }

    /// Begins a round trip each `pause` for `interval`, or later if the last one has not ended.
    ///
    /// # Errors
    /// When the frame is lost.
    pub fn measure_paced(&mut self, interval: Duration, pause: Duration) -> Result<Distribution> {
        self.halt(false)?;
        let mut durations = Vec::new();
        let mut started_at = Instant::now();
        let end = started_at + interval;
        while started_at < end {
            self.make_round_trip()?;
            durations.push(started_at.elapsed());
            let next = started_at + pause;
            while Instant::now() < next {
                std::hint::spin_loop();
            }
            started_at = Instant::now();
        }
        self.halt(true)?;
        Distribution::new(durations).context("the interval is too short")
    }

    /// Returns the CPU time that the back-end's threads have used.
    ///
    /// # Errors
    /// When the back-end has ended.
    pub fn cpu_time(&mut self) -> Result<Duration> {
        cpu_time(self.back_end.proc().pid())
    }

    fn make_round_trip(&mut self) -> Result<()> {
        for from in [0, 1] {
            let tx = &mut self.devices[from].pairs[0].tx;
            tx.reclaim()?;
            let frame = &self.frames[from];
            ensure!(
                tx.queue(&frame.header, &frame.bytes)?,
                "the transmitq is full though one frame is on its way"
            );
            tx.flush()?;
            self.receive(1 - from)?;
        }
        Ok(())
    }

    /// Waits for one frame at a device.
    fn receive(&mut self, at: usize) -> Result<()> {
        let rx = &mut self.devices[at].pairs[0].rx;
        let mut deadline = None;
        while rx.receive(1, |_| ())? == 0 {
            match self.wait {
                DriverWait::Poll => {
                    std::hint::spin_loop();
                    let deadline = *deadline.get_or_insert_with(|| Instant::now() + TIMEOUT);
                    ensure!(Instant::now() < deadline, "the frame is lost");
                }
                // A frame that came meanwhile may not have been announced.
                DriverWait::Sleep if rx.queue.ring.enable_calls() => {}
                DriverWait::Sleep => {
                    let calls = rx.queue.call.wait(TIMEOUT)?;
                    ensure!(calls != 0, "no call has come for {TIMEOUT:?}");
                }
            }
        }
        Ok(())
    }

    fn halt(&mut self, is_halted: bool) -> Result<()> {
        self.back_end.proc().signal(match is_halted {
            true => Signal::SIGSTOP,
            false => Signal::SIGCONT,
        })
    }
}
