//! The numbers of a TAP's queues, as the uplink reports them and as the kernel assigns them.
//!
//! The kernel distributes incoming frames over a group of raw sockets by the number of their queue
//! (packet(7), PACKET_FANOUT_QM), so the socket shows the number.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, unsafe_code)]

mod host;

use std::ffi::c_int;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use host::{PacketSocket, drain, frame, in_namespaces, run, send};
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::uplink::{Uplink, UplinkQueue, null_rx_sink};

const PLAIN: VnetHeader = VnetHeader([0; 12]);
const QUEUES: u16 = 5;
/// <linux/if_packet.h>
const PACKET_FANOUT: c_int = 18;
const PACKET_FANOUT_QM: u32 = 5;

/// Sockets of which number n receives the incoming frames of queue n.
struct Group(Vec<PacketSocket>);

impl Group {
    fn on(name: &str) -> Self {
        // For the kernel, number 0 is "no queue".
        let sockets: Vec<_> = (0..=QUEUES).map(|_| PacketSocket::on(name)).collect();
        for socket in &sockets {
            let group: u32 = PACKET_FANOUT_QM << 16 | 7;
            // SAFETY: the option is one u32, which is alive, and its length is given.
            let rc = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_PACKET,
                    PACKET_FANOUT,
                    (&raw const group).cast(),
                    4,
                )
            };
            assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        }
        Self(sockets)
    }

    /// The number of the queue to which the frame with this mark was written.
    fn number_of(&self, mark: u8) -> Option<usize> {
        let wanted = frame(60, mark);
        let mut found = None;
        for (at, socket) in self.0.iter().enumerate() {
            while let Some(got) = socket.poll() {
                if got == wanted {
                    found = Some((at + self.0.len() - 1) % self.0.len());
                }
            }
        }
        found
    }
}

#[test]
fn reported_queue_numbers_are_those_of_the_kernel() {
    in_namespaces(|| {
        run("mount -t sysfs none /sys");
        let uplink: Arc<dyn Uplink> = host::open_tap("vt0").unwrap();
        let group = Group::on("vt0");
        let mut queues: Vec<Arc<dyn UplinkQueue>> = Vec::new();
        // The pair, and whether to attach or detach it; a new pair is opened first.
        for (step, (pair, attach)) in [
            (0, true),
            (1, true),
            (2, true),
            (3, true),
            (1, false),
            (0, false),
            (4, true),
            (1, true),
            (3, false),
            (2, false),
            (0, true),
            (2, true),
            (4, false),
            (4, true),
            (3, true),
        ]
        .into_iter()
        .enumerate()
        {
            if pair == queues.len() {
                let number = u16::try_from(pair).unwrap();
                queues.push(uplink.open_queue(number, null_rx_sink()).unwrap());
            }
            queues[pair].set_attached(attach).unwrap();
            let reported = uplink.host_interface().unwrap();
            assert_eq!(reported.name, "vt0");
            for (number, pair) in reported.queues.iter().enumerate() {
                let mark = u8::try_from(step * 16 + number).unwrap();
                let queue = &queues[usize::from(*pair)];
                assert_eq!(send(&**queue, PLAIN, &frame(60, mark), 60).frames.get(), 1);
                assert_eq!(group.number_of(mark), Some(number), "{step}: {reported:?}");
            }
            for number in 0..reported.queues.len() {
                let dir = format!("/sys/class/net/vt0/queues/tx-{number}");
                assert!(Path::new(&dir).exists(), "{dir}");
            }
            for queue in &queues {
                drain(&**queue);
            }
        }
    });
}
