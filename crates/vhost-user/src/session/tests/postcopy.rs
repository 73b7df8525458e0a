//! The order of a postcopy migration, as QEMU and as hostile front-ends send it.

use std::io::Read;
use std::sync::mpsc;
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtionet_virtqueue::memory::MissingPages;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

impl FrontEnd {
    /// Sends POSTCOPY_ADVISE, and returns the descriptor of the reply.
    fn advise(&self) -> File {
        self.send_request(Code::POSTCOPY_ADVISE, &[]);
        let mut header = [0; 12];
        let (len, fd) = self.raw.0.recv_with_fd(&mut header).unwrap();
        let code = Code::POSTCOPY_ADVISE.into();
        assert_eq!(header[..len], encode_message(code, 5, &[]));
        fd.expect("a userfaultfd")
    }

    fn listen(&self) {
        assert_eq!(self.send_with_ack(Code::POSTCOPY_LISTEN, &[]), 0);
    }

    /// Adds a region, and returns its address in the back-end.
    fn add_memory_in_postcopy(&self, guest_addr: u64) -> u64 {
        let code = Code::ADD_MEM_REG.into();
        let file = memory_file(GUEST_MEMORY);
        self.raw
            .send_request(code, &region(guest_addr), &[file.as_fd()]);
        let mut reply = [0; 12 + 40];
        (&self.raw.0).read_exact(&mut reply).unwrap();
        let mut wanted = encode_message(code, 5, &region(guest_addr));
        let address: [u8; 8] = reply[12 + 24..12 + 32].try_into().unwrap();
        wanted[12 + 24..12 + 32].copy_from_slice(&address);
        assert_eq!(reply[..], wanted);
        u64::from_ne_bytes(address)
    }

    fn acknowledge(&self, code: Code, result: u64) {
        self.send_request(code, &result.to_ne_bytes());
    }

    /// Waits until the session has ended.
    fn wait_for_end(&self) {
        let mut byte = [0];
        assert_eq!((&self.raw.0).read(&mut byte).unwrap(), 0);
    }

    fn end(&self) {
        assert_eq!(self.request_u64(Code::POSTCOPY_END), 0);
    }
}

#[test]
fn postcopy_in_the_order_of_qemu_uses_memory_once_it_is_acknowledged() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        front_end.negotiate();
        let userfaultfd = front_end.advise();
        front_end.listen();
        front_end.sync();
        backend.read();
        let low = front_end.add_memory_in_postcopy(0);
        let high = front_end.add_memory_in_postcopy(GUEST_MEMORY);
        assert!(low != 0 && high != 0 && low != high);
        assert_eq!(backend.read(), Vec::<String>::new());
        front_end.acknowledge(Code::ADD_MEM_REG, 0);
        front_end.configure(0, 256, 0);
        front_end.sync();
        assert_eq!(
            backend.read(),
            [
                "memory 2",
                "start 0 size 256 base 0 enabled false kick fd call none"
            ]
        );
        assert!(backend.started_with(0).memory.is_in_postcopy());
        // Where nothing changed, QEMU acknowledges under no name.
        front_end.raw.send_request(0, &[0; 8], &[]);
        let code = Code::REM_MEM_REG;
        front_end.send_request(code, &region(GUEST_MEMORY));
        front_end.acknowledge(code, 0);
        front_end.sync();
        assert_eq!(backend.read(), ["memory 1"]);
        front_end.end();
        assert_eq!(backend.read(), ["memory 1"]);
        // From now on memory comes as always.
        assert_eq!(front_end.add_memory(GUEST_MEMORY), 0);
        assert_eq!(backend.read(), ["memory 2"]);
        drop(userfaultfd);
        // Another migration to the same session.
        front_end.base(0);
        drop(front_end.advise());
        drop(front_end.advise());
        front_end.listen();
        front_end.end();
    })
    .unwrap();
    assert_eq!(*backend.refused.lock().unwrap(), None);
}

#[test]
fn memory_table_is_answered_in_its_own_order_with_other_addresses() {
    let backend = RecordingBackend::default();
    session(&backend, |front_end| {
        front_end.negotiate();
        front_end.advise();
        front_end.listen();
        let regions = [2, 0].map(|n| [n * GUEST_MEMORY, GUEST_MEMORY, n * GUEST_MEMORY, 0]);
        let bytes = regions.map(|words| words.map(u64::to_ne_bytes).concat());
        let table = [payload(&[2, 0]), bytes.concat()].concat();
        let (file, code) = (memory_file(GUEST_MEMORY), Code::SET_MEM_TABLE.into());
        let fds = [file.as_fd(), file.as_fd()];
        front_end.raw.send_request(code, &table, &fds);
        let mut reply = [0; 12 + 8 + 64];
        (&front_end.raw.0).read_exact(&mut reply).unwrap();
        let wanted = encode_message(code, 5, &table);
        for (at, bytes) in wanted.chunks(4).enumerate() {
            // The addresses are words 9, 10, 17 and 18 of 21.
            let is_address = [9, 10, 17, 18].contains(&at);
            let is_same = reply[4 * at..4 * at + 4] == *bytes;
            assert!(is_same || is_address, "word {at}");
        }
        front_end.acknowledge(Code::SET_MEM_TABLE, 0);
        front_end.sync();
        assert_eq!(backend.read().last().unwrap(), "memory 2");
        front_end.end();
    })
    .unwrap();
}

#[test]
fn migration_that_completes_before_postcopy_leaves_an_ordinary_session() {
    let backend = RecordingBackend::default();
    let error = session(&backend, |front_end| {
        front_end.negotiate();
        front_end.advise();
        assert_eq!(front_end.add_memory(0), 0);
        front_end.configure(0, 256, 0);
        front_end.sync();
        assert!(!backend.started_with(0).memory.is_in_postcopy());
        // Postcopy cannot begin any more.
        front_end.send_request(Code::POSTCOPY_LISTEN, &[]);
        front_end.wait_for_end();
    });
    assert_eq!(error.unwrap_err().code(), "postcopy-order");
}

/// What a front-end does, by name, and how the error begins that ends its session.
type Step = (&'static str, fn(&FrontEnd), &'static str);

/// Front-ends that send some messages in order, and then something that does not follow.
fn steps_out_of_order() -> Vec<Step> {
    vec![
        (
            "LISTEN before ADVISE",
            |front_end| front_end.send_request(Code::POSTCOPY_LISTEN, &[]),
            "POSTCOPY_LISTEN came before POSTCOPY_ADVISE",
        ),
        (
            "END before ADVISE",
            |front_end| front_end.send_request(Code::POSTCOPY_END, &[]),
            "POSTCOPY_END came before POSTCOPY_ADVISE",
        ),
        (
            "END before LISTEN",
            |front_end| {
                front_end.advise();
                front_end.send_request(Code::POSTCOPY_END, &[]);
            },
            "POSTCOPY_END came before POSTCOPY_LISTEN",
        ),
        (
            "LISTEN twice",
            |front_end| {
                front_end.advise();
                front_end.listen();
                front_end.send_request(Code::POSTCOPY_LISTEN, &[]);
            },
            "POSTCOPY_LISTEN came after POSTCOPY_LISTEN",
        ),
        (
            "ADVISE after LISTEN",
            |front_end| {
                front_end.advise();
                front_end.listen();
                front_end.send_request(Code::POSTCOPY_ADVISE, &[]);
            },
            "POSTCOPY_ADVISE came after POSTCOPY_LISTEN",
        ),
        (
            "END twice",
            |front_end| {
                front_end.advise();
                front_end.listen();
                front_end.end();
                front_end.send_request(Code::POSTCOPY_END, &[]);
            },
            "POSTCOPY_END came before POSTCOPY_ADVISE",
        ),
        (
            "LISTEN while vrings run",
            |front_end| {
                one_pair(front_end);
                front_end.advise();
                front_end.send_request(Code::POSTCOPY_LISTEN, &[]);
            },
            "POSTCOPY_LISTEN came while vrings run",
        ),
        (
            "memory without an acknowledgement",
            |front_end| {
                front_end.advise();
                front_end.listen();
                front_end.add_memory_in_postcopy(0);
                front_end.send_request(Code::GET_FEATURES, &[]);
            },
            "another request came before the acknowledgement of a memory table",
        ),
        (
            "END without an acknowledgement",
            |front_end| {
                front_end.advise();
                front_end.listen();
                front_end.add_memory_in_postcopy(0);
                front_end.send_request(Code::POSTCOPY_END, &[]);
            },
            "another request came before the acknowledgement of a memory table",
        ),
        (
            "memory that is not accepted",
            |front_end| {
                front_end.advise();
                front_end.listen();
                front_end.add_memory_in_postcopy(0);
                front_end.acknowledge(Code::ADD_MEM_REG, 5);
            },
            "the front-end does not accept the addresses of its memory table (it answers 5)",
        ),
        (
            "memory that overlaps",
            |front_end| {
                front_end.advise();
                front_end.listen();
                front_end.add_memory_in_postcopy(0);
                let file = memory_file(GUEST_MEMORY);
                let code = Code::ADD_MEM_REG.into();
                front_end
                    .raw
                    .send_request(code, &region(0), &[file.as_fd()]);
            },
            "ADD_MEM_REG cannot be answered: memory regions",
        ),
    ]
}

#[test]
fn request_out_of_order_ends_the_session_with_the_reason() {
    for (name, step, wanted) in steps_out_of_order() {
        let backend = RecordingBackend::default();
        let error = session(&backend, |front_end| {
            front_end.negotiate();
            step(front_end);
            front_end.wait_for_end();
        });
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with(wanted), "{name}: {error}");
        assert!(backend.running().is_empty());
    }
}

#[test]
fn postcopy_that_was_not_negotiated_is_refused() {
    let others = protocol_features::OFFERED & !Protocol::PAGEFAULT.bits();
    for code in [
        Code::POSTCOPY_ADVISE,
        Code::POSTCOPY_LISTEN,
        Code::POSTCOPY_END,
    ] {
        session(&RecordingBackend::default(), |front_end| {
            front_end.send_u64(Code::SET_PROTOCOL_FEATURES, others);
            assert_eq!(front_end.send_with_ack(code, &[]), 1, "{code:?}");
            // An acknowledgement of memory is none outside of postcopy.
            assert_eq!(front_end.send_with_ack(Code::ADD_MEM_REG, &[0; 8]), 1);
        })
        .unwrap();
    }
}

#[test]
fn front_end_with_several_queue_pairs_is_not_offered_postcopy() {
    assert!(MissingPages::are_supported(), "this test needs Linux 5.11");
    session(&RecordingBackend::default(), |front_end| {
        let pagefault = Protocol::PAGEFAULT.bits();
        let offered = front_end.request_u64(Code::GET_PROTOCOL_FEATURES);
        assert_eq!(offered, protocol_features::OFFERED);
        front_end.send_u64(Code::SET_PROTOCOL_FEATURES, offered);
        let offered = front_end.request_u64(Code::GET_PROTOCOL_FEATURES);
        assert_eq!(offered, protocol_features::OFFERED & !pagefault);
        front_end.send_u64(Code::SET_PROTOCOL_FEATURES, offered);
        assert_eq!(front_end.send_with_ack(Code::POSTCOPY_ADVISE, &[]), 1);
    })
    .unwrap();
}

/// Reads the byte at guest address 0, which waits for the page, in a thread of its own.
fn access(backend: &RecordingBackend) -> mpsc::Receiver<u8> {
    let memory = backend.started_with(0).memory;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut byte = [1];
        assert!(memory.read(0, &mut byte));
        sender.send(byte[0])
    });
    let waits = receiver.recv_timeout(Duration::from_millis(100));
    assert_eq!(waits, Err(mpsc::RecvTimeoutError::Timeout));
    receiver
}

/// Starts a vring in memory of which all pages are missing.
fn start_in_postcopy(front_end: &FrontEnd) -> File {
    front_end.negotiate();
    let userfaultfd = front_end.advise();
    front_end.listen();
    front_end.add_memory_in_postcopy(0);
    front_end.acknowledge(Code::ADD_MEM_REG, 0);
    front_end.configure(0, 256, 0);
    front_end.sync();
    userfaultfd
}

#[test]
fn thread_that_waits_for_a_page_goes_on_when_the_front_end_is_gone_or_the_session_stops() {
    for breaks_the_protocol in [false, true] {
        let backend = RecordingBackend::default();
        let (sender, receiver) = mpsc::channel();
        let ended = session(&backend, |front_end| {
            // A front-end may keep the descriptor, so closing it would not be enough.
            let userfaultfd = start_in_postcopy(front_end);
            sender.send((userfaultfd, access(&backend))).unwrap();
            if breaks_the_protocol {
                front_end.send_request(Code::POSTCOPY_LISTEN, &[]);
                front_end.wait_for_end();
            }
        });
        assert_eq!(ended.is_err(), breaks_the_protocol);
        let (_userfaultfd, read) = receiver.recv_timeout(LIMIT).unwrap();
        assert_eq!(read.recv_timeout(LIMIT), Ok(0));
    }
}

#[test]
fn session_whose_own_thread_waits_for_a_page_ends_when_the_front_end_is_gone() {
    let backend = RecordingBackend::reading_memory_when_it_stops();
    let (sender, receiver) = mpsc::channel();
    session(&backend, |front_end| {
        sender.send(start_in_postcopy(front_end)).unwrap();
        front_end.send_request(Code::GET_VRING_BASE, &payload(&[0, 0]));
        thread::sleep(Duration::from_millis(100));
    })
    .unwrap();
    drop(receiver);
}

#[test]
fn session_in_postcopy_is_not_handed_over() {
    let backend = RecordingBackend::default();
    let (raw, stream) = RawFrontEnd::pair();
    let event = eventfd(0);
    let front_end = FrontEnd { raw, event };
    let log = SessionLog::default();
    let mut session = Session::new(&backend, &log);
    session.state.protocol_features = protocol_features::OFFERED;
    assert!(session.postcopy_advise().is_ok());
    let suspended = session.suspend(stream);
    assert!(matches!(suspended.to_image(), Err(ImageError::Migrating)));
    drop(front_end);
}
