//! A device under attack: its front-end, and how many frames its driver has given and got.

use std::net::Shutdown;
use std::os::fd::AsRawFd;

use serde_json::Value;
use virtionet_guest::driver::Buf;
use virtionet_guest::frame::{Frame, FrameSpec, Transport};
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::header::NetHeader;
use virtionet_guest::hostile::forbid_seals;
use virtionet_guest::net::{MODERN, PACKED, TxLayout};
use virtionet_guest::test_frontend::{StartOrder, TestFrontend, TestFrontendConfig};

use crate::daemon_under_test::{DaemonUnderTest, PAIRS, TIMEOUT, counter};
use virtionet_tests::random::Random;

/// What can become of a chain that the device takes from a transmitq, by the names of the counters.
const TX_OUTCOMES: [&str; 30] = [
    "frames",
    "dropped_disabled",
    "dropped_uplink_full",
    "dropped_uplink_error",
    "dropped_uplink_down",
    "dropped_no_port",
    "dropped_reserved_group",
    "dropped_over_budget",
    "header_missing",
    "frame_too_short",
    "frame_too_long",
    "gso_unknown",
    "gso_not_negotiated",
    "gso_size_zero",
    "gso_without_csum",
    "csum_not_negotiated",
    "csum_out_of_frame",
    "hdr_len_out_of_frame",
    "offload_invalid",
    "chain_loop",
    "chain_too_long",
    "chain_too_big",
    "chain_next_out_of_range",
    "address_invalid",
    "direction_wrong",
    "indirect_nested",
    "indirect_with_next",
    "indirect_bad_length",
    "indirect_unmapped",
    "indirect_not_negotiated",
];

/// The frames of a queue pair, counted by the driver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Ledger {
    /// TX chains that the device has used, in all sessions that have ended.
    tx_used: u64,
    /// TX chains that the driver has published in this session.
    tx_published: u64,
    /// RX frames that the driver has received in all sessions.
    rx_frames: u64,
}

/// How a front-end leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    HangUp,
    InHeader,
    InPayload,
    InPayloadWithDescriptors,
    BeforeReply,
    InvalidHeader,
}

pub const DEPARTURES: [Departure; 6] = [
    Departure::HangUp,
    Departure::InHeader,
    Departure::InPayload,
    Departure::InPayloadWithDescriptors,
    Departure::BeforeReply,
    Departure::InvalidHeader,
];

/// A device with its front-end, if one is connected.
#[derive(Debug)]
pub struct Endpoint {
    pub name: &'static str,
    /// The last byte of the MAC address of the driver.
    mac: u8,
    frontend: Option<TestFrontend>,
    /// Whether the guest's memory can be truncated, because the daemon could not seal it.
    can_truncate: bool,
    ledgers: [Ledger; PAIRS as usize],
}

impl Endpoint {
    pub fn new(name: &'static str, mac: u8) -> Self {
        Self {
            name,
            mac,
            frontend: None,
            can_truncate: false,
            ledgers: Default::default(),
        }
    }

    /// The front-end, which must be connected.
    pub fn frontend(&mut self) -> &mut TestFrontend {
        self.frontend.as_mut().unwrap()
    }

    /// Whether a front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.frontend.is_some()
    }

    /// Connects with a random format and order of messages, if no front-end is connected.
    pub fn connect(&mut self, under_test: &DaemonUnderTest, random: &mut Random) {
        if self.frontend.is_some() {
            return;
        }
        let format = random.pick(&[0, PACKED]);
        let size = random.pick(&[64, 256, 1024]);
        let mut config = TestFrontendConfig::new(PAIRS, size, MODERN | format);
        config.queues.tx_layout = random.pick(&[
            TxLayout::Single,
            TxLayout::SeparateHeader,
            TxLayout::Segments(20),
        ]);
        config.order = random.pick(&[StartOrder::Qemu, StartOrder::FeaturesFirst]);
        config.connect_timeout = TIMEOUT;
        if random.coin() {
            config.layout = vec![(0, 16 << 20), (1 << 32, 4 << 20)];
        }
        let socket = under_test.socket(self.name);
        let connection = FrontendConnection::connect(&socket, TIMEOUT).unwrap();
        let mut frontend = TestFrontend::negotiate(connection, &config).unwrap();
        self.can_truncate = random.coin();
        if self.can_truncate {
            forbid_seals(frontend.ram().file()).unwrap();
        }
        for pair in &mut frontend.pairs {
            pair.rx.fill().unwrap();
        }
        frontend.start().unwrap();
        self.frontend = Some(frontend);
    }

    /// Ends the session in the given way, waits until the daemon has noticed, and counts what the
    /// device has used until then.
    pub fn leave(&mut self, under_test: &DaemonUnderTest, how: Departure) {
        let Some(mut frontend) = self.frontend.take() else {
            return;
        };
        hang_up(&mut frontend.connection, how);
        under_test.wait_for(self.name, "disconnected", |d| d["connected"] == false);
        self.close_account(&mut frontend);
    }

    /// Connects and hangs up in the middle of the negotiation.
    pub fn connect_and_die(&mut self, under_test: &DaemonUnderTest, how: Departure) {
        let socket = under_test.socket(self.name);
        let mut connection = FrontendConnection::connect(&socket, TIMEOUT).unwrap();
        connection.set_owner().unwrap();
        connection.get_features().unwrap();
        hang_up(&mut connection, how);
        under_test.wait_for(self.name, "disconnected", |d| d["connected"] == false);
    }

    /// Truncates the guest's memory under the running vrings, if it is not sealed, and hangs up
    /// when the device has quarantined the transmitq of `pair`.
    pub fn truncate_memory(&mut self, under_test: &DaemonUnderTest, pair: u16) {
        if !self.can_truncate {
            return;
        }
        self.drain();
        let mut frontend = self.frontend.take().unwrap();
        self.close_account(&mut frontend);
        // The driver must not touch this memory any more.
        frontend.ram().file().set_len(0).unwrap();
        let pair = usize::from(pair);
        frontend.pairs[pair].tx.queue.kick_now().unwrap();
        under_test.wait_for(self.name, "quarantined", |device| {
            device["pairs"][pair]["tx"]["state"] == "quarantined"
        });
        hang_up(&mut frontend.connection, Departure::HangUp);
        under_test.wait_for(self.name, "disconnected", |d| d["connected"] == false);
        // The device may have taken zeros for chains, at most as many as the virtqueue has.
        let device = under_test.device(self.name);
        let size = u64::from(frontend.pairs[pair].tx.queue.ring.size());
        for (pair, ledger) in self.ledgers.iter_mut().enumerate() {
            let taken = sum_counters(&device, pair, "tx", &TX_OUTCOMES);
            assert!(
                (ledger.tx_used..=ledger.tx_used + size).contains(&taken),
                "{device}"
            );
            ledger.tx_used = taken;
        }
    }

    /// Stops all vrings and starts them again, either where they were or as after a reset of the
    /// driver.
    pub fn restart(&mut self, is_reset: bool) {
        let mut frontend = self.frontend.take().unwrap();
        frontend.stop().unwrap();
        if is_reset {
            self.close_account(&mut frontend);
            frontend.reset().unwrap();
        }
        frontend.start().unwrap();
        self.frontend = Some(frontend);
    }

    /// Closes the account of a session that the device does not continue.
    fn close_account(&mut self, frontend: &mut TestFrontend) {
        for (pair, ledger) in frontend.pairs.iter_mut().zip(&mut self.ledgers) {
            pair.rx.refill = false;
            ledger.rx_frames += receive_all(&mut pair.rx);
            pair.rx.refill = true;
            pair.tx.reclaim().unwrap();
            ledger.tx_used += ledger.tx_published - u64::from(pair.tx.queue.ring.in_flight());
            ledger.tx_published = 0;
        }
    }

    /// Receives what has arrived. Returns the number of frames.
    pub fn receive(&mut self) -> u64 {
        let frontend = self.frontend.as_mut().unwrap();
        let pairs = frontend.pairs.iter_mut().zip(&mut self.ledgers);
        pairs.fold(0, |sum, (pair, ledger)| {
            let count = receive_all(&mut pair.rx);
            ledger.rx_frames += count;
            sum + count
        })
    }

    /// Sets whether the driver gives received buffers back, and gives back those that it kept.
    pub fn set_refill(&mut self, is_refilling: bool) {
        for pair in &mut self.frontend().pairs {
            pair.rx.refill = is_refilling;
            if is_refilling {
                pair.rx.fill().unwrap();
            }
        }
    }

    /// Sends `frame` `count` times on a queue pair. It waits for unused descriptors.
    pub fn send(&mut self, pair: u16, frame: &Frame, count: u64) {
        let header = frame.header.to_bytes();
        self.send_raw(pair, &header, &frame.bytes, count);
    }

    /// Sends frames whose headers or lengths are invalid.
    pub fn send_invalid(&mut self, pair: u16, random: &mut Random, count: u64) {
        let gso = NetHeader {
            gso_type: 77,
            ..NetHeader::default()
        };
        let csum = NetHeader {
            flags: 1,
            csum_start: 60_000,
            ..NetHeader::default()
        };
        let frame = [0x55; 60];
        let (header, len) = random.pick(&[(gso, 60), (csum, 60), (NetHeader::default(), 5)]);
        self.send_raw(pair, &header.to_bytes(), &frame[..len], count);
    }

    fn send_raw(&mut self, pair: u16, header: &[u8], frame: &[u8], count: u64) {
        let pair = usize::from(pair);
        let tx = &mut self.frontend.as_mut().unwrap().pairs[pair].tx;
        for _ in 0..count {
            while !tx.queue_raw(header, frame).unwrap() {
                tx.flush().unwrap();
                tx.drain(TIMEOUT).unwrap();
            }
            self.ledgers[pair].tx_published += 1;
        }
        tx.flush().unwrap();
    }

    /// Sends chains whose addresses are outside guest memory.
    pub fn send_invalid_addresses(&mut self, pair: u16, count: u64) {
        let pair = usize::from(pair);
        let tx = &mut self.frontend.as_mut().unwrap().pairs[pair].tx;
        tx.drain(TIMEOUT).unwrap();
        for _ in 0..count.min(u64::from(tx.queue.ring.size())) {
            let chain = [Buf::readable(1 << 50, 100)];
            tx.queue.ring.add(&chain, false, 0).unwrap();
            self.ledgers[pair].tx_published += 1;
        }
        tx.flush().unwrap();
        tx.drain(TIMEOUT).unwrap();
        // The driver takes the chains for those of slot 0, so it has to start again.
        self.restart(true);
    }

    /// Waits until the device has used all TX chains.
    pub fn drain(&mut self) {
        for pair in &mut self.frontend().pairs {
            pair.tx.drain(TIMEOUT).unwrap();
        }
    }

    /// A frame to the driver with this last byte of its MAC address.
    pub fn frame_to(&self, target: u8, payload: &[u8]) -> Frame {
        let spec = FrameSpec {
            source_mac: [2, 0, 0, 0, 0, self.mac],
            target_mac: [2, 0, 0, 0, 0, target],
            ..FrameSpec::v4(Transport::Udp)
        };
        spec.build(payload).unwrap()
    }

    /// Checks that the daemon counts what the driver has counted. No front-end may be connected.
    pub fn assert_counters(&self, device: &Value) {
        assert!(self.frontend.is_none());
        for (pair, ledger) in self.ledgers.iter().enumerate() {
            let tx = sum_counters(device, pair, "tx", &TX_OUTCOMES);
            let rx = counter(device, pair, "rx", "frames");
            assert_eq!(
                tx, ledger.tx_used,
                "TX of pair {pair}, {ledger:?}: {device}"
            );
            assert_eq!(
                rx, ledger.rx_frames,
                "RX of pair {pair}, {ledger:?}: {device}"
            );
        }
    }

    /// The number of frames that the driver has sent and received, in all sessions that have ended.
    pub fn totals(&self) -> (u64, u64) {
        let add = |(tx, rx), ledger: &Ledger| (tx + ledger.tx_used, rx + ledger.rx_frames);
        self.ledgers.iter().fold((0, 0), add)
    }
}

fn sum_counters(device: &Value, pair: usize, vring: &str, names: &[&str]) -> u64 {
    names
        .iter()
        .map(|name| counter(device, pair, vring, name))
        .sum()
}

fn receive_all(rx: &mut virtionet_guest::rx::DriverRxQueue) -> u64 {
    let count = rx.receive(usize::MAX, |_| ()).unwrap();
    u64::try_from(count).unwrap()
}

/// Sends a part of a message or none, and shuts the socket down.
fn hang_up(connection: &mut FrontendConnection, how: Departure) {
    let words = |words: [u32; 3]| words.map(u32::to_ne_bytes).concat();
    // SET_VRING_KICK with 8 bytes of payload; GET_FEATURES; and a header of another version.
    let set_vring_kick = words([12, 1, 8]);
    let kick = connection.wire.socket().as_raw_fd();
    let (bytes, fds) = match how {
        Departure::HangUp => (Vec::new(), vec![]),
        Departure::InHeader => (set_vring_kick[..7].to_vec(), vec![]),
        Departure::InPayload => ([&set_vring_kick[..], &[1, 0, 0]].concat(), vec![]),
        Departure::InPayloadWithDescriptors => {
            ([&set_vring_kick[..], &[1, 0, 0]].concat(), vec![kick, kick])
        }
        Departure::BeforeReply => (words([1, 1, 0]), vec![]),
        Departure::InvalidHeader => (words([1, 3, 0]), vec![]),
    };
    if !bytes.is_empty() {
        connection.wire.send_bytes(&bytes, &fds).unwrap();
    }
    connection.wire.socket().shutdown(Shutdown::Both).unwrap();
}
