//! One network device of the request: the keys of `--nic`.

use std::fmt;

use virtionet_sizing::{NetDeviceRequest, QueueRequest};

use super::PlanError;
use virtionet_base::key_value::split_at_commas;

/// Longest name of an interface (`IFNAMSIZ` without the closing zero).
const MAX_INTERFACE: usize = 15;

const KEYS: &str = "name, queues, throughput, mac, tap, bridge and uplink";

/// The request for one network device, complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NetDeviceSpec {
    /// Its name within the guest's plan.
    pub name: String,
    /// How many pairs.
    pub queue_request: QueueRequest,
    /// Its address.
    pub mac: Mac,
    /// Its uplink, as `--uplink` spells it.
    pub uplink: String,
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mac([u8; 6]);

/// The keys of one `--nic` as they are written.
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
    /// The `at`-th card of `guest`, from the text of its `--nic`, which may be empty.
    pub(super) fn parse(guest: &str, at: usize, text: &str) -> Result<Self, PlanError> {
        let error = |sentence: fmt::Arguments<'_>| match text {
            "" => PlanError::Usage(sentence.to_string()),
            _ => PlanError::Usage(format!("--nic {text}: {sentence}")),
        };
        let keys = NicKeys::parse(text).map_err(|sentence| error(format_args!("{sentence}")))?;
        let name = keys.name.unwrap_or_else(|| format!("net{at}"));
        if !is_name(&name) {
            return Err(error(format_args!(
                "name={name} cannot be used: write a letter and up to 31 letters, digits, '.', '_' or '-'"
            )));
        }
        let queue_request = queue_request(keys.queues.as_deref(), keys.throughput.as_deref())
            .map_err(|sentence| error(format_args!("{sentence}")))?;
        let mac = match &keys.mac {
            None => Mac::generate(guest, &name),
            Some(text) => Mac::parse(text).ok_or_else(|| {
                error(format_args!(
                    "mac={text} is no address of a card: write one such as 52:54:00:12:34:56"
                ))
            })?,
        };
        let uplink = uplink(keys.tap, keys.bridge, keys.uplink, || {
            default_tap_name(guest, &name, at)
        })
        .map_err(|sentence| error(format_args!("{sentence}")))?;
        Ok(Self {
            name,
            queue_request,
            mac,
            uplink,
        })
    }

    /// What the policy asks about it.
    pub(super) fn request(&self) -> NetDeviceRequest {
        NetDeviceRequest {
            name: self.name.clone(),
            queue_request: self.queue_request,
        }
    }
}

impl NicKeys {
    fn parse(text: &str) -> Result<Self, String> {
        let mut keys = Self::default();
        if text.is_empty() {
            return Ok(keys);
        }
        for item in split_at_commas(text) {
            let Some((key, value)) = item.split_once('=').filter(|(_, value)| !value.is_empty())
            else {
                return Err(format!(
                    "{item:?} is not KEY=VALUE: write a value behind =, and a comma inside a value twice"
                ));
            };
            let slot = keys
                .slot(key)
                .ok_or_else(|| format!("the key {key:?} is not known: use {KEYS}"))?;
            if slot.replace(value.into()).is_some() {
                return Err(format!("{key} is given twice: keep one of them"));
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

fn queue_request(queues: Option<&str>, throughput: Option<&str>) -> Result<QueueRequest, String> {
    match (queues, throughput) {
        (None, None) => Ok(QueueRequest::Unspecified),
        (Some(queues), Some(throughput)) => Err(format!(
            "queues={queues} and throughput={throughput} are both given: keep one of them"
        )),
        (Some(queues), None) => queues
            .parse()
            .map(QueueRequest::Queues)
            .map_err(|_| format!("queues={queues} is no number of queue pairs: write 1 to 128")),
        (None, Some(throughput)) => throughput
            .parse()
            .map(QueueRequest::Throughput)
            .map_err(|why: virtionet_sizing::ThroughputParseError| why.to_string()),
    }
}

fn uplink(
    tap: Option<String>,
    bridge: Option<String>,
    uplink: Option<String>,
    generate: impl FnOnce() -> String,
) -> Result<String, String> {
    match (tap, bridge, uplink) {
        (Some(tap), _, Some(uplink)) => Err(format!(
            "tap={tap} and uplink={uplink} are both given: keep one of them"
        )),
        (None, Some(bridge), Some(uplink)) => Err(format!(
            "bridge={bridge} and uplink={uplink} are both given: write the bridge into the uplink"
        )),
        (None, None, Some(uplink)) => Ok(uplink),
        (tap, bridge, None) => {
            let tap = tap.unwrap_or_else(generate);
            let bridge = bridge.map(|bridge| format!(",bridge={bridge}"));
            Ok(format!("tap:{tap}{}", bridge.unwrap_or_default()))
        }
    }
}

/// `GUEST-CARD` where a network device can be called so.
fn default_tap_name(guest: &str, card: &str, at: usize) -> String {
    let name = format!("{guest}-{card}");
    match name.len() <= MAX_INTERFACE {
        true => name,
        false => format!("tap{at}"),
    }
}

/// Whether guests and cards can be called `name`: it goes into ids of QEMU, paths and XML.
pub(super) fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.len() <= 32
        && name.chars().all(plain)
}

impl Mac {
    /// An address with QEMU's prefix, the same each time for a card of a guest.
    fn generate(guest: &str, card: &str) -> Self {
        // FNV-1a: no secret is kept and no table filled, only equal names must give equal numbers.
        let bytes = guest.bytes().chain([0]).chain(card.bytes());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let [a, b, c, d, e, f, _, _] = hash.to_le_bytes();
        Self([0x52, 0x54, 0x00, a ^ d, b ^ e, c ^ f])
    }

    /// Reads six pairs of hexadecimal digits; not a group's address, nor one of zeros.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let mut mac = [0; 6];
        for byte in &mut mac {
            let part = parts.next()?;
            let digits = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = digits
                .then(|| u8::from_str_radix(part, 16).ok())
                .flatten()?;
        }
        let group = mac[0] & 1 == 1;
        (parts.next().is_none() && !group && mac != [0; 6]).then_some(Self(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
