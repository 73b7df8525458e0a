//! What a switch has learned, for the process that continues it.

use serde::{Deserialize, Serialize};

use super::mac_addr::MacAddr;
use super::{Port, Switch, coarse_now_secs};

/// What a switch has learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchImage {
    /// The switch's name.
    pub name: String,
    /// The addresses that have not expired.
    pub addresses: Vec<AddressImage>,
    /// The flows of each device, which belong to the switch's seed: positions in the table, and the
    /// entries there.
    pub flows: Vec<(String, Vec<(u16, u64)>)>,
}

/// An address and its port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressImage {
    /// The MAC address.
    pub mac: [u8; 6],
    /// The name of the device behind the port; `None` for the host.
    pub device: Option<String>,
}

impl Switch {
    /// The seed of the flow hash.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// What the switch has learned.
    #[must_use]
    pub fn to_image(&self) -> SwitchImage {
        let mut addresses = self.macs.addresses(coarse_now_secs());
        addresses.sort_unstable_by_key(|(mac, _)| mac.to_bytes());
        let image = |(mac, port): (MacAddr, u16)| {
            let device = match self.ports.get(usize::from(port))?.get()? {
                Port::Device(port) => Some(port.device()),
                Port::Host(_) => None,
            };
            Some(AddressImage {
                mac: mac.to_bytes(),
                device,
            })
        };
        let flows = self.ports().filter_map(|(_, port)| match port {
            Port::Device(port) => Some((port.device(), port.flows()?.entries())),
            Port::Host(_) => None,
        });
        SwitchImage {
            name: self.name.clone(),
            addresses: addresses.into_iter().filter_map(image).collect(),
            flows: flows.filter(|(device, _)| !device.is_empty()).collect(),
        }
    }

    /// Learns what `image` has, as far as this switch has the ports. The flows are those of a switch
    /// with the same seed.
    pub fn learn_image(&self, image: &SwitchImage) {
        let now = coarse_now_secs();
        for (number, port) in self.ports() {
            let device = match port {
                Port::Device(port) => Some(port.device()),
                Port::Host(_) => None,
            };
            let own = |address: &&AddressImage| address.device == device;
            for address in image.addresses.iter().filter(own) {
                self.macs
                    .learn(MacAddr::from_bytes(address.mac), number, now);
            }
            if let Port::Device(port) = port
                && let Some((_, entries)) =
                    image.flows.iter().find(|(name, _)| *name == port.device())
            {
                port.restore_flows(entries, now);
            }
        }
    }
}
