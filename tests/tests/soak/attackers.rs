//! What hostile drivers and front-ends do to devices whose uplink is `null` or a switch. Afterwards
//! a driver that behaves well again must be served.

use std::time::{Duration, Instant};

use virtionet_guest::hostile::block_writes;
use virtionet_guest::message_stream::MessageStream;

use crate::daemon_under_test::{DaemonUnderTest, PAIRS, TIMEOUT, counter};
use crate::endpoint::{DEPARTURES, Departure, Endpoint};
use virtionet_tests::random::Random;

/// The descriptor flags of a packed chain that does not end.
const UNENDING: u16 = 1 | 1 << 7;

/// What is done to one device.
#[derive(Debug, Clone, Copy)]
enum Action {
    Flood,
    FloodOfInvalidFrames,
    KickStorm,
    ChangeOfEnabledPairs,
    Death,
    DeathInNegotiation,
    SecondFrontEnd,
    Fault,
    SameMemoryTable,
    MemoryRemovedAndAdded,
    MemoryTruncated,
    Restart,
    Reset,
}

const ACTIONS: [Action; 13] = [
    Action::Flood,
    Action::FloodOfInvalidFrames,
    Action::KickStorm,
    Action::ChangeOfEnabledPairs,
    Action::Death,
    Action::DeathInNegotiation,
    Action::SecondFrontEnd,
    Action::Fault,
    Action::SameMemoryTable,
    Action::MemoryRemovedAndAdded,
    Action::MemoryTruncated,
    Action::Restart,
    Action::Reset,
];

/// Attacks the device `null` until `end`.
pub fn attack_null(
    under_test: &DaemonUnderTest,
    device: &mut Endpoint,
    mut random: Random,
    end: Instant,
) {
    while Instant::now() < end {
        let action = random.pick(&ACTIONS);
        under_test.journal.note(device.name, &format!("{action:?}"));
        perform(under_test, device, &mut random, action, 0xee);
        under_test.assert_progress();
    }
    device.leave(under_test, random.pick(&DEPARTURES));
}

/// Attacks the two devices of a switch until `end`.
pub fn attack_switch(
    under_test: &DaemonUnderTest,
    devices: &mut [Endpoint; 2],
    mut random: Random,
    end: Instant,
) {
    while Instant::now() < end {
        let n = usize::from(random.coin());
        match random.range(0, 5) {
            0 => starve(under_test, devices, n, &mut random),
            1 => block_call(under_test, devices, n, &mut random),
            2 => quarantine_receiveqs(under_test, devices, n, &mut random),
            _ => {
                let action = random.pick(&ACTIONS);
                under_test
                    .journal
                    .note(devices[n].name, &format!("{action:?}"));
                let target = random.pick(&[mac(1 - n), mac(n), 0xee]);
                perform(under_test, &mut devices[n], &mut random, action, target);
            }
        }
        assert_carries_frames(under_test, devices, n, &mut random);
        under_test.assert_progress();
    }
    for device in devices {
        device.leave(under_test, random.pick(&DEPARTURES));
    }
}

/// The last byte of the MAC address of device `n` of the switch.
pub fn mac(n: usize) -> u8 {
    0x20 + u8::try_from(n).unwrap()
}

fn perform(
    under_test: &DaemonUnderTest,
    device: &mut Endpoint,
    random: &mut Random,
    action: Action,
    target: u8,
) {
    let pair = u16::try_from(random.range(0, u64::from(PAIRS) - 1)).unwrap();
    let frame = device.frame_to(target, &[0x55; 200]);
    device.connect(under_test, random);
    match action {
        Action::Flood => device.send(pair, &frame, random.range(1, 5000)),
        Action::FloodOfInvalidFrames => {
            let count = random.range(1, 2000);
            device.send_invalid(pair, random, count);
            device.send_invalid_addresses(pair, random.range(1, 200));
        }
        Action::KickStorm => {
            for _ in 0..random.range(1000, 20_000) {
                device.frontend().pairs[usize::from(pair)]
                    .tx
                    .queue
                    .kick_now()
                    .unwrap();
            }
        }
        Action::ChangeOfEnabledPairs => {
            for is_enabled in [false, true] {
                device.frontend().enable(1, is_enabled).unwrap();
                device.send(pair, &frame, random.range(1, 500));
            }
        }
        Action::Death => {
            device.send(pair, &frame, random.range(1, 200));
            device.leave(under_test, random.pick(&DEPARTURES));
        }
        Action::DeathInNegotiation => {
            device.leave(under_test, random.pick(&DEPARTURES));
            for _ in 0..random.range(1, 10) {
                device.connect_and_die(under_test, random.pick(&DEPARTURES));
            }
        }
        Action::SecondFrontEnd => {
            let socket = under_test.socket(device.name);
            let mut second = MessageStream::connect(&socket, TIMEOUT).unwrap();
            second.wait_hang_up().unwrap();
        }
        Action::Fault => {
            device.send(pair, &frame, random.range(1, 200));
            quarantine(under_test, device, pair, random);
        }
        Action::SameMemoryTable => {
            device.send(pair, &frame, random.range(1, 50));
            let ram = device.frontend().ram().clone();
            device.frontend().connection.share(&ram).unwrap();
        }
        Action::MemoryRemovedAndAdded => {
            device.send(pair, &frame, random.range(1, 50));
            move_memory(device);
        }
        Action::MemoryTruncated => device.truncate_memory(under_test, pair),
        Action::Restart => {
            device.send(pair, &frame, random.range(1, 50));
            device.restart(false);
        }
        Action::Reset => {
            device.send(pair, &frame, random.range(1, 50));
            device.restart(true);
        }
    }
    if device.is_connected() {
        device.send(pair, &frame, 1);
        device.drain();
        device.receive();
    }
}

/// Makes the transmitq faulty, waits until the device has quarantined it, and resets the driver.
fn quarantine(under_test: &DaemonUnderTest, device: &mut Endpoint, pair: u16, random: &mut Random) {
    let index = usize::from(pair);
    let queue = &mut device.frontend().pairs[index].tx.queue;
    let size = queue.ring.size();
    match queue.ring.as_split() {
        Some(ring) => {
            let available = ring.avail_index();
            let is_jump = random.coin();
            ring.set_avail_entry(available % size, size);
            let step = if is_jump { size + 1000 } else { 1 };
            ring.set_avail_index(available.wrapping_add(step));
        }
        None => {
            // The fault overwrites the descriptors that the device has used.
            device.frontend().pairs[index].tx.drain(TIMEOUT).unwrap();
            let ring = &mut device.frontend().pairs[index].tx.queue.ring;
            let ring = ring.as_packed().unwrap();
            let wrap = if ring.position().word() >> 15 == 1 {
                UNENDING
            } else {
                1 | 1 << 15
            };
            for descriptor in (0..size).rev() {
                ring.set_flags(descriptor, wrap);
            }
        }
    }
    device.frontend().pairs[index].tx.queue.kick_now().unwrap();
    let is_quarantined = |d: &serde_json::Value| d["pairs"][index]["tx"]["state"] == "quarantined";
    under_test.wait_for(device.name, "quarantined", is_quarantined);
    device.restart(true);
}

/// Removes all memory regions under running vrings and adds them again.
fn move_memory(device: &mut Endpoint) {
    let frontend = device.frontend();
    let (regions, fd) = (frontend.ram().regions(), frontend.ram().fd());
    for region in &regions {
        frontend.connection.remove_mem_region(region).unwrap();
    }
    for region in &regions {
        frontend.connection.add_mem_region(region, fd).unwrap();
    }
}

/// Connects those devices that are not connected.
fn connect_all(under_test: &DaemonUnderTest, devices: &mut [Endpoint; 2], random: &mut Random) {
    for device in devices {
        device.connect(under_test, random);
    }
}

/// Lets one device receive without giving buffers back, while the other one floods it.
fn starve(
    under_test: &DaemonUnderTest,
    devices: &mut [Endpoint; 2],
    n: usize,
    random: &mut Random,
) {
    under_test
        .journal
        .note(devices[n].name, "starvation of the receiveqs");
    connect_all(under_test, devices, random);
    devices[n].set_refill(false);
    let frame = devices[1 - n].frame_to(mac(n), &[0x33; 900]);
    devices[1 - n].send(0, &frame, random.range(1000, 4000));
    devices[1 - n].drain();
    devices[n].receive();
    devices[n].set_refill(true);
}

/// Makes the call eventfds of a device blocking and fills them, while the other one sends to it.
/// The front-end then leaves, because the device has cut them off.
fn block_call(
    under_test: &DaemonUnderTest,
    devices: &mut [Endpoint; 2],
    n: usize,
    random: &mut Random,
) {
    under_test
        .journal
        .note(devices[n].name, "blocking call eventfds");
    connect_all(under_test, devices, random);
    for pair in &devices[n].frontend().pairs {
        block_writes(&pair.rx.queue.call).unwrap();
    }
    let frame = devices[1 - n].frame_to(mac(n), &[0x33; 100]);
    devices[1 - n].send(0, &frame, random.range(1, 200));
    devices[1 - n].drain();
    devices[n].leave(under_test, Departure::HangUp);
}

/// Makes the receiveqs of a device faulty, sends until one of them is quarantined, and resets the
/// driver.
fn quarantine_receiveqs(
    under_test: &DaemonUnderTest,
    devices: &mut [Endpoint; 2],
    n: usize,
    random: &mut Random,
) {
    under_test
        .journal
        .note(devices[n].name, "faults of the receiveqs");
    connect_all(under_test, devices, random);
    for pair in &mut devices[n].frontend().pairs {
        let queue = &mut pair.rx.queue;
        let jump = queue.ring.size() + 1000;
        // The device has all buffers of a packed virtqueue already.
        let Some(ring) = queue.ring.as_split() else {
            return;
        };
        ring.set_avail_index(ring.avail_index().wrapping_add(jump));
    }
    let frame = devices[1 - n].frame_to(mac(n), &[0x44; 100]);
    let deadline = Instant::now() + TIMEOUT;
    let name = devices[n].name;
    let is_quarantined = || {
        let device = under_test.device(name);
        let mut pairs = 0..usize::from(PAIRS);
        pairs.any(|pair| device["pairs"][pair]["rx"]["state"] == "quarantined")
    };
    while !is_quarantined() {
        assert!(Instant::now() < deadline, "no receiveq is quarantined");
        devices[1 - n].send(0, &frame, 100);
        devices[1 - n].drain();
    }
    devices[n].restart(true);
}

/// Checks that a frame from the other device reaches device `n`.
fn assert_carries_frames(
    under_test: &DaemonUnderTest,
    devices: &mut [Endpoint; 2],
    n: usize,
    random: &mut Random,
) {
    connect_all(under_test, devices, random);
    devices[n].receive();
    let frame = devices[1 - n].frame_to(mac(n), b"are you there?");
    let deadline = Instant::now() + TIMEOUT;
    loop {
        devices[1 - n].send(0, &frame, 1);
        devices[1 - n].drain();
        if devices[n].receive() > 0 {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{} receives nothing",
            devices[n].name
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Checks that each frame that one device of the switch has sent is a frame or a named drop of the
/// other one. No front-end may be connected.
pub fn assert_switch_counters(under_test: &DaemonUnderTest) {
    let devices = ["bad0", "bad1"].map(|name| under_test.device(name));
    let sum = |vring: &str, names: &[&str]| -> u64 {
        let of = |device| -> u64 {
            let pairs = 0..usize::from(PAIRS);
            pairs
                .flat_map(|pair| {
                    names
                        .iter()
                        .map(move |name| counter(device, pair, vring, name))
                })
                .sum()
        };
        devices.iter().map(of).sum()
    };
    let outcomes = [
        "frames",
        "dropped_no_buffer",
        "dropped_too_long",
        "dropped_disabled",
    ];
    assert_eq!(sum("tx", &["frames"]), sum("rx", &outcomes), "{devices:?}");
}
