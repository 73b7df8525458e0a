//! The front-end with an unmodified vhost-user-backend that echoes frames, and the order of its
//! messages.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Protocol};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::QueueT;
use virtionet_guest::Error;
use virtionet_guest::frame::{Frame, FrameSpec, Transport, check};
use virtionet_guest::frontend::{FrontendConnection, VHOST_USER_F_PROTOCOL_FEATURES};
use virtionet_guest::net::{MODERN, PACKED};
use virtionet_guest::test_frontend::{StartOrder, TestFrontend, TestFrontendConfig};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const LIMIT: Duration = Duration::from_secs(20);

/// A device that sends every frame back on the queue pair on which it came.
struct Echo {
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    pairs: usize,
}

impl VhostUserBackendMut for Echo {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2 * self.pairs
    }
    fn max_queue_size(&self) -> usize {
        1024
    }
    fn features(&self) -> u64 {
        // Without mergeable buffers the echo needs one buffer for each frame.
        MODERN & !MERGEABLE | VHOST_USER_F_PROTOCOL_FEATURES
    }
    fn protocol_features(&self) -> Protocol {
        Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS
    }
    fn set_event_idx(&mut self, _enabled: bool) {}
    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> std::io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some(new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap())
    }
    fn handle_event(
        &mut self,
        event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> std::io::Result<()> {
        if event % 2 == 1 {
            let at = usize::from(event);
            self.echo(&vrings[at], &vrings[at - 1]);
        }
        Ok(())
    }
}

impl Echo {
    fn echo(&self, tx: &VringRwLock, rx: &VringRwLock) {
        let memory = self.memory.as_ref().unwrap().memory();
        loop {
            tx.disable_notification().unwrap();
            loop {
                let chain = tx
                    .get_mut()
                    .get_queue_mut()
                    .pop_descriptor_chain(memory.clone());
                let Some(chain) = chain else { break };
                let head = chain.head_index();
                let mut bytes = Vec::new();
                for d in chain {
                    let mut segment = vec![0; usize::try_from(d.len()).unwrap()];
                    memory.read_slice(&mut segment, d.addr()).unwrap();
                    bytes.append(&mut segment);
                }
                tx.add_used(head, 0).unwrap();
                let rx_chain = rx
                    .get_mut()
                    .get_queue_mut()
                    .pop_descriptor_chain(memory.clone());
                let Some(mut rx_chain) = rx_chain else {
                    continue;
                };
                let head = rx_chain.head_index();
                bytes[10] = 1;
                memory
                    .write_slice(&bytes, rx_chain.next().unwrap().addr())
                    .unwrap();
                rx.add_used(head, u32::try_from(bytes.len()).unwrap())
                    .unwrap();
            }
            for ring in [tx, rx] {
                if ring.needs_notification().unwrap() {
                    ring.signal_used_queue().unwrap();
                }
            }
            if !tx.enable_notification().unwrap() {
                return;
            }
        }
    }
}

fn socket_path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("virtionet-guest-{}-{n}.sock", std::process::id());
    std::env::temp_dir().join(name)
}

/// Serves one connection.
fn serve(pairs: usize) -> (PathBuf, JoinHandle<()>) {
    let path = socket_path();
    let mut listener = Listener::new(&path, true).unwrap();
    let thread = std::thread::spawn(move || {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let echo = std::sync::RwLock::new(Echo {
            memory: None,
            pairs,
        });
        let echo = std::sync::Arc::new(echo);
        let mut daemon = VhostUserDaemon::new("echo".into(), echo, memory).unwrap();
        daemon.start(&mut listener).unwrap();
        // That crate reports the end of a connection as an error.
        let _ = daemon.wait();
        for handler in daemon.get_epoll_handlers() {
            handler.send_exit_event();
        }
    });
    (path, thread)
}

fn config(pairs: u16) -> TestFrontendConfig {
    // That back-end needs SET_FEATURES before SET_VRING_ENABLE.
    TestFrontendConfig {
        order: StartOrder::FeaturesFirst,
        ..TestFrontendConfig::new(pairs, 64, MODERN)
    }
}

fn frames(count: u32) -> Vec<Frame> {
    let make = |sequence| {
        let mut spec = FrameSpec::v4(Transport::Tcp);
        spec.sequence = sequence;
        spec.build(&sequence.to_be_bytes()).unwrap()
    };
    (0..count).map(make).collect()
}

/// Sends `sent` on a queue pair in bursts and checks that they come back in order.
fn echo_through(frontend: &mut TestFrontend, pair: usize, sent: &[Frame]) {
    let pair = &mut frontend.pairs[pair];
    for burst in sent.chunks(32) {
        pair.tx.send_all(burst, LIMIT).unwrap();
        let got = pair.rx.wait_frames(burst.len(), LIMIT).unwrap();
        assert_eq!(got.len(), burst.len());
        for (got, sent) in got.iter().zip(burst) {
            check(got).unwrap();
            assert_eq!(got.bytes, sent.bytes);
        }
    }
    pair.tx.drain(LIMIT).unwrap();
}

#[test]
fn frames_on_every_queue_pair_are_echoed() {
    let (path, server) = serve(3);
    let mut frontend = TestFrontend::connect(&path, &config(3)).unwrap();
    assert_eq!(frontend.features() & MERGEABLE, 0, "it was not offered");
    for pair in 0..3 {
        echo_through(&mut frontend, pair, &frames(1000));
    }
    drop(frontend);
    server.join().unwrap();
}

#[test]
fn queue_pairs_can_be_driven_by_other_threads() {
    let (path, server) = serve(2);
    let mut frontend = TestFrontend::connect(&path, &config(2)).unwrap();
    let threads: Vec<_> = std::mem::take(&mut frontend.pairs)
        .into_iter()
        .map(|mut pair| {
            std::thread::spawn(move || {
                for burst in frames(500).chunks(16) {
                    pair.tx.send_all(burst, LIMIT).unwrap();
                    pair.rx.wait_frames(16.min(burst.len()), LIMIT).unwrap();
                }
                pair
            })
        })
        .collect();
    for thread in threads {
        frontend.pairs.push(thread.join().unwrap());
    }
    frontend.stop().unwrap();
    drop(frontend);
    server.join().unwrap();
}

#[test]
fn stopped_front_end_continues_at_its_base() {
    let (path, server) = serve(1);
    let mut ours = config(1);
    ours.queues.start = 65_500;
    let mut frontend = TestFrontend::connect(&path, &ours).unwrap();
    for round in 0..3u16 {
        echo_through(&mut frontend, 0, &frames(50));
        frontend.stop().unwrap();
        let base = 65_500u16.wrapping_add(50 * (round + 1));
        assert_eq!(frontend.rings()[1].base, u32::from(base));
        frontend.start().unwrap();
    }
    frontend.stop().unwrap();
    frontend.reset().unwrap();
    assert_eq!(frontend.rings()[1].base, 0);
    frontend.start().unwrap();
    echo_through(&mut frontend, 0, &frames(50));
    drop(frontend);
    server.join().unwrap();
}

#[test]
fn memory_with_a_hole_and_changing_regions_is_usable() {
    let (path, server) = serve(1);
    let mut ours = config(1);
    ours.layout = vec![(0, 1 << 16), (1 << 32, 1 << 20)];
    let mut frontend = TestFrontend::connect(&path, &ours).unwrap();
    assert!(frontend.rings()[0].addresses.descriptors < 1 << 16);
    echo_through(&mut frontend, 0, &frames(100));
    let extra = virtionet_guest::memory::GuestRam::with_layout(&[(1 << 40, 4096)]).unwrap();
    let region = extra.regions()[0];
    frontend
        .connection
        .add_mem_region(&region, extra.fd())
        .unwrap();
    frontend.connection.remove_mem_region(&region).unwrap();
    assert!(frontend.connection.get_max_mem_slots().unwrap() > 1);
    echo_through(&mut frontend, 0, &frames(100));
    drop(frontend);
    server.join().unwrap();
}

#[test]
fn front_end_continues_with_another_back_end_after_the_first_ended() {
    let (path, server) = serve(1);
    let mut frontend = TestFrontend::connect(&path, &config(1)).unwrap();
    echo_through(&mut frontend, 0, &frames(70));
    // Closing the connection ends the first back-end. Only the state in guest memory is left.
    let ours = frontend.connection.wire.socket();
    ours.shutdown(std::net::Shutdown::Both).unwrap();
    server.join().unwrap();
    let (path, server) = serve(1);
    let connection = FrontendConnection::connect(&path, LIMIT).unwrap();
    frontend.reconnect(connection, &config(1)).unwrap();
    assert_eq!(frontend.rings()[1].base, 70);
    echo_through(&mut frontend, 0, &frames(70));
    drop(frontend);
    server.join().unwrap();
}

#[test]
fn missing_queue_pairs_features_or_back_end_are_errors() {
    let (path, server) = serve(1);
    let error = TestFrontend::connect(&path, &config(5)).unwrap_err();
    // That crate counts vrings in GET_QUEUE_NUM.
    assert!(
        matches!(error, Error::Pairs { wanted: 5, has: 2 }),
        "{error}"
    );
    server.join().unwrap();
    let (path, server) = serve(1);
    let mut ours = config(1);
    ours.required = MERGEABLE;
    let error = TestFrontend::connect(&path, &ours).unwrap_err();
    assert!(
        matches!(error, Error::Features(bits) if bits == MERGEABLE),
        "{error}"
    );
    server.join().unwrap();
    let mut unreachable = config(1);
    unreachable.connect_timeout = Duration::from_millis(20);
    assert!(matches!(
        TestFrontend::connect(&socket_path(), &unreachable),
        Err(Error::Connect { .. })
    ));
}

/// Answers every message like a back-end with two queue pairs until the front-end closes the
/// connection. Returns the code of each request and the first two 32-bit words of its body, which
/// are the index and the value in messages about vrings.
fn record(mut socket: UnixStream, features: u64) -> Vec<(u32, u32, u32)> {
    let mut seen = Vec::new();
    let mut header = [0; 12];
    while socket.read_exact(&mut header).is_ok() {
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags, size) = (field(0), field(4), field(8));
        let mut body = vec![0; usize::try_from(size).unwrap()];
        socket.read_exact(&mut body).unwrap();
        body.resize(body.len().max(8), 0);
        let read_u32 = |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().unwrap());
        seen.push((request, read_u32(0), read_u32(4)));
        let answer = match FrontendReq::try_from(request).unwrap() {
            FrontendReq::GET_FEATURES => features | VHOST_USER_F_PROTOCOL_FEATURES,
            FrontendReq::GET_PROTOCOL_FEATURES => Protocol::MQ.bits(),
            FrontendReq::GET_QUEUE_NUM => 2,
            FrontendReq::GET_VRING_BASE => u64::from(read_u32(0)) | 9 << 32,
            _ if flags & 8 == 0 => continue,
            _ => 0,
        };
        let reply = [request, 5, 8].map(u32::to_ne_bytes).concat();
        socket.write_all(&reply).unwrap();
        socket.write_all(&answer.to_ne_bytes()).unwrap();
    }
    seen
}

#[test]
fn start_and_stop_send_messages_in_the_order_of_qemu() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || record(theirs, MODERN));
    let mut frontend =
        TestFrontend::from_socket(ours, &TestFrontendConfig::new(2, 64, MODERN)).unwrap();
    frontend.enable(1, false).unwrap();
    frontend.stop().unwrap();
    assert!(frontend.rings().iter().all(|ring| ring.base == 9));
    drop(frontend);
    let seen = server.join().unwrap();
    let at = |request: FrontendReq| {
        let places = seen.iter().enumerate();
        places
            .filter(|(_, m)| m.0 == u32::from(request))
            .map(|(at, m)| (at, m.1, m.2))
            .collect::<Vec<_>>()
    };
    let enables = at(FrontendReq::SET_VRING_ENABLE);
    let features = at(FrontendReq::SET_FEATURES);
    assert!(
        enables[3].0 < features[0].0,
        "SET_VRING_ENABLE comes before SET_FEATURES"
    );
    let states: Vec<_> = enables.iter().map(|e| (e.1, e.2)).collect();
    let before = [(0, 1), (1, 1), (2, 0), (3, 0)];
    let start = [(0, 1), (1, 1), (2, 1), (3, 1)];
    assert_eq!(states[..4], before);
    assert_eq!(states[4..8], start);
    assert_eq!(states[8..], [(2, 0), (3, 0)]);
    assert_eq!(features.len(), 2, "once for each queue pair");
    assert_eq!(at(FrontendReq::SET_MEM_TABLE).len(), 1);
    let calls = at(FrontendReq::SET_VRING_CALL);
    assert_eq!(calls.len(), 8);
    assert!(
        calls[3].0 < enables[0].0,
        "call eventfds are set before a driver is loaded"
    );
    let bases = at(FrontendReq::GET_VRING_BASE);
    assert_eq!(bases.iter().map(|b| b.1).collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[test]
fn packed_format_is_used_only_if_offered() {
    for (offered, size, base) in [(MODERN | PACKED, 100, 0x8000_8000), (MODERN, 64, 0)] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || record(theirs, offered));
        let config = TestFrontendConfig::new(1, size, MODERN | PACKED);
        let mut frontend = TestFrontend::from_socket(ours, &config).unwrap();
        assert_eq!(frontend.features() & PACKED, offered & PACKED);
        let packed = frontend.pairs[0].tx.queue.ring.as_packed().is_some();
        assert_eq!(packed, offered & PACKED != 0);
        assert!(frontend.rings().iter().all(|ring| ring.base == base));
        drop(frontend);
        let seen = server.join().unwrap();
        let bases: Vec<_> = seen
            .iter()
            .filter(|m| m.0 == u32::from(FrontendReq::SET_VRING_BASE))
            .map(|m| m.2)
            .collect();
        assert_eq!(bases, [base; 2]);
    }
}

#[test]
fn closed_connection_timeout_and_wrong_reply_are_different_errors() {
    let path = socket_path();
    let listener = UnixListener::bind(&path).unwrap();
    let answer = |bytes: Option<Vec<u8>>| {
        let mut connection = FrontendConnection::connect(&path, LIMIT).unwrap();
        connection
            .wire
            .set_timeout(Duration::from_millis(50))
            .unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        match bytes {
            Some(bytes) => theirs.write_all(&bytes).unwrap(),
            None => drop(theirs.shutdown(std::net::Shutdown::Write)),
        }
        connection.get_features().unwrap_err()
    };
    let reply = |request: u32, flags: u32, body: &[u8]| {
        let size = u32::try_from(body.len()).unwrap();
        let header = [request, flags, size].map(u32::to_ne_bytes).concat();
        Some([&header[..], body].concat())
    };
    assert!(matches!(answer(None), Error::HungUp(1)));
    assert!(matches!(answer(Some(vec![1, 0])), Error::TimedOut(1)));
    for wrong in [
        reply(2, 5, &[0; 8]),
        reply(1, 1, &[0; 8]),
        reply(1, 5, &[0; 4]),
        Some([1, 5, u32::MAX].map(u32::to_ne_bytes).concat()),
    ] {
        let error = answer(wrong);
        assert!(matches!(error, Error::Reply { request: 1, .. }), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
}
