//! The limit of open files. The limit belongs to the whole process, so this is the only test of its
//! process.
#![cfg(test)]

#[path = "common/descriptors.rs"]
mod descriptors;
#[path = "common/device.rs"]
mod device;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use descriptors::{assert_open_fds, open_fds};
use device::{Device, send, session};
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtionet_vhost_user::SessionError;
use virtionet_vhost_user::listen::{Listener, SocketPermissions};

/// Allows `count` open files.
fn limit(count: usize) {
    let current = u64::try_from(count).unwrap();
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: Some(current),
        maximum,
    };
    setrlimit(Resource::Nofile, limit).unwrap();
}

/// Opens files until the limit is reached.
fn exhaust() -> Vec<File> {
    std::iter::from_fn(|| File::open("/dev/null").ok()).collect()
}

#[test]
fn session_at_the_limit_of_open_files_ends_and_the_next_one_waits() {
    let zero = File::open("/dev/zero").unwrap();
    let before = open_fds();
    // The limit suffices for the session's own descriptors and a few of the twenty that the message
    // carries.
    limit(before + 8);
    let ended = session(&Device::default(), |stream| {
        send(&stream, &[3, 1, 0], &[], &[zero.as_fd(); 20]);
    });
    assert!(matches!(ended, Err(SessionError::FdLimit)), "{ended:?}");
    assert_open_fds(before);

    let path = std::env::temp_dir().join(format!("virtionet-limit-{}", std::process::id()));
    let listener = Listener::bind(&path, &SocketPermissions::default()).unwrap();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let held_files = exhaust();
    let accepted = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(200));
            drop(held_files);
        });
        listener.accept(stop.as_fd())
    });
    assert!(accepted.unwrap().is_some());
    drop(client);

    let _client = UnixStream::connect(&path).unwrap();
    let held_files = exhaust();
    let accepted = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(200));
            rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
        });
        listener.accept(stop.as_fd())
    });
    assert!(accepted.unwrap().is_none());
    drop(held_files);
}
