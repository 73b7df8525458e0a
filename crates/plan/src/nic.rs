//! One network device of the request, and the parser of its `--nic`.

use std::fmt;

use virtionet_base::key_value::{split_at_commas, split_item};
use virtionet_sizing::{NetDeviceRequest, QueueRequest};

use super::error::{NicError, PlanError};

/// The length of the longest interface name, in bytes (`IFNAMSIZ` without the terminating zero).
const MAX_INTERFACE_NAME: usize = 15;

/// The keys of `--nic`, in words.
const KEYS: &str = "name, queues, throughput, mac, tap, bridge and uplink";

/// The request for one network device, with its defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NetDeviceSpec {
    /// The device's name, which is unique in the guest.
    pub name: String,
    /// The request for queue pairs.
    pub queue_request: QueueRequest,
    /// The Ethernet address.
    pub mac: Mac,
    /// The uplink, as virtionetd's `--uplink` spells it.
    pub uplink: String,
}

/// An Ethernet address of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mac([u8; 6]);

/// The values of one `--nic` as they are written, by key.
#[derive(Debug, Default)]
struct NicKeys {
    name: Option<String>,
    queues: Option<String>,
    throughput: Option<String>,
    mac: Option<String>,
    tap: Option<String>,
    bridge: Option<String>,
    uplink: Option<String>,
}

impl NetDeviceSpec {
    /// Parses `text`, the value of a `--nic`, for the network device of `guest` with the index
    /// `at`. An empty text gives a device with defaults only.
    pub(super) fn parse(guest: &str, at: usize, text: &str) -> Result<Self, PlanError> {
        Self::parse_keys(guest, at, text).map_err(|error| PlanError::Nic {
            text: text.into(),
            error,
        })
    }

    fn parse_keys(guest: &str, at: usize, text: &str) -> Result<Self, NicError> {
        let keys = NicKeys::parse(text)?;
        let name = keys.name.unwrap_or_else(|| format!("net{at}"));
        if !is_name(&name) {
            return Err(NicError::Name(name));
        }
        let queue_request = parse_queue_request(keys.queues, keys.throughput)?;
        let mac = match keys.mac {
            None => Mac::generate(guest, &name),
            Some(text) => Mac::parse(&text).ok_or(NicError::Mac(text))?,
        };
        let default_tap = || default_tap_name(guest, &name, at);
        let uplink = resolve_uplink(keys.tap, keys.bridge, keys.uplink, default_tap)?;
        Ok(Self {
            name,
            queue_request,
            mac,
            uplink,
        })
    }

    /// The request in the form that the policy takes.
    pub(super) fn to_queue_request(&self) -> NetDeviceRequest {
        NetDeviceRequest {
            name: self.name.clone(),
            queue_request: self.queue_request,
        }
    }
}

impl NicKeys {
    fn parse(text: &str) -> Result<Self, NicError> {
        let mut keys = Self::default();
        if text.is_empty() {
            return Ok(keys);
        }
        for item in split_at_commas(text) {
            let (key, value) = split_item(&item, &[])?;
            let slot = keys.slot(key).ok_or_else(|| NicError::UnknownKey {
                key: key.into(),
                known: KEYS,
            })?;
            if slot.replace(value.into()).is_some() {
                return Err(NicError::KeyRepeated(key.into()));
            }
        }
        Ok(keys)
    }

    fn slot(&mut self, key: &str) -> Option<&mut Option<String>> {
        Some(match key {
            "name" => &mut self.name,
            "queues" => &mut self.queues,
            "throughput" => &mut self.throughput,
            "mac" => &mut self.mac,
            "tap" => &mut self.tap,
            "bridge" => &mut self.bridge,
            "uplink" => &mut self.uplink,
            _ => return None,
        })
    }
}

fn parse_queue_request(
    queues: Option<String>,
    throughput: Option<String>,
) -> Result<QueueRequest, NicError> {
    match (queues, throughput) {
        (None, None) => Ok(QueueRequest::Unspecified),
        (Some(queues), Some(throughput)) => Err(NicError::KeysConflict {
            first: ("queues", queues),
            second: ("throughput", throughput),
        }),
        (Some(queues), None) => match queues.parse() {
            Ok(pairs) => Ok(QueueRequest::Queues(pairs)),
            Err(_) => Err(NicError::Queues(queues)),
        },
        (None, Some(throughput)) => Ok(QueueRequest::Throughput(throughput.parse()?)),
    }
}

fn resolve_uplink(
    tap: Option<String>,
    bridge: Option<String>,
    uplink: Option<String>,
    default_tap: impl FnOnce() -> String,
) -> Result<String, NicError> {
    match (tap, bridge, uplink) {
        (Some(tap), _, Some(uplink)) => Err(NicError::KeysConflict {
            first: ("tap", tap),
            second: ("uplink", uplink),
        }),
        (None, Some(bridge), Some(uplink)) => Err(NicError::BridgeBesideUplink { bridge, uplink }),
        (None, None, Some(uplink)) => Ok(uplink),
        (tap, bridge, None) => {
            let tap = tap.unwrap_or_else(default_tap);
            let bridge = bridge.map(|bridge| format!(",bridge={bridge}"));
            Ok(format!("tap:{tap}{}", bridge.unwrap_or_default()))
        }
    }
}

/// `GUEST-DEVICE`, or `tapN` where that is too long for an interface.
fn default_tap_name(guest: &str, device: &str, at: usize) -> String {
    let name = format!("{guest}-{device}");
    match name.len() <= MAX_INTERFACE_NAME {
        true => name,
        false => format!("tap{at}"),
    }
}

/// Whether `name` can be the name of a guest or of a network device. It becomes a part of QEMU's
/// ids, of paths and of XML.
pub(super) fn is_name(name: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.len() <= 32
        && name.chars().all(is_allowed)
}

impl Mac {
    /// An address with QEMU's prefix, which is always the same for the same `guest` and `device`.
    fn generate(guest: &str, device: &str) -> Self {
        // FNV-1a is enough, because the address has to be reproducible and not secret.
        let bytes = guest.bytes().chain([0]).chain(device.bytes());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let [a, b, c, d, e, f, _, _] = hash.to_le_bytes();
        Self([0x52, 0x54, 0x00, a ^ d, b ^ e, c ^ f])
    }

    /// Parses six pairs of hexadecimal digits. `None` for other text, for a group address and for
    /// the zero address.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let mut mac = [0; 6];
        for byte in &mut mac {
            let part = parts.next()?;
            let is_byte = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = is_byte
                .then(|| u8::from_str_radix(part, 16).ok())
                .flatten()?;
        }
        let is_group = mac[0] & 1 == 1;
        (parts.next().is_none() && !is_group && mac != [0; 6]).then_some(Self(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
