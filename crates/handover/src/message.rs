//! The messages of a handover, with descriptors of type `F`: those of this process
//! (`Arc<OwnedFd>`), or their positions in a message.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use virtionet_placement::interrupts::AffinityImage;
use virtionet_uplink::switch::SwitchImage;
use virtionet_uplink::tap::TapImage;
use virtionet_vhost_user::SessionImage;

/// The version of these messages. It changes when an older daemon cannot read them any more, or
/// would lose something.
pub const FORMAT: u32 = 1;

/// What the new daemon sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromNew {
    /// It wants to take over.
    Hello {
        /// Its [`FORMAT`].
        format: u32,
        /// Its version, for the log.
        program: String,
    },
    /// It is confined and has all but the sessions.
    Ready,
    /// It has all.
    Prepared,
    /// After Commit: it serves the devices. Daemons that do not know this message have ended or wait
    /// for nothing, so it is no part of the format.
    Serving,
    /// It does not take over.
    Refused {
        /// Why not.
        reason: String,
    },
}

/// What the old daemon sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromOld<F> {
    /// What it can hand over.
    Offer(Offer<F>),
    /// The state of its devices, which are paused.
    State(HandoverState<F>),
    /// From now on the devices belong to the new daemon.
    Commit,
    /// It does not hand over.
    Refused {
        /// Why not.
        reason: String,
    },
}

/// What the old daemon can hand over. Its devices still work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer<F> {
    /// Its version, for the log.
    pub program: String,
    /// Its devices, in the order of its configuration.
    pub devices: Vec<DeviceOffer<F>>,
    /// Its TAPs, by their names in the configuration.
    pub taps: BTreeMap<String, TapImage<F>>,
    /// The seed of each switch, by its name.
    pub switch_seeds: BTreeMap<String, u64>,
    /// The control socket.
    pub control: Option<ListenerImage<F>>,
    /// The control socket that takes no changes.
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub control_read_only: Option<ListenerImage<F>>,
    /// The devices of its configuration that were removed while it ran.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<String>,
    /// The socket for the next handover.
    pub handover: ListenerImage<F>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceOffer<F> {
    /// Its name.
    pub name: String,
    /// Where its front-ends come from.
    pub source: SourceImage<F>,
    /// What its frames go to: `null`, `tap NAME`, `switch NAME`.
    pub uplink: String,
    /// The file of crash records.
    pub crash_records: Option<F>,
    /// The settings with which it was added while the daemon ran, by their keys; `None` for a device
    /// of the configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested: Option<BTreeMap<String, String>>,
    /// Whether its link is down.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_link_down: bool,
}

/// A field that older daemons do not send. The default of an option does not depend on its type.
fn none<T>() -> Option<T> {
    None
}

/// The source of a device's front-ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceImage<F> {
    /// Front-ends connect to this socket.
    Listener(ListenerImage<F>),
    /// The device connects to its front-end.
    Connect,
    /// There is one connection, which was inherited.
    Once,
}

/// A listening socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerImage<F> {
    /// The socket.
    pub socket: F,
    /// The device and inode number of the socket file, if the daemon made it.
    pub file: Option<(u64, u64)>,
}

/// The state of paused devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverState<F> {
    /// The devices, in the order of the offer.
    pub devices: Vec<DeviceImage<F>>,
    /// The TAPs, by their names in the configuration.
    pub taps: BTreeMap<String, TapImage<F>>,
    /// The switches.
    pub switches: Vec<SwitchImage>,
    /// The masks of interrupts and queues that are set.
    pub affinity: AffinityImage,
}

/// The state of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceImage<F> {
    /// The connection with the front-end and the session, if there is one.
    pub session: Option<(F, SessionImage<F>)>,
    /// The counters of its queue pairs, by their index.
    pub counters: BTreeMap<u16, PairCounters>,
}

/// The counters of a queue pair, by their names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairCounters {
    /// Those of the receiveq.
    pub rx: BTreeMap<String, u64>,
    /// Those of the transmitq.
    pub tx: BTreeMap<String, u64>,
    /// Those of the worker.
    pub worker: BTreeMap<String, u64>,
}

impl<F> ListenerImage<F> {
    /// The same with another type of descriptor.
    ///
    /// # Errors
    /// The error of `replace`.
    pub fn map<G, E>(self, replace: impl FnOnce(F) -> Result<G, E>) -> Result<ListenerImage<G>, E> {
        Ok(ListenerImage {
            socket: replace(self.socket)?,
            file: self.file,
        })
    }
}

impl<F> Offer<F> {
    /// The same with another type of descriptor.
    ///
    /// # Errors
    /// The first error of `replace`.
    pub fn map<G, E>(self, mut replace: impl FnMut(F) -> Result<G, E>) -> Result<Offer<G>, E> {
        let mut devices = Vec::new();
        for device in self.devices {
            devices.push(DeviceOffer {
                name: device.name,
                source: match device.source {
                    SourceImage::Listener(image) => SourceImage::Listener(image.map(&mut replace)?),
                    SourceImage::Connect => SourceImage::Connect,
                    SourceImage::Once => SourceImage::Once,
                },
                uplink: device.uplink,
                crash_records: device.crash_records.map(&mut replace).transpose()?,
                requested: device.requested,
                is_link_down: device.is_link_down,
            });
        }
        Ok(Offer {
            program: self.program,
            devices,
            taps: map_taps(self.taps, &mut replace)?,
            switch_seeds: self.switch_seeds,
            control: match self.control {
                Some(control) => Some(control.map(&mut replace)?),
                None => None,
            },
            control_read_only: match self.control_read_only {
                Some(control) => Some(control.map(&mut replace)?),
                None => None,
            },
            removed: self.removed,
            handover: self.handover.map(&mut replace)?,
        })
    }
}

impl<F> HandoverState<F> {
    /// The same with another type of descriptor.
    ///
    /// # Errors
    /// The first error of `replace`.
    pub fn map<G, E>(
        self,
        mut replace: impl FnMut(F) -> Result<G, E>,
    ) -> Result<HandoverState<G>, E> {
        let mut devices = Vec::new();
        for device in self.devices {
            let session = match device.session {
                Some((stream, image)) => Some((replace(stream)?, image.map(&mut replace)?)),
                None => None,
            };
            devices.push(DeviceImage {
                session,
                counters: device.counters,
            });
        }
        Ok(HandoverState {
            devices,
            taps: map_taps(self.taps, &mut replace)?,
            switches: self.switches,
            affinity: self.affinity,
        })
    }
}

fn map_taps<F, G, E>(
    taps: BTreeMap<String, TapImage<F>>,
    mut replace: impl FnMut(F) -> Result<G, E>,
) -> Result<BTreeMap<String, TapImage<G>>, E> {
    let mut mapped = BTreeMap::new();
    for (key, tap) in taps {
        mapped.insert(key, tap.map(&mut replace)?);
    }
    Ok(mapped)
}
