//! Offloads in software compared with the kernel's: the same frame passes a bridge from one TAP to
//! another one whose reader accepts no offloads, so that the kernel performs them.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod host;
#[path = "../../virtio-net/tests/packets/mod.rs"]
mod packets;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use host::{eventually, in_namespaces, open_tap, receive, run, send};
use packets::{ACK, CWR, ECE, FIN, PSH, Packet, PacketBuilder, convert, format};
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::offload::Segmenter;
use virtionet_virtio_net::uplink::{Received, Uplink, UplinkQueue, null_rx_sink};

const WHOLE: usize = 1 << 17;

/// Two TAPs on a bridge: frames are sent to the first; the second accepts no offloads.
struct Bridge {
    from: Arc<dyn UplinkQueue>,
    to: Arc<dyn UplinkQueue>,
    _uplinks: [Arc<dyn Uplink>; 2],
}

impl Bridge {
    fn new() -> Self {
        run("ip link add of-br type bridge mcast_snooping 0");
        let uplinks = ["of-a", "of-b"].map(|name| {
            let uplink = eventually(|| open_tap(name).ok());
            uplink.set_format(format(false, false)).unwrap();
            run(&format!("ip link set {name} master of-br up mtu 65000"));
            uplink
        });
        run("ip link set of-br up");
        let [from, to] = uplinks.each_ref().map(|uplink| {
            let queue = uplink.open_queue(0, null_rx_sink()).unwrap();
            queue.set_attached(true).unwrap();
            queue
        });
        Self {
            from,
            to,
            _uplinks: uplinks,
        }
    }

    /// The frames that the kernel makes of a packet.
    fn convert_by_kernel(&self, packet: &Packet) -> Vec<Packet> {
        let stats = send(&*self.from, packet.header, &packet.bytes, WHOLE);
        assert_eq!(stats.frames.get(), 1, "the kernel refuses the frame");
        // The kernel queues all of them before the write returns, or shortly after.
        let first = eventually(|| self.next());
        let mut made = vec![first];
        let mut silent = 0;
        while silent < 5 {
            match self.next() {
                Some(packet) => made.push(packet),
                None => {
                    silent += 1;
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
        made
    }

    fn next(&self) -> Option<Packet> {
        match receive(&*self.to, &[12, 65_600]) {
            (Received::Frame(_), bytes) => {
                let (header, bytes) = bytes.split_first_chunk().unwrap();
                Some(Packet {
                    header: VnetHeader(*header),
                    bytes: bytes.to_vec(),
                })
            }
            (Received::Empty, _) => None,
            (received, _) => panic!("{received:?}"),
        }
    }
}

#[test]
fn kernel_makes_the_same_frames() {
    in_namespaces(|| {
        let bridge = Bridge::new();
        let mut segmenter = Segmenter::new();
        for (name, maker) in cases() {
            let packet = maker.build();
            eprintln!("{name}: {:?}", packet.header.0);
            let ours = convert(&mut segmenter, &packet, WHOLE, &format(false, false)).unwrap();
            let kernel = bridge.convert_by_kernel(&packet);
            compare(name, &packet, ours, kernel);
        }
    });
}

fn compare(name: &str, packet: &Packet, mut ours: Vec<Packet>, mut kernel: Vec<Packet>) {
    assert_eq!(ours.len(), kernel.len(), "{name}");
    if let Some(at) = fragment_header(packet, &ours) {
        // The identification may have any value.
        for made in ours.iter_mut().chain(&mut kernel) {
            made.bytes[at + 4..at + 8].fill(0);
        }
    }
    for (n, (ours, kernel)) in ours.iter().zip(&kernel).enumerate() {
        assert_eq!(ours.bytes.len(), kernel.bytes.len(), "{name}: frame {n}");
        let differing = (0..ours.bytes.len()).find(|at| ours.bytes[*at] != kernel.bytes[*at]);
        let Some(at) = differing else {
            assert_eq!(kernel.header.flags() & 1, 0, "{name}: frame {n}");
            assert_eq!(kernel.header.gso_type(), 0, "{name}: frame {n}");
            continue;
        };
        let around = at.saturating_sub(20)..(at + 20).min(ours.bytes.len());
        let (ours, kernel) = (&ours.bytes[around.clone()], &kernel.bytes[around.clone()]);
        panic!("{name}: frame {n} differs at {at}: {ours:x?}, kernel {kernel:x?} at {around:?}");
    }
}

/// The offset of the fragment header of IPv6 fragments: behind the headers that they repeat.
fn fragment_header(packet: &Packet, made: &[Packet]) -> Option<usize> {
    let mut ethertypes = packet.bytes[12..].chunks(4).map(|word| [word[0], word[1]]);
    let behind_tags = ethertypes.find(|found| ![[0x81, 0], [0x88, 0xa8]].contains(found));
    let is_fragment = packet.header.gso_type() == 3 && made.len() > 1;
    (is_fragment && behind_tags == Some([0x86, 0xdd])).then(|| packet.header.csum_start().into())
}

/// The packets to compare. Fragments behind IPv6 extension headers are left out: Linux (6.18) adds
/// the length of those headers to the offsets, so that its fragments have gaps.
fn cases() -> Vec<(&'static str, PacketBuilder)> {
    let mut cases = Vec::new();
    for v6 in [false, true] {
        cases.extend([
            ("checksum of TCP", PacketBuilder::tcp(v6, 12, 1000)),
            (
                "checksum of an odd TCP segment",
                PacketBuilder::tcp(v6, 12, 1001),
            ),
            ("checksum of UDP", PacketBuilder::udp(v6, 1000)),
            ("checksum of an odd datagram", PacketBuilder::udp(v6, 1001)),
            ("checksum of an empty datagram", PacketBuilder::udp(v6, 0)),
            (
                "checksum behind a tag",
                PacketBuilder::udp(v6, 1000).tag(0x8100, 7),
            ),
            ("segments", PacketBuilder::tcp(v6, 0, 14_600).gso(1460)),
            (
                "large segments",
                PacketBuilder::tcp(v6, 12, 65_000).gso(8948),
            ),
            ("odd segments", PacketBuilder::tcp(v6, 12, 64_999).gso(1447)),
            ("small segments", PacketBuilder::tcp(v6, 40, 20_000).gso(36)),
            (
                "flags",
                PacketBuilder::tcp(v6, 12, 9000)
                    .gso(1448)
                    .flags(ACK | FIN | PSH),
            ),
            (
                "ECN",
                PacketBuilder::tcp(v6, 12, 9000)
                    .gso(1448)
                    .flags(ACK | CWR | ECE),
            ),
            (
                "segments behind a tag",
                PacketBuilder::tcp(v6, 12, 9000).gso(1448).tag(0x8100, 7),
            ),
            (
                "segments behind two tags",
                PacketBuilder::tcp(v6, 12, 9000)
                    .gso(1448)
                    .tag(0x8100, 7)
                    .tag(0x88a8, 9),
            ),
            ("fragments", PacketBuilder::udp(v6, 14_000).gso(1480)),
            (
                "fragments to the limit",
                PacketBuilder::udp(v6, 65_000).gso(1480),
            ),
            (
                "an odd last fragment",
                PacketBuilder::udp(v6, 14_001).gso(1448),
            ),
            (
                "fragments behind a tag",
                PacketBuilder::udp(v6, 9000).gso(1480).tag(0x8100, 7),
            ),
        ]);
    }
    cases.extend([
        (
            "IPv4 options",
            PacketBuilder::tcp(false, 12, 9000).gso(1448).ip_options(4),
        ),
        (
            "fragments without DF",
            PacketBuilder::udp(false, 9000).gso(1480).may_fragment(),
        ),
        (
            "fragments with options",
            PacketBuilder::udp(false, 9000).gso(1480).ip_options(4),
        ),
        (
            "destination options",
            PacketBuilder::tcp(true, 12, 9000)
                .gso(1400)
                .extension(60, 2),
        ),
        (
            "three extension headers",
            PacketBuilder::tcp(true, 12, 9000)
                .gso(1400)
                .extension(60, 1)
                .extension(43, 1)
                .extension(0, 1),
        ),
    ]);
    cases
}
