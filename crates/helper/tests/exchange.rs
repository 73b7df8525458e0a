//! A client and a server at the two ends of a socketpair, with the kernel's own sockets and TAPs.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread::{self, JoinHandle};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtionet_base::Pattern;
use virtionet_base::rights::{FileIdentity, Helper, LinkChange};
use virtionet_helper::{Client, Rule, take_rules};
use virtionet_uplink::tap::find_index;

fn sockets() -> (OwnedFd, OwnedFd) {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    socketpair(family, kind, SocketFlags::CLOEXEC, None).unwrap()
}

/// Starts a server with `rules`, which ends with the client.
fn start(rules: impl IntoIterator<Item = Rule>) -> (Client, JoinHandle<()>) {
    let (ours, theirs) = sockets();
    let server = thread::spawn(|| {
        if let Some(server) = take_rules(theirs).unwrap() {
            server.serve().unwrap();
        }
    });
    (Client::new(ours, rules).unwrap(), server)
}

fn pattern(text: &str) -> Pattern {
    text.parse().unwrap()
}

fn open_tun() -> File {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap()
}

#[test]
fn socket_that_is_allowed_is_connected_and_no_other() {
    let folder = std::env::temp_dir().join(format!("virtionet-helper-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (allowed, other) = (folder.join("a.sock"), folder.join("b.sock"));
    let listener = UnixListener::bind(&allowed).unwrap();
    let _other = UnixListener::bind(&other).unwrap();
    let (client, server) = start([Rule::socket_at(&allowed)]);
    let mut connection = client.connect(&allowed).unwrap().unwrap();
    connection.write_all(b"hello").unwrap();
    let mut text = [0; 5];
    listener.accept().unwrap().0.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    let refused = client.connect(&other).unwrap().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    std::fs::remove_dir_all(&folder).unwrap();
    let missing = client.connect(&allowed).unwrap().unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(client.is_open());
    client.close();
    server.join().unwrap();
}

fn identity_of(path: &Path) -> FileIdentity {
    let metadata = std::fs::symlink_metadata(path).unwrap();
    FileIdentity {
        device: metadata.dev(),
        inode: metadata.ino(),
    }
}

#[test]
fn own_socket_is_removed_while_it_is_the_same_file_and_no_other_is() {
    let folder = std::env::temp_dir().join(format!("virtionet-removed-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (own, other) = (folder.join("a.sock"), folder.join("b.sock"));
    let _own = UnixListener::bind(&own).unwrap();
    let _other = UnixListener::bind(&other).unwrap();
    let (client, server) = start([Rule::own_socket_at(&own), Rule::socket_at(&other)]);
    let remove = |path: &Path, identity| {
        let done = client.remove_socket(path, identity).unwrap();
        done.map_err(|error| error.kind())
    };
    let (own_identity, other_identity) = (identity_of(&own), identity_of(&other));
    assert_eq!(
        remove(&other, other_identity),
        Err(ErrorKind::PermissionDenied)
    );
    assert_eq!(remove(&own, other_identity), Err(ErrorKind::NotFound));
    assert!(own.exists() && other.exists());
    assert_eq!(remove(&own, own_identity), Ok(()));
    assert!(!own.exists());
    // Another kind of file at the same path stays, even if the request names it.
    std::fs::write(&own, "x").unwrap();
    assert_eq!(remove(&own, identity_of(&own)), Err(ErrorKind::NotFound));
    assert!(own.exists());
    client.close();
    server.join().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn taps_that_are_allowed_are_opened_and_changed_and_no_others() {
    if !geteuid().is_root() {
        eprintln!("skipped: making a TAP needs root");
        return;
    }
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let (client, server) = start([Rule::Taps(pattern("vnet*")), Rule::Tap("t%d".into())]);
    let tun = open_tun();
    assert_eq!(
        client.attach_tap(tun.as_fd(), "vnet7").unwrap().unwrap(),
        "vnet7"
    );
    assert!(find_index("vnet7").is_ok());
    let other = open_tun();
    assert_eq!(
        client.attach_tap(other.as_fd(), "t%d").unwrap().unwrap(),
        "t0"
    );
    // The name that the kernel chose is one that was opened.
    client
        .change_link("t0", &LinkChange::Mtu(9000))
        .unwrap()
        .unwrap();
    let refused = |done: Option<std::io::Result<()>>| done.unwrap().unwrap_err().kind();
    for (name, change) in [
        ("lo", LinkChange::Up),
        ("lo", LinkChange::Mtu(1500)),
        ("t0", LinkChange::Port("lo".into())),
    ] {
        let kind = refused(client.change_link(name, &change));
        assert_eq!(kind, ErrorKind::PermissionDenied, "{name}: {change}");
    }
    let unnamed = open_tun();
    let kind = refused(
        client
            .attach_tap(unnamed.as_fd(), "eth0")
            .map(|name| name.map(drop)),
    );
    assert_eq!(kind, ErrorKind::PermissionDenied);
    let null = File::open("/dev/null").unwrap();
    let kind = refused(
        client
            .attach_tap(null.as_fd(), "vnet8")
            .map(|name| name.map(drop)),
    );
    assert_eq!(kind, ErrorKind::InvalidInput);
    client.close();
    server.join().unwrap();
}

#[test]
fn cpu_masks_are_written_only_where_that_is_allowed() {
    let (client, server) = start([Rule::Sockets(pattern("/run/*"))]);
    let file = Path::new("/proc/irq/0/smp_affinity_list");
    let refused = client.write_affinity(file, "0").unwrap().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    client.close();
    server.join().unwrap();
    let (client, server) = start([Rule::Affinity]);
    let file = Path::new("/proc/irq/999999/smp_affinity_list");
    let missing = client.write_affinity(file, "0").unwrap().unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    client.close();
    server.join().unwrap();
}

#[test]
fn client_whose_server_has_ended_says_so_and_asks_no_more() {
    let (ours, theirs) = sockets();
    let client = Client::new(ours, [Rule::Affinity]).unwrap();
    drop(theirs);
    assert!(client.connect(Path::new("/run/a.sock")).is_none());
    assert!(!client.is_open());
    assert!(client.connect(Path::new("/run/a.sock")).is_none());
}

#[test]
fn server_does_not_serve_before_it_has_all_rules_nor_with_a_wrong_one() {
    let (ours, theirs) = sockets();
    drop(ours);
    assert!(take_rules(theirs).unwrap().is_none());
    let (ours, theirs) = sockets();
    rustix::io::write(&ours, b"{\"Allow\":{\"Sockets\":\"/run/***\"}}").unwrap();
    let error = take_rules(theirs).unwrap_err();
    assert!(error.to_string().starts_with("/run/***: "), "{error}");
}

#[test]
fn message_that_is_no_request_ends_the_server() {
    let (ours, theirs) = sockets();
    let copy = ours.try_clone().unwrap();
    let server = thread::spawn(|| take_rules(theirs).unwrap().unwrap().serve());
    let _client = Client::new(ours, []).unwrap();
    rustix::io::write(&copy, b"{\"Reboot\":{}}").unwrap();
    assert!(server.join().unwrap().is_err());
}
