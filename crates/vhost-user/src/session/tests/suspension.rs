//! Sessions that are suspended and continue.

use std::io::Read;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::time::Duration;

use super::migration::LOGGING;
use super::*;
use crate::stop::{StopDemand, StopSignal};

const BASE: u32 = 7;

/// Demands a suspension once its descriptor is readable, until that is over.
struct Suspension {
    fd: OwnedFd,
    demand: Mutex<StopDemand>,
}

impl StopSignal for Suspension {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn demand(&self) -> StopDemand {
        *self.demand.lock().unwrap()
    }
}

/// Serves a session from `start` on. Once `front_end` has returned, the session is to be suspended.
fn serve_until_suspended(
    start: SessionStart,
    backend: &RecordingBackend,
    front_end: impl FnOnce() + Send,
) -> Served {
    let (trigger, fd) = stop_pair();
    let stop = Suspension {
        fd,
        demand: Mutex::new(StopDemand::Suspend),
    };
    thread::scope(|scope| {
        scope.spawn(move || {
            front_end();
            trigger.write(1).unwrap();
        });
        serve_from(start, backend, &stop, None, &SessionLog::default()).unwrap()
    })
}

fn suspended(served: Served) -> Box<SuspendedSession> {
    match served {
        Served::Suspended(session) => session,
        Served::Ended(end) => panic!("the session ended: {end:?}"),
    }
}

fn pair() -> (FrontEnd, UnixStream) {
    let (raw, stream) = RawFrontEnd::pair();
    let event = eventfd(0);
    (FrontEnd { raw, event }, stream)
}

#[test]
fn image_has_all_that_the_front_end_has_set_and_another_device_gets_it() {
    let (front_end, stream) = pair();
    let old = RecordingBackend::with_stop_base(BASE);
    let served = serve_until_suspended(SessionStart::Connected(stream), &old, || {
        one_pair(&front_end);
        front_end.event(Code::SET_VRING_CALL, 1);
        front_end.send_u64(Code::NET_SET_MTU, 9000);
        front_end.sync();
    });
    assert_eq!(old.read().last().unwrap(), "suspended");
    assert_eq!(old.running(), [0; 0]);
    let session = suspended(served);
    let image = session.to_image().unwrap();
    image.check(&old).unwrap();
    assert_eq!(image.vrings[1].base, Some([0, BASE]));
    assert_eq!(image.mtu, Some(9000));
    assert_eq!(image.regions.len(), 1);

    let stream = session.stream().try_clone().unwrap();
    drop(session);
    let copied = SuspendedSession::from_image(image, stream).unwrap();
    let new = RecordingBackend::with_stop_base(BASE + 1);
    let start = SessionStart::Suspended(Box::new(copied));
    suspended(serve_until_suspended(start, &new, || {
        // The vrings stop where the front-end expects it, and it negotiates nothing again.
        assert_eq!(front_end.base(0), BASE + 1);
    }));
    let calls = new.read();
    for expected in [
        "resumed",
        "mtu 9000",
        "memory 1",
        "start 0 size 256 base 7 enabled true kick fd call none",
        "start 1 size 256 base 7 enabled true kick fd call fd",
        "stop 0",
        "suspended",
    ] {
        assert!(calls.iter().any(|call| call == expected), "{calls:?}");
    }
    assert!(!calls.iter().any(|call| call == "disconnected"));
}

#[test]
fn front_end_sees_the_end_of_the_connection_when_no_vring_runs_any_more() {
    let (front_end, stream) = pair();
    let backend = RecordingBackend::slow_to_stop(Duration::from_millis(50));
    let (trigger, fd) = stop_pair();
    thread::scope(|scope| {
        let backend = &backend;
        let waiting = scope.spawn(move || {
            one_pair(&front_end);
            assert_eq!(backend.running(), [0, 1]);
            trigger.write(1).unwrap();
            assert_eq!((&front_end.raw.0).read(&mut [0]).unwrap(), 0);
            backend.running()
        });
        let end = serve(stream, backend, fd.as_fd(), None, &SessionLog::default());
        assert_eq!(end.unwrap(), SessionEnd::Stopped);
        assert_eq!(waiting.join().unwrap(), [0; 0]);
    });
}

#[test]
fn session_that_was_stopped_within_a_message_ends() {
    let (front_end, stream) = pair();
    let backend = RecordingBackend::default();
    let served = serve_until_suspended(SessionStart::Connected(stream), &backend, || {
        one_pair(&front_end);
        front_end.raw.send(&[1, 0, 0, 0, 1], &[]);
        // The bytes are read before the descriptor is.
        thread::sleep(Duration::from_millis(100));
    });
    assert!(matches!(served, Served::Ended(SessionEnd::Disconnected)));
    assert_eq!(backend.read().last().unwrap(), "disconnected");
}

#[test]
fn session_continues_with_a_partial_message_if_its_suspension_is_over() {
    let (front_end, stream) = pair();
    let backend = RecordingBackend::default();
    let (trigger, fd) = stop_pair();
    let stop = Suspension {
        fd,
        demand: Mutex::new(StopDemand::GoOn),
    };
    let (stop, trigger) = (&stop, &trigger);
    let start = SessionStart::Connected(stream);
    thread::scope(|scope| {
        scope.spawn(move || {
            let message = encode_message(Code::GET_FEATURES.into(), 1, &[]);
            front_end.raw.send(&message[..5], &[]);
            trigger.write(1).unwrap();
            thread::sleep(Duration::from_millis(50));
            trigger.read().unwrap();
            front_end.raw.send(&message[5..], &[]);
            front_end.raw.reply(Code::GET_FEATURES.into());
            *stop.demand.lock().unwrap() = StopDemand::End;
            trigger.write(1).unwrap();
        });
        let served = serve_from(start, &backend, stop, None, &SessionLog::default());
        assert!(matches!(served, Ok(Served::Ended(SessionEnd::Stopped))));
    });
}

#[test]
fn session_of_a_guest_that_is_migrated_has_no_image_and_continues() {
    let (front_end, stream) = pair();
    let backend = RecordingBackend::default();
    let log = memory_file(4096);
    let start = SessionStart::Connected(stream);
    let session = suspended(serve_until_suspended(start, &backend, || {
        one_pair(&front_end);
        assert_eq!(front_end.set_log(32, 0, &log), 0);
        assert_eq!(front_end.set_features(LOGGING), 0);
    }));
    let refused = session.to_image().unwrap_err();
    assert!(matches!(refused, ImageError::Migrating), "{refused}");
    backend.read();
    let start = SessionStart::Suspended(session);
    suspended(serve_until_suspended(start, &backend, || {
        front_end.sync();
        assert!(backend.started_with(0).memory.is_logging());
    }));
}

#[test]
fn image_that_needs_more_than_the_device_has_is_refused() {
    let (front_end, stream) = pair();
    let backend = RecordingBackend::default();
    let start = SessionStart::Connected(stream);
    let session = suspended(serve_until_suspended(start, &backend, || {
        one_pair(&front_end);
    }));
    let image = || session.to_image().unwrap();
    let refused = |change: fn(&mut SessionImage<Arc<OwnedFd>>)| {
        let mut image = image();
        change(&mut image);
        image.check(&backend).unwrap_err().to_string()
    };
    assert!(refused(|image| image.features = Some(1 << 63)).contains("0x8000000000000000"));
    assert!(refused(|image| image.protocol_features = 1 << 60).contains("protocol features"));
    let many = refused(|image| {
        let vring = image.vrings[1].clone();
        image.vrings.extend([vring.clone(), vring]);
    });
    assert!(many.contains("3 queue pairs, and there are 2"), "{many}");
    let mut long = image();
    let vring = long.vrings[0].clone();
    long.vrings.resize(257, vring);
    let stream = session.stream().try_clone().unwrap();
    let refused = SuspendedSession::from_image(long, stream).unwrap_err();
    assert!(matches!(refused, ImageError::Vrings(257)), "{refused}");
}
