//! Tests of the devices' threads and of the end of the program, without a process of its own.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::log_lines::with_log;
use virtionet_guest::test_frontend::TestFrontend;
use virtionet_uplink::null::Null;
use virtionet_vhost_user::{Backend, SessionError, SuspendedSession, VringState};

use virtionet_config::{PollMode, Socket};
use virtionet_net_device::net_device::NetDevice;
use virtionet_net_device::worker_pool::WorkerPool;
use virtionet_process::panic_policy::contained_panics;

use super::*;
use crate::device_failure::DeviceFailure;
use crate::device_thread::{pause, serve_device};
use crate::served_device::SuspendedSlot;
use crate::testing::config;
use virtionet_net_device::testing::{
    TIMEOUT, TestUplink, net_device, net_device_of, send, sent_frames, two_pairs, wait_until,
    with_frontend,
};

/// A path for a socket of one test, which is removed at the end.
struct SocketPath(PathBuf);

impl SocketPath {
    fn new(test: &str) -> Self {
        let name = format!("virtionetd-{}-{test}.sock", process::id());
        Self(std::env::temp_dir().join(name))
    }

    fn listener(&self) -> Socket {
        Socket::Listen {
            path: self.0.clone(),
            mode: 0o600,
            group: None,
            peer_uid: None,
        }
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Ends what it stops when it goes out of scope. A failing test unwinds, and the
/// scope of its threads would otherwise wait for ever for those that serve.
struct StopAtEnd<'a>(&'a Stop);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Serves `source` in a thread of its own, as the only device if that is what `is_only` says, while
/// `work` runs. Returns how that thread ended, and its log lines.
fn serve_while<T>(
    net_device: &NetDevice,
    source: FrontendSource,
    is_only: bool,
    work: impl FnOnce() -> T,
) -> (Result<(), DeviceFailure>, String) {
    serve_with(net_device, source, is_only, |_, _| work())
}

/// Does so with a `work` that gets what stops the thread, and the session while it is suspended.
fn serve_with<T>(
    net_device: &NetDevice,
    source: FrontendSource,
    is_only: bool,
    work: impl FnOnce(&Stop, &SuspendedSlot) -> T,
) -> (Result<(), DeviceFailure>, String) {
    let (stop, suspended) = (Stop::new().unwrap(), SuspendedSlot::default());
    std::thread::scope(|scope| {
        let serve = || serve_device(net_device, &suspended, source, &stop, is_only);
        let serving = scope.spawn(|| with_log(serve));
        let stop_at_end = StopAtEnd(&stop);
        // Its result lasts until the thread has ended.
        let _held = work(&stop, &suspended);
        drop(stop_at_end);
        serving.join().unwrap()
    })
}

/// Starts a ring without having shared any memory.
fn start_without_memory(socket: UnixStream) {
    let mut connection = FrontendConnection::from_socket(socket).unwrap();
    connection.acknowledge = false;
    let features = connection.get_features().unwrap();
    connection.set_features(features).unwrap();
    connection.set_vring_num(0, 64).unwrap();
    connection.set_vring_base(0, 0).unwrap();
    let addresses = virtionet_guest::driver::VirtqueueAddresses {
        descriptors: 0x1000,
        driver: 0x2000,
        device: 0x3000,
    };
    connection.set_vring_user_addr(0, 0, addresses, 0).unwrap();
    let kick = virtionet_guest::eventfd::WaitableEventFd::new().unwrap();
    connection
        .set_vring_kick(0, Some(kick.as_raw_fd()))
        .unwrap();
    assert!(connection.get_features().is_err(), "the session has ended");
}

#[test]
fn thread_that_is_held_at_the_end_is_named_after_2_s_and_the_others_are_joined() {
    let uplink = TestUplink::default();
    let pool = Arc::new(WorkerPool::default());
    let net_device = net_device_of(Arc::clone(&pool), 2, uplink.clone(), PollMode::Off);
    let (release, held) = mpsc::channel::<()>();
    with_frontend(&net_device, &two_pairs(), |frontend| {
        // The uplink holds the worker of the first queue pair in the middle of a frame.
        let gate = uplink.gate.lock();
        let frame = FrameSpec::v4(Transport::Udp).build(b"frame").unwrap();
        frontend.pairs[0].tx.send(&frame).unwrap();
        wait_until("the worker is held", || {
            uplink.bursts.load(Ordering::Relaxed) == 1
        });
        let device = std::thread::spawn(move || {
            let _ = held.recv();
            Ok(())
        });
        let placer = std::thread::spawn(|| {});
        let started_at = Instant::now();
        let error = end_threads(
            &pool,
            None,
            vec![("vnet".into(), device)],
            vec![("placer".into(), placer)],
        )
        .unwrap_err();
        assert!(started_at.elapsed() >= SHUTDOWN_TIMEOUT);
        assert_eq!(
            error.to_string(),
            "ended without waiting any longer for vnet, vnet-q0; something outside holds them up"
        );
        assert_eq!(error.code(), "thread-stuck");
        drop(gate);
        drop(release);
        // Once nothing holds them, nobody is named.
        assert_eq!(pool.join(Instant::now() + TIMEOUT), [""; 0]);
        assert!(end_threads(&pool, None, Vec::new(), Vec::new()).is_ok());
    });
    assert_eq!(sent_frames(&net_device), [1, 0]);
}

#[test]
fn device_that_failed_and_thread_that_panicked_are_the_errors_of_the_run() {
    let pool = WorkerPool::default();
    let failed = || -> Result<(), DeviceFailure> { Err(SessionError::NotShared.into()) };
    let threads = vec![("vnet".into(), std::thread::spawn(failed))];
    let error = end_threads(&pool, None, threads, Vec::new()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("vnet: {}", SessionError::NotShared)
    );
    assert_eq!(error.code(), SessionError::NotShared.code());

    let panicking = || -> Result<(), DeviceFailure> { panic!("this panic is part of the test") };
    let threads = vec![("vnet".into(), std::thread::spawn(panicking))];
    let error = end_threads(&pool, None, threads, Vec::new()).unwrap_err();
    let text = "its thread ended by a panic; please report this as a bug";
    assert_eq!(error.to_string(), format!("vnet: {text}"));

    let helper = std::thread::spawn(|| panic!("this panic is part of the test"));
    let threads = vec![("placer".into(), helper)];
    let error = end_threads(&pool, None, Vec::new(), threads).unwrap_err();
    assert_eq!(error.to_string(), format!("placer: {text}"));
    assert_eq!(error.code(), "thread-panicked");
}

#[test]
fn device_serves_one_front_end_after_the_other_and_refuses_a_second_one() {
    let path = SocketPath::new("serves");
    let net_device = net_device(2, Null, PollMode::Off);
    let source = FrontendSource::open(&path.listener()).unwrap();
    let expected = format!("listening on {}", path.0.display());
    assert_eq!(source.to_string(), expected);
    let (ended, log) = serve_while(&net_device, source, true, || {
        for count in 1..=2 {
            let mut frontend = TestFrontend::connect(&path.0, &two_pairs()).unwrap();
            let mut second = UnixStream::connect(&path.0).unwrap();
            second.set_read_timeout(Some(TIMEOUT)).unwrap();
            assert_eq!(second.read(&mut [0]).unwrap(), 0, "the second is refused");
            send(&mut frontend, 0, count);
            drop(frontend);
            wait_until("the front-end has gone", || {
                !net_device.frontend().connected
            });
        }
        // The program also ends while a front-end is connected.
        TestFrontend::connect(&path.0, &two_pairs()).unwrap()
    });
    ended.unwrap();
    assert_eq!(sent_frames(&net_device), [3, 0]);
    assert!(!net_device.frontend().connected);
    for served in net_device.pairs() {
        assert_eq!(served.pair.rx().state(), VringState::Stopped);
    }
    assert!(log.contains("front-end connected"), "{log}");
}

#[test]
fn front_end_without_shared_memory_ends_an_only_device_that_no_other_can_reach() {
    let inherited = |is_only| {
        let net_device = net_device(2, Null, PollMode::Off);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let source = FrontendSource::Once(Some(ours));
        let (ended, log) = serve_while(&net_device, source, is_only, || {
            start_without_memory(theirs);
            wait_until("it has gone", || !net_device.frontend().connected);
        });
        (ended, log, net_device.warnings())
    };
    let (ended, ..) = inherited(true);
    assert_eq!(ended.unwrap_err().code(), SessionError::NotShared.code());
    // The program goes on with its other devices, and this one warns.
    let (ended, log, warnings) = inherited(false);
    ended.unwrap();
    assert_eq!(warnings, [SessionError::NotShared.to_string()]);
    assert!(log.contains(&warnings[0]), "{log}");
}

#[test]
fn device_that_cannot_listen_any_more_is_logged_where_others_go_on() {
    let fail = |is_only| {
        let net_device = net_device(1, Null, PollMode::Off);
        // No path of a unix socket is that long.
        let source = FrontendSource::Connect("x".repeat(200).into());
        serve_while(&net_device, source, is_only, || {})
    };
    let (ended, log) = fail(false);
    let error = ended.unwrap_err();
    assert_eq!(error.code(), "vhost-user-socket-unavailable");
    assert!(
        log.contains(&format!("ERROR virtionetd::device_thread: vnet: {error}")),
        "{log}"
    );
    let (ended, log) = fail(true);
    assert!(ended.is_err());
    assert_eq!(log, "", "the program reports it at its end");
}

#[test]
fn session_that_panics_costs_its_connection_only() {
    let path = SocketPath::new("panics");
    let uplink = TestUplink::default();
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    let source = FrontendSource::open(&path.listener()).unwrap();
    let before = contained_panics();
    let (ended, log) = serve_while(&net_device, source, true, || {
        uplink.panics.store(true, Ordering::Relaxed);
        assert!(TestFrontend::connect(&path.0, &two_pairs()).is_err());
        uplink.panics.store(false, Ordering::Relaxed);
        let mut frontend = TestFrontend::connect(&path.0, &two_pairs()).unwrap();
        send(&mut frontend, 1, 1);
    });
    ended.unwrap();
    assert!(contained_panics() > before);
    assert!(
        log.contains("vnet: the session ended: this code panicked"),
        "{log}"
    );
    assert_eq!(sent_frames(&net_device), [0, 1]);
}

#[test]
fn session_that_breaks_the_protocol_is_logged_and_the_next_front_end_is_served() {
    let path = SocketPath::new("protocol");
    let net_device = net_device(2, Null, PollMode::Off);
    let source = FrontendSource::open(&path.listener()).unwrap();
    let (ended, log) = serve_while(&net_device, source, true, || {
        let mut hostile = UnixStream::connect(&path.0).unwrap();
        io::Write::write_all(&mut hostile, &[0xff; 12]).unwrap();
        hostile.set_read_timeout(Some(TIMEOUT)).unwrap();
        assert_eq!(hostile.read(&mut [0]).unwrap(), 0, "the session has ended");
        let mut frontend = TestFrontend::connect(&path.0, &two_pairs()).unwrap();
        send(&mut frontend, 0, 1);
    });
    ended.unwrap();
    assert_eq!(log.matches("ERROR").count(), 1, "{log}");
    assert_eq!(sent_frames(&net_device), [1, 0]);
}

#[test]
fn device_that_connects_warns_until_the_front_end_listens() {
    let path = SocketPath::new("connects");
    let net_device = net_device(1, Null, PollMode::Off);
    let source = FrontendSource::open(&Socket::Connect {
        path: path.0.clone(),
    })
    .unwrap();
    assert_eq!(
        source.to_string(),
        format!("connecting to {}", path.0.display())
    );
    let (ended, _) = serve_while(&net_device, source, true, || {
        wait_until("there is a warning", || !net_device.warnings().is_empty());
        let warnings = net_device.warnings();
        assert!(
            warnings[0].contains("the socket does not exist yet"),
            "{warnings:?}"
        );
        let frontend = std::os::unix::net::UnixListener::bind(&path.0).unwrap();
        let _connection = frontend.accept().unwrap();
        wait_until("the device is connected", || {
            net_device.frontend().connected
        });
        assert_eq!(net_device.warnings(), [""; 0]);
    });
    ended.unwrap();
}

#[test]
fn device_that_cannot_be_made_is_an_error_that_names_it() {
    let folder = std::env::temp_dir();
    let flags = format!(
        "--socket-path /s --uplink null --state-dir {}",
        folder.display()
    );
    let host = Host::new(&config(&flags)).unwrap();
    let device = |uplink: &str, placement: &str| DeviceConfig {
        name: "vnet".into(),
        socket: Socket::Inherited(3),
        queues: virtionet_config::QueuePairCount::AtMost(2),
        uplink: uplink.parse().unwrap(),
        placement: placement.parse().unwrap(),
        irq_affinity: Default::default(),
        qmp: None,
        poll: PollMode::Off,
        features_compat: Default::default(),
        postcopy: false,
    };
    let mut uplinks = Uplinks::default();
    let created = host
        .create_net_device(&device("switch:lan", "auto"), &mut uplinks, None)
        .unwrap();
    assert_eq!(created.uplink_summary, "port of switch lan");
    assert_eq!(created.net_device.max_queue_pairs(), 2);
    let refused = host.create_net_device(&device("null", "list:4095"), &mut uplinks, None);
    let error = refused.err().unwrap();
    assert_eq!(error.code(), "placement-impossible");
    assert!(error.to_string().starts_with("vnet: "), "{error}");
}

#[test]
fn shared_workers_on_cpus_of_another_host_are_an_error_that_names_them() {
    let refused = Host::new(&config(
        "--socket-path /s --uplink null --workers list:4095",
    ));
    let error = refused.err().unwrap();
    assert_eq!(error.code(), "placement-impossible");
    let text = error.to_string();
    assert!(
        text.contains("--workers") && text.contains("4095"),
        "{text}"
    );
}

#[test]
fn pause_ends_when_the_program_must_end() {
    let stop = Stop::new().unwrap();
    assert!(!pause(&stop, Duration::from_millis(1)));
    stop.end();
    assert!(pause(&stop, TIMEOUT));
}

/// A session that is suspended and continues, as `hand_over` decides where.
fn check_suspension(hand_over: impl Fn(&NetDevice, &SuspendedSlot, &Stop)) {
    let path = SocketPath::new("suspends");
    let net_device = net_device(2, Null, PollMode::Off);
    let source = FrontendSource::open(&path.listener()).unwrap();
    let (ended, log) = serve_with(&net_device, source, true, |stop, suspended| {
        // Without a front-end, too.
        assert!(stop.suspend(TIMEOUT));
        assert!(suspended.lock().is_none());
        stop.resume();
        let mut frontend = TestFrontend::connect(&path.0, &two_pairs()).unwrap();
        for count in 1..=3 {
            send(&mut frontend, 1, count);
            assert!(stop.suspend(TIMEOUT));
            for served in net_device.pairs() {
                assert_eq!(served.pair.tx().state(), VringState::Stopped);
            }
            hand_over(&net_device, suspended, stop);
            stop.resume();
        }
        send(&mut frontend, 0, 1);
        frontend
    });
    ended.unwrap();
    assert_eq!(sent_frames(&net_device), [1, 6]);
    assert_eq!(log.matches("front-end connected").count(), 1, "{log}");
}

#[test]
fn suspended_session_continues_with_the_frames_that_came_meanwhile() {
    check_suspension(|_, suspended, _| assert!(suspended.lock().is_some()));
}

/// A queue that is detached loses the frames that wait in it.
#[test]
fn queues_of_the_uplink_stay_attached_while_a_session_is_suspended() {
    let path = SocketPath::new("attached");
    let uplink = TestUplink::with_frames();
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    let source = FrontendSource::open(&path.listener()).unwrap();
    let (ended, _) = serve_with(&net_device, source, true, |stop, _| {
        let mut frontend = TestFrontend::connect(&path.0, &two_pairs()).unwrap();
        for _ in 0..200 {
            // Waits until the session runs.
            send(&mut frontend, 0, 1);
            assert!(stop.suspend(TIMEOUT));
            stop.resume();
        }
        send(&mut frontend, 0, 1);
        assert_eq!(uplink.detached.load(Ordering::Relaxed), 0);
        frontend
    });
    ended.unwrap();
}

#[test]
fn session_continues_from_its_image() {
    check_suspension(|net_device, suspended, _| {
        let mut slot = suspended.lock();
        let session = slot.take().unwrap();
        let image = session.to_image().unwrap();
        image.check(net_device).unwrap();
        let stream = session.stream().try_clone().unwrap();
        drop(session);
        let copied = SuspendedSession::from_image(image, stream).unwrap();
        *slot = Some(Box::new(copied));
    });
}
