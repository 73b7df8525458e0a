//! The flows of [`super::Traffic`], and how the host sends and receives their frames.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtionet_guest::frame::{Frame, FrameSpec, Transport};

use super::sequence::{PAYLOAD_LEN, SequenceCheck, parse, payload};

/// Where the payload of a UDP frame over IPv4 begins.
pub(super) const PAYLOAD_START: usize = 14 + 20 + 8;
/// Where the checksum of UDP lies.
const UDP_CHECKSUM: Range<usize> = 40..42;
/// One end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A queue pair of a device.
    Driver {
        /// The device.
        device: usize,
        /// The queue pair.
        pair: usize,
    },
    /// The socket of a queue pair.
    Host {
        /// The queue pair.
        pair: usize,
    },
}

/// The numbered frames from one end to another.
#[derive(Debug)]
pub struct Flow {
    /// Where they come from.
    pub source: End,
    /// Where they go to.
    pub target: End,
    /// Which of them have arrived.
    pub check: SequenceCheck,
    /// Those that arrived at another vring than that of `target`.
    pub at_other_vring: u64,
    /// What was sent.
    pub sent: u64,
    /// Those of them that need not arrive any more.
    pub(super) given_up: u64,
    /// What the driver sends, but for the number.
    pub(super) frame: Frame,
    arrived_at: Option<Instant>,
    pub(super) longest_gap: Duration,
}

impl Flow {
    pub(super) fn new(source: End, target: End, frame: Frame) -> Self {
        Self {
            source,
            target,
            check: SequenceCheck::default(),
            at_other_vring: 0,
            sent: 0,
            given_up: 0,
            frame,
            arrived_at: None,
            longest_gap: Duration::ZERO,
        }
    }

    /// The frames that have not arrived.
    #[must_use]
    pub fn unreceived(&self) -> u64 {
        self.sent.saturating_sub(self.check.received)
    }

    pub(super) fn on_its_way(&self) -> u64 {
        self.unreceived().saturating_sub(self.given_up)
    }

    pub(super) fn arrived(&mut self, number: u64, at: End, now: Instant) {
        self.check.arrived(number);
        self.at_other_vring += u64::from(at != self.target);
        self.note_gap(now);
        self.arrived_at = Some(now);
    }

    pub(super) fn note_gap(&mut self, now: Instant) {
        if let Some(before) = self.arrived_at {
            let gap = now.saturating_duration_since(before);
            self.longest_gap = self.longest_gap.max(gap);
        }
    }
}

/// The frame that `spec` describes, with a payload for a number and without a checksum of it.
pub(super) fn frame(spec: &FrameSpec) -> Result<Frame> {
    let mut frame = spec.build(&[0; PAYLOAD_LEN])?;
    ensure!(spec.transport == Transport::Udp && spec.vlan.is_none());
    // There is none (RFC 768).
    frame.bytes[UDP_CHECKSUM].fill(0);
    Ok(frame)
}

pub(super) fn send_by_host(
    socket: &UdpSocket,
    flow: &mut Flow,
    index: u32,
    count: u64,
) -> Result<()> {
    for _ in 0..count {
        match socket.send(&payload(index, flow.sent)) {
            Ok(_) => flow.sent += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("the host cannot send"),
        }
    }
    Ok(())
}

pub(super) fn receive_by_host(socket: &UdpSocket, pair: usize, flows: &mut [Flow]) -> Result<()> {
    let now = Instant::now();
    let mut bytes = [0; PAYLOAD_LEN];
    loop {
        match socket.recv(&mut bytes) {
            Ok(len) => {
                if let Some((flow, number)) = parse(&bytes[..len])
                    && let Some(flow) = flows.get_mut(flow)
                {
                    flow.arrived(number, End::Host { pair }, now);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error).context("the host cannot receive"),
        }
    }
}
