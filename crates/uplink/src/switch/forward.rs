//! The data path: which port each frame of a burst goes to.
//!
//! A burst for one receiveq, which is the rule, is passed on as it came.

use std::ops::Range;

use virtionet_virtio_net::port::{MAX_BURST, TxFrame};
use virtionet_virtio_net::stats::{RingStats, wide};
use virtionet_virtqueue::memory::GuestSlice;

use super::burst::{Asks, Burst, Sender};
use super::macs::Mac;
use super::masks::{Groups, all};
use super::{Switch, seconds};

/// In place of a port's number: all but the sender's.
const FLOOD: u16 = u16::MAX;

impl Switch {
    /// Gives `frames` to the ports that they are for.
    pub(super) fn forward(&self, from: &Sender, frames: &[TxFrame<'_>], stats: &RingStats) {
        for frames in frames.chunks(MAX_BURST) {
            self.forward_burst(from, frames, stats);
        }
    }

    #[inline(always)]
    fn forward_burst(&self, from: &Sender, frames: &[TxFrame<'_>], stats: &RingStats) {
        let now = seconds();
        let plan = self.plan(from.number, frames, now);
        let burst = Burst::new(from, frames, plan.asks, self.seed, now, stats);
        burst.learn_flows();
        let taken = match plan.flood {
            0 => self.deliver_each(&burst, &plan),
            _ => self.deliver_flood(from.number, &burst, &plan),
        };
        let lost = all(frames.len()) & !taken;
        if lost != 0 {
            let unheeded = lost & !burst.refused();
            stats.dropped_no_port.add(u64::from(unheeded.count_ones()));
        }
        stats.frames.add(u64::from(taken.count_ones()));
        stats.bytes.add(plan.bytes - burst.bytes(lost));
    }

    /// Decides where each frame goes. Frames of one pair of addresses are decided on at once.
    #[inline(always)]
    fn plan(&self, from: u16, frames: &[TxFrame<'_>], now: u32) -> Plan {
        let mut plan = Plan::default();
        // Apart from the plan, so that they stay in registers.
        let (mut bytes, mut asks) = (0, Asks::default());
        let mut start = 0;
        let mut last = Addresses::default();
        for (n, frame) in frames.iter().enumerate() {
            bytes += frame.len;
            asks.add(&frame.header);
            let addresses = Addresses::of(frame.payload);
            if addresses != last {
                self.decide(&mut plan, from, last, start..n, now);
                if addresses.source() != last.source() {
                    self.macs.learn(addresses.source(), from, now);
                }
                (last, start) = (addresses, n);
            }
        }
        self.decide(&mut plan, from, last, start..frames.len(), now);
        plan.bytes = wide(bytes);
        plan.asks = asks;
        plan
    }

    #[inline(always)]
    fn decide(
        &self,
        plan: &mut Plan,
        from: u16,
        addresses: Addresses,
        frames: Range<usize>,
        now: u32,
    ) {
        if frames.is_empty() {
            return;
        }
        let mask = all(frames.len()) << frames.start;
        match self.port_of(addresses.destination(), now) {
            FLOOD => plan.flood |= mask,
            // It is there already.
            port if port == from => {}
            port => plan.ports.add(port, mask),
        }
    }

    #[inline(always)]
    fn port_of(&self, mac: Mac, now: u32) -> u16 {
        match mac.is_nobodys() {
            true => FLOOD,
            false => self.macs.find(mac, now).unwrap_or(FLOOD),
        }
    }

    /// Returns the frames that were taken.
    #[inline(always)]
    fn deliver_each(&self, burst: &Burst<'_>, plan: &Plan) -> u64 {
        let mut taken = 0;
        for (number, mask) in plan.ports.iter() {
            if let Some(port) = self.ports[..]
                .get(usize::from(number))
                .and_then(|p| p.get())
            {
                taken |= burst.deliver(port, mask);
            }
        }
        taken
    }

    /// The same where some frames go to all other ports: each gets those and its own, in order.
    #[inline(never)]
    fn deliver_flood(&self, from: u16, burst: &Burst<'_>, plan: &Plan) -> u64 {
        let others = self.ports().filter(|(number, _)| *number != from);
        others.fold(0, |taken, (number, port)| {
            let mask = burst.affordable(plan.flood) | plan.ports.of(number);
            taken | burst.deliver(port, mask)
        })
    }
}

/// Where the frames of a burst go.
#[derive(Debug, Default)]
struct Plan {
    ports: Groups,
    /// Those that go everywhere.
    flood: u64,
    bytes: u64,
    asks: Asks,
}

/// Both MAC addresses of a frame: its first eight bytes, which hold the destination, and eight from
/// the fifth on, which hold the source. Of each byte one copy counts, whatever the guest does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Addresses(u64, u64);

impl Addresses {
    const LEN: usize = 12;

    #[inline(always)]
    fn of(payload: &[GuestSlice<'_>]) -> Self {
        match payload.first() {
            Some(first) if first.len() >= Self::LEN => Self::at(first),
            _ => Self::gathered(payload),
        }
    }

    /// In a slice that is long enough.
    #[inline(always)]
    fn at(frame: &GuestSlice<'_>) -> Self {
        let [mut begin, mut end] = [[0; 8]; 2];
        frame.copy_to(&mut begin);
        frame.skip(4).copy_to(&mut end);
        Self(u64::from_le_bytes(begin), u64::from_le_bytes(end))
    }

    #[cold]
    fn gathered(payload: &[GuestSlice<'_>]) -> Self {
        let mut bytes = [0; Self::LEN];
        let mut len = 0;
        for slice in payload {
            len += slice.copy_to(&mut bytes[len..]);
        }
        Self::at(&GuestSlice::private(&mut bytes))
    }

    #[inline(always)]
    fn destination(self) -> Mac {
        Mac(self.0 & 0xffff_ffff_ffff)
    }

    #[inline(always)]
    fn source(self) -> Mac {
        Mac(self.1 >> 16)
    }
}
