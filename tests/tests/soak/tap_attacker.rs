//! What the host and a driver do to a device on a TAP: the link goes down and up, the TAP is
//! deleted and created, and the driver starves, floods and dies. Afterwards frames must be carried
//! in both directions.

use std::fs::File;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use virtionet_tests::netns::Netns;

use crate::daemon_under_test::{
    ATTACKED_TAP, DaemonUnderTest, PAIRS, TIMEOUT, counter, create_attacked_tap,
};
use crate::endpoint::{DEPARTURES, Endpoint};
use virtionet_tests::random::Random;

/// The last byte of the MAC address of the driver.
pub const MAC: u8 = 0x30;
/// Where the host sends its frames.
const GUEST: &str = "10.78.0.2:9";

/// A device on a TAP, and the host's end of it.
#[derive(Debug)]
pub struct TapAttacker {
    pub device: Endpoint,
    host: UdpSocket,
}

impl TapAttacker {
    pub fn new(under_test: &DaemonUnderTest) -> Self {
        Self {
            device: Endpoint::new("tap", MAC),
            host: socket_in(under_test.network.netns()),
        }
    }

    /// Attacks the device until `end`.
    pub fn attack(&mut self, under_test: &DaemonUnderTest, mut random: Random, end: Instant) {
        while Instant::now() < end {
            self.device.connect(under_test, &mut random);
            self.act(under_test, &mut random);
            self.device.connect(under_test, &mut random);
            self.assert_transmits(under_test);
            self.assert_receives();
            under_test.assert_progress();
        }
        self.device.leave(under_test, random.pick(&DEPARTURES));
    }

    fn act(&mut self, under_test: &DaemonUnderTest, random: &mut Random) {
        let note = |action| under_test.journal.note("tap", action);
        let netns = under_test.network.netns();
        match random.range(0, 6) {
            0 => {
                note("link down and up");
                netns.ip(&format!("link set {ATTACKED_TAP} down")).unwrap();
                self.flood(random);
                netns.ip(&format!("link set {ATTACKED_TAP} up")).unwrap();
                configure(under_test);
            }
            1 => {
                note("TAP deleted and created");
                netns.ip(&format!("link del {ATTACKED_TAP}")).unwrap();
                self.flood(random);
                create_attacked_tap(&under_test.network);
            }
            2 => {
                note("starvation of the receiveqs");
                self.device.set_refill(false);
                self.send_from_host(random.range(500, 3000));
                self.device.receive();
                self.device.set_refill(true);
            }
            3 => {
                note("flood");
                self.flood(random);
            }
            4 => {
                note("change of the enabled queue pairs");
                self.device.frontend().enable(1, false).unwrap();
                self.flood(random);
                self.device.frontend().enable(1, true).unwrap();
            }
            5 => {
                let how = random.pick(&DEPARTURES);
                note(&format!("death: {how:?}"));
                self.flood(random);
                self.device.leave(under_test, how);
            }
            _ => {
                note("restart");
                self.flood(random);
                self.device.restart(random.coin());
            }
        }
    }

    /// Sends from the driver and from the host.
    fn flood(&mut self, random: &mut Random) {
        let frame = self.device.frame_to(0xff, &[0x66; 300]);
        self.send_from_host(random.range(1, 200));
        for pair in 0..PAIRS {
            self.device.send(pair, &frame, random.range(1, 1000));
        }
        self.device.receive();
    }

    /// Sends while there is a way to send: the TAP may be deleted or down.
    fn send_from_host(&self, count: u64) {
        for _ in 0..count {
            _ = self.host.send_to(&[0x77; 500], GUEST);
        }
    }

    fn assert_transmits(&mut self, under_test: &DaemonUnderTest) {
        let frames = || counter(&under_test.device("tap"), 0, "tx", "frames");
        self.device.drain();
        let before = frames();
        let frame = self.device.frame_to(0xff, b"are you there?");
        let deadline = Instant::now() + TIMEOUT;
        while frames() == before {
            assert!(Instant::now() < deadline, "the TAP takes no frames");
            self.device.send(0, &frame, 1);
            self.device.drain();
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn assert_receives(&mut self) {
        // What was sent before may still wait in the TAP.
        self.device.receive();
        let deadline = Instant::now() + TIMEOUT;
        self.send_from_host(1);
        while self.device.receive() == 0 {
            assert!(Instant::now() < deadline, "no frame arrives from the TAP");
            std::thread::sleep(Duration::from_millis(5));
            self.send_from_host(1);
        }
    }
}

/// A link that went down has lost its neighbours.
fn configure(under_test: &DaemonUnderTest) {
    let neighbour = format!(
        "neigh replace 10.78.0.2 lladdr 02:00:00:00:00:{MAC:02x} dev {ATTACKED_TAP} nud permanent"
    );
    under_test.network.netns().ip(&neighbour).unwrap();
}

/// A socket that stays in the namespace in which it was made.
fn socket_in(netns: &Netns) -> UdpSocket {
    let name = netns.name().to_owned();
    let make = move || {
        let namespace = File::open(format!("/run/netns/{name}")).unwrap();
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    };
    std::thread::spawn(make).join().unwrap()
}
