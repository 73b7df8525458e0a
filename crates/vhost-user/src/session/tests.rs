//! Complete sessions over a socket pair, with a device that records its calls.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

mod iommu;
mod migration;
mod postcopy;
mod suspension;

use proptest::prelude::*;
use vhost::vhost_user::message::FrontendReq as Code;

use std::fs::File;

use super::*;
use crate::testing::{
    FEATURES, QUEUE_PAIRS, RawFrontEnd, RecordingBackend, encode_message, eventfd, memory_file,
    payload, stop_pair,
};

const GUEST_MEMORY: u64 = 1 << 20;

/// The front-end of a session.
struct FrontEnd {
    raw: RawFrontEnd,
    /// The eventfd that serves as every call and kick descriptor.
    event: OwnedFd,
}

impl FrontEnd {
    fn send_request(&self, code: Code, payload: &[u8]) {
        self.raw.send_request(code.into(), payload, &[]);
    }

    fn request_u64(&self, code: Code) -> u64 {
        u64::from_ne_bytes(self.raw.request_reply(code.into(), &[]))
    }

    fn send_u64(&self, code: Code, number: u64) {
        self.send_request(code, &number.to_ne_bytes());
    }

    fn send_with_ack(&self, code: Code, payload: &[u8]) -> u64 {
        self.raw.send_with_ack(code.into(), payload, &[])
    }

    fn enable(&self, ring: u32, value: u32) -> u64 {
        self.send_with_ack(Code::SET_VRING_ENABLE, &payload(&[ring, value]))
    }

    fn event(&self, code: Code, ring: u64) {
        let bytes = ring.to_ne_bytes();
        self.raw
            .send_request(code.into(), &bytes, &[self.event.as_fd()]);
    }

    fn add_memory(&self, guest_addr: u64) -> u64 {
        let code = Code::ADD_MEM_REG.into();
        let file = memory_file(GUEST_MEMORY);
        self.raw
            .send_with_ack(code, &region(guest_addr), &[file.as_fd()])
    }

    /// Sends NUM, BASE, ADDR and KICK, in the order of QEMU.
    fn configure(&self, ring: u32, size: u32, base: u32) {
        self.send_request(Code::SET_VRING_NUM, &payload(&[ring, size]));
        self.send_request(Code::SET_VRING_BASE, &payload(&[ring, base]));
        self.send_request(
            Code::SET_VRING_ADDR,
            &addresses(ring, 0x1000 * u64::from(ring)),
        );
        self.event(Code::SET_VRING_KICK, ring.into());
    }

    fn base(&self, ring: u32) -> u32 {
        let reply = self
            .raw
            .request_reply(Code::GET_VRING_BASE.into(), &payload(&[ring, 0]));
        let [a, b, c, d, e, f, g, h] = reply;
        assert_eq!(u32::from_ne_bytes([a, b, c, d]), ring);
        u32::from_ne_bytes([e, f, g, h])
    }

    /// Waits until the session has handled everything sent so far.
    fn sync(&self) {
        self.request_u64(Code::GET_FEATURES);
    }

    fn negotiate(&self) {
        self.send_u64(Code::SET_PROTOCOL_FEATURES, protocol_features::OFFERED);
        self.send_u64(
            Code::SET_FEATURES,
            FEATURES | VHOST_USER_F_PROTOCOL_FEATURES,
        );
    }
}

/// The payload of ADD_MEM_REG for a region whose front-end addresses are the guest's.
fn region(guest_addr: u64) -> Vec<u8> {
    [0, guest_addr, GUEST_MEMORY, guest_addr, 0]
        .map(u64::to_ne_bytes)
        .concat()
}

fn addresses(ring: u32, start: u64) -> Vec<u8> {
    let areas = [start, start + 0x400, start + 0x800, 0];
    [payload(&[ring, 0]), areas.map(u64::to_ne_bytes).concat()].concat()
}

/// Runs a session while `front_end` runs. Returns the result of the session.
fn session(
    backend: &RecordingBackend,
    front_end: impl FnOnce(&FrontEnd) + Send,
) -> Result<SessionEnd, SessionError> {
    let (raw, stream) = RawFrontEnd::pair();
    let (_stop, stopped) = stop_pair();
    thread::scope(|scope| {
        scope.spawn(move || {
            front_end(&FrontEnd {
                raw,
                event: eventfd(0),
            });
        });
        serve(
            stream,
            backend,
            stopped.as_fd(),
            None,
            &SessionLog::default(),
        )
    })
}

fn one_pair(front_end: &FrontEnd) {
    front_end.negotiate();
    front_end.add_memory(0);
    for ring in 0..2 {
        front_end.configure(ring, 256, 0);
        front_end.enable(ring, 1);
    }
    front_end.sync();
}

/// Sends what QEMU 10 sends for two queue pairs when the guest's driver uses one of them.
fn qemu(front_end: &FrontEnd, backend: &RecordingBackend) {
    for pair in 0..2u64 {
        assert_eq!(
            front_end.request_u64(Code::GET_FEATURES),
            FEATURES | SESSION_FEATURES
        );
        let offered = front_end.request_u64(Code::GET_PROTOCOL_FEATURES);
        let withheld = match pair {
            0 => 0,
            _ => VhostUserProtocolFeatures::PAGEFAULT.bits(),
        };
        assert_eq!(offered, protocol_features::OFFERED & !withheld);
        front_end.send_u64(Code::SET_PROTOCOL_FEATURES, offered);
        assert_eq!(
            front_end.request_u64(Code::GET_QUEUE_NUM),
            u64::from(QUEUE_PAIRS)
        );
        assert_eq!(front_end.request_u64(Code::GET_MAX_MEM_SLOTS), 509);
        front_end.send_request(Code::SET_OWNER, &[]);
        front_end.request_u64(Code::GET_FEATURES);
        for ring in 2 * pair..2 * pair + 2 {
            front_end.event(Code::SET_VRING_CALL, ring);
            front_end.event(Code::SET_VRING_ERR, ring);
        }
    }
    for (ring, value) in [(0, 1), (1, 1), (2, 0), (3, 0), (0, 1), (1, 1)] {
        assert_eq!(front_end.enable(ring, value), 0);
    }
    backend.read();
    start_as_qemu(front_end);
}

fn start_as_qemu(front_end: &FrontEnd) {
    for pair in 0..2 {
        front_end.send_u64(
            Code::SET_FEATURES,
            FEATURES | VHOST_USER_F_PROTOCOL_FEATURES,
        );
        let status = front_end.request_u64(Code::GET_STATUS);
        front_end.send_u64(Code::SET_STATUS, status | 8);
        if pair == 0 {
            assert_eq!(front_end.add_memory(0), 0);
        }
        for ring in 2 * pair..2 * pair + 2 {
            front_end.configure(ring, 256, 7);
            front_end.event(Code::SET_VRING_CALL, ring.into());
        }
    }
    assert_eq!(front_end.request_u64(Code::GET_STATUS), 8);
}

#[test]
fn vrings_start_and_stop_in_the_order_that_qemu_uses() {
    let backend = RecordingBackend::with_stop_base(20);
    let ended = session(&backend, |front_end| {
        qemu(front_end, &backend);
        let start = |ring, enabled| {
            format!("start {ring} size 256 base 7 enabled {enabled} kick fd call fd")
        };
        let features = format!("features {FEATURES:#x}");
        assert_eq!(
            backend.read(),
            [
                features.as_str(),
                "memory 1",
                // SET_VRING_ENABLE comes before SET_FEATURES and is not repeated after it.
                &start(0, true),
                "call 0 fd",
                &start(1, true),
                "call 1 fd",
                &start(2, false),
                "call 2 fd",
                &start(3, false),
                "call 3 fd",
            ]
        );
        // `ethtool -L` in the guest enables the second queue pair.
        assert_eq!(front_end.enable(2, 1), 0);
        assert_eq!(front_end.enable(3, 1), 0);
        assert_eq!(backend.read(), ["enabled 2 true", "enabled 3 true"]);
        // The driver is unloaded.
        for ring in 0..4 {
            assert_eq!(front_end.base(ring), 20);
        }
        front_end.send_u64(Code::SET_STATUS, 0);
        front_end.send_request(Code::RESET_DEVICE, &[]);
        let file = memory_file(GUEST_MEMORY);
        let code = Code::REM_MEM_REG.into();
        let removed = front_end
            .raw
            .send_with_ack(code, &region(0), &[file.as_fd()]);
        assert_eq!(removed, 0);
        assert_eq!(
            backend.read(),
            ["stop 0", "stop 1", "stop 2", "stop 3", "memory 0"]
        );
        assert_eq!(front_end.request_u64(Code::GET_STATUS), 0);
        // The driver is loaded again: QEMU enables only the first queue pair and sends no call
        // descriptor.
        front_end.enable(0, 1);
        front_end.enable(1, 1);
        start_as_qemu(front_end);
        assert_eq!(
            backend.read(),
            [
                "memory 1",
                &start(0, true),
                "call 0 fd",
                &start(1, true),
                "call 1 fd",
                &start(2, false),
                "call 2 fd",
                &start(3, false),
                "call 3 fd",
            ]
        );
        // QEMU sends no err descriptor either.
        assert!(backend.started_with(0).err.is_some());
    });
    assert_eq!(ended.unwrap(), SessionEnd::Disconnected);
    assert_eq!(
        backend.read(),
        ["stop 0", "stop 1", "stop 2", "stop 3", "disconnected"]
    );
    assert!(backend.running().is_empty());
}

#[test]
fn vring_starts_whatever_the_order_of_its_messages() {
    let steps: [fn(&FrontEnd); 4] = [
        |front_end| front_end.send_request(Code::SET_VRING_NUM, &payload(&[0, 128])),
        |front_end| front_end.send_request(Code::SET_VRING_BASE, &payload(&[0, 3])),
        |front_end| front_end.send_request(Code::SET_VRING_ADDR, &addresses(0, 0)),
        |front_end| front_end.send_u64(Code::SET_VRING_KICK, 0x100),
    ];
    for first in 0..4 {
        let backend = RecordingBackend::default();
        session(&backend, |front_end| {
            front_end.negotiate();
            front_end.add_memory(0);
            for step in 0..4 {
                front_end.sync();
                assert!(backend.running().is_empty());
                steps[(first + step) % 4](front_end);
            }
            front_end.sync();
            assert_eq!(
                backend.read().last().unwrap(),
                "start 0 size 128 base 3 enabled false kick none call none"
            );
        })
        .unwrap();
    }
}

#[test]
fn vrings_without_protocol_features_start_enabled() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        front_end.send_u64(Code::SET_FEATURES, FEATURES);
        let table = [
            payload(&[1, 0]),
            [0, GUEST_MEMORY, 0, 0].map(u64::to_ne_bytes).concat(),
        ]
        .concat();
        let file = memory_file(GUEST_MEMORY);
        front_end
            .raw
            .send_request(Code::SET_MEM_TABLE.into(), &table, &[file.as_fd()]);
        front_end.configure(0, 256, 0);
        front_end.sync();
        assert!(backend.started_with(0).enabled);
        // A request for an acknowledgement gets none before REPLY_ACK is negotiated.
        let wants = encode_message(Code::SET_OWNER.into(), 9, &[]);
        front_end.raw.send(&wants, &[]);
        front_end.sync();
        // When protocol features are negotiated late, the vring waits for SET_VRING_ENABLE.
        backend.read();
        front_end.negotiate();
        front_end.sync();
        assert!(backend.read().contains(&"enabled 0 false".into()));
        front_end.enable(0, 1);
        assert_eq!(backend.read(), ["enabled 0 true"]);
    })
    .unwrap();
}

#[test]
fn vring_start_without_shared_memory_ends_the_session() {
    let empty_table = |front_end: &FrontEnd| {
        front_end.send_request(Code::SET_MEM_TABLE, &payload(&[0, 0]));
    };
    for prepare in [|_: &FrontEnd| {}, empty_table] {
        let backend = RecordingBackend::default();
        let ended = session(&backend, |front_end| {
            front_end.negotiate();
            prepare(front_end);
            front_end.configure(0, 256, 0);
        });
        assert!(matches!(ended, Err(SessionError::NotShared)), "{ended:?}");
        let text = SessionError::NotShared.to_string();
        assert!(text.contains("memory-backend-memfd,id=mem,size=SIZE,share=on"));
        assert!(backend.running().is_empty());
    }
}

#[test]
fn refused_request_changes_nothing_and_the_session_continues() {
    let backend = RecordingBackend::default();
    let result = session(&backend, |front_end| {
        one_pair(front_end);
        backend.read();
        let u64s = |value: u64| value.to_ne_bytes().to_vec();
        for (code, bytes) in [
            (Code::SET_FEATURES, u64s(FEATURES | 1 << 27)),
            (Code::SET_FEATURES, u64s(VHOST_USER_F_PROTOCOL_FEATURES)),
            (
                Code::SET_PROTOCOL_FEATURES,
                u64s(protocol_features::OFFERED | 1 << 12),
            ),
            (Code::SET_VRING_BASE, payload(&[4, 0])),
            (Code::SET_VRING_NUM, payload(&[4, 256])),
            (Code::SET_VRING_NUM, payload(&[0, 0])),
            (Code::SET_VRING_NUM, payload(&[255, 256])),
            (Code::SET_VRING_NUM, payload(&[0x1_0000, 256])),
            (Code::SET_VRING_ADDR, addresses(4, 0)),
            (Code::SET_VRING_ADDR, addresses(0, 8)),
            (Code::SET_VRING_KICK, u64s(0x104)),
            (Code::SET_VRING_CALL, u64s(0x104)),
            (Code::SET_VRING_ERR, u64s(0x104)),
            (Code::SET_VRING_ENABLE, payload(&[4, 1])),
            (Code::SET_VRING_ENABLE, payload(&[0, 2])),
            (Code::REM_MEM_REG, region(4096)),
            (Code::SET_STATUS, u64s(0x100)),
            (Code::SEND_RARP, u64s(0)),
            (
                Code::SEND_RARP,
                u64s(u64::from_ne_bytes([1, 2, 3, 4, 5, 6, 0, 0])),
            ),
        ] {
            assert_eq!(front_end.send_with_ack(code, &bytes), 1, "{code:?}");
            // A request that asks for no acknowledgement gets none.
            front_end.send_request(code, &bytes);
        }
        assert_eq!(front_end.raw.send_with_ack(1000, &[1, 2, 3], &[]), 1);
        front_end
            .raw
            .send_request(1000, &[], &[front_end.event.as_fd()]);
        // Regions that overlap, are too short or cannot be mapped, and a directory as memory.
        let short = memory_file(4096);
        let directory = File::open("/").unwrap();
        for (bytes, file) in [
            (region(0), &memory_file(GUEST_MEMORY)),
            (region(GUEST_MEMORY), &short),
            (region(u64::MAX - 8), &short),
            (region(GUEST_MEMORY), &directory),
        ] {
            let code = Code::ADD_MEM_REG.into();
            let fds = [file.as_fd()];
            assert_eq!(front_end.raw.send_with_ack(code, &bytes, &fds), 1);
        }
        front_end.sync();
        assert_eq!(backend.read(), Vec::<String>::new());
        assert_eq!(backend.running(), [0, 1]);
    });
    assert_eq!(result.unwrap(), SessionEnd::Disconnected);
    // The device learns the first refused request.
    let refused = *backend.refused.lock().unwrap();
    assert_eq!(refused, Some("features-not-offered"));
}

#[test]
fn mtu_that_the_device_cannot_carry_is_refused() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        front_end.negotiate();
        let mtu = |value: u64| front_end.send_with_ack(Code::NET_SET_MTU, &value.to_ne_bytes());
        assert_eq!([mtu(68), mtu(9000), mtu(9001), mtu(67)], [0, 0, 1, 1]);
        assert_eq!(backend.read()[3..], ["mtu 68", "mtu 9000", "mtu 9001"]);
    })
    .unwrap();
}

#[test]
fn protocol_error_ends_the_session_and_stops_its_vrings() {
    let u64s = |value: u64| value.to_ne_bytes().to_vec();
    let code = |code: Code| u32::from(code);
    for (bytes, fds, want) in [
        (encode_message(1, 0, &[]), 0, "version 0"),
        (encode_message(1, 2, &[]), 0, "version 2"),
        (encode_message(1, 5, &[]), 0, "marked as a reply"),
        (payload(&[1, 1, 4097]), 0, "4097 bytes"),
        (payload(&[1, 1, u32::MAX]), 0, "4294967295 bytes"),
        (encode_message(1, 1, &[0; 1]), 0, "payload of 1 bytes"),
        (encode_message(1, 1, &[]), 1, "carries 1 file descriptors"),
        (
            encode_message(1, 1, &[]),
            33,
            "more than 32 file descriptors",
        ),
        (
            encode_message(code(Code::SET_VRING_KICK), 1, &u64s(0)),
            0,
            "instead of 1",
        ),
        (
            encode_message(code(Code::SET_VRING_KICK), 1, &u64s(0x100)),
            1,
            "instead of 0",
        ),
        (
            encode_message(code(Code::SET_VRING_CALL), 1, &u64s(0)),
            2,
            "instead of 1",
        ),
        (
            encode_message(code(Code::GET_VRING_BASE), 1, &payload(&[4, 0])),
            0,
            "ring 4",
        ),
        (
            encode_message(code(Code::GET_VRING_BASE), 9, &payload(&[999, 0])),
            0,
            "0x3e7",
        ),
        (payload(&[1]), 0, "middle of a message"),
        (payload(&[2, 1, 8, 0]), 0, "middle of a message"),
    ] {
        let backend = RecordingBackend::default();
        let error = session(&backend, |front_end| {
            one_pair(front_end);
            front_end
                .raw
                .send(&bytes, &vec![front_end.event.as_fd(); fds]);
        })
        .unwrap_err();
        assert!(matches!(error, SessionError::Protocol(_)));
        assert!(error.to_string().contains(want), "{error}\nwanted: {want}");
        let entries = backend.read();
        assert_eq!(
            entries[entries.len() - 3..],
            ["stop 0", "stop 1", "disconnected"]
        );
    }
}

#[test]
fn descriptor_that_is_not_an_eventfd_ends_the_session() {
    for path in ["/dev/zero", "/"] {
        let file = File::open(path).unwrap();
        let error = session(&RecordingBackend::default(), |front_end| {
            let code = Code::SET_VRING_CALL.into();
            let bytes = 1u64.to_ne_bytes();
            front_end.raw.send_request(code, &bytes, &[file.as_fd()]);
        })
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("SET_VRING_CALL for ring 1 carries {path} instead of an eventfd")
        );
    }
}

#[test]
fn refusal_of_too_many_queue_pairs_names_both_numbers() {
    let refusal = RequestError::NoSuchVring {
        ring: 4,
        queue_pairs: 2,
    };
    assert_eq!(
        refusal.to_string(),
        "the front-end configures ring 4, but this device has 2 queue pairs (rings 0 to 3); raise virtionetd's --queues or lower queues= of QEMU's -netdev vhost-user"
    );
}

#[test]
fn descriptors_of_a_running_vring_can_change() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        one_pair(front_end);
        backend.read();
        front_end.event(Code::SET_VRING_KICK, 0);
        front_end.send_u64(Code::SET_VRING_KICK, 0x101);
        front_end.event(Code::SET_VRING_CALL, 0);
        front_end.send_u64(Code::SET_VRING_CALL, 0x100);
        front_end.event(Code::SET_VRING_ERR, 1);
        front_end.sync();
        assert_eq!(
            backend.read(),
            [
                "kick 0 fd",
                "kick 1 none",
                "call 0 fd",
                "call 0 none",
                "err 1 fd"
            ]
        );
    })
    .unwrap();
}

#[test]
fn running_vring_with_a_new_address_is_started_again() {
    let backend = RecordingBackend::with_stop_base(11);
    session(&backend, |front_end| {
        one_pair(front_end);
        backend.read();
        // Setting the same address again changes nothing.
        front_end.send_request(Code::SET_VRING_NUM, &payload(&[0, 256]));
        front_end.send_request(Code::SET_VRING_ADDR, &addresses(0, 0));
        front_end.sync();
        assert_eq!(backend.read(), Vec::<String>::new());
        front_end.send_request(Code::SET_VRING_ADDR, &addresses(0, 0x8000));
        front_end.sync();
        let moved = "start 0 size 256 base 11 enabled true kick fd call none";
        assert_eq!(backend.read(), ["stop 0", moved]);
        assert_eq!(backend.started_with(0).layout.desc, 0x8000);
        // The address is outside of memory, so the vring stays stopped until memory contains it.
        let bytes = addresses(0, GUEST_MEMORY);
        assert_eq!(front_end.send_with_ack(Code::SET_VRING_ADDR, &bytes), 1);
        assert_eq!(backend.read(), ["stop 0"]);
        front_end.add_memory(GUEST_MEMORY);
        assert_eq!(backend.read(), ["memory 2", moved]);
        front_end.send_request(Code::SET_VRING_BASE, &payload(&[0, 3]));
        front_end.sync();
        assert_eq!(backend.read()[0], "stop 0");
        assert_eq!(backend.started_with(0).base, 3);
    })
    .unwrap();
}

#[test]
fn features_that_change_under_running_vrings_restart_none_and_keep_the_format() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        one_pair(front_end);
        backend.read();
        let set = |virtio: u64| {
            let bits = virtio | VHOST_USER_F_PROTOCOL_FEATURES;
            front_end.send_with_ack(Code::SET_FEATURES, &bits.to_ne_bytes())
        };
        let others = FEATURES & !PACKED;
        let fewer = PACKED | others & (others - 1);
        assert_ne!(fewer, FEATURES);
        assert_eq!(set(fewer), 0);
        assert_eq!(backend.read(), [format!("features {fewer:#x}")]);
        assert_eq!(set(others), 1, "the format of a running vring");
        assert_eq!(set(FEATURES | 1 << 27), 1, "a feature that is not offered");
        assert_eq!(backend.read(), Vec::<String>::new());
        assert_eq!(backend.running(), [0, 1]);
    })
    .unwrap();
}

#[test]
fn stopped_vring_keeps_its_last_base() {
    let backend = RecordingBackend::with_stop_base(42);
    session(&backend, |front_end| {
        assert_eq!(front_end.base(0), 0);
        one_pair(front_end);
        assert_eq!(front_end.base(0), 42);
        assert_eq!(front_end.base(0), 42);
        backend.read();
        // New parameters alone do not start the vring, because SET_VRING_KICK has not come.
        front_end.send_request(Code::SET_VRING_NUM, &payload(&[0, 64]));
        front_end.send_request(Code::SET_VRING_BASE, &payload(&[0, 50]));
        front_end.sync();
        assert_eq!(backend.read(), Vec::<String>::new());
        assert_eq!(front_end.base(0), 50);
        front_end.event(Code::SET_VRING_KICK, 0);
        front_end.sync();
        assert_eq!(
            backend.read(),
            ["start 0 size 64 base 50 enabled true kick fd call none"]
        );
    })
    .unwrap();
}

#[test]
fn vring_that_leaves_the_memory_table_stops_and_starts_again_with_its_memory() {
    let backend = RecordingBackend::with_stop_base(9);
    session(&backend, |front_end| {
        one_pair(front_end);
        backend.read();
        let remove = || {
            let code = Code::REM_MEM_REG;
            assert_eq!(front_end.send_with_ack(code, &region(0)), 0);
        };
        remove();
        assert_eq!(backend.read(), ["memory 0"]);
        // GET_VRING_BASE returns the base at which the device stopped the vring, which is not
        // stopped twice.
        assert_eq!(front_end.base(1), 9);
        assert_eq!(backend.read(), Vec::<String>::new());
        // Vring 1 waits for a new kick, and vring 0 only for memory.
        assert_eq!(front_end.add_memory(0), 0);
        assert_eq!(
            backend.read(),
            [
                "memory 1",
                "start 0 size 256 base 9 enabled true kick fd call none"
            ]
        );
        // The format may change while no vring is started.
        remove();
        let features = FEATURES & !PACKED | VHOST_USER_F_PROTOCOL_FEATURES;
        assert_eq!(
            front_end.send_with_ack(Code::SET_FEATURES, &features.to_ne_bytes()),
            0
        );
    })
    .unwrap();
}

#[test]
fn reset_stops_every_vring() {
    for (code, bytes) in [
        (Code::RESET_DEVICE, vec![]),
        (Code::RESET_OWNER, vec![]),
        (Code::SET_STATUS, vec![0; 8]),
    ] {
        let backend = RecordingBackend::default();
        session(&backend, |front_end| {
            one_pair(front_end);
            front_end.send_u64(Code::SET_STATUS, 15);
            assert_eq!(front_end.request_u64(Code::GET_STATUS), 15);
            backend.read();
            assert_eq!(front_end.send_with_ack(code, &bytes), 0);
            assert_eq!(backend.read(), ["stop 0", "stop 1"], "{code:?}");
            let status = front_end.request_u64(Code::GET_STATUS);
            assert_eq!(status == 0, code != Code::RESET_OWNER);
            assert_eq!(front_end.send_with_ack(code, &bytes), 0);
            assert_eq!(backend.read(), Vec::<String>::new());
        })
        .unwrap();
    }
}

#[test]
fn packed_vring_accepts_sizes_and_bases_that_a_split_one_does_not() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        let base = payload(&[0, 0x8000_8000]);
        let size = payload(&[0, 100]);
        front_end.send_u64(Code::SET_PROTOCOL_FEATURES, protocol_features::OFFERED);
        front_end.send_u64(Code::SET_FEATURES, VHOST_USER_F_PROTOCOL_FEATURES);
        assert_eq!(front_end.send_with_ack(Code::SET_VRING_BASE, &base), 1);
        assert_eq!(front_end.send_with_ack(Code::SET_VRING_NUM, &size), 1);
        front_end.negotiate();
        assert_eq!(front_end.send_with_ack(Code::SET_VRING_BASE, &base), 0);
        assert_eq!(front_end.send_with_ack(Code::SET_VRING_NUM, &size), 0);
        assert_eq!(front_end.base(0), 0x8000_8000);
    })
    .unwrap();
}

#[test]
fn request_that_waits_for_its_own_reply_is_refused_or_ends_the_session() {
    for code in [Code::GET_CONFIG, Code::GET_INFLIGHT_FD] {
        // With an acknowledgement the front-end learns of the refusal, and the session goes on.
        session(&RecordingBackend::default(), |front_end| {
            front_end.negotiate();
            assert_eq!(front_end.send_with_ack(code, &[]), 1);
            front_end.sync();
        })
        .unwrap();
        let error = session(&RecordingBackend::default(), |front_end| {
            front_end.raw.send_request(code.into(), &[], &[]);
            let read = std::io::Read::read(&mut &front_end.raw.0, &mut [0]);
            assert_eq!(read.unwrap(), 0, "the connection is closed");
        })
        .unwrap_err();
        assert_eq!(error.code(), "request-unanswerable");
    }
}

#[test]
fn stop_ends_a_session_and_stops_its_rings() {
    let backend = RecordingBackend::default();
    let (raw, stream) = RawFrontEnd::pair();
    let (stop, stopped) = stop_pair();
    let ended = thread::scope(|scope| {
        scope.spawn(|| {
            let event = eventfd(0);
            let front_end = FrontEnd { raw, event };
            one_pair(&front_end);
            stop.write(1).unwrap();
            // The connection stays open until the session has ended.
            let mut byte = [0];
            let read = std::io::Read::read(&mut &front_end.raw.0, &mut byte);
            assert_eq!(read.unwrap(), 0);
        });
        serve(
            stream,
            &backend,
            stopped.as_fd(),
            None,
            &SessionLog::default(),
        )
    });
    assert_eq!(ended.unwrap(), SessionEnd::Stopped);
    assert!(backend.running().is_empty());
}

/// A message with a plausible code and vring, and a payload whose size is that of some request.
fn any_message() -> impl Strategy<Value = (u32, bool, Vec<u8>, usize)> {
    let words = prop_oneof![0..6u32, Just(256), Just(0x100), any::<u32>()];
    let payload = prop_oneof![Just(0), Just(2), Just(10), 0..12usize]
        .prop_flat_map(move |len| prop::collection::vec(words.clone(), len))
        .prop_map(|words| payload(&words));
    (0..48u32, any::<bool>(), payload, 0..3usize)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever messages come, nothing panics, no running vring is started (the device asserts
    /// that), and no vring runs at the end.
    #[test]
    fn session_stays_consistent_whatever_messages_come(
        messages in prop::collection::vec(any_message(), 1..40),
    ) {
        let (backend, log) = (RecordingBackend::default(), SessionLog::default());
        let mut session = Session::new(&backend, &log);
        for (code, need_reply, payload, fds) in messages {
            let header = Header { code, need_reply, size: payload.len() };
            let fds = (0..fds).map(|_| ForeignFd::new(eventfd(0))).collect();
            // A broken protocol would end the session; here it goes on, to reach more states.
            let _ = session.handle(Message { header, payload, fds });
        }
        session.stop_all();
        prop_assert!(backend.running().is_empty());
    }
}
