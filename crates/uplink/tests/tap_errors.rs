//! The errors of a TAP that cannot be opened, each caused by a real kernel.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod host;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use host::{become_nobody, eventually, hide_tun, in_namespaces, open_tap, run, share_tun};
use virtionet_virtio_net::uplink::{Uplink, null_rx_sink};

fn open_error(spec: &str) -> String {
    let message = open_tap(spec).unwrap_err().to_string();
    println!("{message}");
    assert!(!message.contains('\n'));
    message
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

fn tap(spec: &str) -> Arc<dyn Uplink> {
    eventually(|| open_tap(spec).ok())
}

#[test]
fn missing_driver_and_missing_permission_have_their_errors() {
    in_namespaces(|| {
        hide_tun();
        assert_says(
            &open_error("vt0"),
            &["/dev/net/tun", "modprobe tun", "container"],
        );
        run("mknod -m 600 /dev/net/tun c 10 250");
        assert_says(&open_error("vt0"), &["no TUN driver", "modprobe tun"]);
        run("rm /dev/net/tun");
        run("mknod -m 600 /dev/net/tun c 10 200");
        become_nobody();
        assert_says(
            &open_error("vt0"),
            &["by user 65534", "read and write access"],
        );
    });
}

#[test]
fn missing_capability_has_its_error() {
    in_namespaces(|| {
        share_tun();
        run("ip tuntap add dev vt1 mode tap user 1 multi_queue vnet_hdr");
        run("ip tuntap add dev vt2 mode tap user 65534 multi_queue vnet_hdr");
        run("ip link add vbr type bridge");
        become_nobody();
        let command = |name: &str| {
            format!("`ip tuntap add dev {name} mode tap user 65534 multi_queue vnet_hdr`")
        };
        assert_says(
            &open_error("vt0"),
            &[
                "user 65534 may not make TAP vt0",
                &command("vt0"),
                "CAP_NET_ADMIN",
            ],
        );
        assert_says(
            &open_error("vt1"),
            &[
                "vt1 does not belong to user 65534",
                &command("vt1"),
                "CAP_NET_ADMIN",
            ],
        );
        assert_says(
            &open_error("vt2,bridge=vbr"),
            &[
                "cannot be put into bridge vbr",
                "`ip link set vt2 master vbr`",
                "CAP_NET_ADMIN",
            ],
        );
    });
}

#[test]
fn interface_of_the_wrong_kind_has_its_error() {
    in_namespaces(|| {
        run("ip tuntap add dev single mode tap vnet_hdr");
        run("ip tuntap add dev tun0 mode tun multi_queue");
        run("ip link add vbr type bridge");
        assert_says(
            &open_error("single"),
            &[
                "takes one queue only",
                "`ip tuntap add dev single mode tap multi_queue vnet_hdr`",
            ],
        );
        assert_says(&open_error("tun0"), &["tun0 is no TAP but a TUN"]);
        assert_says(&open_error("vbr"), &["vbr is no TAP but a bridge"]);
        assert_says(
            &open_error("lo"),
            &["lo is no TAP but a network card or loopback"],
        );
    });
}

#[test]
fn tap_of_another_process_has_its_error() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queue = uplink.open_queue(1, null_rx_sink()).unwrap();
        assert_says(
            &open_error("vt0"),
            &["vt0 is held by another process, with 2 of its queues"],
        );
        drop((uplink, queue));
        tap("vt0");
    });
}

#[test]
fn tap_that_is_released_within_a_second_is_opened() {
    in_namespaces(|| {
        run("ip tuntap add dev vt0 mode tap multi_queue vnet_hdr");
        let owner = tap("vt0");
        thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(300));
                drop(owner);
            });
            let began = Instant::now();
            open_tap("vt0").unwrap();
            assert!(began.elapsed() >= Duration::from_millis(300));
        });
    });
}

#[test]
fn one_queue_too_many_has_its_error() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let _queues: Vec<_> = (0..256)
            .map(|pair| uplink.open_queue(pair, null_rx_sink()).unwrap())
            .collect();
        let message = uplink
            .open_queue(256, null_rx_sink())
            .unwrap_err()
            .to_string();
        assert_says(
            &message,
            &[
                "as many queues as the kernel allows (256)",
                "fewer queue pairs",
            ],
        );
        assert_says(
            &open_error("vt0"),
            &["as many queues as the kernel allows (256)"],
        );
    });
}

#[test]
fn wrong_bridge_has_its_error() {
    in_namespaces(|| {
        run("ip link add vbr type bridge");
        run("ip link add vbr2 type bridge");
        run("ip tuntap add dev vt0 mode tap multi_queue vnet_hdr");
        run("ip link set vt0 master vbr2");
        assert_says(
            &open_error("vt1,bridge=none"),
            &["no bridge none", "`ip link add none type bridge`"],
        );
        assert_says(&open_error("vt1,bridge=lo"), &["lo is no bridge"]);
        assert_says(
            &open_error("vt0,bridge=vbr"),
            &["vt0 is a port of another bridge than vbr", "nomaster"],
        );
        assert!(
            !run("ip link").contains("vt1"),
            "a refused TAP stays behind"
        );
        tap("vt0,bridge=vbr2");
    });
}
