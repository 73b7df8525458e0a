//! A whole network card: a front-end, guest memory and started queue pairs.
//!
//! ```no_run
//! # use virtionet_guest::{test_frontend::{Card, TestFrontendConfig}, frame::{FrameSpec, Transport}, net::MODERN};
//! # use std::{path::Path, time::Duration};
//! let mut card = Card::connect(Path::new("/run/card.sock"), &TestFrontendConfig::new(1, 256, MODERN))?;
//! let frame = FrameSpec::v4(Transport::Udp).build(b"hello").unwrap();
//! card.pairs[0].tx.send(&frame)?;
//! let answer = card.pairs[0].rx.wait_frames(1, Duration::from_secs(1))?;
//! # Ok::<(), virtionet_guest::Error>(())
//! ```

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

use crate::error::Error;
use crate::frontend::{FrontendConnection, VHOST_USER_F_PROTOCOL_FEATURES};
use crate::memory::GuestRam;
use crate::net::{DriverQueueConfig, VringSetup};
use crate::rx::DriverRxQueue;
use crate::tx::DriverTxQueue;

/// The order in which a pair is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartOrder {
    /// QEMU's: a pair's rings are enabled before SET_FEATURES, which is sent once a pair.
    Qemu,
    /// Features once and first, then the rings, enabled last.
    FeaturesFirst,
}

/// How a card is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestFrontendConfig {
    /// Queue pairs, 1 to 128.
    pub pairs: u16,
    /// Pairs that are enabled when the card starts.
    pub enabled: u16,
    /// Feature bits that the back-end must offer.
    pub required: u64,
    /// How every pair's queues are made; `features` are those wanted, and taken where offered.
    pub queues: DriverQueueConfig,
    /// Protocol features wanted, and taken where offered.
    pub protocol: u64,
    /// The order of the start.
    pub order: StartOrder,
    /// Regions of guest memory (address, bytes); none for one region that is large enough.
    pub layout: Vec<(u64, u64)>,
    /// How long to try to connect.
    pub connect_timeout: Duration,
}

impl TestFrontendConfig {
    /// A card of `pairs` pairs, all enabled, with rings of `size` descriptors, that takes what it
    /// can get of `features`.
    #[must_use]
    pub fn new(pairs: u16, size: u16, features: u64) -> Self {
        let protocol = Protocol::MQ
            | Protocol::REPLY_ACK
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::MTU
            | Protocol::RARP
            | Protocol::LOG_SHMFD
            | Protocol::RESET_DEVICE
            | Protocol::STATUS;
        Self {
            pairs,
            enabled: pairs,
            required: 0,
            queues: DriverQueueConfig::new(size, features),
            protocol: protocol.bits(),
            order: StartOrder::Qemu,
            layout: Vec::new(),
            connect_timeout: Duration::from_secs(5),
        }
    }
}

/// A queue pair: receiveq and transmitq.
#[derive(Debug)]
pub struct DriverQueuePair {
    /// What the guest receives.
    pub rx: DriverRxQueue,
    /// What the guest sends.
    pub tx: DriverTxQueue,
}

impl DriverQueuePair {
    /// Allocates both queues in `ram`; the receiveq is empty.
    ///
    /// # Errors
    /// When the configuration makes no sense or `ram` has no room.
    pub fn new(ram: &GuestRam, config: &DriverQueueConfig) -> Result<Self, Error> {
        Ok(Self {
            rx: DriverRxQueue::new(ram, config)?,
            tx: DriverTxQueue::new(ram, config)?,
        })
    }
}

/// A network card on a vhost-user back-end.
#[derive(Debug)]
pub struct TestFrontend {
    /// The connection.
    pub connection: FrontendConnection,
    /// The queue pairs. They may be taken out and driven by threads of their own: the card keeps
    /// what it needs to stop and start them.
    pub pairs: Vec<DriverQueuePair>,
    ram: GuestRam,
    features: u64,
    order: StartOrder,
    enabled: Vec<bool>,
    /// By ring index: 2k for receiveq k, 2k + 1 for transmitq k.
    rings: Vec<VringSetup>,
}

impl TestFrontend {
    /// Connects to a listening back-end, negotiates and starts every pair with its receiveq full.
    ///
    /// # Errors
    /// When the back-end cannot be reached, refuses, or lacks pairs or required features.
    pub fn connect(path: &Path, config: &TestFrontendConfig) -> Result<Self, Error> {
        Self::start_on(
            FrontendConnection::connect(path, config.connect_timeout)?,
            config,
        )
    }

    /// The same over a connected socket.
    ///
    /// # Errors
    /// As [`Card::connect`].
    pub fn from_socket(socket: UnixStream, config: &TestFrontendConfig) -> Result<Self, Error> {
        Self::start_on(FrontendConnection::from_socket(socket)?, config)
    }

    fn start_on(
        connection: FrontendConnection,
        config: &TestFrontendConfig,
    ) -> Result<Self, Error> {
        let mut card = Self::negotiate(connection, config)?;
        for pair in &mut card.pairs {
            pair.rx.fill()?;
        }
        card.start()?;
        Ok(card)
    }

    /// Negotiates and makes the queues, but starts nothing and fills no receiveq.
    ///
    /// # Errors
    /// As [`Card::connect`].
    pub fn negotiate(
        mut connection: FrontendConnection,
        config: &TestFrontendConfig,
    ) -> Result<Self, Error> {
        let features = negotiate(&mut connection, config)?;
        let queues = DriverQueueConfig {
            features,
            ..config.queues.clone()
        };
        let ram = guest_ram(config, &queues)?;
        let mut pairs = Vec::new();
        let mut rings = Vec::new();
        for _ in 0..config.pairs {
            let pair = DriverQueuePair::new(&ram, &queues)?;
            rings.push(pair.rx.queue.setup()?);
            rings.push(pair.tx.queue.setup()?);
            pairs.push(pair);
        }
        let mut card = Self {
            connection,
            pairs,
            ram,
            features,
            order: config.order,
            enabled: (0..config.pairs).map(|k| k < config.enabled).collect(),
            rings,
        };
        card.announce()?;
        Ok(card)
    }

    /// What QEMU sends before any driver is there: the call eventfds, the first pair enabled and
    /// the others not.
    fn announce(&mut self) -> Result<(), Error> {
        if self.order != StartOrder::Qemu {
            return Ok(());
        }
        for (ring, setup) in (0..).zip(&self.rings) {
            self.connection
                .set_vring_call(ring, Some(setup.call.as_raw_fd()))?;
        }
        for ring in 0..self.ring_count() {
            self.connection.set_vring_enable(ring, ring < 2)?;
        }
        Ok(())
    }

    /// Starts every pair, where the last [`Card::stop`] left it.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn start(&mut self) -> Result<(), Error> {
        if self.order == StartOrder::FeaturesFirst {
            self.connection.set_features(self.features)?;
        }
        self.share_memory_as_qemu()?;
        for pair in 0..self.enabled.len() {
            self.start_pair(pair)?;
        }
        Ok(())
    }

    /// QEMU shares memory with the first pair, after that pair's features.
    fn share_memory_as_qemu(&mut self) -> Result<(), Error> {
        if self.order == StartOrder::Qemu {
            self.send_enable(0, self.enabled[0])?;
            self.connection.set_features(self.features)?;
        }
        self.connection.share(&self.ram)
    }

    fn start_pair(&mut self, pair: usize) -> Result<(), Error> {
        let enabled = self.enabled[pair];
        if self.order == StartOrder::Qemu && pair != 0 {
            self.send_enable(pair, enabled)?;
            self.connection.set_features(self.features)?;
        }
        for ring in 2 * pair..2 * pair + 2 {
            self.start_ring(ring)?;
        }
        if self.order == StartOrder::FeaturesFirst {
            self.send_enable(pair, enabled)?;
        }
        Ok(())
    }

    fn start_ring(&mut self, ring: usize) -> Result<(), Error> {
        let setup = &self.rings[ring];
        let index = u32::try_from(ring).map_err(|_| Error::Config("too many rings"))?;
        let connection = &mut self.connection;
        connection.set_vring_num(index, setup.size.into())?;
        connection.set_vring_base(index, setup.base)?;
        connection.set_vring_addr(index, &self.ram, setup.addresses)?;
        connection.set_vring_err(index, Some(setup.err.as_raw_fd()))?;
        connection.set_vring_kick(index, Some(setup.kick.as_raw_fd()))?;
        connection.set_vring_call(index, Some(setup.call.as_raw_fd()))
    }

    /// Stops every ring; the back-end writes nothing after this returns. Chains in flight stay
    /// where they are and go on with the next [`Card::start`].
    ///
    /// # Errors
    /// When the connection fails.
    pub fn stop(&mut self) -> Result<(), Error> {
        for (ring, setup) in (0..).zip(&mut self.rings) {
            setup.base = self.connection.get_vring_base(ring)?;
        }
        Ok(())
    }

    /// Empties the rings of a stopped card and fills the receiveqs, as a driver that is loaded
    /// anew; [`Card::start`] comes next. The pairs must be in the card.
    ///
    /// # Errors
    /// When a kick cannot be written.
    pub fn reset(&mut self) -> Result<(), Error> {
        for pair in &mut self.pairs {
            pair.tx.reset();
            pair.rx.reset();
            pair.rx.fill()?;
        }
        self.read_bases();
        Ok(())
    }

    /// Goes on with another back-end process after the last one died: the bases come from what
    /// each ring shows as used, as in QEMU. The pairs must be in the card.
    ///
    /// # Errors
    /// As [`Card::connect`].
    pub fn reconnect(
        &mut self,
        connection: FrontendConnection,
        config: &TestFrontendConfig,
    ) -> Result<(), Error> {
        self.read_bases();
        self.connection = connection;
        let offered = negotiate(&mut self.connection, config)?;
        let lost = self.features & !offered;
        if lost != 0 {
            return Err(Error::Features(lost));
        }
        self.announce()?;
        self.start()
    }

    /// Takes each ring's base from what it shows as used.
    fn read_bases(&mut self) {
        let pairs = self.pairs.iter();
        let queues = pairs.flat_map(|pair| [&pair.rx.queue, &pair.tx.queue]);
        for (setup, queue) in self.rings.iter_mut().zip(queues) {
            setup.base = queue.ring.base();
        }
    }

    /// Enables or disables a pair, as `ethtool -L` in a guest does.
    ///
    /// # Errors
    /// When the card has no such pair, the connection fails or the back-end refuses.
    pub fn enable(&mut self, pair: u16, enable: bool) -> Result<(), Error> {
        let pair = usize::from(pair);
        let Some(state) = self.enabled.get_mut(pair) else {
            return Err(Error::Config("there is no such queue pair"));
        };
        *state = enable;
        self.send_enable(pair, enable)
    }

    fn send_enable(&mut self, pair: usize, enable: bool) -> Result<(), Error> {
        for ring in 2 * pair..2 * pair + 2 {
            let index = u32::try_from(ring).map_err(|_| Error::Config("too many rings"))?;
            self.connection.set_vring_enable(index, enable)?;
        }
        Ok(())
    }

    /// The feature bits in force.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The guest's memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What the back-end is told of each ring.
    #[must_use]
    pub fn rings(&self) -> &[VringSetup] {
        &self.rings
    }

    fn ring_count(&self) -> u32 {
        u32::try_from(self.rings.len()).unwrap_or(u32::MAX)
    }
}

/// The conversation before a driver is there; the features to use.
fn negotiate(
    connection: &mut FrontendConnection,
    config: &TestFrontendConfig,
) -> Result<u64, Error> {
    if !(1..=128).contains(&config.pairs) {
        return Err(Error::Config("a card has 1 to 128 queue pairs"));
    }
    let offered = connection.get_features()?;
    if offered & VHOST_USER_F_PROTOCOL_FEATURES != 0 {
        let protocol = connection.get_protocol_features()? & config.protocol;
        connection.set_protocol_features(protocol)?;
    }
    let has = if connection.has_feature(Protocol::MQ) {
        connection.get_queue_num()?
    } else {
        1
    };
    if has < u64::from(config.pairs) {
        return Err(Error::Pairs {
            wanted: config.pairs,
            has,
        });
    }
    connection.set_owner()?;
    let offered = connection.get_features()?;
    let missing = config.required & !offered;
    if missing != 0 {
        return Err(Error::Features(missing));
    }
    Ok(offered & (config.queues.features | config.required | VHOST_USER_F_PROTOCOL_FEATURES))
}

fn guest_ram(config: &TestFrontendConfig, queues: &DriverQueueConfig) -> Result<GuestRam, Error> {
    if !config.layout.is_empty() {
        return Ok(GuestRam::with_layout(&config.layout)?);
    }
    // A page at each of the few page-aligned allocations of a pair, and one for address 0.
    let pair = queues.memory() + 8 * 4096;
    let bytes = pair * u64::from(config.pairs) + 1024 * 1024;
    Ok(GuestRam::new(bytes.next_multiple_of(4096))?)
}
