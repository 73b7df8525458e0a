//! Tests with real sockets in a directory of their own.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use virtionet_guest::log_lines::with_log;

use super::*;
use crate::testing::stop_pair;

const TIMEOUT: Duration = Duration::from_secs(20);

/// A directory that is removed when the value is dropped.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("virtionet-vhost-user-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("s")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn bind(path: &Path) -> Result<Listener, ListenError> {
    Listener::bind(path, &SocketPermissions::default())
}

#[test]
fn listener_accepts_a_client_and_removes_its_file() {
    let directory = Directory::new();
    let path = directory.socket();
    let (_stop, stopped) = stop_pair();
    let own_group = fs::metadata(&directory.0).unwrap().gid();
    let access = SocketPermissions {
        mode: Some(0o620),
        group: Some(own_group.to_string()),
    };
    let listener = Listener::bind(&path, &access).unwrap();
    assert_eq!(listener.path(), Some(path.as_path()));
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(
        (metadata.mode() & 0o777, metadata.gid()),
        (0o620, own_group)
    );
    let mut client = UnixStream::connect(&path).unwrap();
    // A second client waits in the backlog.
    let mut second = UnixStream::connect(&path).unwrap();
    client.write_all(b"1").unwrap();
    second.write_all(b"2").unwrap();
    for want in [b"1", b"2"] {
        let mut stream = listener.accept(stopped.as_fd()).unwrap().unwrap();
        let mut byte = [0];
        // The accepted socket is blocking, although the listening socket is not.
        stream.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, want);
    }
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn stale_socket_file_is_replaced_and_one_in_use_is_kept() {
    let directory = Directory::new();
    let path = directory.socket();
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let first = bind(&path).unwrap();
    let error = bind(&path).unwrap_err();
    let text = format!(
        "socket {} is in use by another process; stop that or choose another path",
        path.display()
    );
    assert_eq!(error.to_string(), text);
    assert_eq!(error.code(), "vhost-user-socket-unavailable");
    // A socket with a full backlog is in use as well.
    let clients: Vec<_> = (0..2).map_while(|_| connect_to(&path).ok()).collect();
    assert!(matches!(
        bind(&path),
        Err(ListenError::Socket(UnixSocketError::InUse(_)))
    ));
    drop(clients);
    // The socket file of another process under the same name is kept.
    fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
    drop(other);
}

#[test]
fn path_or_access_that_is_not_possible_has_its_error() {
    let directory = Directory::new();
    let file = directory.0.join("file");
    fs::write(&file, "precious").unwrap();
    let no_group = SocketPermissions {
        group: Some("no such group".into()),
        ..SocketPermissions::default()
    };
    for (error, want) in [
        (bind(&file).unwrap_err(), "exists and is not a socket"),
        (
            bind(&directory.0.join("x".repeat(200))).unwrap_err(),
            "107 bytes at most",
        ),
        (
            bind(&directory.0.join("none/s")).unwrap_err(),
            "cannot bind socket",
        ),
        (
            Listener::bind(&directory.socket(), &no_group).unwrap_err(),
            "group no such group does not exist",
        ),
    ] {
        assert!(error.to_string().contains(want), "{error}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert!(!directory.socket().exists());
}

#[test]
fn accept_and_connect_end_when_stop_is_readable() {
    let directory = Directory::new();
    let listener = bind(&directory.socket()).unwrap();
    let (stop, stopped) = stop_pair();
    let begin = Instant::now();
    let trigger = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        stop.write(1).unwrap();
    });
    assert!(listener.accept(stopped.as_fd()).unwrap().is_none());
    let nobody = directory.0.join("nobody");
    assert!(connect(&nobody, stopped.as_fd(), |_| {}).unwrap().is_none());
    assert!(begin.elapsed() < Duration::from_secs(5));
    trigger.join().unwrap();
}

#[test]
fn connect_waits_until_the_front_end_listens() {
    let directory = Directory::new();
    let path = directory.socket();
    let (_stop, stopped) = stop_pair();
    let server = {
        let path = path.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            let listener = UnixListener::bind(path).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"x").unwrap();
        })
    };
    let stream = connect(&path, stopped.as_fd(), |_| {}).unwrap().unwrap();
    server.join().unwrap();
    let mut byte = [0];
    (&stream).read_exact(&mut byte).unwrap();
    assert!(matches!(
        connect(&directory.0.join("x".repeat(200)), stopped.as_fd(), |_| {}),
        Err(ListenError::Socket(UnixSocketError::TooLong(_)))
    ));
}

#[test]
fn inherited_socket_is_recognized_by_its_kind() {
    let directory = Directory::new();
    let path = directory.socket();
    let (_stop, stopped) = stop_pair();
    let listening = UnixListener::bind(&path).unwrap();
    let InheritedSocket::Listening(listener) = InheritedSocket::new(listening.into()).unwrap()
    else {
        panic!("not listening");
    };
    let _client = UnixStream::connect(&path).unwrap();
    assert!(listener.accept(stopped.as_fd()).unwrap().is_some());
    drop(listener);
    // The listener did not create the file, so it does not remove it.
    assert!(path.exists());
    let (one, _other) = UnixStream::pair().unwrap();
    assert!(matches!(
        InheritedSocket::new(one.into()),
        Ok(InheritedSocket::Connected(_))
    ));
    let flags = rustix::net::SocketFlags::CLOEXEC;
    let idle =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let network = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for (fd, want) in [
        (idle, "neither connected nor listening"),
        (datagram.into(), "another kind of socket"),
        (network.into(), "another kind of socket"),
        (fs::File::open("/dev/null").unwrap().into(), "no socket"),
    ] {
        let error = InheritedSocket::new(fd).unwrap_err();
        assert_eq!(error.code(), "inherited-descriptor-invalid");
        assert!(error.to_string().contains(want), "{error}");
    }
}

#[test]
fn connect_goes_on_after_an_error_that_looks_final_and_says_why_it_waits() {
    let directory = Directory::new();
    let path = directory.socket();
    // A datagram socket is in the way (EPROTOTYPE); the front-end replaces it later.
    let wrong = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let (_stop, stopped) = stop_pair();
    let front_end = thread::spawn({
        let path = path.clone();
        move || {
            thread::sleep(Duration::from_millis(200));
            drop(wrong);
            fs::remove_file(&path).unwrap();
            UnixListener::bind(&path).unwrap().accept().unwrap()
        }
    });
    let mut reasons = Vec::new();
    let stream = connect(&path, stopped.as_fd(), |reason| {
        reasons.push(reason.to_owned())
    });
    assert!(stream.unwrap().is_some());
    assert!(reasons[0].contains("it is no stream socket"), "{reasons:?}");
    front_end.join().unwrap();
}

#[test]
fn pause_before_the_next_attempt_grows_to_5_s_unless_nobody_listens() {
    let mut pauses = Vec::new();
    let mut pause = MIN_RETRY_INTERVAL;
    for _ in 0..7 {
        pause = next_pause(pause, Errno::ACCESS);
        pauses.push(pause.as_millis());
    }
    assert_eq!(pauses, [750, 1125, 1687, 2531, 3796, 5000, 5000]);
    // A front-end that is about to start is not kept waiting.
    for error in [Errno::NOENT, Errno::CONNREFUSED] {
        assert_eq!(next_pause(pause, error), Duration::from_millis(500));
    }
}

#[test]
fn reason_of_a_failed_connection_says_what_to_do() {
    for (error, advice) in [
        (Errno::NOENT, "start the front-end, or correct the path"),
        (Errno::CONNREFUSED, "start the front-end"),
        (Errno::AGAIN, "see whether it is stopped"),
        (Errno::ACCESS, "correct its mode, owner or security label"),
        (Errno::PERM, "correct its mode, owner or security label"),
        (Errno::PROTOTYPE, "it is no stream socket; correct the path"),
        (Errno::MFILE, "raise the limit (ulimit -n)"),
        (Errno::NFILE, "raise the limit (ulimit -n)"),
        (Errno::NOMEM, "see whether the front-end runs"),
    ] {
        let reason = explain_failed_connect(Path::new("/run/s"), error);
        let beginning = format!("cannot connect to /run/s ({error}): ");
        assert!(reason.starts_with(&beginning), "{reason}");
        assert!(reason.ends_with(advice), "{reason}");
    }
}

#[test]
fn reason_is_reported_once_until_it_changes() {
    let directory = Directory::new();
    let path = directory.socket();
    let (_stop, stopped) = stop_pair();
    let (reported, reasons) = mpsc::channel();
    let connecting = thread::spawn({
        let path = path.clone();
        move || {
            connect(&path, stopped.as_fd(), |reason| {
                reported.send(reason.to_owned()).unwrap();
            })
        }
    });
    let reason = reasons.recv_timeout(TIMEOUT).unwrap();
    assert!(reason.contains("does not exist yet"), "{reason}");
    // Two more attempts fail for the same reason.
    thread::sleep(Duration::from_millis(1_200));
    // A socket whose listener is closed. It is renamed, so that no attempt finds it while it
    // still has one.
    let new = directory.0.join("new");
    drop(UnixListener::bind(&new).unwrap());
    fs::rename(&new, &path).unwrap();
    let reason = reasons.recv_timeout(TIMEOUT).unwrap();
    assert!(reason.contains("no front-end listens on it"), "{reason}");
    let front_end = UnixListener::bind(&new).unwrap();
    fs::rename(&new, &path).unwrap();
    assert!(connecting.join().unwrap().unwrap().is_some());
    assert!(front_end.accept().is_ok());
    assert_eq!(reasons.iter().collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn accept_on_a_socket_that_does_not_listen_is_an_error() {
    let flags = rustix::net::SocketFlags::CLOEXEC;
    let idle =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let (_stop, stopped) = stop_pair();
    let error = Listener::new(idle, None)
        .unwrap()
        .accept(stopped.as_fd())
        .unwrap_err();
    assert_eq!(error.code(), "accept-failed");
    assert!(error.to_string().ends_with("start virtionetd again"));
}

#[test]
fn accept_goes_on_when_another_thread_took_the_client() {
    let directory = Directory::new();
    let first = UnixListener::bind(directory.socket()).unwrap();
    let second = first.try_clone().unwrap();
    let (stop, stopped) = stop_pair();
    let (accepted, results) = mpsc::channel();
    thread::scope(|scope| {
        for socket in [first, second] {
            let (accepted, stopped) = (accepted.clone(), stopped.as_fd());
            scope.spawn(move || {
                let listener = Listener::new(socket.into(), None).unwrap();
                accepted
                    .send(listener.accept(stopped).map(|stream| stream.is_some()))
                    .unwrap();
            });
        }
        // Both wait when the client comes, and both wake up.
        thread::sleep(Duration::from_millis(50));
        let _client = UnixStream::connect(directory.socket()).unwrap();
        assert!(results.recv_timeout(TIMEOUT).unwrap().unwrap());
        thread::sleep(Duration::from_millis(50));
        stop.write(1).unwrap();
        assert!(!results.recv_timeout(TIMEOUT).unwrap().unwrap());
    });
}

/// Of all that wake up for a client, one gets it, and `accept4` fails with EAGAIN for the others.
#[test]
fn accept_waits_on_when_others_take_every_client() {
    const CLIENTS: u32 = 300;
    let directory = Directory::new();
    let socket = UnixListener::bind(directory.socket()).unwrap();
    let (stop, stopped) = stop_pair();
    let accepted = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            let (socket, stopped) = (socket.try_clone().unwrap(), stopped.as_fd());
            let accepted = &accepted;
            scope.spawn(move || {
                let listener = Listener::new(socket.into(), None).unwrap();
                while listener.accept(stopped).unwrap().is_some() {
                    accepted.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..CLIENTS {
            let mut client = UnixStream::connect(directory.socket()).unwrap();
            client.set_read_timeout(Some(TIMEOUT)).unwrap();
            // The connection is closed once it was accepted.
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
        }
        stop.write(1).unwrap();
    });
    assert_eq!(accepted.into_inner(), CLIENTS);
}

#[test]
fn errors_of_accept_are_told_apart() {
    let classes = |error: Errno| {
        let error = io::Error::from(error);
        (is_exhausted(&error), is_transient(&error))
    };
    for lack in [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM] {
        assert_eq!(classes(lack), (true, false), "{lack}");
    }
    for passing in [Errno::AGAIN, Errno::INTR, Errno::CONNABORTED] {
        assert_eq!(classes(passing), (false, true), "{passing}");
    }
    assert_eq!(classes(Errno::INVAL), (false, false));
}

#[test]
fn second_front_ends_are_refused_one_at_a_time_and_logged_once_a_second() {
    let directory = Directory::new();
    let listener = bind(&directory.socket()).unwrap();
    let clients: Vec<_> = (0..2)
        .map(|_| UnixStream::connect(directory.socket()).unwrap())
        .collect();
    let is_closed_within = |mut client: &UnixStream, timeout| {
        client.set_read_timeout(Some(timeout)).unwrap();
        client.read(&mut [0]).is_ok_and(|bytes| bytes == 0)
    };
    let ((), log) = with_log(|| listener.refuse());
    assert!(is_closed_within(&clients[0], TIMEOUT));
    assert!(!is_closed_within(&clients[1], Duration::from_millis(20)));
    let text = format!(
        "process {} connected while a front-end is being served and was refused; a device serves one front-end at a time",
        std::process::id()
    );
    assert!(log.contains(&text), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");
    let ((), log) = with_log(|| listener.refuse());
    assert!(is_closed_within(&clients[1], TIMEOUT));
    assert_eq!(log, "", "it is less than a second later");
    thread::sleep(Duration::from_millis(1_100));
    let _late = UnixStream::connect(directory.socket()).unwrap();
    let ((), log) = with_log(|| listener.refuse());
    assert!(log.contains("suppressed=1"), "{log}");
}

#[test]
fn connections_beside_the_one_served_are_refused() {
    let directory = Directory::new();
    let listener = bind(&directory.socket()).unwrap();
    let mut second = UnixStream::connect(directory.socket()).unwrap();
    second
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    listener.refuse();
    assert_eq!(
        second.read(&mut [0]).unwrap(),
        0,
        "the connection is closed"
    );
    // The socket still takes the next one.
    let (_stop, stopped) = stop_pair();
    let _third = UnixStream::connect(directory.socket()).unwrap();
    assert!(listener.accept(stopped.as_fd()).unwrap().is_some());
}

#[test]
fn front_ends_of_another_user_are_refused() {
    let directory = Directory::new();
    let own = rustix::process::geteuid().as_raw();
    let (stop, stopped) = stop_pair();
    let listener = bind(&directory.socket()).unwrap().with_peer_uid(Some(own));
    let _client = UnixStream::connect(directory.socket()).unwrap();
    assert!(listener.accept(stopped.as_fd()).unwrap().is_some());
    let listener = listener.with_peer_uid(Some(own + 1));
    let mut client = UnixStream::connect(directory.socket()).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let waiting = thread::spawn(move || with_log(|| listener.accept(stopped.as_fd()).unwrap()));
    assert_eq!(
        client.read(&mut [0]).unwrap(),
        0,
        "the connection is closed"
    );
    stop.write(1).unwrap();
    let (accepted, log) = waiting.join().unwrap();
    assert!(accepted.is_none());
    let text = format!(
        "a front-end of user {own} was refused, because only user {} is served (--peer-uid)",
        own + 1
    );
    assert!(log.contains(&text), "{log}");
}
