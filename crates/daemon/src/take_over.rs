//! Taking the devices over from the daemon before this one ([`virtionet_handover`]).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtionet_base::rights::FileIdentity;
use virtionet_base::unix_socket::{SocketFile, connect_own};
use virtionet_config::{Config, DeviceConfig, Requested, Socket};
use virtionet_handover::{
    HandoverError, HandoverState, ListenerImage, NewSide, Offer, SharedFd, SourceImage, TakenOver,
};
use virtionet_net_device::crash_records::CrashRecords;
use virtionet_placement::interrupts::IrqAffinityManager;
use virtionet_uplink::tap::TapImage;
use virtionet_vhost_user::listen::ListenError;
use virtionet_vhost_user::{ImageError, SuspendedSession};

use crate::frontend_source::FrontendSource;
use crate::served_device::ServedDevice;
use crate::uplinks::Uplinks;

/// Why this daemon cannot take over. The one before it continues.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// No daemon listens.
    #[error("no virtionetd listens on {path} ({source}); start without --take-over")]
    NoDaemon {
        /// The socket's path.
        path: String,
        /// The kernel's error.
        source: std::io::Error,
    },
    /// The daemon before this one, or the connection with it.
    #[error("the devices cannot be taken over: {0}")]
    Handover(#[from] HandoverError),
    /// The configurations differ.
    #[error("the devices cannot be taken over: {0}; use the configuration of the daemon that runs")]
    Different(String),
    /// A session cannot be continued.
    #[error("{device}: the session of its front-end cannot be continued: {source}")]
    Session {
        /// The device's name.
        device: String,
        /// The cause.
        source: ImageError,
    },
    /// A socket cannot be used.
    #[error("{device}: {source}")]
    Socket {
        /// The device's name.
        device: String,
        /// The cause.
        source: ListenError,
    },
    /// There are no descriptors left.
    #[error("descriptors cannot be copied ({0}); raise the limit of open files")]
    Descriptors(#[from] std::io::Error),
}

impl TakeOverError {
    /// A stable name of the error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoDaemon { .. } => "take-over-no-daemon",
            Self::Handover(_) => "take-over-failed",
            Self::Different(_) => "take-over-configuration",
            Self::Session { .. } => "take-over-session",
            Self::Socket { .. } => "take-over-socket",
            Self::Descriptors(_) => "take-over-descriptors",
        }
    }
}

/// What the daemon before this one offers. It owns all of it until [`OfferedDevices::take`] returns.
#[derive(Debug)]
pub struct OfferedDevices {
    side: NewSide,
    offer: Offer<SharedFd>,
}

impl OfferedDevices {
    /// Asks the daemon at `path` for the devices of `config`.
    ///
    /// # Errors
    /// When there is no daemon, or it has other devices.
    pub fn request(path: &Path, config: &Config) -> Result<Self, TakeOverError> {
        let stream = connect_own(path).map_err(|source| TakeOverError::NoDaemon {
            path: path.display().to_string(),
            source,
        })?;
        let (side, offer) = NewSide::hello(stream, env!("CARGO_PKG_VERSION"))?;
        let offered = Self { side, offer };
        offered.refuse_if(offered.check(config))?;
        Ok(offered)
    }

    /// Passes a result on, and an error also to the daemon before this one.
    fn refuse_if<T>(&self, result: Result<T, TakeOverError>) -> Result<T, TakeOverError> {
        result.inspect_err(|error| self.side.refuse(&error.to_string()))
    }

    fn check(&self, config: &Config) -> Result<(), TakeOverError> {
        let different = |text: String| Err(TakeOverError::Different(text));
        for (device, offer) in self.devices(config)?.iter().zip(&self.offer.devices) {
            let is_same = match (&device.socket, &offer.source) {
                (Socket::Listen { .. }, SourceImage::Listener(_))
                | (Socket::Connect { .. }, SourceImage::Connect) => true,
                (Socket::Inherited(_), source) => !matches!(source, SourceImage::Connect),
                _ => false,
            };
            if !is_same {
                return different(format!("{} has another kind of socket there", device.name));
            }
        }
        let sockets = [
            (&config.control, &self.offer.control),
            (&config.control_read_only, &self.offer.control_read_only),
        ];
        if sockets
            .iter()
            .any(|(own, offered)| own.is_some() != offered.is_some())
        {
            return different("only one of the two has a control socket".into());
        }
        Ok(())
    }

    /// The devices that this daemon gets, in the order of the offer: those of the configuration, less
    /// those that were removed while the other one ran, and with those that were added.
    ///
    /// # Errors
    /// When the configurations differ in another way.
    pub fn devices(&self, config: &Config) -> Result<Vec<DeviceConfig>, TakeOverError> {
        let names = |names: Vec<&str>| names.join(", ");
        let removed = &self.offer.removed;
        let is_kept = |device: &&DeviceConfig| !removed.contains(&device.name);
        let own: Vec<&DeviceConfig> = config.devices.iter().filter(is_kept).collect();
        let offered = self.offer.devices.iter();
        let configured: Vec<_> = offered.filter(|offer| offer.requested.is_none()).collect();
        let mut devices = Vec::new();
        for offer in &self.offer.devices {
            let device = match &offer.requested {
                Some(settings) => {
                    let requested = Requested::from_settings(settings.clone());
                    Some(
                        requested
                            .map_err(|error| TakeOverError::Different(error.to_string()))?
                            .config,
                    )
                }
                None => own
                    .iter()
                    .find(|device| device.name == offer.name)
                    .map(|d| (*d).clone()),
            };
            devices.extend(device);
        }
        let count = self.offer.devices.len();
        if devices.len() != count || own.len() != configured.len() {
            let offered = names(configured.iter().map(|offer| offer.name.as_str()).collect());
            let own = names(own.iter().map(|device| device.name.as_str()).collect());
            let text = format!("its devices are {offered}, and those of this one {own}");
            return Err(TakeOverError::Different(text));
        }
        Ok(devices)
    }

    /// The settings of the requests by which the devices were added, where they were, and whether their
    /// links are down.
    pub fn requests(&self) -> impl Iterator<Item = (Option<BTreeMap<String, String>>, bool)> {
        let offers = self.offer.devices.iter();
        offers.map(|offer| (offer.requested.clone(), offer.is_link_down))
    }

    /// The names of the devices of the configuration that were removed.
    #[must_use]
    pub fn removed(&self) -> Vec<String> {
        self.offer.removed.clone()
    }

    /// Where the front-ends of device `index` come from. `socket` is its configuration.
    ///
    /// # Errors
    /// When the socket cannot be used.
    pub fn source(
        &self,
        index: usize,
        device: &str,
        socket: &Socket,
    ) -> Result<FrontendSource, TakeOverError> {
        let image = self.offer.devices.get(index).map(|device| &device.source);
        let fd = match image {
            Some(SourceImage::Listener(image)) => Some(image.socket.try_clone()?),
            _ => None,
        };
        FrontendSource::inherited(socket, fd).map_err(|source| TakeOverError::Socket {
            device: device.to_owned(),
            source,
        })
    }

    /// The crash records of device `index`.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn crash_records(&self, index: usize) -> Result<Option<CrashRecords>, TakeOverError> {
        let device = self.offer.devices.get(index);
        let file = device.and_then(|device| device.crash_records.as_ref());
        Ok(file
            .map(|file| file.try_clone().map(CrashRecords::inherited))
            .transpose()?)
    }

    /// The TAPs, by their owners.
    #[must_use]
    pub fn taps(&self) -> BTreeMap<String, TapImage<SharedFd>> {
        self.offer.taps.clone()
    }

    /// The seeds of the switches, by name.
    #[must_use]
    pub fn switch_seeds(&self) -> BTreeMap<String, u64> {
        self.offer.switch_seeds.clone()
    }

    /// Takes over. The sessions become those of `devices`, whose threads continue them.
    ///
    /// # Errors
    /// When that fails; the daemon before this one then continues.
    pub fn take(
        self,
        devices: &[Arc<ServedDevice>],
        uplinks: &Mutex<Uplinks>,
        irq_manager: &IrqAffinityManager,
    ) -> Result<(TakenSockets, Predecessor), TakeOverError> {
        for (device, offer) in devices.iter().zip(&self.offer.devices) {
            let own = device.net_device.uplink_text();
            if own != offer.uplink {
                let name = &offer.name;
                let text = format!("{name} is on {} there, and on {own} here", offer.uplink);
                self.refuse_if(Err(TakeOverError::Different(text)))?;
            }
        }
        let paused_at = Instant::now();
        let mut state = self.side.ready()?;
        let affinity = std::mem::take(&mut state.affinity);
        self.refuse_if(restore(devices, &uplinks.lock(), state))?;
        // Nothing that can fail may follow the commit.
        let sockets = self.refuse_if(TakenSockets::copy(&self.offer))?;
        let connection = self.side.prepared()?;
        uplinks.lock().own();
        irq_manager.inherit(affinity);
        let predecessor = Predecessor {
            program: self.offer.program,
            paused_at,
            connection,
        };
        Ok((sockets, predecessor))
    }
}

/// The daemon before this one, which has nothing any more and waits until this one serves the devices.
#[derive(Debug)]
pub struct Predecessor {
    program: String,
    paused_at: Instant,
    connection: TakenOver,
}

impl Predecessor {
    /// Its version.
    #[must_use]
    pub fn program(&self) -> &str {
        &self.program
    }

    /// The time since this daemon was ready for paused devices.
    #[must_use]
    pub fn paused_for(&self) -> Duration {
        self.paused_at.elapsed()
    }

    /// Lets it end, because this daemon serves the devices.
    pub fn let_end(self) {
        self.connection.serving();
    }
}

/// The sockets that belong to this daemon now.
#[derive(Debug)]
pub struct TakenSockets {
    /// The files of the devices' sockets, in their order.
    pub socket_files: Vec<Option<(u64, u64)>>,
    /// The control socket.
    pub control: Option<TakenListener>,
    /// The control socket that takes no changes.
    pub control_read_only: Option<TakenListener>,
    /// The socket for the next handover.
    pub handover: TakenListener,
}

impl TakenSockets {
    fn copy(offer: &Offer<SharedFd>) -> Result<Self, TakeOverError> {
        let file = |image: &SourceImage<SharedFd>| match image {
            SourceImage::Listener(image) => image.file,
            SourceImage::Connect | SourceImage::Once => None,
        };
        let devices = offer.devices.iter();
        let (control, read_only) = (offer.control.as_ref(), offer.control_read_only.as_ref());
        Ok(Self {
            socket_files: devices.map(|device| file(&device.source)).collect(),
            control: control.map(TakenListener::copy).transpose()?,
            control_read_only: read_only.map(TakenListener::copy).transpose()?,
            handover: TakenListener::copy(&offer.handover)?,
        })
    }
}

/// A listening socket that belongs to this daemon now.
#[derive(Debug)]
pub struct TakenListener {
    socket: UnixListener,
    file: Option<(u64, u64)>,
}

impl TakenListener {
    fn copy(image: &ListenerImage<SharedFd>) -> Result<Self, TakeOverError> {
        Ok(Self {
            socket: image.socket.try_clone()?.into(),
            file: image.file,
        })
    }

    /// The socket, and its file at `path`.
    #[must_use]
    pub fn at(self, path: &Path) -> (UnixListener, SocketFile) {
        (self.socket, socket_file(self.file, path))
    }
}

/// The socket file at `path` with these numbers. One without numbers is no file at all.
#[must_use]
pub fn socket_file(numbers: Option<(u64, u64)>, path: &Path) -> SocketFile {
    let (device, inode) = numbers.unwrap_or_default();
    SocketFile::inherited(path.to_owned(), FileIdentity { device, inode })
}

fn restore(
    devices: &[Arc<ServedDevice>],
    uplinks: &Uplinks,
    state: HandoverState<SharedFd>,
) -> Result<(), TakeOverError> {
    if devices.len() != state.devices.len() {
        return Err(TakeOverError::Different(
            "the number of devices changed".into(),
        ));
    }
    uplinks.update(&state.taps, &state.switches)?;
    for (device, image) in devices.iter().zip(state.devices) {
        let net_device = &device.net_device;
        net_device.add_counters(&image.counters);
        let Some((stream, session)) = image.session else {
            continue;
        };
        let failed = |source| TakeOverError::Session {
            device: net_device.name().to_owned(),
            source,
        };
        session.check(&**net_device).map_err(failed)?;
        let stream: OwnedFd = stream.try_clone()?;
        let session = SuspendedSession::from_image(session, stream.into()).map_err(failed)?;
        *device.suspended.lock() = Some(Box::new(session));
    }
    Ok(())
}
