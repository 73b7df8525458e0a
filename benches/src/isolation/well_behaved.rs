//! The driver of the well-behaved devices, in the thread that measures.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::paths::RunDir;

/// The number of descriptors of each virtqueue.
const QUEUE_SIZE: u16 = 256;
/// Frames that are published at once.
const BURST: u16 = 32;
/// Frames on their way through the switch. They always fit the receiveq, so that none is dropped.
const MAX_IN_FLIGHT: u64 = 192;
const PAYLOAD: [u8; 100] = [0x5a; 100];
/// The time without any frame after which the device counts as stalled.
const STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// What the well-behaved driver does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// It sends to the uplink `null`.
    Transmit,
    /// It sends from one device of a switch, and receives with another one.
    Forward,
}

impl Traffic {
    /// Both kinds.
    pub const ALL: [Self; 2] = [Self::Transmit, Self::Forward];

    /// The name in the results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Transmit => "TX to null",
            Self::Forward => "TX and RX through a switch",
        }
    }

    /// Names and uplinks of the devices.
    #[must_use]
    pub fn devices(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Transmit => &[("good0", "null")],
            Self::Forward => &[("good0", "switch:good"), ("good1", "switch:good")],
        }
    }
}

/// The driver of one sending device and, with [`Traffic::Forward`], of one receiving device.
#[derive(Debug)]
pub struct WellBehavedDriver {
    sender: TestFrontend,
    receiver: Option<TestFrontend>,
}

impl WellBehavedDriver {
    /// Connects the devices.
    ///
    /// # Errors
    /// When the daemon refuses a front-end.
    pub fn connect(traffic: Traffic, dir: &RunDir) -> Result<Self> {
        let config = TestFrontendConfig::new(1, QUEUE_SIZE, MODERN);
        let connect = |name| TestFrontend::connect(&dir.join(&format!("{name}.sock")), &config);
        let there = FrameSpec::v4(Transport::Udp);
        let back = FrameSpec {
            source_mac: there.target_mac,
            target_mac: there.source_mac,
            ..there.clone()
        };
        let mut sender = connect("good0")?;
        sender.pairs[0].tx.prefill(&there.build(&PAYLOAD)?)?;
        let receiver = match traffic {
            Traffic::Transmit => None,
            Traffic::Forward => {
                let mut receiver = connect("good1")?;
                // The switch learns where the receiver is.
                receiver.pairs[0].tx.send(&back.build(&PAYLOAD)?)?;
                sender.pairs[0].rx.wait_frames(1, STALL_TIMEOUT)?;
                Some(receiver)
            }
        };
        Ok(Self { sender, receiver })
    }

    /// Carries as many frames as possible for `interval`. Returns frames per second.
    ///
    /// # Errors
    /// When a device stalls, or breaks a rule.
    pub fn carry_for(&mut self, interval: Duration) -> Result<f64> {
        let started_at = Instant::now();
        let (mut sent, mut carried) = (0, 0);
        let mut progressed_at = started_at;
        while started_at.elapsed() < interval {
            let before = carried;
            if self.receiver.is_none() || sent - carried + u64::from(BURST) <= MAX_IN_FLIGHT {
                let tx = &mut self.sender.pairs[0].tx;
                sent += u64::from(tx.queue_prefilled(BURST)?);
                tx.flush()?;
            }
            match &mut self.receiver {
                Some(receiver) => {
                    let rx = &mut receiver.pairs[0].rx;
                    carried += u64::try_from(rx.receive(usize::MAX, |_| ())?)?;
                }
                None => carried = sent,
            }
            if carried > before {
                progressed_at = Instant::now();
            }
            ensure!(
                progressed_at.elapsed() < STALL_TIMEOUT,
                "the well-behaved device has carried nothing for {STALL_TIMEOUT:?}"
            );
        }
        let duration = started_at.elapsed();
        self.drain()?;
        Ok(f64::from(u32::try_from(carried)?) / duration.as_secs_f64())
    }

    /// Waits until nothing is on its way.
    fn drain(&mut self) -> Result<()> {
        self.sender.pairs[0].tx.drain(STALL_TIMEOUT)?;
        if let Some(receiver) = &mut self.receiver {
            receiver.pairs[0].rx.receive(usize::MAX, |_| ())?;
        }
        Ok(())
    }
}
