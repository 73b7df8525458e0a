//! The data path of the switch: decides to which port each frame of a burst goes.
//!
//! A burst for one receiveq, which is the usual case, is passed on as a whole.

use std::ops::Range;

use virtionet_virtio_net::stats::{VringStats, to_u64};
use virtionet_virtio_net::uplink::{MAX_BURST, TxFrame};
use virtionet_virtqueue::memory::GuestSlice;

use super::delivery::{BurstDelivery, IngressPort, OffloadRequests};
use super::mac_addr::MacAddr;
use super::masks::{FrameGroups, low_mask};
use super::{Switch, coarse_now_secs};

impl Switch {
    /// Forwards `frames` to the ports of their destinations. If one receiveq gets all of them, it calls
    /// `release` when they are copied.
    pub(super) fn forward(
        &self,
        from: &IngressPort,
        frames: &[TxFrame<'_>],
        stats: &VringStats,
        release: &mut dyn FnMut(),
    ) {
        if frames.len() <= MAX_BURST {
            return self.forward_burst(from, frames, stats, release);
        }
        for frames in frames.chunks(MAX_BURST) {
            self.forward_burst(from, frames, stats, &mut || ());
        }
    }

    #[inline(always)]
    fn forward_burst(
        &self,
        from: &IngressPort,
        frames: &[TxFrame<'_>],
        stats: &VringStats,
        release: &mut dyn FnMut(),
    ) {
        let now = coarse_now_secs();
        let decisions = self.decide_burst(from.number, frames, now);
        let burst = BurstDelivery::new(from, frames, decisions.requests, self.seed, now, stats);
        burst.learn_flows();
        let burst = match decisions.flood {
            // No frame has a second receiver.
            0 => burst.with_release(release),
            _ => burst,
        };
        let delivered = match decisions.flood {
            0 => self.deliver_each(&burst, &decisions),
            _ => self.deliver_flood(from.number, &burst, &decisions),
        };
        let lost = low_mask(frames.len()) & !delivered;
        if lost != 0 {
            let undelivered = lost & !burst.dropped() & !decisions.reserved;
            stats
                .dropped_reserved_group
                .add(u64::from(decisions.reserved.count_ones()));
            stats
                .dropped_no_port
                .add(u64::from(undelivered.count_ones()));
        }
        stats.frames.add(u64::from(delivered.count_ones()));
        stats.bytes.add(decisions.bytes - burst.bytes(lost));
    }

    /// Decides where each frame goes. Consecutive frames with the same addresses need one lookup.
    #[inline(always)]
    fn decide_burst(&self, from: u16, frames: &[TxFrame<'_>], now: u32) -> ForwardingDecisions {
        let mut decisions = ForwardingDecisions::default();
        // Not in `decisions`, so that they stay in registers.
        let (mut bytes, mut requests) = (0, OffloadRequests::default());
        let mut start = 0;
        let mut last = Addresses::default();
        for (n, frame) in frames.iter().enumerate() {
            bytes += frame.len;
            requests.add(&frame.header);
            let addresses = Addresses::of(frame.payload);
            if addresses != last {
                self.decide(&mut decisions, from, last, start..n, now);
                if addresses.source() != last.source() {
                    self.macs.learn(addresses.source(), from, now);
                }
                (last, start) = (addresses, n);
            }
        }
        self.decide(&mut decisions, from, last, start..frames.len(), now);
        decisions.bytes = to_u64(bytes);
        decisions.requests = requests;
        decisions
    }

    #[inline(always)]
    fn decide(
        &self,
        decisions: &mut ForwardingDecisions,
        from: u16,
        addresses: Addresses,
        frames: Range<usize>,
        now: u32,
    ) {
        if frames.is_empty() {
            return;
        }
        let mask = low_mask(frames.len()) << frames.start;
        let destination = addresses.destination();
        if destination.is_group_or_zero() {
            match destination.is_reserved_group() && !self.forwards_reserved_groups() {
                true => decisions.reserved |= mask,
                false => decisions.flood |= mask,
            }
            return;
        }
        match self.macs.find(destination, now) {
            None => decisions.flood |= mask,
            // The destination is behind the port from which the frame comes.
            Some(port) if port == from => {}
            Some(port) => decisions.ports.add(port, mask),
        }
    }

    /// Delivers each frame to one port; returns the mask of the frames that were accepted.
    #[inline(always)]
    fn deliver_each(&self, burst: &BurstDelivery<'_>, decisions: &ForwardingDecisions) -> u64 {
        let mut delivered = 0;
        for (number, mask) in decisions.ports.iter() {
            if let Some(port) = self.ports[..]
                .get(usize::from(number))
                .and_then(|p| p.get())
            {
                delivered |= burst.deliver(port, mask);
            }
        }
        delivered
    }

    /// The same where some frames go to all other ports: each port gets those frames and its own,
    /// in order.
    #[inline(never)]
    fn deliver_flood(
        &self,
        from: u16,
        burst: &BurstDelivery<'_>,
        decisions: &ForwardingDecisions,
    ) -> u64 {
        let others = self.ports().filter(|(number, _)| *number != from);
        others.fold(0, |delivered, (number, port)| {
            let mask = burst.within_budget(decisions.flood) | decisions.ports.of(number);
            delivered | burst.deliver(port, mask)
        })
    }
}

/// The ports to which the frames of a burst go.
#[derive(Debug, Default)]
struct ForwardingDecisions {
    ports: FrameGroups,
    /// The mask of the frames that go to all ports.
    flood: u64,
    /// The mask of the frames to reserved groups, which go to no port.
    reserved: u64,
    bytes: u64,
    requests: OffloadRequests,
}

/// Both MAC addresses of a frame: its first eight bytes, which contain the destination, and the
/// eight bytes from the fifth on, which contain the source. They are a private copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Addresses(u64, u64);

impl Addresses {
    const LEN: usize = 12;

    #[inline(always)]
    fn of(payload: &[GuestSlice<'_>]) -> Self {
        match payload.first() {
            Some(first) if first.len() >= Self::LEN => Self::at(first),
            _ => Self::gather(payload),
        }
    }

    /// The addresses in a slice that is long enough.
    #[inline(always)]
    fn at(frame: &GuestSlice<'_>) -> Self {
        let [mut begin, mut end] = [[0; 8]; 2];
        frame.copy_to(&mut begin);
        frame.skip(4).copy_to(&mut end);
        Self(u64::from_le_bytes(begin), u64::from_le_bytes(end))
    }

    #[cold]
    fn gather(payload: &[GuestSlice<'_>]) -> Self {
        let mut bytes = [0; Self::LEN];
        let mut len = 0;
        for slice in payload {
            len += slice.copy_to(&mut bytes[len..]);
        }
        Self::at(&GuestSlice::from_private(&mut bytes))
    }

    #[inline(always)]
    fn destination(self) -> MacAddr {
        MacAddr(self.0 & 0xffff_ffff_ffff)
    }

    #[inline(always)]
    fn source(self) -> MacAddr {
        MacAddr(self.1 >> 16)
    }
}
