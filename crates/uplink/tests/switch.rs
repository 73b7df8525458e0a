//! A switch between real rings: the frames in each guest's receiveqs, and the counters.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use proptest::prelude::*;
use virtionet_guest::frame::{Checksum, Frame, FrameSpec, Transport, check};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::{self, DriverQueue, MODERN, OFFLOADS, PACKED};
use virtionet_guest::test_frontend::DriverQueuePair;
use virtionet_uplink::switch::Switch;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{MAX_BURST, Received, RxSink, TxFrame, Uplink, UplinkQueue};
use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue, TxQueue};
use virtionet_virtqueue::VirtqueueLayout;
use virtionet_virtqueue::memory::GuestMemory;

const LIMIT: Duration = Duration::from_secs(5);
const SIZE: u16 = 256;

/// A device's receiveq, in the place of the daemon's vring slot.
#[derive(Debug)]
struct TestReceiveq {
    queue: Mutex<RxQueue>,
    enabled: AtomicBool,
    stats: Arc<VringStats>,
    /// The number of frames of each push.
    pushes: Mutex<Vec<usize>>,
}

impl RxSink for TestReceiveq {
    fn push(&self, frames: &[TxFrame<'_>]) -> usize {
        self.push_releasing(frames, &mut || ())
    }

    fn push_releasing(&self, frames: &[TxFrame<'_>], release: &mut dyn FnMut()) -> usize {
        assert!(!frames.is_empty() && frames.len() <= MAX_BURST);
        self.pushes.lock().unwrap().push(frames.len());
        if self.enabled.load(Ordering::Relaxed) {
            let mut queue = self.queue.lock().unwrap();
            let pushed = queue.push_releasing(frames, release);
            pushed.unwrap().descriptors_read
        } else {
            let count = u64::try_from(frames.len()).unwrap();
            self.stats.dropped_disabled.add(count);
            0
        }
    }
}

/// The switches of a test, by name, and the number of devices.
#[derive(Default)]
struct Switches(BTreeMap<String, Arc<Switch>>, usize);

impl Switches {
    fn add_device_port(&mut self, name: &str) -> Arc<dyn Uplink> {
        let switch = self
            .0
            .entry(name.to_owned())
            .or_insert_with(|| Switch::new(name));
        self.1 += 1;
        let device = format!("net{}", self.1);
        Arc::new(switch.add_device_port(&device).unwrap())
    }
}

/// Both ends of a queue pair.
struct PairEnds {
    driver: DriverQueuePair,
    tx: TxQueue,
    rx: Arc<TestReceiveq>,
    uplink: Arc<dyn UplinkQueue>,
    stats: Arc<VringStats>,
}

/// A guest, its device and its port of a switch.
struct Guest {
    _ram: GuestRam,
    uplink: Arc<dyn Uplink>,
    pairs: Vec<PairEnds>,
}

impl Guest {
    fn new(switches: &mut Switches, switch: &str, pairs: u16, features: u64) -> Self {
        let uplink = switches.add_device_port(switch);
        uplink.set_format(Features(features).format()).unwrap();
        let config = net::DriverQueueConfig {
            tx_slot: 24 * 1024,
            ..net::DriverQueueConfig::new(SIZE, features)
        };
        let ram = GuestRam::new((config.memory() + 64 * 1024) * u64::from(pairs)).unwrap();
        let memory = Arc::new(ram.guest_memory().unwrap());
        let pairs = (0..pairs).map(|pair| {
            let mut driver = DriverQueuePair::new(&ram, &config).unwrap();
            driver.rx.fill().unwrap();
            let device = |queue| queue_config(&ram, &memory, queue, features);
            let rx = device(&driver.rx.queue);
            let rx = Arc::new(TestReceiveq {
                stats: Arc::clone(&rx.stats),
                queue: Mutex::new(RxQueue::new(rx).unwrap()),
                enabled: AtomicBool::new(true),
                pushes: Mutex::default(),
            });
            let tx = device(&driver.tx.queue);
            let weak: Weak<TestReceiveq> = Arc::downgrade(&rx);
            let queue = uplink.open_queue(pair, weak).unwrap();
            queue.set_attached(true).unwrap();
            PairEnds {
                stats: Arc::clone(&tx.stats),
                tx: TxQueue::new(tx).unwrap(),
                driver,
                rx,
                uplink: queue,
            }
        });
        Self {
            pairs: pairs.collect(),
            _ram: ram,
            uplink,
        }
    }

    /// Transmits `frames` on a pair, in as many bursts as are needed.
    fn send(&mut self, pair: usize, frames: &[Frame]) {
        let ends = &mut self.pairs[pair];
        for some in frames.chunks(usize::from(SIZE) / 2) {
            ends.driver.tx.send_all(some, Duration::ZERO).unwrap();
            while ends.tx.send(Some(&*ends.uplink)).unwrap().chains > 0 {}
            ends.driver.tx.reclaim().unwrap();
        }
    }

    /// The frames that arrived on a pair since the last call.
    fn received(&mut self, pair: usize) -> Vec<Vec<u8>> {
        let frames = self.pairs[pair].driver.rx.receive_frames().unwrap();
        frames.into_iter().map(|frame| frame.bytes).collect()
    }

    /// The sizes of the pushes to a pair since the last call.
    fn pushes(&self, pair: usize) -> Vec<usize> {
        std::mem::take(&mut self.pairs[pair].rx.pushes.lock().unwrap())
    }

    fn tx(&self) -> &VringStats {
        &self.pairs[0].stats
    }
}

fn queue_config(
    ram: &GuestRam,
    memory: &Arc<GuestMemory>,
    queue: &DriverQueue,
    features: u64,
) -> QueueConfig {
    let setup = queue.setup().unwrap();
    let at = setup.addresses;
    let user = |addr| ram.user_addr(addr).unwrap();
    QueueConfig {
        layout: VirtqueueLayout {
            size: setup.size,
            desc: user(at.descriptors),
            avail: user(at.driver),
            used: user(at.device),
        },
        base: setup.base,
        features: Features(features),
        memory: Arc::clone(memory),
        stats: Arc::default(),
        record: None,
    }
}

fn mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

const ALL: u8 = 0xff;

/// A packet to one guest, or to all.
fn spec(from: u8, to: u8) -> FrameSpec {
    FrameSpec {
        source_mac: mac(from),
        target_mac: if to == ALL { [0xff; 6] } else { mac(to) },
        source: [10, 0, 0, from].into(),
        target: [10, 0, 0, to].into(),
        ..FrameSpec::v4(Transport::Udp)
    }
}

fn frame(from: u8, to: u8, payload: &[u8]) -> Frame {
    spec(from, to).build(payload).unwrap()
}

fn guests<const N: usize>(switches: &mut Switches, pairs: u16) -> [Guest; N] {
    [(); N].map(|()| Guest::new(switches, "s", pairs, MODERN))
}

#[test]
fn burst_for_one_receiver_is_one_push() {
    let mut switches = Switches::default();
    let [mut a, mut b, mut c] = guests(&mut switches, 1);
    b.send(0, &[frame(1, ALL, b"here")]);
    a.received(0);
    c.received(0);
    c.pushes(0);
    let burst: Vec<Frame> = (0..64).map(|n| frame(0, 1, &[n; 60])).collect();
    a.send(0, &burst);
    assert_eq!(b.pushes(0), [64]);
    let bytes: Vec<_> = burst.iter().map(|f| f.bytes.clone()).collect();
    assert_eq!(b.received(0), bytes);
    assert!(c.pushes(0).is_empty());
    assert!(c.received(0).is_empty());
    let total: usize = bytes.iter().map(Vec::len).sum();
    assert_eq!(a.tx().frames.get(), 64);
    assert_eq!(a.tx().bytes.get(), u64::try_from(total).unwrap());
    assert_eq!(b.pairs[0].rx.stats.frames.get(), 64);
}

#[test]
fn frames_for_several_receivers_are_sorted_and_pushed_once_each() {
    let mut switches = Switches::default();
    let [mut a, mut b, mut c] = guests(&mut switches, 1);
    b.send(0, &[frame(1, ALL, b"b")]);
    c.send(0, &[frame(2, ALL, b"c")]);
    for guest in [&mut a, &mut b, &mut c] {
        guest.received(0);
        guest.pushes(0);
    }
    // The frames go to each guest in turn, and sometimes to all.
    let to = |n: u8| match n % 8 {
        7 => ALL,
        n => 1 + n % 2,
    };
    let burst: Vec<Frame> = (0..60).map(|n| frame(0, to(n), &[n; 60])).collect();
    a.send(0, &burst);
    for (who, guest) in [(1, &mut b), (2, &mut c)] {
        let for_it = |n: &u8| [who, ALL].contains(&to(*n));
        let want: Vec<_> = (0..60)
            .filter(for_it)
            .map(|n| burst[usize::from(n)].bytes.clone())
            .collect();
        assert_eq!(guest.pushes(0), [want.len()]);
        assert_eq!(guest.received(0), want);
    }
    assert_eq!(a.tx().frames.get(), 60);
}

#[test]
fn frames_without_receiver_are_counted() {
    let mut switches = Switches::default();
    let [mut a] = guests(&mut switches, 1);
    a.send(0, &[frame(0, 1, b"alone"), frame(0, ALL, b"alone")]);
    assert_eq!((a.tx().frames.get(), a.tx().dropped_no_port.get()), (0, 2));
    assert_eq!(a.tx().bytes.get(), 0);
    let [mut b] = guests(&mut switches, 1);
    b.send(0, &[frame(1, ALL, b"hello")]);
    assert_eq!(a.received(0).len(), 1);
    // This frame is addressed to the sender itself.
    a.send(0, &[frame(0, 0, b"to the sender")]);
    assert_eq!(a.tx().dropped_no_port.get(), 3);
    assert!(a.received(0).is_empty());
    // A known port without attached pairs receives nothing, and no other port does instead.
    let [mut c] = guests(&mut switches, 1);
    b.pairs[0].uplink.set_attached(false).unwrap();
    a.send(0, &[frame(0, 1, b"b"), frame(0, ALL, b"all")]);
    assert_eq!((a.tx().frames.get(), a.tx().dropped_no_port.get()), (1, 4));
    assert_eq!(c.received(0).len(), 1);
    assert!(b.received(0).is_empty());
    // A ring that is disabled between decision and push counts the frame.
    b.pairs[0].uplink.set_attached(true).unwrap();
    b.pairs[0].rx.enabled.store(false, Ordering::Relaxed);
    a.send(0, &[frame(0, 1, b"b")]);
    assert_eq!(b.pairs[0].rx.stats.dropped_disabled.get(), 1);
    // A receiver that was dropped receives nothing and does no harm.
    b.pairs.clear();
    a.send(0, &[frame(0, 1, b"b"), frame(0, ALL, b"all")]);
    assert_eq!(c.received(0).len(), 1);
}

#[test]
fn receiver_without_buffers_loses_only_its_own_frames() {
    let mut switches = Switches::default();
    let [mut a, mut b, mut c] = guests(&mut switches, 1);
    b.send(0, &[frame(1, ALL, b"b")]);
    c.send(0, &[frame(2, ALL, b"c")]);
    b.received(0);
    c.received(0);
    let to_b: Vec<Frame> = (0..200).map(|n| frame(0, 1, &[n; 60])).collect();
    for round in 0..5 {
        a.send(0, &to_b);
        a.send(0, &[frame(0, 2, &[round])]);
        assert_eq!(c.received(0).len(), 1);
    }
    let stats = Arc::clone(&b.pairs[0].rx.stats);
    assert_eq!(b.received(0).len(), usize::from(SIZE));
    assert_eq!(stats.dropped_no_buffer.get(), 1000 - u64::from(SIZE));
    assert_eq!(a.tx().frames.get(), 1005);
    assert_eq!(a.tx().dropped_no_port.get(), 0);
}

#[test]
fn flow_is_answered_on_the_pair_on_which_it_was_transmitted() {
    let mut switches = Switches::default();
    let [mut a, mut b] = guests(&mut switches, 4);
    let flow = |from, to, port| FrameSpec {
        source_port: port,
        target_port: port,
        ..spec(from, to)
    };
    b.send(0, &[frame(1, ALL, b"b")]);
    (0..4).for_each(|pair| drop(a.received(pair)));
    // New flows go from pair k to pair k.
    for pair in 0..4 {
        a.send(pair, &[flow(0, 1, 7).build(b"new").unwrap()]);
        assert_eq!(b.received(pair).len(), 1, "{pair}");
    }
    // Known flows go to the pair on which the receiver transmits them.
    for port in 0..64 {
        let pair = usize::from(port) % 4;
        b.send(pair, &[flow(1, 0, 1000 + port).build(b"mine").unwrap()]);
    }
    let replies = |ports: std::ops::Range<u16>| -> Vec<Frame> {
        ports
            .map(|port| flow(0, 1, 1000 + port).build(b"reply").unwrap())
            .collect()
    };
    (0..4).for_each(|pair| drop(b.pushes(pair)));
    a.send(1, &replies(0..64));
    for pair in 0..4 {
        assert_eq!(b.pushes(pair).len(), 1, "{pair}");
        // Two flows may have the same entry of the table; one of them is then steered as new.
        assert!(b.received(pair).len() >= 13, "{pair}");
    }
    // When that pair is detached, the flow goes to another one.
    b.pairs[2].uplink.set_attached(false).unwrap();
    a.send(0, &replies(0..64));
    assert!(b.received(2).is_empty() && b.pushes(2).is_empty());
    assert!(b.received(0).len() >= 27);
    b.pairs[2].uplink.set_attached(true).unwrap();
    a.send(0, &replies(0..64));
    assert!(b.received(2).len() >= 13);
}

/// The cost of a flood to many ports is limited; beyond the limit no copies are made.
#[test]
fn flood_of_large_frames_costs_no_more_than_its_budget() {
    const RECEIVERS: usize = 12;
    const BUDGET: usize = 4 << 20;
    let mut switches = Switches::default();
    let [mut a, others @ ..] = guests::<{ RECEIVERS + 1 }>(&mut switches, 1);
    let burst = vec![frame(0, ALL, &[7; 8_000]); MAX_BURST];
    a.send(0, &burst);
    let pushed: usize = others.iter().flat_map(|guest| guest.pushes(0)).sum();
    // A copy costs its bytes, and its descriptors beside those.
    let copied = pushed * burst[0].bytes.len();
    assert!((BUDGET / 10 * 9..=BUDGET).contains(&copied), "{copied}");
    let left_out = u64::try_from(RECEIVERS * MAX_BURST - pushed).unwrap();
    assert_eq!(a.tx().dropped_over_budget.get(), left_out);
    // Each frame reached at least one port.
    assert_eq!((a.tx().frames.get(), a.tx().dropped_no_port.get()), (64, 0));
}

#[test]
fn receiver_gets_only_offloads_that_it_negotiated() {
    let mut switches = Switches::default();
    let mut new = |features| Guest::new(&mut switches, "s", 1, features);
    let [
        mut sender,
        mut plain,
        mut without_guest_offloads,
        mut packed,
    ] = [
        MODERN,
        MODERN & !OFFLOADS,
        // Only VERSION_1 and CSUM.
        1 << 32 | 1,
        MODERN | PACKED,
    ]
    .map(&mut new);
    let large = |n: u8| {
        let tso = FrameSpec {
            checksum: Checksum::Partial,
            gso_size: Some(1400),
            sequence: 1000,
            ..FrameSpec {
                transport: Transport::Tcp,
                ..spec(0, ALL)
            }
        };
        tso.build(&vec![n; 20_000]).unwrap()
    };
    let csum = FrameSpec {
        checksum: Checksum::Partial,
        ..spec(0, ALL)
    };
    let csum = csum.build(b"partial checksum").unwrap();
    // A guest that claims that its own checksum was verified (DATA_VALID).
    let mut claimed = frame(0, ALL, b"claimed");
    claimed.header.flags = virtionet_guest::header::VIRTIO_NET_HDR_F_DATA_VALID;
    let sent = [large(1), csum.clone(), large(2), claimed.clone()];
    sender.send(0, &sent);

    let got = packed.pairs[0].driver.rx.receive_frames().unwrap();
    for (got, sent) in got.iter().zip(&sent) {
        assert_eq!(got.bytes, sent.bytes);
        let flags = sent.header.flags & virtionet_guest::header::VIRTIO_NET_HDR_F_NEEDS_CSUM;
        assert_eq!(
            (got.header.flags, got.header.gso_type),
            (flags, sent.header.gso_type)
        );
    }
    assert_eq!(got.len(), 4);
    for guest in [&mut plain, &mut without_guest_offloads] {
        let got = guest.pairs[0].driver.rx.receive_frames().unwrap();
        // 20,000 bytes need 15 segments of 1,400.
        assert_eq!(got.len(), 15 + 1 + 15 + 1);
        for frame in &got {
            check(frame).unwrap();
            assert_eq!((frame.header.flags, frame.header.gso_type), (0, 0));
        }
        let payload = |some: &[Frame]| -> Vec<u8> {
            let parts = some
                .iter()
                .map(|f| f.bytes[check(f).unwrap().payload].to_vec());
            parts.flatten().collect()
        };
        assert_eq!(payload(&got[..15]), [1; 20_000]);
        assert_eq!(payload(&got[16..31]), [2; 20_000]);
        assert_eq!(payload(&got[15..16]), b"partial checksum");
        assert_eq!(got[31].bytes, claimed.bytes);
    }
    assert_eq!(sender.tx().frames.get(), 4);

    // An impossible request is dropped where it would have to be performed, and counted.
    let mut odd = csum;
    odd.header.csum_start = 0;
    odd.bytes[..6].copy_from_slice(&mac(9));
    sender.send(0, &[odd]);
    assert_eq!(packed.received(0).len(), 1);
    assert!(plain.received(0).is_empty());
    // A frame counts once, whatever the number of receivers.
    assert_eq!(sender.tx().offload_invalid.get(), 1);
}

#[test]
fn switches_are_independent() {
    let mut switches = Switches::default();
    let mut new = |switch| Guest::new(&mut switches, switch, 1, MODERN);
    let [mut a, mut b] = ["one", "one"].map(&mut new);
    let [mut c, mut d] = ["two", "two"].map(&mut new);
    a.send(0, &[frame(0, ALL, b"one")]);
    c.send(0, &[frame(0, ALL, b"two")]);
    assert_eq!(b.received(0), [frame(0, ALL, b"one").bytes]);
    assert_eq!(d.received(0), [frame(0, ALL, b"two").bytes]);
    assert!(a.received(0).is_empty() && c.received(0).is_empty());
}

#[test]
fn switch_port_has_nothing_to_poll_or_receive() {
    let mut switches = Switches::default();
    let [a] = guests(&mut switches, 1);
    assert!(a.pairs[0].uplink.poll_fd().is_none());
    assert_eq!(a.pairs[0].uplink.receive(&[], &mut [0]), Received::Empty);
    a.uplink.set_mtu(9000).unwrap();
    let too_many = a
        .uplink
        .open_queue(128, virtionet_virtio_net::uplink::null_rx_sink());
    assert!(too_many.unwrap_err().to_string().contains("pair 128"));
}

#[test]
fn concurrent_senders_lose_and_mix_no_frames() {
    let mut switches = Switches::default();
    let [mut sink, a, b, c] = guests(&mut switches, 1);
    sink.send(0, &[frame(0, ALL, b"sink")]);
    const ROUNDS: u8 = 200;
    let left = std::sync::atomic::AtomicUsize::new(3);
    let got = std::thread::scope(|scope| {
        for (who, mut guest) in (1..).zip([a, b, c]) {
            let left = &left;
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let burst: Vec<Frame> =
                        (0..16).map(|n| frame(who, 0, &[who, round, n])).collect();
                    guest.send(0, &burst);
                }
                left.fetch_sub(1, Ordering::Release);
            });
        }
        let mut got = Vec::new();
        let end = std::time::Instant::now() + LIMIT;
        loop {
            let last = left.load(Ordering::Acquire) == 0;
            got.extend(sink.received(0));
            if last || std::time::Instant::now() > end {
                return got;
            }
        }
    });
    // The frames of each sender are in order, and missing ones were dropped without a buffer.
    let mut last = BTreeMap::new();
    for bytes in &got {
        let [who, round, n] = bytes[42..45].try_into().unwrap();
        let now = u16::from(round) * 16 + u16::from(n);
        let before = last.insert(who, now);
        assert!(before.is_none_or(|before| before < now), "{who}: {now}");
    }
    let lost = sink.pairs[0].rx.stats.dropped_no_buffer.get();
    let total = u64::try_from(got.len()).unwrap() + lost;
    assert_eq!(total, 3 * u64::from(ROUNDS) * 16);
}

#[test]
fn switch_without_tap_has_no_host_port_forwarder() {
    let mut switches = Switches::default();
    let _guests: [Guest; 2] = guests(&mut switches, 1);
    assert!(switches.0["s"].host_port_forwarder().is_none());
}

/// An event on a switch.
#[derive(Debug, Clone)]
enum Action {
    /// A guest transmits a burst on a pair: the destination, the flow, the length.
    Send(u8, usize, Vec<(u8, u16, usize)>),
    /// A guest's pair is attached or detached.
    Attach(u8, usize, bool),
}

const GUESTS: u8 = 3;
const PAIRS: u16 = 3;

fn action() -> impl Strategy<Value = Action> {
    let pair = 0..usize::from(PAIRS);
    let to = prop_oneof![6 => 0..GUESTS, 1 => Just(ALL), 1 => Just(9)];
    let burst = proptest::collection::vec((to, 0_u16..4, 0_usize..3000), 1..20);
    prop_oneof![
        4 => (0..GUESTS, pair.clone(), burst).prop_map(|(a, b, c)| Action::Send(a, b, c)),
        1 => (0..GUESTS, pair, any::<bool>()).prop_map(|(a, b, c)| Action::Attach(a, b, c)),
    ]
}

/// A simple model of the switch.
#[derive(Default)]
struct Model {
    known: [bool; GUESTS as usize],
    attached: BTreeMap<(u8, usize), bool>,
}

impl Model {
    fn has_pairs(&self, guest: u8) -> bool {
        self.attached
            .iter()
            .any(|((owner, _), attached)| *owner == guest && *attached)
    }

    /// The guests that receive a frame.
    fn receivers(&self, from: u8, to: u8) -> Vec<u8> {
        let known = self.known.get(usize::from(to)).copied().unwrap_or(false);
        (0..GUESTS)
            .filter(|&guest| guest != from && (!known || guest == to) && self.has_pairs(guest))
            .collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_frame_reaches_its_receivers_once_and_in_order(
        acts in proptest::collection::vec(action(), 1..40),
    ) {
        let mut switches = Switches::default();
        let mut all: [Guest; GUESTS as usize] = guests(&mut switches, PAIRS);
        let mut model = Model::default();
        for guest in 0..GUESTS {
            for pair in 0..usize::from(PAIRS) {
                model.attached.insert((guest, pair), true);
            }
        }
        let mut serial = 0_u32;
        for act in acts {
            let (from, pair, burst) = match act {
                Action::Attach(guest, pair, attached) => {
                    let ends = &all[usize::from(guest)].pairs[pair];
                    ends.uplink.set_attached(attached).unwrap();
                    model.attached.insert((guest, pair), attached);
                    continue;
                }
                Action::Send(from, pair, burst) => (from, pair, burst),
            };
            let sender = &mut all[usize::from(from)];
            let before = (sender.pairs[pair].stats.frames.get(), sender.pairs[pair].stats.dropped_no_port.get());
            model.known[usize::from(from)] = true;
            // By receiver and flow: the serial numbers that must arrive, in order.
            let mut want: BTreeMap<(u8, u16), Vec<u32>> = BTreeMap::new();
            let mut carried = 0;
            let mut frames = Vec::new();
            for (to, flow, len) in burst {
                serial += 1;
                let receivers = model.receivers(from, to);
                carried += u64::from(!receivers.is_empty());
                for receiver in receivers {
                    want.entry((receiver, flow)).or_default().push(serial);
                }
                let built = FrameSpec { source_port: flow, target_port: flow, ..spec(from, to) };
                let payload = [&serial.to_le_bytes()[..], &vec![0x5a; len]].concat();
                frames.push(built.build(&payload).unwrap());
            }
            let count = u64::try_from(frames.len()).unwrap();
            sender.send(pair, &frames);
            let stats = &sender.pairs[pair].stats;
            prop_assert_eq!(stats.frames.get() - before.0, carried);
            prop_assert_eq!(stats.dropped_no_port.get() - before.1, count - carried);
            for receiver in 0..GUESTS {
                let mut got: BTreeMap<u16, Vec<u32>> = BTreeMap::new();
                for pair in 0..usize::from(PAIRS) {
                    let bytes = all[usize::from(receiver)].received(pair);
                    prop_assert!(bytes.is_empty() || model.attached[&(receiver, pair)]);
                    let mut last = 0;
                    for bytes in bytes {
                        let flow = u16::from_be_bytes(bytes[34..36].try_into().unwrap());
                        let serial = u32::from_le_bytes(bytes[42..46].try_into().unwrap());
                        prop_assert!(serial > last, "{} came after {}", serial, last);
                        last = serial;
                        let sent = frames.iter().any(|frame| frame.bytes == bytes);
                        prop_assert!(sent, "frame {} was changed", serial);
                        got.entry(flow).or_default().push(serial);
                    }
                }
                for flow in 0..4 {
                    let got = got.remove(&flow).unwrap_or_default();
                    let want = want.remove(&(receiver, flow)).unwrap_or_default();
                    // Broadcasts are flows of their own and may arrive on another pair.
                    let mut sorted = got.clone();
                    sorted.sort_unstable();
                    prop_assert_eq!(sorted, want);
                }
            }
        }
    }
}
