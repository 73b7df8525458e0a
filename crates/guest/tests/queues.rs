//! Both queues of a queue pair with a device in this process that uses the virtio-queue crate.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::{Queue, QueueT};
use virtionet_guest::Error;
use virtionet_guest::driver::{DeviceFault, VirtqueueAddresses};
use virtionet_guest::frame::{Checksum, Frame, FrameSpec, Transport, check};
use virtionet_guest::header::NetHeader;
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::{BIG_BUFFER, DriverQueueConfig, MODERN, TxLayout};
use virtionet_guest::test_frontend::DriverQueuePair;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device that a test drives step by step.
struct Device {
    memory: GuestMemoryMmap,
    tx: Queue,
    rx: Queue,
}

fn queue(size: u16, at: VirtqueueAddresses) -> Queue {
    let mut queue = Queue::new(size).unwrap();
    let part = GuestAddress;
    queue
        .try_set_desc_table_address(part(at.descriptors))
        .unwrap();
    queue.try_set_avail_ring_address(part(at.driver)).unwrap();
    queue.try_set_used_ring_address(part(at.device)).unwrap();
    queue.set_ready(true);
    queue
}

fn make(config: &DriverQueueConfig) -> (DriverQueuePair, Device) {
    let ram = GuestRam::new(config.memory().next_multiple_of(4096) + (1 << 16)).unwrap();
    let pair = DriverQueuePair::new(&ram, config).unwrap();
    let region = ram.regions()[0];
    let file = FileOffset::new(ram.file().try_clone().unwrap(), region.file_offset);
    let size = usize::try_from(region.size).unwrap();
    let ranges = [(GuestAddress(region.guest_addr), size, Some(file))];
    let device = Device {
        memory: GuestMemoryMmap::from_ranges_with_files(ranges).unwrap(),
        tx: queue(config.size, pair.tx.queue.ring.addresses()),
        rx: queue(config.size, pair.rx.queue.ring.addresses()),
    };
    (pair, device)
}

impl Device {
    /// Dequeues and completes the next TX chain. Returns the lengths of its buffers and all its
    /// bytes.
    fn transmit(&mut self) -> Option<(Vec<u32>, Vec<u8>)> {
        let chain = self.tx.pop_descriptor_chain(&self.memory)?;
        let head = chain.head_index();
        let (mut lens, mut bytes) = (Vec::new(), Vec::new());
        for d in chain {
            assert!(!d.is_write_only());
            let mut segment = vec![0; usize::try_from(d.len()).unwrap()];
            self.memory.read_slice(&mut segment, d.addr()).unwrap();
            lens.push(d.len());
            bytes.append(&mut segment);
        }
        self.tx.add_used(&self.memory, head, 0).unwrap();
        Some((lens, bytes))
    }

    /// Writes as many of `bytes` to the next RX chain as fit and completes it. Returns the rest.
    fn fill<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let chain = self.rx.pop_descriptor_chain(&self.memory).unwrap();
        let head = chain.head_index();
        let mut left = bytes;
        for d in chain {
            assert!(d.is_write_only());
            let n = left.len().min(usize::try_from(d.len()).unwrap());
            self.memory.write_slice(&left[..n], d.addr()).unwrap();
            left = &left[n..];
        }
        let len = u32::try_from(bytes.len() - left.len()).unwrap();
        self.rx.add_used(&self.memory, head, len).unwrap();
        left
    }

    /// Writes a frame with its header to as many RX chains as it needs.
    fn deliver(&mut self, frame: &Frame, num_buffers: u16) {
        let header = NetHeader {
            num_buffers,
            ..frame.header
        };
        let bytes = [&header.to_bytes()[..], &frame.bytes].concat();
        let mut left = &bytes[..];
        while !left.is_empty() {
            left = self.fill(left);
        }
    }
}

fn frame(payload: usize) -> Frame {
    let mut spec = FrameSpec::v4(Transport::Tcp);
    spec.sequence = u32::try_from(payload).unwrap();
    let bytes: Vec<u8> = (0..=250).cycle().take(payload).collect();
    spec.build(&bytes).unwrap()
}

#[test]
fn frame_in_each_tx_layout_reaches_the_device() {
    for (layout, features, lens) in [
        (TxLayout::Single, VERSION_1, vec![12 + 154]),
        (TxLayout::SeparateHeader, VERSION_1, vec![12, 154]),
        (
            TxLayout::SeparateHeader,
            VERSION_1 | INDIRECT,
            vec![12, 154],
        ),
        (TxLayout::SeparateHeader, 0, vec![10, 154]),
        (TxLayout::Segments(60), VERSION_1, vec![60, 60, 46]),
        (
            TxLayout::Segments(5),
            VERSION_1 | INDIRECT,
            [5; 33].into_iter().chain([1]).collect(),
        ),
    ] {
        let mut config = DriverQueueConfig::new(64, features);
        config.tx_layout = layout;
        let (mut pair, mut device) = make(&config);
        let sent = frame(100);
        // More frames than slots, so that each slot is used again.
        for _ in 0..150 {
            pair.tx.send(&sent).unwrap();
            let header = &sent.header.to_bytes()[..if features == 0 { 10 } else { 12 }];
            let want = [header, &sent.bytes].concat();
            assert_eq!(device.transmit(), Some((lens.clone(), want)), "{layout:?}");
        }
        pair.tx.drain(Duration::from_secs(1)).unwrap();
    }
}

#[test]
fn full_transmitq_refuses_frames_until_one_is_used() {
    let (mut pair, mut device) = make(&DriverQueueConfig::new(8, VERSION_1));
    let small = frame(10);
    let queue = |pair: &mut DriverQueuePair| pair.tx.queue(&small.header, &small.bytes).unwrap();
    for _ in 0..8 {
        assert!(queue(&mut pair));
    }
    assert!(!queue(&mut pair));
    pair.tx.flush().unwrap();
    assert_eq!(pair.tx.queue.kick.try_read(), 1, "one kick for all frames");
    device.transmit().unwrap();
    assert!(queue(&mut pair));
    assert!(!queue(&mut pair));
    let error = pair.tx.drain(Duration::from_millis(5)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Waited {
                got: 0,
                wanted: 7,
                ..
            }
        ),
        "{error}"
    );
    let long = frame(2048);
    assert!(matches!(
        pair.tx.queue(&long.header, &long.bytes),
        Err(Error::FrameTooLong { .. })
    ));
}

#[test]
fn prefilled_slots_are_sent_unchanged() {
    let (mut pair, mut device) = make(&DriverQueueConfig::new(16, VERSION_1));
    let sent = frame(46);
    pair.tx.prefill(&sent).unwrap();
    let want = [&sent.header.to_bytes()[..], &sent.bytes].concat();
    for _ in 0..5 {
        assert_eq!(pair.tx.queue_prefilled(10).unwrap(), 10);
        assert_eq!(pair.tx.queue_prefilled(10).unwrap(), 6);
        pair.tx.flush().unwrap();
        for _ in 0..16 {
            assert_eq!(device.transmit().unwrap().1, want);
        }
        assert!(device.transmit().is_none());
    }
}

#[test]
fn frame_merged_from_several_buffers_is_complete() {
    let config = DriverQueueConfig::new(64, VERSION_1 | MERGEABLE);
    let (mut pair, mut device) = make(&config);
    assert_eq!(pair.rx.fill().unwrap(), 64);
    // Lengths around the ends of the first and second buffer, and the largest one.
    for payload in [0, 1460, 1461, 1400, 2985, 2986, 2987, 65_000] {
        let sent = frame(payload);
        let buffers = (sent.bytes.len() + 12).div_ceil(1526);
        device.deliver(&sent, u16::try_from(buffers).unwrap());
        let got = pair.rx.receive_frames().unwrap();
        assert_eq!(got.len(), 1);
        assert_eq!(got[0].bytes, sent.bytes);
        check(&got[0]).unwrap();
        assert_eq!(usize::from(got[0].header.num_buffers), buffers);
        assert_eq!(
            pair.rx.queue.ring.in_flight(),
            64,
            "the receiveq is refilled"
        );
    }
}

#[test]
fn largest_frame_fits_one_big_buffer() {
    let features = VERSION_1 | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let whole = DriverQueueConfig::new(8, features);
    assert_eq!(whole.rx_buffer, [BIG_BUFFER]);
    // Linux uses a buffer for the header and then pages.
    let mut pages = vec![12];
    pages.extend([4096; 16]);
    pages.push(BIG_BUFFER - 12 - 16 * 4096);
    let mut direct = DriverQueueConfig::new(64, features);
    direct.rx_buffer.clone_from(&pages);
    let mut indirect = DriverQueueConfig::new(8, features | INDIRECT);
    indirect.rx_buffer = pages;
    for (config, buffers) in [(whole, 8), (direct, 64 / 18), (indirect, 8)] {
        let (mut pair, mut device) = make(&config);
        assert_eq!(pair.rx.fill().unwrap(), buffers);
        for payload in [1, 65_000, 65_495, 300] {
            let sent = frame(payload);
            device.deliver(&sent, 1);
            let got = pair.rx.wait_frames(1, Duration::from_secs(1)).unwrap();
            assert_eq!(got[0].bytes, sent.bytes);
        }
    }
}

#[test]
fn receiveq_without_refill_runs_out_of_buffers() {
    let (mut pair, mut device) = make(&DriverQueueConfig::new(8, VERSION_1 | MERGEABLE));
    pair.rx.refill = false;
    assert_eq!(pair.rx.fill_some(2).unwrap(), 2);
    device.deliver(&frame(50), 1);
    device.deliver(&frame(60), 1);
    assert!(device.rx.pop_descriptor_chain(&device.memory).is_none());
    let mut lens = Vec::new();
    let taken = pair.rx.receive(1, |f| lens.push((f.len, f.buffers())));
    assert_eq!(taken.unwrap(), 1);
    assert_eq!(pair.rx.receive_frames().unwrap().len(), 1);
    assert_eq!(lens, [(54 + 50, 1)]);
    assert!(device.rx.pop_descriptor_chain(&device.memory).is_none());
    assert_eq!(pair.rx.fill().unwrap(), 8);
    device.deliver(&frame(70), 1);
    assert_eq!(pair.rx.receive_frames().unwrap()[0], {
        let mut want = frame(70);
        want.header.num_buffers = 1;
        want
    });
}

#[test]
fn invalid_frame_is_the_matching_device_fault() {
    let fault = |num_buffers: u16, bytes: usize| {
        let (mut pair, mut device) = make(&DriverQueueConfig::new(8, VERSION_1 | MERGEABLE));
        pair.rx.fill().unwrap();
        let header = NetHeader {
            num_buffers,
            ..NetHeader::default()
        };
        let mut raw = header.to_bytes().to_vec();
        raw.resize(bytes, 0);
        device.fill(&raw);
        match pair.rx.receive_frames() {
            Err(Error::Device(fault)) => fault,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(fault(0, 100), DeviceFault::NoBuffers);
    assert_eq!(fault(1, 11), DeviceFault::NoHeader(11));
    assert_eq!(fault(3, 100), DeviceFault::TornFrame { wanted: 3, got: 1 });
    let (mut pair, mut device) = make(&DriverQueueConfig::new(8, VERSION_1));
    pair.rx.fill().unwrap();
    let head = device
        .rx
        .pop_descriptor_chain(&device.memory)
        .unwrap()
        .head_index();
    device.rx.add_used(&device.memory, head, 1527).unwrap();
    let want = DeviceFault::UsedLength {
        len: 1527,
        capacity: 1526,
    };
    assert!(matches!(pair.rx.receive_frames(), Err(Error::Device(f)) if f == want));
}

#[test]
fn queues_after_reset_work_like_new_ones() {
    let config = DriverQueueConfig::new(8, MODERN);
    let (mut pair, mut device) = make(&config);
    for _ in 0..3 {
        pair.rx.fill().unwrap();
        for _ in 0..8 {
            pair.tx.send(&frame(10)).unwrap();
        }
        device.transmit().unwrap();
        device.deliver(&frame(20), 1);
        assert_eq!(pair.rx.receive_frames().unwrap().len(), 1);
        pair.rx.reset();
        pair.tx.reset();
        device.tx = queue(8, pair.tx.queue.ring.addresses());
        device.rx = queue(8, pair.rx.queue.ring.addresses());
        assert!(device.transmit().is_none());
    }
}

#[test]
fn frame_with_partial_checksum_and_gso_keeps_its_header() {
    let (mut pair, mut device) = make(&DriverQueueConfig::new(8, MODERN).with_big_tx());
    let mut spec = FrameSpec::v6(Transport::Tcp);
    spec.checksum = Checksum::Partial;
    spec.gso_size = Some(1400);
    let sent = spec.build(&[7; 60_000]).unwrap();
    pair.tx.send(&sent).unwrap();
    let (_, bytes) = device.transmit().unwrap();
    let header = NetHeader::from_bytes(bytes[..12].try_into().unwrap());
    assert_eq!(header, sent.header);
    assert_eq!(header.gso_size, 1400);
    check(&Frame {
        header,
        bytes: bytes[12..].to_vec(),
    })
    .unwrap();
}

#[test]
fn impossible_configuration_is_refused() {
    let ram = GuestRam::new(1 << 20).unwrap();
    let good = DriverQueueConfig::new(8, VERSION_1);
    let change = |f: fn(&mut DriverQueueConfig)| {
        let mut config = good.clone();
        f(&mut config);
        config
    };
    for bad in [
        change(|c| c.rx_buffer.clear()),
        change(|c| c.rx_buffer.push(0)),
        change(|c| c.rx_buffer = vec![100; 9]),
        change(|c| c.tx_slot = 11),
        change(|c| c.tx_layout = TxLayout::Segments(0)),
        change(|c| c.size = 9),
        change(|c| c.tx_slot = 1 << 20),
    ] {
        assert!(DriverQueuePair::new(&ram, &bad).is_err(), "{bad:?}");
    }
}
