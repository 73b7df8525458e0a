//! The delivery of a burst: chooses the queue pair of a port for each frame, and converts the frame
//! where the receiver needs it.

use std::cell::{Cell, Ref, RefCell};
use std::sync::Arc;

use arrayvec::ArrayVec;
use parking_lot::Mutex;
use virtionet_virtio_net::header::{FrameFormat, VIRTIO_NET_HDR_F_NEEDS_CSUM, VnetHeader};
use virtionet_virtio_net::offload::{
    OffloadFault, Segmenter, can_pass_unmodified, conversion_work,
};
use virtionet_virtio_net::stats::{VringStats, to_u64};
use virtionet_virtio_net::uplink::{MAX_BURST, TxFrame};

use super::Port;
use super::flow::{NO_FLOW, hash_flow};
use super::flow_table::PairSet;
use super::host_port::HostPort;
use super::masks::{FrameGroups, contiguous_range, iter_bits};
use super::port::DevicePort;

/// What the floods, conversions and receivers' descriptors of one burst may cost, as a number of
/// bytes that can be copied in the same time: about half a millisecond, whatever the number of
/// receivers. Copies beyond that are not made (`dropped_over_budget`).
const WORK_BUDGET: usize = 4 << 20;
/// The cost of a further copy of a frame beside that of its bytes.
const COPY_COST: usize = 256;
/// The cost of a descriptor that a receiver's ring makes the switch read.
const DESCRIPTOR_COST: usize = 128;

/// The port from which a burst comes.
#[derive(Debug)]
pub(super) struct IngressPort {
    /// The port's number.
    pub(super) number: u16,
    /// The device's port and the index of the queue pair, where a device is the sender.
    device: Option<(Arc<DevicePort>, u16)>,
    /// For frames that a receiver does not accept unmodified.
    segmenter: Mutex<Segmenter>,
}

impl IngressPort {
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

/// The offloads that the headers of a burst request: all bits of their flags and GSO types.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct OffloadRequests {
    flags: u8,
    gso: u8,
}

impl OffloadRequests {
    #[inline(always)]
    pub(super) fn add(&mut self, header: &VnetHeader) {
        self.flags |= header.flags();
        self.gso |= header.gso_type();
    }

    /// Whether a receiver accepts all such headers unmodified; if not, each header is checked.
    #[inline(always)]
    fn is_supported_by(self, format: FrameFormat) -> bool {
        self.gso == 0
            && (self.flags == 0 || self.flags == VIRTIO_NET_HDR_F_NEEDS_CSUM && format.csum)
    }
}

/// One burst, its sender, and the state of its delivery.
pub(super) struct BurstDelivery<'a> {
    frames: &'a [TxFrame<'a>],
    from: &'a IngressPort,
    now: u32,
    seed: u64,
    requests: OffloadRequests,
    /// The counters of the sender.
    stats: &'a VringStats,
    /// The mask of the frames that were dropped and counted.
    dropped: Cell<u64>,
    /// The remaining part of [`WORK_BUDGET`]. The copy of a frame to its only receiver is free.
    budget_left: Cell<usize>,
    /// What the only receiver of all frames calls when it has copied them.
    release: Option<RefCell<&'a mut dyn FnMut()>>,
    /// The flow of each frame; empty until it is needed.
    flows: RefCell<ArrayVec<u64, MAX_BURST>>,
}

impl<'a> BurstDelivery<'a> {
    /// Prepares the delivery of `frames` (at most [`MAX_BURST`]), whose headers request `requests`.
    /// `seed` is the seed of the flow hash.
    #[inline(always)]
    pub(super) fn new(
        from: &'a IngressPort,
        frames: &'a [TxFrame<'a>],
        requests: OffloadRequests,
        seed: u64,
        now: u32,
        stats: &'a VringStats,
    ) -> Self {
        Self {
            frames,
            from,
            now,
            seed,
            requests,
            stats,
            dropped: Cell::new(0),
            budget_left: Cell::new(WORK_BUDGET),
            release: None,
            flows: RefCell::default(),
        }
    }

    /// The same delivery, in which no frame has a second receiver, so that one that gets all frames may
    /// call `release`.
    #[inline(always)]
    pub(super) fn with_release(mut self, release: &'a mut dyn FnMut()) -> Self {
        self.release = Some(RefCell::new(release));
        self
    }

    /// The mask of the frames that were dropped and counted.
    #[inline(always)]
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.get()
    }

    /// Records the pair on which the sending guest transmits each flow, so that replies arrive
    /// there. A guest with one pair needs no table.
    #[inline(always)]
    pub(super) fn learn_flows(&self) {
        let Some((port, pair)) = &self.from.device else {
            return;
        };
        if !port.attached().has_several() {
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
            let flows = frames.map(|frame| hash_flow(frame.payload, self.seed));
            self.flows.borrow_mut().extend(flows);
        }
        self.flows.borrow()
    }

    /// Delivers the frames in `mask` to `port`; returns the mask of those that it accepted.
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
        if !pairs.has_several() {
            return self.push(port, pairs.first(), mask);
        }
        let mut groups = FrameGroups::default();
        self.steer(port, pairs, mask, &mut groups);
        groups.iter().fold(0, |delivered, (pair, mask)| {
            delivered | self.push(port, pair, mask)
        })
    }

    #[inline(never)]
    fn deliver_host(&self, port: &HostPort, mask: u64) -> u64 {
        let sent = iter_bits(mask).filter(|&n| port.send(&self.sanitized_frame(n), self.stats));
        let delivered = sent.fold(0, |delivered, n| delivered | 1 << n);
        self.mark_dropped(mask & !delivered);
        delivered
    }

    /// Takes `work` from the budget; where too little is left, counts a dropped copy and returns
    /// false.
    fn try_charge(&self, work: usize) -> bool {
        match self.budget_left.get().checked_sub(work) {
            Some(left) => self.budget_left.set(left),
            None => {
                self.stats.dropped_over_budget.add(1);
                return false;
            }
        }
        true
    }

    /// The mask of those frames in `mask` that the budget allows to be copied again.
    pub(super) fn within_budget(&self, mask: u64) -> u64 {
        let can = iter_bits(mask)
            .filter(|&n| self.try_charge(self.frames[n].len + COPY_COST))
            .fold(0, |mask, n| mask | 1 << n);
        self.mark_dropped(mask & !can);
        can
    }

    /// Counts the frames in `mask` as dropped because the budget is used up.
    #[cold]
    fn refuse(&self, mask: u64) -> u64 {
        let count = u64::from(mask.count_ones());
        self.stats.dropped_over_budget.add(count);
        self.mark_dropped(mask);
        0
    }

    fn mark_dropped(&self, mask: u64) {
        self.dropped.set(self.dropped.get() | mask);
    }

    /// Groups the frames in `mask` by the pair that they go to.
    fn steer(&self, port: &DevicePort, pairs: PairSet, mask: u64, groups: &mut FrameGroups) {
        let flows = self.flows();
        let (mut run, mut last, mut pair) = (0, NO_FLOW, 0);
        for n in iter_bits(mask) {
            let flow = flows.get(n).copied().unwrap_or(NO_FLOW);
            if flow != last || run == 0 {
                groups.add(pair, run);
                (run, last, pair) = (0, flow, self.select_pair(port, pairs, flow));
            }
            run |= 1 << n;
        }
        groups.add(pair, run);
    }

    #[inline(always)]
    fn select_pair(&self, port: &DevicePort, pairs: PairSet, flow: u64) -> u16 {
        let known = match flow {
            NO_FLOW => None,
            _ => port.flows().and_then(|table| table.find(flow, self.now)),
        };
        match (known, &self.from.device) {
            (Some(pair), _) if pairs.contains(pair) => pair,
            (_, Some((_, pair))) => pairs.nth_cyclic(u64::from(*pair)),
            (_, None) => pairs.nth_cyclic(flow >> 32),
        }
    }

    /// Pushes the frames in `mask` to one receiveq; returns the mask of those that were pushed.
    #[inline(always)]
    fn push(&self, port: &DevicePort, pair: u16, mask: u64) -> u64 {
        if self.budget_left.get() == 0 {
            return self.refuse(mask);
        }
        let format = port.format();
        match contiguous_range(mask) {
            _ if !self.requests.is_supported_by(format) => {
                return self.push_each(port, pair, mask, format);
            }
            Some(run) if run.len() == self.frames.len() => self.push_all(port, pair),
            Some(run) => self.push_frames(port, pair, &self.frames[run]),
            None => {
                let mut frames = ArrayVec::<TxFrame<'_>, MAX_BURST>::new();
                frames.extend(iter_bits(mask).map(|n| self.frames[n]));
                self.push_frames(port, pair, &frames);
            }
        }
        mask
    }

    /// Pushes all frames of the burst, which are released if nobody else gets any.
    #[inline(always)]
    fn push_all(&self, port: &DevicePort, pair: u16) {
        match &self.release {
            Some(release) => self.push_with(port, pair, self.frames, &mut **release.borrow_mut()),
            None => self.push_frames(port, pair, self.frames),
        }
    }

    /// Pushes `frames`, which stay readable.
    #[inline(always)]
    fn push_frames(&self, port: &DevicePort, pair: u16, frames: &[TxFrame<'_>]) {
        self.push_with(port, pair, frames, &mut || ());
    }

    /// Pushes `frames`, and takes the cost of the receiver's descriptors from the budget.
    #[inline(always)]
    fn push_with(
        &self,
        port: &DevicePort,
        pair: u16,
        frames: &[TxFrame<'_>],
        release: &mut dyn FnMut(),
    ) {
        let cost = port
            .push(pair, frames, release)
            .saturating_mul(DESCRIPTOR_COST);
        self.budget_left
            .set(self.budget_left.get().saturating_sub(cost));
    }

    /// The same where each header must be checked.
    #[inline(never)]
    fn push_each(&self, port: &DevicePort, pair: u16, mask: u64, format: FrameFormat) -> u64 {
        let mut ready = ArrayVec::<TxFrame<'_>, MAX_BURST>::new();
        let mut delivered = mask;
        for n in iter_bits(mask) {
            let frame = self.sanitized_frame(n);
            if can_pass_unmodified(&frame.header, &format) {
                ready.push(frame);
                continue;
            }
            // Earlier frames must be pushed first, to keep the order.
            self.push_frames(port, pair, &ready);
            ready.clear();
            if !self.try_charge(conversion_work(&frame)) {
                delivered &= !(1 << n);
                continue;
            }
            let emit = |frames: &[TxFrame<'_>]| self.push_frames(port, pair, frames);
            if let Err(fault) = self.convert(&frame, format, emit) {
                // The fault is counted once, even where the frame has several receivers.
                if self.dropped.get() & 1 << n == 0 {
                    fault.count(self.stats);
                }
                self.mark_dropped(1 << n);
                delivered &= !(1 << n);
            }
        }
        self.push_frames(port, pair, &ready);
        self.mark_dropped(mask & !delivered);
        delivered
    }

    /// Frame `n`, without the guest-supplied flags except NEEDS_CSUM, because a guest's statement
    /// that a checksum was verified (DATA_VALID) cannot be trusted.
    #[inline(always)]
    fn sanitized_frame(&self, n: usize) -> TxFrame<'_> {
        let mut frame = self.frames[n];
        if self.from.device.is_some() {
            frame.header.0[0] &= VIRTIO_NET_HDR_F_NEEDS_CSUM;
        }
        frame
    }

    /// Performs the offloads that the receiver did not negotiate.
    #[cold]
    fn convert(
        &self,
        frame: &TxFrame<'_>,
        format: FrameFormat,
        emit: impl FnMut(&[TxFrame<'_>]),
    ) -> Result<(), OffloadFault> {
        self.from.segmenter.lock().convert(frame, &format, emit)
    }

    /// The total length of the frames in `mask`.
    pub(super) fn bytes(&self, mask: u64) -> u64 {
        iter_bits(mask).map(|n| to_u64(self.frames[n].len)).sum()
    }
}
