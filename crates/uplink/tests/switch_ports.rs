//! The ports of a switch: the host's TAP, reserved group addresses, and addresses in conflict.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod host;

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, Weak};
use std::thread;

use host::{PacketSocket, become_nobody, eventually, frame, in_namespaces, link, run, share_tun};
use rustix::event::{EventfdFlags, eventfd};
use virtionet_uplink::switch::{Switch, SwitchPort};
use virtionet_uplink::tap::TapConfig;
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{RxSink, TxFrame, Uplink, UplinkChange, UplinkQueue};

const PLAIN: VnetHeader = VnetHeader([0; 12]);

/// A receiveq that keeps the frames that are pushed to it.
#[derive(Debug, Default)]
struct Sink(Mutex<Vec<Vec<u8>>>);

impl Sink {
    fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl RxSink for Sink {
    fn push(&self, frames: &[TxFrame<'_>]) -> usize {
        for frame in frames {
            let mut bytes = vec![0; frame.len];
            let mut at = 0;
            for slice in frame.payload {
                at += slice.copy_to(&mut bytes[at..]);
            }
            self.0.lock().unwrap().push(bytes);
        }
        frames.len()
    }
}

/// A device with one queue pair on a switch.
struct Device {
    port: SwitchPort,
    queue: Arc<dyn UplinkQueue>,
    sink: Arc<Sink>,
}

impl Device {
    fn new(switch: &Arc<Switch>, name: &str) -> Self {
        let port = switch.add_device_port(name).unwrap();
        let sink = Arc::new(Sink::default());
        let weak: Weak<Sink> = Arc::downgrade(&sink);
        let queue = port.open_queue(0, weak).unwrap();
        queue.set_attached(true).unwrap();
        Self { port, queue, sink }
    }

    fn send(&self, frames: &[Vec<u8>]) -> VringStats {
        let mut guest = host::Guest::new();
        frames.iter().for_each(|frame| guest.put(frame, 9000));
        let burst: Vec<TxFrame<'_>> = guest
            .slices()
            .chunks(1)
            .map(|payload| TxFrame {
                header: PLAIN,
                payload,
                len: payload[0].len(),
            })
            .collect();
        let stats = VringStats::default();
        self.queue.transmit(&burst, &stats);
        stats
    }
}

#[test]
fn port_of_a_removed_device_is_the_next_ones_and_knows_none_of_its_addresses() {
    let switch = Switch::new("s");
    let sender = Device::new(&switch, "sender");
    let addresses = |name: &str| {
        let image = switch.to_image();
        let own = |device: &Option<String>| device.as_deref() == Some(name);
        image.addresses.iter().filter(|a| own(&a.device)).count()
    };
    // A switch has 1,024 ports.
    for _ in 0..2000 {
        let removed = Device::new(&switch, "removed");
        removed.send(&[frame_to([0xff; 6], 7)]);
        assert_eq!(addresses("removed"), 1);
        let Device { port, queue, sink } = removed;
        drop(port);
        // Its queue still transmits for it.
        assert_eq!(switch.devices(), ["sender", "removed"]);
        drop(queue);
        assert_eq!(switch.devices(), ["sender"]);
        assert_eq!(addresses("removed"), 0);
        let next = Device::new(&switch, "next");
        assert_eq!(addresses("next"), 0);
        sender.send(&[frame_to([0xff; 6], 1)]);
        assert_eq!(next.sink.take().len(), 1);
        assert!(sink.take().is_empty(), "a removed device gets no frame");
    }
    drop(sender);
    assert!(switch.is_unused());
}

fn frame_to(to: [u8; 6], from: u8) -> Vec<u8> {
    let mut bytes = frame(60, from);
    bytes[..6].copy_from_slice(&to);
    bytes
}

/// A switch whose host port is TAP vt0.
fn switch_with_tap() -> Arc<Switch> {
    let switch = Switch::new("lan");
    let config = TapConfig {
        name: "vt0".into(),
        bridge: None,
    };
    eventually(|| switch.add_host_port(&config).ok());
    switch
}

#[test]
fn host_tap_has_the_largest_mtu_of_all_devices() {
    in_namespaces(|| {
        let switch = switch_with_tap();
        let [a, b] = ["a", "b"].map(|name| Device::new(&switch, name));
        for (device, mtu, expected) in [
            (&a, 2000, "mtu 2000 "),
            (&b, 9000, "mtu 9000 "),
            (&a, 1500, "mtu 9000 "),
            (&b, 1400, "mtu 1500 "),
        ] {
            device.port.set_mtu(mtu).unwrap();
            assert!(link("vt0").contains(expected), "{mtu}: {}", link("vt0"));
        }
        // The TAP is made again with the same MTU.
        a.port.set_mtu(3000).unwrap();
        run("ip link del vt0");
        assert_eq!(a.port.refresh().unwrap(), UplinkChange::Reopened);
        assert!(link("vt0").contains("mtu 3000 "));
    });
}

#[test]
fn tap_that_cannot_have_the_mtu_is_an_error_of_the_device_that_needs_it() {
    in_namespaces(|| {
        share_tun();
        run("ip tuntap add dev vt0 mode tap user 65534 multi_queue vnet_hdr");
        run("ip link set vt0 up mtu 2000");
        become_nobody();
        let switch = switch_with_tap();
        let [a, b] = ["a", "b"].map(|name| Device::new(&switch, name));
        let error = a.port.set_mtu(9000).unwrap_err();
        assert_eq!(error.code(), "mtu-refused");
        assert!(
            error
                .to_string()
                .contains("TAP vt0 has an MTU of 2000 and it cannot be set to 9000"),
            "{error}"
        );
        b.port.set_mtu(1500).unwrap();
        b.port.set_mtu(2001).unwrap_err();
        a.port.set_mtu(2000).unwrap();
    });
}

#[test]
fn host_tap_is_opened_again_for_both_directions() {
    in_namespaces(|| {
        run("ip tuntap add dev vt0 mode tap multi_queue vnet_hdr");
        run("ip link set vt0 up");
        let switch = switch_with_tap();
        let [a, b] = ["a", "b"].map(|name| Device::new(&switch, name));
        let forwarder = switch.host_port_forwarder().unwrap();
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| forwarder.run(stop.as_fd()));
            for round in 0..3 {
                run("ip link del vt0");
                assert_eq!(a.port.refresh().unwrap_err().code(), "tap-gone");
                assert_eq!(b.port.refresh().unwrap_err().code(), "tap-gone");
                let stats = a.send(&[frame_to([0xff; 6], 1)]);
                assert_eq!(stats.dropped_uplink_down.get(), 1);
                assert_eq!(b.sink.take().len(), 1, "{round}");
                run("ip tuntap add dev vt0 mode tap multi_queue vnet_hdr");
                run("ip link set vt0 up");
                assert_eq!(b.port.refresh().unwrap(), UplinkChange::Reopened);
                assert_eq!(a.port.refresh().unwrap(), UplinkChange::Unchanged);
                let socket = PacketSocket::on("vt0");
                a.send(&[frame_to([0xff; 6], 1)]);
                assert_eq!(socket.next(), frame_to([0xff; 6], 1));
                b.sink.take();
                socket.send(&frame_to([0xff; 6], 7));
                eventually(|| {
                    let frames = b.sink.take();
                    frames.contains(&frame_to([0xff; 6], 7)).then_some(())
                });
            }
            rustix::io::write(&stop, &1_u64.to_ne_bytes()).unwrap();
        });
    });
}

#[test]
fn frames_to_reserved_groups_reach_no_port_unless_the_switch_forwards_them() {
    let switch = Switch::new("lan");
    let [a, b, c] = ["a", "b", "c"].map(|name| Device::new(&switch, name));
    let reserved = |last| frame_to([1, 0x80, 0xc2, 0, 0, last], 1);
    // Spanning tree, PAUSE, LACP, LLDP, and the last one.
    for last in [0, 1, 2, 0xe, 0xf] {
        let stats = a.send(&[reserved(last)]);
        assert_eq!(stats.dropped_reserved_group.get(), 1, "{last}");
        assert_eq!((stats.frames.get(), stats.dropped_no_port.get()), (0, 0));
    }
    assert_eq!((b.sink.take().len(), c.sink.take().len()), (0, 0));
    // The next address is an ordinary group, and the other frames of a burst are forwarded.
    let others = [reserved(0x10), frame_to([0xff; 6], 1)];
    let burst = [
        reserved(0),
        others[0].clone(),
        reserved(2),
        others[1].clone(),
    ];
    let stats = a.send(&burst);
    assert_eq!(stats.dropped_reserved_group.get(), 2);
    assert_eq!((stats.frames.get(), stats.bytes.get()), (2, 120));
    assert_eq!(
        (b.sink.take(), c.sink.take()),
        (others.to_vec(), others.to_vec())
    );

    switch.forward_reserved_groups();
    let stats = a.send(&burst);
    assert_eq!(
        (stats.frames.get(), stats.dropped_reserved_group.get()),
        (4, 0)
    );
    assert_eq!((b.sink.take().len(), c.sink.take().len()), (4, 4));
}

#[test]
fn address_that_two_devices_use_is_reported_for_both() {
    let switch = Switch::new("lan");
    let [a, b, c] = ["a", "b", "c"].map(|name| Device::new(&switch, name));
    let broadcast = || frame_to([0xff; 6], 1);
    a.send(&[broadcast()]);
    c.send(&[frame_to([0xff; 6], 3)]);
    // A guest that moves once, or twice, is no conflict.
    b.send(&[broadcast()]);
    a.send(&[broadcast()]);
    assert_eq!(a.port.address_conflict(), None);
    b.send(&[broadcast()]);
    let text = "MAC address 02:00:00:00:00:01 is used by device a and by device b on switch lan, so each gets frames of the other; give one of them another address";
    for device in [&a, &b] {
        let conflict = device.port.address_conflict().unwrap();
        assert_eq!(conflict.to_string(), text);
    }
    assert_eq!(c.port.address_conflict(), None);
}

#[test]
fn switch_knows_from_an_image_where_addresses_and_flows_are() {
    let (a, b) = ([0x52, 0x54, 0, 0, 0, 1], [0x52, 0x54, 0, 0, 0, 2]);
    let learned = |switch: &Arc<Switch>| {
        let devices = ["x", "y", "z"].map(|name| Device::new(switch, name));
        // A second pair, so that there are flows.
        let sinks = [0, 1, 2].map(|_| Arc::new(Sink::default()));
        for (device, sink) in devices.iter().zip(&sinks) {
            let weak: Weak<Sink> = Arc::downgrade(sink);
            let queue = device.port.open_queue(1, weak).unwrap();
            queue.set_attached(true).unwrap();
        }
        (devices, sinks)
    };
    let old = Switch::new("lan");
    let (devices, _sinks) = learned(&old);
    let from = |to: [u8; 6], from: [u8; 6]| {
        let mut bytes = frame_to(to, 1);
        bytes[6..12].copy_from_slice(&from);
        bytes
    };
    devices[0].send(&[from([0xff; 6], a)]);
    devices[1].send(&[from([0xff; 6], b)]);
    let image = old.to_image();
    assert_eq!(image.addresses.len(), 2);
    let text = serde_json::to_string(&image).unwrap();

    let new = Switch::with_seed("lan", old.seed());
    let (devices, sinks) = learned(&new);
    new.learn_image(&serde_json::from_str(&text).unwrap());
    assert_eq!(new.to_image().addresses, image.addresses);
    assert_eq!(new.to_image().flows, image.flows);
    // It does not flood.
    devices[0].send(&[from(b, a)]);
    let received = |n: usize| devices[n].sink.take().len() + sinks[n].take().len();
    assert_eq!([received(1), received(2)], [1, 0]);
}
