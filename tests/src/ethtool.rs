//! What `ethtool` in the guest says about a network device, as typed values.
//!
//! The values are looked up by the names that ethtool prints, under the heading that they belong to:
//! newer versions print further lines and use other columns. ethtool 6.1 has no JSON form of `-g`,
//! and neither 6.1 nor 6.14 has one of `-l`, but both versions use the same names in their text.
//!
//! Per-queue statistics (`ethtool -S`) are not here: virtio_net of Linux 6.12 has no packets among
//! them, so tests read `/sys/class/net/DEVICE/statistics`, which all kernels have.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::guest::Guest;

/// The headings of `ethtool -g` and `ethtool -l`.
const MAXIMUM: &str = "Pre-set maximums";
const CURRENT: &str = "Current hardware settings";

/// A number that the driver may change up to a maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The value in use.
    pub current: u32,
    /// The largest value that the device supports.
    pub maximum: u32,
}

/// The sizes of a network device's rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rings {
    /// Descriptors of each receive ring.
    pub rx: Setting,
    /// Descriptors of each transmit ring.
    pub tx: Setting,
}

/// The features of a network device: whether each is on, by name.
pub type Features = BTreeMap<String, bool>;

/// Reads the ring sizes of `device`.
///
/// # Errors
/// When ethtool fails, or does not print them.
pub fn rings(guest: &Guest, device: &str) -> Result<Rings> {
    parse_rings(&guest.ok(&format!("ethtool -g {device}"))?)
}

/// Reads how many queue pairs of `device` the driver uses (ethtool's combined channels).
///
/// # Errors
/// When ethtool fails, or does not print it.
pub fn combined(guest: &Guest, device: &str) -> Result<Setting> {
    parse_combined(&guest.ok(&format!("ethtool -l {device}"))?)
}

/// Has the driver use `pairs` queue pairs of `device`, unless it uses so many already.
///
/// # Errors
/// When ethtool fails.
pub fn set_combined(guest: &Guest, device: &str, pairs: u32) -> Result<()> {
    if combined(guest, device)?.current != pairs {
        guest.ok(&format!("ethtool -L {device} combined {pairs}"))?;
    }
    Ok(())
}

/// Reads the features of `device`.
///
/// # Errors
/// When ethtool fails.
pub fn features(guest: &Guest, device: &str) -> Result<Features> {
    let text = guest.ok(&format!("ethtool -k {device}"))?;
    Ok(parse_features(&text))
}

fn parse_rings(text: &str) -> Result<Rings> {
    Ok(Rings {
        rx: setting(text, "RX")?,
        tx: setting(text, "TX")?,
    })
}

fn parse_combined(text: &str) -> Result<Setting> {
    setting(text, "Combined")
}

fn setting(text: &str, name: &str) -> Result<Setting> {
    Ok(Setting {
        current: number(text, CURRENT, name)?,
        maximum: number(text, MAXIMUM, name)?,
    })
}

/// The number called `name` under `heading`: a heading is a line without a value.
fn number(text: &str, heading: &str, name: &str) -> Result<u32> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines
        .map(|(key, value)| (key.trim(), value.trim()))
        .skip_while(|line| *line != (heading, ""))
        .skip(1)
        .take_while(|(_, value)| !value.is_empty())
        .find(|(key, _)| *key == name)
        .with_context(|| format!("ethtool prints no {name} under '{heading}': {text}"))?;
    value
        .parse()
        .with_context(|| format!("{name} under '{heading}' is '{value}', not a number: {text}"))
}

/// A feature's line is `NAME: on` or `NAME: off`, perhaps with `[fixed]` or `[requested on]`.
fn parse_features(text: &str) -> Features {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines
        .filter_map(|(name, value)| {
            let is_on = match value.split_whitespace().next()? {
                "on" => true,
                "off" => false,
                _ => return None,
            };
            Some((name.trim().to_owned(), is_on))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of ethtool 6.1 (Debian 12).
    const RINGS_6_1: &str = "Ring parameters for eth0:
Pre-set maximums:
RX:\t\t1024
RX Mini:\tn/a
RX Jumbo:\tn/a
TX:\t\t512
Current hardware settings:
RX:\t\t256
RX Mini:\tn/a
RX Jumbo:\tn/a
TX:\t\t128
RX Buf Len:\t\tn/a
CQE Size:\t\tn/a
TX Push:\toff
TCP data split:\tn/a
";
    /// Of ethtool 6.14 (Debian 13).
    const RINGS_6_14: &str = "Ring parameters for eth0:
Pre-set maximums:
RX:\t\t\t1024
RX Mini:\t\tn/a
RX Jumbo:\t\tn/a
TX:\t\t\t512
TX push buff len:\t1024
Current hardware settings:
RX:\t\t\t256
RX Mini:\t\tn/a
RX Jumbo:\t\tn/a
TX:\t\t\t128
RX Buf Len:\t\tn/a
CQE Size:\t\tn/a
TX Push:\t\toff
RX Push:\t\toff
TX push buff len:\t1024
TCP data split:\t\tn/a
";
    /// Of both versions.
    const CHANNELS: &str = "Channel parameters for eth0:
Pre-set maximums:
RX:\t\tn/a
TX:\t\tn/a
Other:\t\tn/a
Combined:\t4
Current hardware settings:
RX:\t\tn/a
TX:\t\tn/a
Other:\t\tn/a
Combined:\t2
";
    const FEATURES: &str = "Features for eth0:
rx-checksumming: on [fixed]
tx-checksumming: on
\ttx-checksum-ipv4: off [fixed]
\ttx-checksum-ip-generic: on
large-receive-offload: off [requested on]
";

    #[test]
    fn rings_are_read_from_old_and_new_text() {
        let setting = |current, maximum| Setting { current, maximum };
        let rings = Rings {
            rx: setting(256, 1024),
            tx: setting(128, 512),
        };
        for text in [RINGS_6_1, RINGS_6_14] {
            assert_eq!(parse_rings(text).unwrap(), rings);
        }
    }

    #[test]
    fn channels_are_read() {
        let combined = Setting {
            current: 2,
            maximum: 4,
        };
        assert_eq!(parse_combined(CHANNELS).unwrap(), combined);
    }

    #[test]
    fn a_value_that_is_missing_or_no_number_is_an_error() {
        let error = |text: &str| format!("{:#}", parse_combined(text).unwrap_err());
        let shortened = CHANNELS.replace("Combined:\t2\n", "");
        let expected = "no Combined under 'Current hardware settings'";
        assert!(error(&shortened).contains(expected));
        let shortened = CHANNELS.replace("Combined:\t4\n", "");
        let expected = "no Combined under 'Pre-set maximums'";
        assert!(error(&shortened).contains(expected));
        let unsupported = CHANNELS.replace("Combined:\t2", "Combined:\tn/a");
        assert!(error(&unsupported).contains("is 'n/a', not a number"));
    }

    #[test]
    fn features_are_read() {
        let features = parse_features(FEATURES);
        let expected = [
            ("large-receive-offload", false),
            ("rx-checksumming", true),
            ("tx-checksum-ip-generic", true),
            ("tx-checksum-ipv4", false),
            ("tx-checksumming", true),
        ];
        let expected = expected.map(|(name, is_on)| (name.to_owned(), is_on));
        assert_eq!(features, Features::from(expected));
    }
}
