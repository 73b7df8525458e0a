//! The log of written pages, and the announcement after a migration.

use std::os::fd::BorrowedFd;

use super::*;

/// Covers the memory of [`one_pair`]: 256 pages.
const LOG_SIZE: u64 = 32;
pub(super) const LOGGING: u64 = FEATURES | SESSION_FEATURES;
const NOT_LOGGING: u64 = FEATURES | VHOST_USER_F_PROTOCOL_FEATURES;

impl FrontEnd {
    /// Sends SET_LOG_BASE, and returns 0 if the log was accepted.
    pub(super) fn set_log(&self, size: u64, offset: u64, file: &File) -> u64 {
        self.set_log_with(size, offset, &[file.as_fd()])
    }

    fn set_log_with(&self, size: u64, offset: u64, fds: &[BorrowedFd<'_>]) -> u64 {
        let payload = |size, offset| [size, offset].map(u64::to_ne_bytes).concat();
        let code = Code::SET_LOG_BASE.into();
        self.raw.send_request(code, &payload(size, offset), fds);
        let mut answer = [0; 28];
        std::io::Read::read_exact(&mut &self.raw.0, &mut answer).unwrap();
        assert_eq!(answer[..12], encode_message(code, 5, &[0; 16])[..12]);
        let is_accepted = answer[12..] == payload(size, offset);
        assert!(is_accepted || answer[12..] == [0; 16]);
        u64::from(!is_accepted || size == 0)
    }

    pub(super) fn set_features(&self, features: u64) -> u64 {
        self.send_with_ack(Code::SET_FEATURES, &features.to_ne_bytes())
    }

    /// Sends the addresses of a vring, with the flag for the log.
    fn log_used(&self, ring: u32, logged: bool) -> u64 {
        let start = 0x1000 * u64::from(ring);
        let areas = [start, start + 0x400, start + 0x800, 0x7000];
        let bytes = [
            payload(&[ring, u32::from(logged)]),
            areas.map(u64::to_ne_bytes).concat(),
        ];
        self.send_with_ack(Code::SET_VRING_ADDR, &bytes.concat())
    }
}

/// Whether a bit of the log is set.
fn is_marked(log: &File) -> bool {
    let mut bytes = vec![0; usize::try_from(log.metadata().unwrap().len()).unwrap()];
    std::os::unix::fs::FileExt::read_exact_at(log, &mut bytes, 0).unwrap();
    bytes.iter().any(|byte| *byte != 0)
}

#[test]
fn log_begins_and_ends_in_the_order_of_qemu_without_a_restart_of_the_vrings() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        one_pair(front_end);
        backend.read();
        let log = memory_file(LOG_SIZE);
        for _ in 0..2 {
            // The migration begins.
            assert_eq!(front_end.set_log(LOG_SIZE, 0, &log), 0);
            assert_eq!(backend.read(), Vec::<String>::new());
            assert_eq!(front_end.set_features(LOGGING), 0);
            assert_eq!([0, 1].map(|ring| front_end.log_used(ring, true)), [0, 0]);
            assert_eq!(
                backend.read(),
                [
                    "memory 1 logged",
                    "used log 0 Some(7000)",
                    "used log 1 Some(7000)"
                ]
            );
            // It is cancelled.
            assert_eq!(front_end.set_features(NOT_LOGGING), 0);
            assert_eq!([0, 1].map(|ring| front_end.log_used(ring, false)), [0, 0]);
            assert_eq!(
                backend.read(),
                ["memory 1", "used log 0 None", "used log 1 None"]
            );
        }
        assert_eq!(backend.running(), [0, 1]);
        assert!(!is_marked(&log));
    })
    .unwrap();
}

#[test]
fn log_stays_when_memory_is_added_and_a_vring_starts_with_it() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        one_pair(front_end);
        let log = memory_file(2 * LOG_SIZE);
        assert_eq!(front_end.set_log(2 * LOG_SIZE, 0, &log), 0);
        assert_eq!(front_end.set_features(LOGGING), 0);
        backend.read();
        assert_eq!(front_end.add_memory(GUEST_MEMORY), 0);
        let removed = front_end.send_with_ack(Code::REM_MEM_REG, &region(GUEST_MEMORY));
        assert_eq!(removed, 0);
        assert_eq!(backend.read(), ["memory 2 logged", "memory 1 logged"]);
        // Memory for which the log has no bits is refused.
        assert_eq!(front_end.add_memory(2 * GUEST_MEMORY), 1);
        assert_eq!(backend.read(), Vec::<String>::new());

        front_end.base(0);
        assert_eq!(front_end.log_used(0, true), 0);
        front_end.event(Code::SET_VRING_KICK, 0);
        front_end.sync();
        let start = backend.started_with(0);
        assert_eq!(start.used_log, Some(0x7000));
        assert!(start.memory.is_logging());
        assert_eq!(start.features & VHOST_F_LOG_ALL, 0);
    })
    .unwrap();
}

#[test]
fn log_that_comes_after_vrings_have_started_says_that_all_memory_was_written() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        front_end.send_u64(Code::SET_PROTOCOL_FEATURES, protocol_features::OFFERED);
        assert_eq!(front_end.set_features(LOGGING), 0);
        front_end.add_memory(0);
        let early = memory_file(LOG_SIZE);
        assert_eq!(front_end.set_log(LOG_SIZE, 0, &early), 0);
        assert!(!is_marked(&early));
        front_end.configure(0, 256, 0);
        front_end.sync();
        let late = memory_file(4096 + LOG_SIZE);
        assert_eq!(front_end.set_log(LOG_SIZE, 4096, &late), 0);
        let mut bytes = vec![0; 32];
        std::os::unix::fs::FileExt::read_exact_at(&late, &mut bytes, 4096).unwrap();
        assert_eq!(bytes, [0xff; 32]);
        assert!(!is_marked(&early), "nothing is written to the old log");
    })
    .unwrap();
}

#[test]
fn wrong_log_is_answered_and_logging_with_it_is_refused() {
    let backend = RecordingBackend::default();
    let result = session(&backend, |front_end| {
        one_pair(front_end);
        backend.read();
        let log = memory_file(2 * 4096);
        let directory = File::open("/").unwrap();
        for (size, offset, file) in [
            (0, 0, &log),
            (LOG_SIZE - 1, 0, &log),
            (LOG_SIZE, 8, &log),
            (LOG_SIZE, 8192, &log),
            (u64::MAX, 4096, &log),
            (LOG_SIZE, u64::MAX, &log),
            (LOG_SIZE, 0, &directory),
        ] {
            assert_eq!(front_end.set_log(size, offset, file), 1, "{size} {offset}");
            assert_eq!(front_end.set_features(LOGGING), 1);
        }
        // Without a descriptor.
        assert_eq!(front_end.set_log_with(LOG_SIZE, 0, &[]), 1);
        assert_eq!(backend.read(), Vec::<String>::new());
        assert_eq!(front_end.set_log(LOG_SIZE, 4096, &log), 0);
        assert_eq!(front_end.set_features(LOGGING), 0);
        assert_eq!(backend.read(), ["memory 1 logged"]);
    });
    assert_eq!(result.unwrap(), SessionEnd::Disconnected);
    let refused = *backend.refused.lock().unwrap();
    assert_eq!(refused, Some("dirty-log-invalid"));
}

#[test]
fn wrong_log_during_a_migration_stops_the_vrings_until_there_is_a_good_one() {
    let backend = RecordingBackend::with_stop_base(5);
    session(&backend, |front_end| {
        one_pair(front_end);
        let log = memory_file(LOG_SIZE);
        let restarted =
            |ring| format!("start {ring} size 256 base 5 enabled true kick fd call none");
        let good = || assert_eq!(front_end.set_log(LOG_SIZE, 0, &log), 0);
        let cancel = || assert_eq!(front_end.set_features(NOT_LOGGING), 0);
        for (repair, memory) in [
            (&good as &dyn Fn(), "memory 1 logged"),
            (&cancel, "memory 1"),
        ] {
            assert_eq!(front_end.set_log(LOG_SIZE, 0, &log), 0);
            assert_eq!(front_end.set_features(LOGGING), 0);
            backend.read();
            assert_eq!(front_end.set_log(1, 0, &log), 1);
            assert_eq!(backend.read(), ["stop 0", "stop 1", "memory 1"]);
            front_end.event(Code::SET_VRING_KICK, 0);
            front_end.sync();
            assert_eq!(backend.read(), Vec::<String>::new());
            repair();
            assert_eq!(
                backend.read(),
                [memory.to_owned(), restarted(0), restarted(1)]
            );
        }
    })
    .unwrap();
}

#[test]
fn log_needs_log_shmfd_and_the_descriptor_for_its_changes_is_ignored() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        let log = memory_file(LOG_SIZE);
        let bytes = [LOG_SIZE, 0].map(u64::to_ne_bytes).concat();
        let code = Code::SET_LOG_BASE.into();
        let protocol = protocol_features::OFFERED & !2;
        front_end.send_u64(Code::SET_PROTOCOL_FEATURES, protocol);
        front_end.raw.send_request(code, &bytes, &[]);
        assert_eq!(front_end.raw.send_with_ack(code, &bytes, &[log.as_fd()]), 1);
        one_pair(front_end);
        let code = Code::SET_LOG_FD.into();
        let fds = [front_end.event.as_fd()];
        assert_eq!(front_end.raw.send_with_ack(code, &[], &fds), 0);
    })
    .unwrap();
}

#[test]
fn address_to_announce_reaches_the_device() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        one_pair(front_end);
        backend.read();
        let code = Code::SEND_RARP;
        assert_eq!(front_end.send_with_ack(code, &[2, 1, 2, 3, 4, 5, 9, 9]), 0);
        assert_eq!(backend.read(), ["announce [2, 1, 2, 3, 4, 5]"]);
    })
    .unwrap();
}
