//! The output of `ethtool` in the guest, as typed values.
//!
//! Values are found by the name that ethtool prints and the heading above it, because newer
//! versions print more lines and use other columns. ethtool 6.1 cannot print `-g` as JSON, and
//! neither 6.1 nor 6.14 can print `-l` as JSON, but both versions use the same names in their text.
//!
//! This module does not read per-queue statistics (`ethtool -S`), because those of virtio_net in
//! Linux 6.12 contain no packet counters. Tests read `/sys/class/net/DEVICE/statistics` instead,
//! which every kernel provides.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::guest::Guest;

/// The headings of `ethtool -g` and `ethtool -l`.
const MAXIMUM: &str = "Pre-set maximums";
const CURRENT: &str = "Current hardware settings";

/// A setting that the driver can change up to a maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EthtoolSetting {
    /// The value in use.
    pub current: u32,
    /// The largest value that the device supports.
    pub maximum: u32,
}

/// The ring sizes of a network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSizes {
    /// The number of descriptors of each receiveq.
    pub rx: EthtoolSetting,
    /// The number of descriptors of each transmitq.
    pub tx: EthtoolSetting,
}

/// The features of a network device by name; the value says whether the feature is on.
pub type EthtoolFeatures = BTreeMap<String, bool>;

/// Reads the ring sizes of `device`.
///
/// # Errors
/// When ethtool fails, or does not print the sizes.
pub fn rings(guest: &Guest, device: &str) -> Result<RingSizes> {
    parse_rings(&guest.ok(&format!("ethtool -g {device}"))?)
}

/// Reads the number of queue pairs of `device` that the driver uses (ethtool's combined channels).
///
/// # Errors
/// When ethtool fails, or does not print the number.
pub fn combined(guest: &Guest, device: &str) -> Result<EthtoolSetting> {
    parse_combined(&guest.ok(&format!("ethtool -l {device}"))?)
}

/// Sets the number of queue pairs of `device` that the driver uses, if it differs from `pairs`.
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
pub fn features(guest: &Guest, device: &str) -> Result<EthtoolFeatures> {
    let text = guest.ok(&format!("ethtool -k {device}"))?;
    Ok(parse_features(&text))
}

fn parse_rings(text: &str) -> Result<RingSizes> {
    Ok(RingSizes {
        rx: parse_setting(text, "RX")?,
        tx: parse_setting(text, "TX")?,
    })
}

fn parse_combined(text: &str) -> Result<EthtoolSetting> {
    parse_setting(text, "Combined")
}

fn parse_setting(text: &str, name: &str) -> Result<EthtoolSetting> {
    Ok(EthtoolSetting {
        current: parse_number(text, CURRENT, name)?,
        maximum: parse_number(text, MAXIMUM, name)?,
    })
}

/// Parses the number called `name` under `heading`. A heading is a line without a value.
fn parse_number(text: &str, heading: &str, name: &str) -> Result<u32> {
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

/// Parses lines of the form `NAME: on` or `NAME: off`, to which ethtool may append `[fixed]` or
/// `[requested on]`.
fn parse_features(text: &str) -> EthtoolFeatures {
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

    /// The output of ethtool 6.1 (Debian 12).
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
    /// The output of ethtool 6.14 (Debian 13).
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
    /// The output of both versions.
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
    const FEATURES: &str = "EthtoolFeatures for eth0:
rx-checksumming: on [fixed]
tx-checksumming: on
\ttx-checksum-ipv4: off [fixed]
\ttx-checksum-ip-generic: on
large-receive-offload: off [requested on]
";

    #[test]
    fn ring_sizes_are_parsed_from_the_output_of_both_ethtool_versions() {
        let setting = |current, maximum| EthtoolSetting { current, maximum };
        let rings = RingSizes {
            rx: setting(256, 1024),
            tx: setting(128, 512),
        };
        for text in [RINGS_6_1, RINGS_6_14] {
            assert_eq!(parse_rings(text).unwrap(), rings);
        }
    }

    #[test]
    fn combined_channels_are_parsed_from_the_output_of_ethtool() {
        let combined = EthtoolSetting {
            current: 2,
            maximum: 4,
        };
        assert_eq!(parse_combined(CHANNELS).unwrap(), combined);
    }

    #[test]
    fn value_that_is_missing_or_not_a_number_is_an_error() {
        let error = |text: &str| format!("{:#}", parse_combined(text).unwrap_err());
        let incomplete = CHANNELS.replace("Combined:\t2\n", "");
        let expected = "no Combined under 'Current hardware settings'";
        assert!(error(&incomplete).contains(expected));
        let incomplete = CHANNELS.replace("Combined:\t4\n", "");
        let expected = "no Combined under 'Pre-set maximums'";
        assert!(error(&incomplete).contains(expected));
        let unsupported = CHANNELS.replace("Combined:\t2", "Combined:\tn/a");
        assert!(error(&unsupported).contains("is 'n/a', not a number"));
    }

    #[test]
    fn features_are_parsed_from_the_output_of_ethtool() {
        let features = parse_features(FEATURES);
        let expected = [
            ("large-receive-offload", false),
            ("rx-checksumming", true),
            ("tx-checksum-ip-generic", true),
            ("tx-checksum-ipv4", false),
            ("tx-checksumming", true),
        ];
        let expected = expected.map(|(name, is_on)| (name.to_owned(), is_on));
        assert_eq!(features, EthtoolFeatures::from(expected));
    }
}
