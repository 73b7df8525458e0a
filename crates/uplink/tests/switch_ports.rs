//! The ports of a switch: addresses in conflict.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod host;

use std::sync::{Arc, Mutex, Weak};

use host::frame;
use virtionet_uplink::switch::{Switch, SwitchPort};
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{RxSink, TxFrame, Uplink, UplinkQueue};

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
    fn push(&self, frames: &[TxFrame<'_>]) {
        for frame in frames {
            let mut bytes = vec![0; frame.len];
            let mut at = 0;
            for slice in frame.payload {
                at += slice.copy_to(&mut bytes[at..]);
            }
            self.0.lock().unwrap().push(bytes);
        }
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

fn frame_to(to: [u8; 6], from: u8) -> Vec<u8> {
    let mut bytes = frame(60, from);
    bytes[..6].copy_from_slice(&to);
    bytes
}

#[test]
fn an_address_that_two_devices_use_is_reported_for_both() {
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
