//! A burst on its way: to which pair of a port its frames go, and as what.

use std::cell::{Cell, Ref, RefCell};
use std::sync::Arc;

use arrayvec::ArrayVec;
use parking_lot::Mutex;
use virtionet_virtio_net::header::{FrameFormat, VnetHeader};
use virtionet_virtio_net::offload::{OffloadFault, Segmenter, fits, most_frames};
use virtionet_virtio_net::port::{MAX_BURST, TxFrame};
use virtionet_virtio_net::stats::{RingStats, wide};

use super::Port;
use super::flow::{NO_FLOW, flow_of};
use super::host::HostPort;
use super::masks::{Groups, bits, run};
use super::port::DevicePort;
use super::steer::Pairs;

/// What floods and conversions of one burst may cost, in bytes copied: some ms at most, whoever is
/// to receive. Beyond it frames are dropped (`dropped_over_budget`).
const WORK: usize = 16 << 20;
/// What a segment costs beside its bytes.
const SEGMENT: usize = 512;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM.
const NEEDS_CSUM: u8 = 1;

/// Who sends.
#[derive(Debug)]
pub(super) struct Sender {
    /// The port's number.
    pub(super) number: u16,
    /// The device's port and pair, where it is one.
    device: Option<(Arc<DevicePort>, u16)>,
    /// For frames that their receiver does not take as they are.
    segmenter: Mutex<Segmenter>,
}

impl Sender {
    pub(super) fn device(number: u16, port: Arc<DevicePort>, pair: u16) -> Self {
        Self {
            number,
            device: Some((port, pair)),
            segmenter: Mutex::default(),
        }
    }

    pub(super) fn host(number: u16) -> Self {
        Self {
            number,
            device: None,
            segmenter: Mutex::default(),
        }
    }
}

/// What the headers of a burst ask for: all bits of their flags and GSO types.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asks {
    flags: u8,
    gso: u8,
}

impl Asks {
    #[inline(always)]
    pub(super) fn add(&mut self, header: &VnetHeader) {
        self.flags |= header.flags();
        self.gso |= header.gso_type();
    }

    /// Whether a receiver takes any such header as it is; `false` leads to a closer look.
    #[inline(always)]
    fn fit(self, format: FrameFormat) -> bool {
        self.gso == 0 && (self.flags == 0 || self.flags == NEEDS_CSUM && format.csum)
    }
}

/// What is handed over in one call, and by whom.
pub(super) struct Burst<'a> {
    frames: &'a [TxFrame<'a>],
    from: &'a Sender,
    now: u32,
    seed: u64,
    asks: Asks,
    /// The sender's.
    stats: &'a RingStats,
    /// Frames that were dropped and counted.
    refused: Cell<u64>,
    /// Work that it may still cost, beside one copy of each frame.
    left: Cell<usize>,
    /// Each frame's flow, once that was asked for.
    flows: RefCell<ArrayVec<u64, MAX_BURST>>,
}

impl<'a> Burst<'a> {
    /// `frames` (at most [`MAX_BURST`]), whose headers ask for `asks`; `seed` is what flows hash to.
    #[inline(always)]
    pub(super) fn new(
        from: &'a Sender,
        frames: &'a [TxFrame<'a>],
        asks: Asks,
        seed: u64,
        now: u32,
        stats: &'a RingStats,
    ) -> Self {
        Self {
            frames,
            from,
            now,
            seed,
            asks,
            stats,
            refused: Cell::new(0),
            left: Cell::new(WORK),
            flows: RefCell::default(),
        }
    }

    /// Frames that were dropped and counted.
    #[inline(always)]
    pub(super) fn refused(&self) -> u64 {
        self.refused.get()
    }

    /// A guest with several pairs is answered on the pair that it sends on.
    #[inline(always)]
    pub(super) fn learn_flows(&self) {
        let Some((port, pair)) = &self.from.device else {
            return;
        };
        if !port.attached().are_several() {
            return;
        }
        let Some(table) = port.flows() else { return };
        let mut last = NO_FLOW;
        for &flow in &*self.flows() {
            if flow != last {
                table.learn(flow, *pair, self.now);
                last = flow;
            }
        }
    }

    #[inline(always)]
    fn flows(&self) -> Ref<'_, ArrayVec<u64, MAX_BURST>> {
        if self.flows.borrow().is_empty() {
            let frames = self.frames.iter().take(MAX_BURST);
            let flows = frames.map(|frame| flow_of(frame.payload, self.seed));
            self.flows.borrow_mut().extend(flows);
        }
        self.flows.borrow()
    }

    /// Gives the frames in `mask` to `port`; returns those that it took.
    #[inline(always)]
    pub(super) fn deliver(&self, port: &Port, mask: u64) -> u64 {
        match port {
            Port::Device(port) => self.deliver_device(port, mask),
            Port::Host(port) => self.deliver_host(port, mask),
        }
    }

    #[inline(always)]
    fn deliver_device(&self, port: &DevicePort, mask: u64) -> u64 {
        let pairs = port.attached();
        if pairs.is_empty() || mask == 0 {
            return 0;
        }
        if !pairs.are_several() {
            return self.push(port, pairs.first(), mask);
        }
        let mut groups = Groups::default();
        self.steer(port, pairs, mask, &mut groups);
        groups
            .iter()
            .fold(0, |taken, (pair, mask)| taken | self.push(port, pair, mask))
    }

    #[inline(never)]
    fn deliver_host(&self, port: &HostPort, mask: u64) -> u64 {
        let sent = bits(mask).filter(|&n| port.send(&self.cleaned(n), self.stats));
        let taken = sent.fold(0, |taken, n| taken | 1 << n);
        self.refuse(mask & !taken);
        taken
    }

    /// Takes `work` from what one burst may cost, or counts a frame that would cost more.
    fn afford(&self, work: usize) -> bool {
        match self.left.get().checked_sub(work) {
            Some(left) => self.left.set(left),
            None => {
                self.stats.dropped_over_budget.add(1);
                return false;
            }
        }
        true
    }

    /// The frames in `mask` that may be copied once more.
    pub(super) fn affordable(&self, mask: u64) -> u64 {
        let can = bits(mask)
            .filter(|&n| self.afford(self.frames[n].len))
            .fold(0, |mask, n| mask | 1 << n);
        self.refuse(mask & !can);
        can
    }

    fn refuse(&self, mask: u64) {
        self.refused.set(self.refused.get() | mask);
    }

    /// The pairs that the frames in `mask` go to.
    fn steer(&self, port: &DevicePort, pairs: Pairs, mask: u64, groups: &mut Groups) {
        let flows = self.flows();
        let (mut run, mut last, mut pair) = (0, NO_FLOW, 0);
        for n in bits(mask) {
            let flow = flows.get(n).copied().unwrap_or(NO_FLOW);
            if flow != last || run == 0 {
                groups.add(pair, run);
                (run, last, pair) = (0, flow, self.pair_for(port, pairs, flow));
            }
            run |= 1 << n;
        }
        groups.add(pair, run);
    }

    #[inline(always)]
    fn pair_for(&self, port: &DevicePort, pairs: Pairs, flow: u64) -> u16 {
        let known = match flow {
            NO_FLOW => None,
            _ => port.flows().and_then(|table| table.find(flow, self.now)),
        };
        match (known, &self.from.device) {
            (Some(pair), _) if pairs.has(pair) => pair,
            (_, Some((_, pair))) => pairs.spread(u64::from(*pair)),
            (_, None) => pairs.spread(flow >> 32),
        }
    }

    /// Gives the frames in `mask` to one receiveq; returns those that could be given.
    #[inline(always)]
    fn push(&self, port: &DevicePort, pair: u16, mask: u64) -> u64 {
        let format = port.format();
        match run(mask) {
            _ if !self.asks.fit(format) => return self.push_each(port, pair, mask, format),
            Some(run) => port.push(pair, &self.frames[run]),
            None => {
                let mut frames = ArrayVec::<TxFrame<'_>, MAX_BURST>::new();
                frames.extend(bits(mask).map(|n| self.frames[n]));
                port.push(pair, &frames);
            }
        }
        mask
    }

    /// The same where their headers need a look.
    #[inline(never)]
    fn push_each(&self, port: &DevicePort, pair: u16, mask: u64, format: FrameFormat) -> u64 {
        let mut ready = ArrayVec::<TxFrame<'_>, MAX_BURST>::new();
        let mut taken = mask;
        for n in bits(mask) {
            let frame = self.cleaned(n);
            if fits(&frame.header, &format) {
                ready.push(frame);
                continue;
            }
            // What came before it goes before it.
            port.push(pair, &ready);
            ready.clear();
            if !self.afford(frame.len + most_frames(&frame) * SEGMENT) {
                taken &= !(1 << n);
                continue;
            }
            if let Err(fault) = self.convert(&frame, format, |frames| port.push(pair, frames)) {
                // Other receivers may have found the same.
                if self.refused.get() & 1 << n == 0 {
                    fault.count(self.stats);
                }
                self.refuse(1 << n);
                taken &= !(1 << n);
            }
        }
        port.push(pair, &ready);
        self.refuse(mask & !taken);
        taken
    }

    /// Frame `n`. A guest has a say in no flag but NEEDS_CSUM: that a checksum has been found right
    /// (DATA_VALID) is not its to tell.
    #[inline(always)]
    fn cleaned(&self, n: usize) -> TxFrame<'_> {
        let mut frame = self.frames[n];
        if self.from.device.is_some() {
            frame.header.0[0] &= NEEDS_CSUM;
        }
        frame
    }

    /// Does what the receiver's guest does not.
    #[cold]
    fn convert(
        &self,
        frame: &TxFrame<'_>,
        format: FrameFormat,
        emit: impl FnMut(&[TxFrame<'_>]),
    ) -> Result<(), OffloadFault> {
        self.from.segmenter.lock().convert(frame, &format, emit)
    }

    /// Bytes of the frames in `mask`.
    pub(super) fn bytes(&self, mask: u64) -> u64 {
        bits(mask).map(|n| wide(self.frames[n].len)).sum()
    }
}
