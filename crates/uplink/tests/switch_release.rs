//! A switch gives the buffers of a burst back to the sender before the receiver sees its frames, so
//! that as many frames as a ring has descriptors can circulate.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use virtionet_guest::frame::{Frame, FrameSpec, Transport};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::{self, DriverQueue, MODERN, PACKED};
use virtionet_guest::rx::DriverRxQueue;
use virtionet_guest::tx::DriverTxQueue;
use virtionet_uplink::switch::Switch;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{RxSink, TxFrame, Uplink, UplinkQueue};
use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue, TxQueue};
use virtionet_virtqueue::VirtqueueLayout;

const SIZE: u16 = 256;

/// A guest's receiveq and its driver, and the driver of the transmitq from which frames come.
#[derive(Debug)]
struct Receiveq {
    queue: Mutex<RxQueue>,
    /// Checks each push.
    observer: Mutex<Option<Observer>>,
}

/// Looks at both drivers during a push.
struct Observer {
    receiver: Arc<Mutex<DriverRxQueue>>,
    sender: Arc<Mutex<DriverTxQueue>>,
    released: Vec<usize>,
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.released)
    }
}

fn receive(driver: &Mutex<DriverRxQueue>) -> usize {
    driver.lock().unwrap().receive(usize::MAX, |_| ()).unwrap()
}

impl RxSink for Receiveq {
    fn push(&self, frames: &[TxFrame<'_>]) -> usize {
        self.push_releasing(frames, &mut || ())
    }

    fn push_releasing(&self, frames: &[TxFrame<'_>], release: &mut dyn FnMut()) -> usize {
        let mut queue = self.queue.lock().unwrap();
        let mut observer = self.observer.lock().unwrap();
        let Some(observer) = &mut *observer else {
            return queue
                .push_releasing(frames, release)
                .unwrap()
                .descriptors_read;
        };
        let mut release = || {
            assert_eq!(receive(&observer.receiver), 0, "the frames are not visible");
            release();
            let released = observer.sender.lock().unwrap().reclaim().unwrap();
            observer.released.push(released.into());
        };
        let pushed = queue.push_releasing(frames, &mut release).unwrap();
        assert_eq!(receive(&observer.receiver), pushed.frames);
        pushed.descriptors_read
    }
}

struct Guest {
    _ram: GuestRam,
    rx_driver: Arc<Mutex<DriverRxQueue>>,
    tx_driver: Arc<Mutex<DriverTxQueue>>,
    tx: TxQueue,
    rx: Arc<Receiveq>,
    rx_stats: Arc<VringStats>,
    queue: Arc<dyn UplinkQueue>,
}

impl Guest {
    fn new(switch: &Arc<Switch>, features: u64) -> Self {
        let port = switch.add_device_port("device").unwrap();
        port.set_format(Features(features).format()).unwrap();
        let config = net::DriverQueueConfig::new(SIZE, features);
        let ram = GuestRam::new((config.memory() + 0x2_0000).next_multiple_of(4096)).unwrap();
        let mut rx_driver = DriverRxQueue::new(&ram, &config).unwrap();
        let tx_driver = DriverTxQueue::new(&ram, &config).unwrap();
        let memory = Arc::new(ram.guest_memory().unwrap());
        let queue_config = |queue: &DriverQueue| {
            let setup = queue.setup().unwrap();
            let user = |addr| ram.user_addr(addr).unwrap();
            QueueConfig {
                layout: VirtqueueLayout {
                    size: setup.size,
                    desc: user(setup.addresses.descriptors),
                    avail: user(setup.addresses.driver),
                    used: user(setup.addresses.device),
                },
                base: setup.base,
                features: Features(features),
                memory: Arc::clone(&memory),
                stats: Arc::default(),
                record: None,
            }
        };
        let rx_config = queue_config(&rx_driver.queue);
        let rx_stats = Arc::clone(&rx_config.stats);
        let rx = Arc::new(Receiveq {
            queue: Mutex::new(RxQueue::new(rx_config).unwrap()),
            observer: Mutex::default(),
        });
        let tx = TxQueue::new(queue_config(&tx_driver.queue)).unwrap();
        let weak: Weak<Receiveq> = Arc::downgrade(&rx);
        let queue = port.open_queue(0, weak).unwrap();
        queue.set_attached(true).unwrap();
        rx_driver.fill().unwrap();
        Self {
            _ram: ram,
            rx_driver: Arc::new(Mutex::new(rx_driver)),
            tx_driver: Arc::new(Mutex::new(tx_driver)),
            tx,
            rx,
            rx_stats,
            queue,
        }
    }

    fn send(&mut self, frames: &[Frame]) {
        let mut driver = self.tx_driver.lock().unwrap();
        driver.send_all(frames, Duration::ZERO).unwrap();
        drop(driver);
        while self.tx.send(Some(&*self.queue)).unwrap().chains > 0 {}
    }
}

fn frame(from: u8, to: u8, n: usize) -> Frame {
    let spec = FrameSpec {
        source_mac: [2, 0, 0, 0, 0, from],
        target_mac: [2, 0, 0, 0, 0, to],
        ..FrameSpec::v4(Transport::Udp)
    };
    spec.build(&[u8::try_from(n % 256).unwrap(); 22]).unwrap()
}

/// Two guests on a switch, each of which has sent one frame.
fn two_guests(features: u64) -> [Guest; 2] {
    let switch = Switch::new("s");
    let mut guests = [1, 2].map(|_| Guest::new(&switch, features));
    for (from, to) in [(0, 1), (1, 0)] {
        let known = frame(from, to, 0);
        guests[usize::from(from)].send(&[known]);
        receive(&guests[usize::from(to)].rx_driver);
        guests[usize::from(from)]
            .tx_driver
            .lock()
            .unwrap()
            .reclaim()
            .unwrap();
    }
    guests
}

#[test]
fn buffers_of_a_burst_are_free_before_its_receiver_sees_the_frames() {
    for features in [MODERN, MODERN | PACKED] {
        let [mut a, b] = two_guests(features);
        *b.rx.observer.lock().unwrap() = Some(Observer {
            receiver: Arc::clone(&b.rx_driver),
            sender: Arc::clone(&a.tx_driver),
            released: Vec::new(),
        });
        let burst: Vec<_> = (0..32).map(|n| frame(0, 1, n)).collect();
        a.send(&burst);
        let observer = b.rx.observer.lock().unwrap().take().unwrap();
        assert_eq!(observer.released, [32], "{features:#x}");
        assert_eq!(a.tx_driver.lock().unwrap().reclaim().unwrap(), 0);
    }
}

/// Sends back what arrives until `stop`. Counts received frames, and those for which the transmitq had
/// no descriptor.
fn forward(
    (rx, tx): (&Mutex<DriverRxQueue>, &Mutex<DriverTxQueue>),
    back: &Frame,
    stop: &AtomicBool,
    (received, refused): (&AtomicU64, &AtomicU64),
) {
    let (mut rx, mut tx) = (rx.lock().unwrap(), tx.lock().unwrap());
    while !stop.load(Ordering::Relaxed) {
        // Each frame that arrives is taken, and its buffer returned, before it is sent back.
        let count = rx.receive(usize::MAX, |_| ()).unwrap();
        received.fetch_add(u64::try_from(count).unwrap(), Ordering::Relaxed);
        tx.reclaim().unwrap();
        for _ in 0..count {
            if !tx.queue(&back.header, &back.bytes).unwrap() {
                refused.fetch_add(1, Ordering::Relaxed);
            }
        }
        tx.flush().unwrap();
        std::thread::yield_now();
    }
}

#[test]
fn whole_ring_of_frames_circulates_without_a_loss() {
    const WANTED: u64 = 20_000;
    for features in [MODERN, MODERN | PACKED] {
        let [mut a, mut b] = two_guests(features);
        let stop = AtomicBool::new(false);
        let [received_a, received_b, refused] = [(); 3].map(|()| AtomicU64::new(0));
        // 8 times 32 frames, which are all descriptors of a ring.
        {
            let mut driver = a.tx_driver.lock().unwrap();
            for n in 0..SIZE.into() {
                let Frame { header, bytes } = frame(0, 1, n);
                assert!(driver.queue(&header, &bytes).unwrap());
            }
            driver.flush().unwrap();
        }
        std::thread::scope(|scope| {
            for (guest, received, back) in [
                (&a, &received_a, frame(0, 1, 0)),
                (&b, &received_b, frame(1, 0, 0)),
            ] {
                let drivers = (Arc::clone(&guest.rx_driver), Arc::clone(&guest.tx_driver));
                let (stop, refused) = (&stop, &refused);
                scope.spawn(move || {
                    forward((&drivers.0, &drivers.1), &back, stop, (received, refused));
                });
            }
            for (tx, queue) in [(&mut a.tx, &a.queue), (&mut b.tx, &b.queue)] {
                let stop = &stop;
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        if tx.send(Some(&**queue)).unwrap().chains == 0 {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            let end = Instant::now() + Duration::from_secs(60);
            let count = || received_a.load(Ordering::Relaxed) + received_b.load(Ordering::Relaxed);
            while count() < WANTED && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            stop.store(true, Ordering::Relaxed);
            assert!(count() >= WANTED, "{} frames in 60 s", count());
        });
        assert_eq!(refused.into_inner(), 0, "{features:#x}");
        for guest in [&a, &b] {
            assert_eq!(guest.rx_stats.dropped_no_buffer.get(), 0, "{features:#x}");
        }
    }
}
