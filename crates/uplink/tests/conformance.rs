//! The conformance suite: checks for every uplink what the documentation of the uplink traits
//! requires. A new uplink needs a [`Fixture`] here and a test that calls [`conforms`].
#![allow(clippy::unwrap_used, clippy::panic)]

mod host;

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, Weak, mpsc};
use std::thread;
use std::time::Duration;

use host::{ETHERTYPE, PacketSocket, in_namespaces, open_tap, run};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtionet_uplink::null::Null;
use virtionet_uplink::switch::Switch;
use virtionet_virtio_net::header::{FrameFormat, VNET_HEADER_LEN, VnetHeader};
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{
    MAX_BURST, Received, RxSink, TxFrame, Uplink, UplinkQueue, null_rx_sink,
};
use virtionet_virtqueue::memory::GuestSlice;

/// A duration that is far longer than all calls take if none blocks.
const LIMIT: Duration = Duration::from_secs(20);

/// An uplink and its other end.
struct Fixture {
    uplink: Arc<dyn Uplink>,
    kind: &'static str,
    other_end: Box<dyn OtherEnd>,
    /// The counter of the frames that are dropped once the other end has failed; `None` where the
    /// uplink never drops a frame.
    drop_counter: Option<&'static str>,
}

/// The other end of an uplink, where its frames arrive and from where frames are sent to it.
trait OtherEnd {
    /// The next frames that arrived here; `None` where frames cannot be observed.
    fn next_frames(&self, count: usize) -> Option<Vec<Vec<u8>>>;

    /// Sends a frame to the uplink; returns false where the uplink never receives one.
    fn send(&self, frame: &[u8]) -> bool;

    /// Makes it impossible to carry frames.
    fn fail(&mut self);
}

/// A receiveq that keeps the frames that are pushed to it.
#[derive(Debug, Default)]
struct RecordingSink(Mutex<Vec<Vec<u8>>>);

impl RecordingSink {
    fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl RxSink for RecordingSink {
    fn push(&self, frames: &[TxFrame<'_>]) -> usize {
        assert!(frames.len() <= MAX_BURST);
        let copies = frames.iter().map(|frame| {
            let mut bytes = vec![0; frame.len];
            let mut at = 0;
            for slice in frame.payload {
                at += slice.copy_to(&mut bytes[at..]);
            }
            bytes
        });
        self.0.lock().unwrap().extend(copies);
        frames.len()
    }
}

/// A TAP, whose other end is a raw socket of the host.
struct TapEnd(PacketSocket);

impl OtherEnd for TapEnd {
    fn next_frames(&self, count: usize) -> Option<Vec<Vec<u8>>> {
        Some((0..count).map(|_| self.0.next()).collect())
    }

    fn send(&self, frame: &[u8]) -> bool {
        self.0.send(frame);
        true
    }

    fn fail(&mut self) {
        run("ip link set vt0 down");
    }
}

/// A switch, whose other end is a second device's port.
struct SwitchEnd {
    queue: Arc<dyn UplinkQueue>,
    sink: Arc<RecordingSink>,
}

impl OtherEnd for SwitchEnd {
    fn next_frames(&self, count: usize) -> Option<Vec<Vec<u8>>> {
        let frames = self.sink.take();
        assert_eq!(frames.len(), count);
        Some(frames)
    }

    fn send(&self, frame: &[u8]) -> bool {
        transmit(&*self.queue, &[frame.to_vec()], usize::MAX);
        true
    }

    fn fail(&mut self) {
        self.queue.set_attached(false).unwrap();
    }
}

/// The null uplink, which has no other end.
struct NoEnd;

impl OtherEnd for NoEnd {
    fn next_frames(&self, _count: usize) -> Option<Vec<Vec<u8>>> {
        None
    }

    fn send(&self, _frame: &[u8]) -> bool {
        false
    }

    fn fail(&mut self) {}
}

fn tap_fixture() -> Fixture {
    let uplink = host::eventually(|| open_tap("vt0").ok());
    Fixture {
        other_end: Box::new(TapEnd(PacketSocket::on("vt0"))),
        uplink,
        kind: "tap",
        drop_counter: Some("dropped_uplink_down"),
    }
}

fn switch_fixture() -> Fixture {
    let switch = Switch::new("s");
    let uplink = Arc::new(switch.add_device_port("a").unwrap());
    let port = switch.add_device_port("b").unwrap();
    let sink = Arc::new(RecordingSink::default());
    let weak: Weak<RecordingSink> = Arc::downgrade(&sink);
    let queue = port.open_queue(0, weak).unwrap();
    queue.set_attached(true).unwrap();
    Fixture {
        other_end: Box::new(SwitchEnd { queue, sink }),
        uplink,
        kind: "switch",
        drop_counter: Some("dropped_no_port"),
    }
}

fn null_fixture() -> Fixture {
    Fixture {
        uplink: Arc::new(Null),
        kind: "null",
        other_end: Box::new(NoEnd),
        drop_counter: None,
    }
}

/// Transmits frames as one burst, each in segments of `cut` bytes.
fn transmit(queue: &dyn UplinkQueue, frames: &[Vec<u8>], cut: usize) -> VringStats {
    let mut bytes = frames.to_vec();
    let segments: Vec<Vec<GuestSlice<'_>>> = bytes
        .iter_mut()
        .map(|frame| {
            let segments = frame.chunks_mut(cut.min(1 << 20));
            segments.map(GuestSlice::from_private).collect()
        })
        .collect();
    let burst: Vec<TxFrame<'_>> = segments
        .iter()
        .zip(frames)
        .map(|(payload, frame)| TxFrame {
            header: VnetHeader::default(),
            payload,
            len: frame.len(),
        })
        .collect();
    let stats = VringStats::default();
    queue.transmit(&burst, &stats);
    stats
}

/// The counters that are not 0.
fn counted(stats: &VringStats) -> Vec<(&'static str, u64)> {
    let names = VringStats::NAMES.iter().map(|(name, _)| *name);
    names
        .zip(stats.values())
        .filter(|(_, value)| *value != 0)
        .collect()
}

/// The frames of this suite among those that the uplink received: read from it, and pushed by it.
fn received(queue: &dyn UplinkQueue, sink: &RecordingSink) -> Vec<Vec<u8>> {
    let mut bounce = vec![0; 70_000];
    let mut frames = sink.take();
    while let Received::Frame(len) = queue.receive(&[], &mut bounce) {
        frames.push(bounce[VNET_HEADER_LEN..len].to_vec());
    }
    frames.retain(|frame| frame[12..14] == ETHERTYPE);
    frames
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&at_once),
    )
    .unwrap()
        == 1
}

/// A broadcast frame, which every uplink carries to its other end.
fn frame(len: usize, mark: u8) -> Vec<u8> {
    let mut frame = host::frame(len, mark);
    frame[..6].fill(0xff);
    frame
}

/// Frames of different lengths, each with a mark of its own.
fn burst() -> Vec<Vec<u8>> {
    let count = u8::try_from(MAX_BURST).unwrap();
    (0..count)
        .map(|mark| frame(60 + 20 * usize::from(mark), mark))
        .collect()
}

/// Checks everything that the traits require.
fn conforms(mut fixture: Fixture) {
    assert_eq!(fixture.uplink.kind(), fixture.kind);
    assert!(!fixture.uplink.name().is_empty());
    let sink = Arc::new(RecordingSink::default());
    let weak: Weak<RecordingSink> = Arc::downgrade(&sink);
    let queue = fixture.uplink.open_queue(0, weak).unwrap();
    fixture.uplink.set_mtu(1500).unwrap();
    for format in [FrameFormat::ALL, no_offloads()] {
        fixture.uplink.set_format(format).unwrap();
    }
    receives_only_while_attached(&fixture, &*queue, &sink);
    transmits_in_order(&fixture, &*queue);
    is_readable_while_a_frame_waits(&fixture, &*queue);
    received(&*queue, &sink);
    opens_further_queues_detached(&fixture, &*queue, &sink);
    accounts_for_every_frame_without_blocking(&*queue);
    counts_drops_under_a_name(&mut fixture, &*queue);
}

fn no_offloads() -> FrameFormat {
    FrameFormat {
        header_len: VNET_HEADER_LEN,
        csum: false,
        tso4: false,
        tso6: false,
        ecn: false,
        ufo: false,
    }
}

/// A queue is opened detached; `set_attached` is idempotent; received frames keep their order.
fn receives_only_while_attached(fixture: &Fixture, queue: &dyn UplinkQueue, sink: &RecordingSink) {
    assert_eq!(queue.receive(&[], &mut [0; 2048]), Received::Empty);
    for attached in [
        None,
        Some(true),
        Some(true),
        Some(false),
        Some(false),
        Some(true),
    ] {
        if let Some(attached) = attached {
            queue.set_attached(attached).unwrap();
        }
        let frames = burst();
        let can_receive = frames
            .iter()
            .filter(|frame| fixture.other_end.send(frame))
            .count();
        let expected = match attached {
            Some(true) if can_receive > 0 => frames,
            _ => Vec::new(),
        };
        let context = format!("{}, attached: {attached:?}", fixture.kind);
        assert!(received(queue, sink) == expected, "{context}");
    }
}

/// Transmitted frames keep their order and their bytes, and are counted.
fn transmits_in_order(fixture: &Fixture, queue: &dyn UplinkQueue) {
    for cut in [usize::MAX, 100, 7] {
        let frames = burst();
        let bytes: usize = frames.iter().map(Vec::len).sum();
        let stats = transmit(queue, &frames, cut);
        let expected = [
            ("frames", u64::try_from(frames.len()).unwrap()),
            ("bytes", u64::try_from(bytes).unwrap()),
        ];
        assert_eq!(counted(&stats), expected, "{}", fixture.kind);
        if let Some(arrived) = fixture.other_end.next_frames(frames.len()) {
            assert!(arrived == frames, "{} in segments of {cut}", fixture.kind);
        }
    }
    assert!(counted(&transmit(queue, &[], 1)).is_empty());
}

/// The descriptor is readable while a frame waits; without a descriptor none ever waits.
fn is_readable_while_a_frame_waits(fixture: &Fixture, queue: &dyn UplinkQueue) {
    let mut bounce = [0; 2048];
    while queue.receive(&[], &mut bounce) != Received::Empty {}
    if let Some(fd) = queue.poll_fd() {
        assert!(!is_readable(fd), "{}", fixture.kind);
    }
    if !fixture.other_end.send(&frame(60, 1)) {
        return;
    }
    match queue.poll_fd() {
        Some(fd) => assert!(is_readable(fd), "{}", fixture.kind),
        None => assert_eq!(queue.receive(&[], &mut bounce), Received::Empty),
    }
}

/// Further queue pairs get queues of their own, to which no frames of the first one are steered.
fn opens_further_queues_detached(fixture: &Fixture, first: &dyn UplinkQueue, sink: &RecordingSink) {
    let queues: Vec<_> = (1..4)
        .map(|pair| fixture.uplink.open_queue(pair, null_rx_sink()).unwrap())
        .collect();
    if fixture.other_end.send(&frame(60, 1)) {
        assert_eq!(received(first, sink), [frame(60, 1)], "{}", fixture.kind);
    }
    for queue in queues {
        assert_eq!(queue.receive(&[], &mut [0; 2048]), Received::Empty);
    }
}

/// However much is transmitted, each frame is carried or dropped, and both are counted.
fn accounts_for_every_frame_without_blocking(queue: &dyn UplinkQueue) {
    for _ in 0..100 {
        let stats = transmit(queue, &burst(), usize::MAX);
        let all: u64 = counted(&stats)
            .iter()
            .filter(|(name, _)| *name == "frames" || name.starts_with("dropped_"))
            .map(|(_, value)| value)
            .sum();
        assert_eq!(all, u64::try_from(MAX_BURST).unwrap());
    }
}

/// A frame that cannot be carried is dropped and counted under one name, not as carried.
fn counts_drops_under_a_name(fixture: &mut Fixture, queue: &dyn UplinkQueue) {
    fixture.other_end.fail();
    let stats = transmit(queue, &burst(), usize::MAX);
    let count = u64::try_from(MAX_BURST).unwrap();
    if let Some(name) = fixture.drop_counter {
        assert_eq!(counted(&stats), [(name, count)], "{}", fixture.kind);
    } else {
        assert_eq!(stats.frames.get(), count, "{}", fixture.kind);
    }
}

/// Runs `test` on a thread of its own; a call that blocks must not block the whole suite.
fn within_limit(test: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = mpsc::channel();
    let thread = thread::spawn(move || {
        test();
        sender.send(()).unwrap();
    });
    if receiver.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("a call blocks");
    }
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn tap_conforms() {
    within_limit(|| in_namespaces(|| conforms(tap_fixture())));
}

#[test]
fn switch_conforms() {
    within_limit(|| conforms(switch_fixture()));
}

#[test]
fn null_uplink_conforms() {
    within_limit(|| conforms(null_fixture()));
}
