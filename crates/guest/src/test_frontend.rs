//! A complete front-end with guest memory and started queue pairs, in place of QEMU and its guest.
//!
//! ```no_run
//! # use virtionet_guest::{test_frontend::{TestFrontend, TestFrontendConfig}, frame::{FrameSpec, Transport}, net::MODERN};
//! # use std::{path::Path, time::Duration};
//! let config = TestFrontendConfig::new(1, 256, MODERN);
//! let mut frontend = TestFrontend::connect(Path::new("/run/net0.sock"), &config)?;
//! let frame = FrameSpec::v4(Transport::Udp).build(b"hello").unwrap();
//! frontend.pairs[0].tx.send(&frame)?;
//! let answer = frontend.pairs[0].rx.wait_frames(1, Duration::from_secs(1))?;
//! # Ok::<(), virtionet_guest::Error>(())
//! ```

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

use crate::error::Error;
use crate::frontend::{FrontendConnection, VHOST_USER_F_PROTOCOL_FEATURES};
use crate::iommu::{ACCESS_PLATFORM, to_distant_regions};
use crate::memory::{GuestRam, PageSource};
use crate::net::{DriverQueueConfig, PACKED, VringSetup};
use crate::rx::DriverRxQueue;
use crate::tx::DriverTxQueue;

/// The order of the messages that start queue pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartOrder {
    /// The order of QEMU: the vrings of a queue pair are enabled before SET_FEATURES, which is sent
    /// once for each queue pair.
    Qemu,
    /// SET_FEATURES once at the beginning; the vrings are enabled last.
    FeaturesFirst,
}

/// How a front-end and its guest are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestFrontendConfig {
    /// The number of queue pairs, 1 to 128.
    pub pairs: u16,
    /// The number of queue pairs that are enabled at the start.
    pub enabled: u16,
    /// Feature bits that the back-end must offer.
    pub required: u64,
    /// How the queues of each queue pair are made. Of its `features`, those that the back-end
    /// offers are negotiated.
    pub queues: DriverQueueConfig,
    /// The protocol features to negotiate, as far as the back-end offers them.
    pub protocol: u64,
    /// The order of the messages at the start.
    pub order: StartOrder,
    /// Regions of guest memory (guest address, bytes). An empty list means one region that is large
    /// enough.
    pub layout: Vec<(u64, u64)>,
    /// The time for which connecting is attempted.
    pub connect_timeout: Duration,
}

impl TestFrontendConfig {
    /// A front-end with `pairs` queue pairs, all enabled, and virtqueues of `size` descriptors,
    /// that negotiates those of `features` that the back-end offers.
    #[must_use]
    pub fn new(pairs: u16, size: u16, features: u64) -> Self {
        let protocol = Protocol::MQ
            | Protocol::REPLY_ACK
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::MTU
            | Protocol::RARP
            | Protocol::LOG_SHMFD
            | Protocol::BACKEND_REQ
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

/// The driver side of a queue pair.
#[derive(Debug)]
pub struct DriverQueuePair {
    /// The receiveq.
    pub rx: DriverRxQueue,
    /// The transmitq.
    pub tx: DriverTxQueue,
}

impl DriverQueuePair {
    /// Allocates both queues in `ram`. The device has no RX buffers yet.
    ///
    /// # Errors
    /// When the configuration is not possible or `ram` has not enough free memory.
    pub fn new(ram: &GuestRam, config: &DriverQueueConfig) -> Result<Self, Error> {
        Ok(Self {
            rx: DriverRxQueue::new(ram, config)?,
            tx: DriverTxQueue::new(ram, config)?,
        })
    }
}

/// A front-end that is connected to a vhost-user back-end, with its guest's queue pairs.
#[derive(Debug)]
pub struct TestFrontend {
    /// The vhost-user connection.
    pub connection: FrontendConnection,
    /// The queue pairs. They may be moved out and driven by other threads; the front-end can still
    /// stop and start them.
    pub pairs: Vec<DriverQueuePair>,
    ram: GuestRam,
    features: u64,
    order: StartOrder,
    enabled: Vec<bool>,
    /// By vring index: 2k for receiveq k, 2k + 1 for transmitq k.
    rings: Vec<VringSetup>,
    /// What provides the pages of memory, in a postcopy migration.
    page_source: Option<Arc<PageSource>>,
}

impl TestFrontend {
    /// Connects to a listening back-end, negotiates, and starts every queue pair with a full
    /// receiveq.
    ///
    /// # Errors
    /// When the back-end cannot be reached, refuses a request, or has not enough queue pairs or not
    /// all required features.
    pub fn connect(path: &Path, config: &TestFrontendConfig) -> Result<Self, Error> {
        Self::start_on(
            FrontendConnection::connect(path, config.connect_timeout)?,
            config,
        )
    }

    /// The same on a connected socket.
    ///
    /// # Errors
    /// As [`TestFrontend::connect`].
    pub fn from_socket(socket: UnixStream, config: &TestFrontendConfig) -> Result<Self, Error> {
        Self::start_on(FrontendConnection::from_socket(socket)?, config)
    }

    fn start_on(
        connection: FrontendConnection,
        config: &TestFrontendConfig,
    ) -> Result<Self, Error> {
        let mut frontend = Self::negotiate(connection, config)?;
        for pair in &mut frontend.pairs {
            pair.rx.fill()?;
        }
        frontend.start()?;
        Ok(frontend)
    }

    /// Negotiates and allocates the queues, but does not start them or fill the receiveqs.
    ///
    /// # Errors
    /// As [`TestFrontend::connect`].
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
        let mut frontend = Self {
            connection,
            pairs,
            ram,
            features,
            order: config.order,
            enabled: (0..config.pairs).map(|k| k < config.enabled).collect(),
            rings,
            page_source: None,
        };
        frontend.announce()?;
        Ok(frontend)
    }

    /// Sends what QEMU sends before a driver is loaded: the call eventfds, and the first queue pair
    /// enabled and the others disabled.
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

    /// Starts every queue pair at the position at which the last [`TestFrontend::stop`] stopped it.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn start(&mut self) -> Result<(), Error> {
        if self.order == StartOrder::FeaturesFirst {
            self.connection.set_features(self.features)?;
        }
        self.share_memory()?;
        for pair in 0..self.enabled.len() {
            self.start_pair(pair)?;
        }
        Ok(())
    }

    /// Shares the guest's memory. QEMU does so while it starts the first queue pair, after that
    /// pair's SET_FEATURES.
    fn share_memory(&mut self) -> Result<(), Error> {
        if self.order == StartOrder::Qemu {
            self.send_enable(0, self.enabled[0])?;
            self.connection.set_features(self.features)?;
        }
        if let Some(page_source) = &self.page_source {
            let bases = self.connection.share_in_postcopy(&self.ram)?;
            page_source.set_back_end_bases(bases);
            return self.connection.acknowledge_memory();
        }
        if !self.has_iommu() {
            return self.connection.share(&self.ram);
        }
        let regions = to_distant_regions(self.ram.regions());
        let table: Vec<_> = regions.into_iter().map(|r| (r, self.ram.fd())).collect();
        self.connection.set_mem_table(&table)
    }

    /// Whether the addresses of the driver are I/O virtual addresses.
    pub(crate) fn has_iommu(&self) -> bool {
        self.features & ACCESS_PLATFORM != 0
    }

    /// Begins a postcopy migration to this front-end, whose queue pairs must not have been started: the
    /// guest's memory arrives page by page, from what is returned. PAGEFAULT must be negotiated.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn begin_postcopy(&mut self) -> Result<Arc<PageSource>, Error> {
        let userfaultfd = self.connection.postcopy_advise()?;
        self.connection.postcopy_listen()?;
        let page_source = Arc::new(PageSource::new(&self.ram, userfaultfd)?);
        self.page_source = Some(Arc::clone(&page_source));
        Ok(page_source)
    }

    /// Ends the postcopy migration, after all pages have arrived.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn end_postcopy(&mut self) -> Result<(), Error> {
        if let Some(page_source) = self.page_source.take() {
            page_source.provide_all();
        }
        self.connection.postcopy_end()
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
        let has_iommu = self.has_iommu();
        let setup = &self.rings[ring];
        let index = u32::try_from(ring).map_err(|_| Error::Config("there are too many vrings"))?;
        let connection = &mut self.connection;
        connection.set_vring_num(index, setup.size.into())?;
        connection.set_vring_base(index, setup.base)?;
        match has_iommu {
            false => connection.set_vring_addr(index, &self.ram, setup.addresses)?,
            true => connection.set_vring_user_addr(index, 0, setup.addresses, 0)?,
        }
        connection.set_vring_err(index, Some(setup.err.as_raw_fd()))?;
        connection.set_vring_kick(index, Some(setup.kick.as_raw_fd()))?;
        connection.set_vring_call(index, Some(setup.call.as_raw_fd()))
    }

    /// Stops every vring. The back-end does not access guest memory after this returns. Chains in
    /// flight continue with the next [`TestFrontend::start`].
    ///
    /// # Errors
    /// When the connection fails.
    pub fn stop(&mut self) -> Result<(), Error> {
        for (ring, setup) in (0..).zip(&mut self.rings) {
            setup.base = self.connection.get_vring_base(ring)?;
        }
        Ok(())
    }

    /// Discards all chains of a stopped front-end and fills the receiveqs, as a driver does that is
    /// loaded again. Call [`TestFrontend::start`] afterwards. The queue pairs must not be moved
    /// out.
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

    /// Continues with another back-end process after the last one ended. The base of each split vring
    /// is derived from what the device has used, and that of each packed one is the base of its last
    /// start, as in QEMU. The queue pairs must not be moved out.
    ///
    /// # Errors
    /// As [`TestFrontend::connect`].
    pub fn reconnect(
        &mut self,
        connection: FrontendConnection,
        config: &TestFrontendConfig,
    ) -> Result<(), Error> {
        if self.features & PACKED == 0 {
            self.read_bases();
        }
        self.connection = connection;
        let offered = negotiate(&mut self.connection, config)?;
        let lost = self.features & !offered;
        if lost != 0 {
            return Err(Error::Features(lost));
        }
        self.announce()?;
        self.start()
    }

    /// Derives the base of each vring from what the device has used.
    fn read_bases(&mut self) {
        let pairs = self.pairs.iter();
        let queues = pairs.flat_map(|pair| [&pair.rx.queue, &pair.tx.queue]);
        for (setup, queue) in self.rings.iter_mut().zip(queues) {
            setup.base = queue.ring.base();
        }
    }

    /// Starts vring `ring` with this base from the next [`TestFrontend::reconnect`] on, as a front-end
    /// does that has used chains itself. It has no effect on a split vring.
    pub fn set_base(&mut self, ring: usize, base: u32) {
        if let Some(setup) = self.rings.get_mut(ring) {
            setup.base = base;
        }
    }

    /// Enables or disables a queue pair, as `ethtool -L` in a guest does.
    ///
    /// # Errors
    /// When there is no such queue pair, the connection fails or the back-end refuses.
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
            let index =
                u32::try_from(ring).map_err(|_| Error::Config("there are too many vrings"))?;
            self.connection.set_vring_enable(index, enable)?;
        }
        Ok(())
    }

    /// The negotiated feature bits.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The guest's memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The description of each vring, by vring index.
    #[must_use]
    pub fn rings(&self) -> &[VringSetup] {
        &self.rings
    }

    fn ring_count(&self) -> u32 {
        u32::try_from(self.rings.len()).unwrap_or(u32::MAX)
    }
}

/// Exchanges the messages that come before a driver is loaded. Returns the features to use.
fn negotiate(
    connection: &mut FrontendConnection,
    config: &TestFrontendConfig,
) -> Result<u64, Error> {
    if !(1..=128).contains(&config.pairs) {
        return Err(Error::Config("a front-end has 1 to 128 queue pairs"));
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

/// The guest's memory: the configured regions, or one that is large enough.
fn guest_ram(config: &TestFrontendConfig, queues: &DriverQueueConfig) -> Result<GuestRam, Error> {
    if !config.layout.is_empty() {
        return Ok(GuestRam::with_layout(&config.layout)?);
    }
    // Each of the few page-aligned allocations of a queue pair may lose a page, and address 0 costs
    // one.
    let pair = queues.memory() + 8 * 4096;
    let bytes = pair * u64::from(config.pairs) + 1024 * 1024;
    Ok(GuestRam::new(bytes.next_multiple_of(4096))?)
}
