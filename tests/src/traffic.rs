//! Numbered frames through all vrings of a daemon, by drivers in this process in place of guests.
//!
//! A [`testbed::TrafficTestbed`] is a daemon whose devices are on a TAP or on a switch. On the TAP
//! there is one device, and for each queue pair one UDP socket of the host: its frames go to the
//! receiveq, and those of the transmitq to it. On the switch there are two devices, and queue pair k
//! of one exchanges frames with queue pair k of the other. So each vring has a flow of its own, whose
//! frames are checked for losses, changes of their order and repetitions ([`sequence`]).
//!
//! A flow has at most [`Traffic::window`] frames on their way. A pause of the daemon therefore fills
//! no queue, and whatever is lost is lost by the daemon.

pub mod flow;
pub mod probe;
pub mod reply_watch;
pub mod sequence;
pub mod testbed;

use std::net::UdpSocket;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtionet_guest::driver::DriverVirtqueue;
use virtionet_guest::frame::FrameSpec;
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::message_stream::VHOST_USER_VERSION;
use virtionet_guest::net::DriverQueue;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};

use flow::{PAYLOAD_START, frame, receive_by_host, send_by_host};
use reply_watch::ReplyWatch;
use sequence::{PAYLOAD_LEN, parse, payload};

pub use flow::{End, Flow};

/// The request GET_VRING_BASE of the vhost-user protocol.
const GET_VRING_BASE: u32 = 11;
/// The longest time for the reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// A device's front-end, and what has happened to its vrings.
#[derive(Debug)]
struct Device {
    frontend: TestFrontend,
    /// By vring.
    is_stopped: Vec<bool>,
    /// The chains that the device has used, by vring.
    used: Vec<u64>,
}

/// The flows of a testbed.
#[derive(Debug)]
pub struct Traffic {
    devices: Vec<Device>,
    sockets: Vec<UdpSocket>,
    /// The flows, one for each vring.
    pub flows: Vec<Flow>,
    /// The highest number of frames of a flow that are on their way.
    pub window: u64,
}

impl Traffic {
    /// The flows between a device on a TAP and the `sockets` of the host, one for each queue pair.
    /// `spec` describes the frames of queue pair k of the device.
    ///
    /// # Errors
    /// When a frame cannot be built.
    pub fn with_host(
        frontend: TestFrontend,
        sockets: Vec<UdpSocket>,
        spec: impl Fn(usize) -> FrameSpec,
    ) -> Result<Self> {
        let mut flows = Vec::new();
        for pair in 0..sockets.len() {
            let (driver, host) = (End::Driver { device: 0, pair }, End::Host { pair });
            flows.push(Flow::new(driver, host, frame(&spec(pair))?));
            flows.push(Flow::new(host, driver, frame(&spec(pair))?));
        }
        Ok(Self::new(vec![frontend], sockets, flows))
    }

    /// The flows between two devices on a switch. `spec` describes the frames of queue pair k of a
    /// device.
    ///
    /// # Errors
    /// When a frame cannot be built.
    pub fn between(
        frontends: [TestFrontend; 2],
        spec: impl Fn(usize, usize) -> FrameSpec,
    ) -> Result<Self> {
        let mut flows = Vec::new();
        for pair in 0..frontends[0].pairs.len() {
            for device in 0..2 {
                let end = |device| End::Driver { device, pair };
                let frame = frame(&spec(device, pair))?;
                flows.push(Flow::new(end(device), end(1 - device), frame));
            }
        }
        Ok(Self::new(frontends.into(), Vec::new(), flows))
    }

    fn new(frontends: Vec<TestFrontend>, sockets: Vec<UdpSocket>, flows: Vec<Flow>) -> Self {
        let devices = frontends.into_iter().map(|frontend| Device {
            is_stopped: vec![false; frontend.rings().len()],
            used: vec![0; frontend.rings().len()],
            frontend,
        });
        Self {
            devices: devices.collect(),
            sockets,
            flows,
            window: 256,
        }
    }

    /// The number of devices.
    #[must_use]
    pub fn device_count(&self) -> usize {
        self.devices.len()
    }

    /// The number of vrings of a device.
    #[must_use]
    pub fn vring_count(&self, device: usize) -> usize {
        self.devices[device].is_stopped.len()
    }

    /// The front-end of a device.
    #[must_use]
    pub fn frontend(&self, device: usize) -> &TestFrontend {
        &self.devices[device].frontend
    }

    /// The number of chains that the device has used of a vring.
    #[must_use]
    pub fn used(&self, device: usize, vring: usize) -> u64 {
        self.devices[device].used[vring]
    }

    /// Sends up to `count` frames of each flow whose window is not full, and receives what has
    /// arrived. Stopped vrings are kicked, and nothing else is done to them.
    ///
    /// # Errors
    /// When the device breaks a rule of virtqueues, or the host cannot send or receive.
    pub fn exchange(&mut self, count: u64) -> Result<()> {
        self.send(count)?;
        self.receive()
    }

    /// Exchanges bursts of `count` frames for `time`.
    ///
    /// # Errors
    /// As [`Traffic::exchange`].
    pub fn exchange_for(&mut self, count: u64, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.exchange(count)?;
        }
        Ok(())
    }

    /// Receives until no frame is on its way.
    ///
    /// # Errors
    /// When one does not arrive within `limit`, or as [`Traffic::exchange`].
    pub fn drain(&mut self, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        while self.flows.iter().any(|flow| flow.on_its_way() > 0) {
            ensure!(
                Instant::now() < until,
                "frames do not arrive within {limit:?}: {}",
                self.describe()
            );
            self.receive()?;
        }
        Ok(())
    }

    fn send(&mut self, count: u64) -> Result<()> {
        self.send_where(count, |_| true)
    }

    /// Sends up to `count` frames of each flow of `which` whose window is not full, and receives
    /// none.
    ///
    /// # Errors
    /// As [`Traffic::exchange`].
    pub fn send_where(&mut self, count: u64, which: impl Fn(&Flow) -> bool) -> Result<()> {
        let flows = (0..).zip(&mut self.flows);
        for (index, flow) in flows.filter(|(_, flow)| which(flow)) {
            let count = count.min(self.window.saturating_sub(flow.on_its_way()));
            match flow.source {
                End::Driver { device, pair } => {
                    send_by_driver(&mut self.devices[device], pair, flow, index, count)?;
                }
                End::Host { pair } => send_by_host(&self.sockets[pair], flow, index, count)?,
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        for (index, device) in self.devices.iter_mut().enumerate() {
            for pair in 0..device.frontend.pairs.len() {
                receive_by_driver(index, device, pair, &mut self.flows)?;
            }
        }
        for (pair, socket) in self.sockets.iter().enumerate() {
            receive_by_host(socket, pair, &mut self.flows)?;
        }
        Ok(())
    }

    /// The longest time between two arrivals of each flow since the last call, that since the last
    /// arrival included.
    pub fn take_gaps(&mut self) -> Vec<Duration> {
        let now = Instant::now();
        let take = |flow: &mut Flow| {
            flow.note_gap(now);
            std::mem::take(&mut flow.longest_gap)
        };
        self.flows.iter_mut().map(take).collect()
    }

    /// Carries frames for `time`, and forgets what became of them: the host sends a flow to its vring
    /// only after the driver has sent some of its own.
    ///
    /// # Errors
    /// As [`Traffic::exchange`].
    pub fn warm_up(&mut self, time: Duration) -> Result<()> {
        self.exchange_for(1, time)?;
        self.wait_for_late_frames(time)?;
        for flow in &mut self.flows {
            flow.check.forget_below(flow.sent);
            flow.given_up = 0;
            (flow.at_other_vring, flow.longest_gap) = (0, Duration::ZERO);
        }
        Ok(())
    }

    /// Receives until no frame has come for `time`. Those that are then on their way are given up.
    ///
    /// # Errors
    /// As [`Traffic::exchange`].
    pub fn wait_for_late_frames(&mut self, time: Duration) -> Result<()> {
        let received = |flows: &[Flow]| flows.iter().map(|flow| flow.check.received).sum::<u64>();
        loop {
            let before = received(&self.flows);
            self.exchange_for(0, time)?;
            if received(&self.flows) == before {
                break;
            }
        }
        for flow in &mut self.flows {
            flow.given_up = flow.unreceived();
        }
        Ok(())
    }

    /// Frames that are on their way need not arrive any more.
    pub fn give_up(&mut self) {
        self.give_up_where(|_| true);
    }

    /// Those of the host need not: their queue is gone.
    pub fn give_up_frames_of_host(&mut self) {
        self.give_up_where(|flow| matches!(flow.source, End::Host { .. }));
    }

    fn give_up_where(&mut self, which: impl Fn(&Flow) -> bool) {
        for flow in self.flows.iter_mut().filter(|flow| which(flow)) {
            flow.given_up += flow.on_its_way();
        }
    }

    /// Sends GET_VRING_BASE while the flows go on, also those of this vring, until the reply is
    /// there. From then on the driver does not access the vring. Returns the base, and when the
    /// reply arrived after the request, by `watch`.
    ///
    /// # Errors
    /// When no reply comes, or as [`Traffic::exchange`].
    pub fn stop_vring(
        &mut self,
        device: usize,
        vring: usize,
        count: u64,
        watch: &ReplyWatch,
    ) -> Result<(u32, Duration)> {
        let number = u32::try_from(vring)?;
        let body = [number, 0].map(u32::to_ne_bytes).concat();
        let wire = &mut self.devices[device].frontend.connection.wire;
        watch.expect(wire.socket())?;
        let sent_at = Instant::now();
        wire.send(GET_VRING_BASE, VHOST_USER_VERSION, &body, &[])?;
        let arrived_at = loop {
            if let Some(arrived_at) = watch.arrival()? {
                break arrived_at;
            }
            ensure!(
                sent_at.elapsed() < REPLY_TIMEOUT,
                "GET_VRING_BASE of vring {vring} has no reply after {REPLY_TIMEOUT:?}"
            );
            self.exchange(count)?;
        };
        let elapsed = arrived_at.saturating_duration_since(sent_at);
        let device = &mut self.devices[device];
        device.is_stopped[vring] = true;
        let reply = device.frontend.connection.wire.reply(GET_VRING_BASE)?;
        let base = reply.get(4..8).context("the reply is too short")?;
        Ok((u32::from_ne_bytes(base.try_into()?), elapsed))
    }

    /// Starts the vrings of a device again, all of which are stopped, at these bases.
    ///
    /// # Errors
    /// When the back-end refuses.
    pub fn restart(&mut self, device: usize, bases: &[(usize, u32)]) -> Result<()> {
        let device = &mut self.devices[device];
        for (vring, base) in bases {
            device.frontend.set_base(*vring, *base);
        }
        device.frontend.start()?;
        device.is_stopped.fill(false);
        Ok(())
    }

    /// Continues a device with the back-end at the other end of `connection`, as a front-end does
    /// whose back-end has vanished.
    ///
    /// # Errors
    /// When the back-end refuses.
    pub fn reconnect(
        &mut self,
        device: usize,
        connection: FrontendConnection,
        config: &TestFrontendConfig,
    ) -> Result<()> {
        let frontend = &mut self.devices[device].frontend;
        Ok(frontend.reconnect(connection, config)?)
    }

    /// A copy of the guest memory of a vring: the parts of the virtqueue, and its buffers or slots.
    ///
    /// # Errors
    /// When they do not lie in guest memory.
    pub fn vring_memory(&self, device: usize, vring: usize) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        for range in self.vring_ranges(device, vring) {
            all.extend(self.memory(device, range)?);
        }
        Ok(all)
    }

    /// The guest addresses of the memory of a vring.
    #[must_use]
    pub fn vring_ranges(&self, device: usize, vring: usize) -> [Range<u64>; 4] {
        let pair = &self.devices[device].frontend.pairs[vring / 2];
        let (queue, area) = match vring % 2 {
            0 => (&pair.rx.queue, pair.rx.buffers()),
            _ => (&pair.tx.queue, pair.tx.slots()),
        };
        let (at, size) = (queue.ring.addresses(), u64::from(queue.ring.size()));
        // Of the available and the used ring, or of both event areas.
        let (driver_len, device_len) = match queue.ring {
            DriverVirtqueue::Split(_) => (6 + 2 * size, 6 + 8 * size),
            DriverVirtqueue::Packed(_) => (4, 4),
        };
        let buffers_len = u64::try_from(area.len()).unwrap_or(u64::MAX);
        [
            (at.descriptors, 16 * size),
            (at.driver, driver_len),
            (at.device, device_len),
            (area.addr(), buffers_len),
        ]
        .map(|(start, len)| start..start + len)
    }

    /// A copy of all guest memory of a device.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn whole_memory(&self, device: usize) -> Result<Vec<u8>> {
        let regions = self.devices[device].frontend.ram().regions();
        let mut all = Vec::new();
        for region in regions {
            let range = region.guest_addr..region.guest_addr + region.size;
            all.extend(self.memory(device, range)?);
        }
        Ok(all)
    }

    fn memory(&self, device: usize, range: Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(range.end - range.start)?];
        let ram = self.devices[device].frontend.ram();
        ram.read(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// What became of the frames of all flows, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        let describe = |flow: &Flow| {
            let check = &flow.check;
            format!(
                "{:?} -> {:?}: {} sent, {} received, {} lost, {} reordered, {} repeated, {} at another vring\n",
                flow.source,
                flow.target,
                flow.sent,
                check.received,
                check.lost(),
                check.reordered,
                check.repeated,
                flow.at_other_vring
            )
        };
        self.flows.iter().map(describe).collect()
    }
}

fn send_by_driver(
    device: &mut Device,
    pair: usize,
    flow: &mut Flow,
    index: u32,
    count: u64,
) -> Result<()> {
    let vring = 2 * pair + 1;
    let tx = &mut device.frontend.pairs[pair].tx;
    if device.is_stopped[vring] {
        return kick(&mut tx.queue);
    }
    device.used[vring] += u64::from(tx.reclaim()?);
    for _ in 0..count {
        let payload = payload(index, flow.sent);
        flow.frame.bytes[PAYLOAD_START..].copy_from_slice(&payload);
        if !tx.queue(&flow.frame.header, &flow.frame.bytes)? {
            break;
        }
        flow.sent += 1;
    }
    Ok(tx.flush()?)
}

fn kick(queue: &mut DriverQueue) -> Result<()> {
    Ok(queue.kick_now()?)
}

fn receive_by_driver(
    index: usize,
    device: &mut Device,
    pair: usize,
    flows: &mut [Flow],
) -> Result<()> {
    let vring = 2 * pair;
    let rx = &mut device.frontend.pairs[pair].rx;
    if device.is_stopped[vring] {
        return kick(&mut rx.queue);
    }
    let now = Instant::now();
    let end = End::Driver {
        device: index,
        pair,
    };
    let frames = rx.receive(usize::MAX, |frame| {
        let mut bytes = [0; PAYLOAD_START + PAYLOAD_LEN];
        let len = frame.copy_to(&mut bytes);
        if let Some((flow, number)) = parse(bytes[..len].get(PAYLOAD_START..).unwrap_or_default())
            && let Some(flow) = flows.get_mut(flow)
        {
            flow.arrived(number, end, now);
        }
    })?;
    device.used[vring] += u64::try_from(frames)?;
    Ok(())
}
