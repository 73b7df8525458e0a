//! Tests of packed vrings whose session ends without the front-end learning where they stopped.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::net::{MODERN, PACKED};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_uplink::null::Null;
use virtionet_virtqueue::{Burst, Direction, Virtqueue, VirtqueueConfig, VirtqueueLayout};

use super::*;
use crate::testing::{TIMEOUT, net_device, send, sent_frames, with_socket};

fn packed_pairs() -> TestFrontendConfig {
    TestFrontendConfig {
        required: PACKED,
        ..TestFrontendConfig::new(2, 64, MODERN | PACKED)
    }
}

/// Connects a front-end, which keeps its guest for the next session.
fn first_session(net_device: &NetDevice) -> TestFrontend {
    let mut kept = None;
    with_socket(net_device, |socket| {
        let _end = EndOnDrop::new(&socket);
        let mut frontend = TestFrontend::from_socket(socket, &packed_pairs()).unwrap();
        send(&mut frontend, 0, 5);
        kept = Some(frontend);
    });
    kept.unwrap()
}

/// Connects the front-end again, as QEMU does after its back-end has vanished.
fn next_session(
    net_device: &NetDevice,
    frontend: &mut TestFrontend,
    work: impl FnOnce(&mut TestFrontend),
) -> String {
    with_socket(net_device, |socket| {
        let _end = EndOnDrop::new(&socket);
        let connection = FrontendConnection::from_socket(socket).unwrap();
        frontend.reconnect(connection, &packed_pairs()).unwrap();
        frontend.connection.get_features().unwrap();
        work(frontend);
    })
}

/// Ends the session that is served on a socket, also when a test fails.
struct EndOnDrop(UnixStream);

impl EndOnDrop {
    fn new(socket: &UnixStream) -> Self {
        Self(socket.try_clone().unwrap())
    }
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// By vring of the first queue pair, RX and TX: the starts at a corrected and at an implausible base.
fn starts(net_device: &NetDevice) -> [(u64, u64); 2] {
    let served = net_device.pairs().next().unwrap();
    [served.pair.rx().stats(), served.pair.tx().stats()]
        .map(|stats| (stats.base_corrected.get(), stats.base_implausible.get()))
}

#[test]
fn packed_vring_continues_at_its_record_after_the_session_ended() {
    let net_device = net_device(2, Null, PollMode::Off);
    let mut frontend = first_session(&net_device);
    assert_eq!(starts(&net_device), [(0, 0), (0, 0)]);
    for session in 1..=70 {
        let log = next_session(&net_device, &mut frontend, |frontend| send(frontend, 0, 3));
        assert_eq!(sent_frames(&net_device), [5 + 3 * session, 0], "{log}");
        assert_eq!(net_device.warnings(), [""; 0]);
    }
    // The ring has 64 descriptors, so at some multiples of two laps the base is right.
    let [rx, tx] = starts(&net_device);
    assert_eq!(rx, (0, 0));
    assert!(tx.0 >= 68 && tx.1 == 0, "{tx:?}");
}

/// Uses the chains that are available in the first transmitq at `base`, as QEMU does while the link
/// is down. Returns the base behind them.
fn use_chains(frontend: &TestFrontend, memory: &Arc<GuestMemory>, base: u32) -> u32 {
    let ring = &frontend.pairs[0].tx.queue.ring;
    let at = ring.addresses();
    let user = |addr| frontend.ram().user_addr(addr).unwrap();
    let config = VirtqueueConfig {
        layout: VirtqueueLayout {
            size: ring.size(),
            desc: user(at.descriptors),
            avail: user(at.driver),
            used: user(at.device),
        },
        base,
        direction: Direction::Readable,
        packed: true,
        event_idx: false,
        indirect: true,
        min_len: 0,
    };
    let mut virtqueue = Virtqueue::new(config, memory).unwrap();
    let mut burst = Burst::new(Arc::clone(memory));
    while virtqueue.dequeue(&mut burst, 64).unwrap() > 0 {
        for chain in burst.chains().to_vec() {
            virtqueue.complete(&chain, 0);
        }
        burst.clear();
        let _ = virtqueue.publish();
    }
    virtqueue.base()
}

#[test]
fn frames_in_front_of_those_that_the_front_end_used_itself_are_counted_as_dropped() {
    const FIRST_BASE: u32 = 0x8000_8000;
    let net_device = net_device(2, Null, PollMode::Off);
    let mut frontend = first_session(&net_device);
    let slots = (frontend.pairs[0].tx.queue.ring.base() & 0x7fff) / 5;
    // Two frames before the end of the second lap, whose successors are where the vring began.
    let frames = 2 * 64 / slots - 2;
    let mut memory = Arc::default();
    next_session(&net_device, &mut frontend, |frontend| {
        memory = net_device.frontend().memory;
        send(frontend, 0, usize::try_from(frames).unwrap() - 5);
    });
    let frame = FrameSpec::v4(Transport::Udp).build(b"frame").unwrap();
    for _ in 0..4 {
        frontend.pairs[0].tx.send(&frame).unwrap();
    }
    let base = use_chains(&frontend, &memory, FIRST_BASE);
    assert_eq!(base & 0x7fff, 2 * slots);
    frontend.set_base(1, base);
    next_session(&net_device, &mut frontend, |frontend| {
        frontend.pairs[0].tx.drain(TIMEOUT).unwrap();
        send(frontend, 0, 3);
    });
    let served = net_device.pairs().next().unwrap();
    assert_eq!(served.pair.tx().stats().dropped_at_start.get(), 2);
    assert_eq!(sent_frames(&net_device), [u64::from(frames) + 3, 0]);
}

#[test]
fn packed_vring_whose_base_was_read_starts_where_the_front_end_says() {
    let net_device = net_device(2, Null, PollMode::Off);
    let mut frontend = first_session(&net_device);
    next_session(&net_device, &mut frontend, |frontend| {
        frontend.stop().unwrap();
        frontend.reset().unwrap();
        frontend.start().unwrap();
        send(frontend, 0, 2);
    });
    let before = starts(&net_device);
    next_session(&net_device, &mut frontend, |frontend| {
        frontend.connection.reset_device().unwrap();
        frontend.reset().unwrap();
        frontend.start().unwrap();
        send(frontend, 0, 4);
    });
    assert_eq!(sent_frames(&net_device), [11, 0]);
    // Once at the start of the session, and not at that after the reset.
    assert_eq!(starts(&net_device), [before[0], (before[1].0 + 1, 0)]);
}

#[test]
fn packed_vring_without_its_record_is_reported() {
    let mut net_device = net_device(2, Null, PollMode::Off);
    net_device.crash_records = None;
    let mut frontend = first_session(&net_device);
    let log = next_session(&net_device, &mut frontend, |_| {
        let warnings = net_device.warnings();
        let expected = "vring 1: the front-end starts the packed ring at 0x80008000, where its descriptors show that it cannot be, and there is no crash record of it; reload the guest's driver or restart the guest";
        assert_eq!(warnings, [expected]);
    });
    assert_eq!(log.matches("reload the guest's driver").count(), 1, "{log}");
    assert_eq!(starts(&net_device), [(0, 0), (0, 1)]);
    assert_eq!(net_device.warnings(), [""; 0]);
}

#[test]
fn warning_about_a_missing_record_ends_when_the_driver_resets_its_rings() {
    let mut net_device = net_device(2, Null, PollMode::Off);
    net_device.crash_records = None;
    let mut frontend = first_session(&net_device);
    next_session(&net_device, &mut frontend, |frontend| {
        assert_eq!(net_device.warnings().len(), 1);
        frontend.stop().unwrap();
        frontend.reset().unwrap();
        frontend.start().unwrap();
        send(frontend, 0, 2);
        assert_eq!(net_device.warnings(), [""; 0]);
    });
}
