//! `GET /metrics`: a [`Report`] in the OpenMetrics text format, which Prometheus reads.
//!
//! The counters belong to the vrings and workers, and not to a registry of metrics, so each scrape
//! makes the page from a report. Each counter is a metric family of its own. The labels `device`,
//! `pair` and `direction` identify the vring; `rx` and `tx` are named from the guest's side.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::v1::{
    Counter, Counters, DeviceReport, HelperState, QueuePairReport, Report, VringReport, VringStatus,
};

/// The page's media type.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The labels of what concerns the whole process.
const NO_LABELS: [(&str, &str); 0] = [];

/// The page for `report`.
///
/// # Errors
/// The encoder's signature has an error, but writing to a [`String`] does not fail.
pub fn encode(report: Report) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("virtionetd");
    registry.register_collector(Box::new(Snapshot(report)));
    let mut page = String::new();
    text::encode(&mut page, &registry)?;
    Ok(page)
}

#[derive(Debug)]
struct Snapshot(Report);

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        let Report {
            version,
            log_lines_dropped,
            panics,
            rights,
            process: _,
            devices,
        } = &self.0;
        page.info(
            "build",
            "The version of the daemon.",
            [[("version", version.as_str())]],
        )?;
        page.counter(
            ("log_lines_dropped", None),
            "Log lines that were lost because standard error did not take them.",
            [(NO_LABELS, *log_lines_dropped)].into_iter(),
        )?;
        page.counter(
            ("panics", None),
            "Panics that were caught, each a bug of the daemon.",
            [(NO_LABELS, *panics)].into_iter(),
        )?;
        let helper = rights.as_ref().map(|rights| rights.helper);
        page.gauge(
            ("helper_running", None),
            "Whether the helper, which keeps rights that the daemon has given up, is there.",
            helper
                .filter(|state| *state != HelperState::Off)
                .map(|state| (NO_LABELS, u32::from(state == HelperState::Running)))
                .into_iter(),
        )?;
        encode_devices(&mut page, devices)?;
        encode_workers(&mut page, devices)?;
        encode_vrings(&mut page, devices)
    }
}

fn encode_devices(page: &mut Page<'_>, devices: &[DeviceReport]) -> fmt::Result {
    page.info(
        "device",
        "The device's vhost-user socket and uplink.",
        devices.iter().map(|device| {
            [
                ("device", device.name.as_str()),
                ("socket", &device.socket),
                ("uplink_kind", &device.uplink.kind),
                ("uplink", &device.uplink.name),
            ]
        }),
    )?;
    page.gauge(
        ("device_connected", None),
        "Whether a front-end is connected to the device.",
        devices
            .iter()
            .map(|device| (device_label(device), u32::from(device.connected))),
    )?;
    page.gauge(
        ("device_uplink_up", None),
        "Whether the device's uplink can carry frames: 0 while its interface is deleted or down.",
        devices
            .iter()
            .map(|device| (device_label(device), u32::from(device.uplink.up))),
    )?;
    page.gauge(
        ("device_mtu", Some(&Unit::Bytes)),
        "The MTU that the front-end has set for the device.",
        devices
            .iter()
            .filter_map(|device| Some((device_label(device), u32::from(device.mtu?)))),
    )
}

fn encode_workers(page: &mut Page<'_>, devices: &[DeviceReport]) -> fmt::Result {
    page.info(
        "worker",
        "The worker of a queue pair, the CPUs that it may run on and the vCPUs that it serves.",
        pairs(devices).map(|(device, pair)| {
            [
                ("device", device.name.clone()),
                ("pair", pair.pair.to_string()),
                ("worker", pair.worker.clone()),
                ("cpus", comma_separated(&pair.cpus)),
                ("vcpus", comma_separated(&pair.vcpus)),
            ]
        }),
    )?;
    page.gauge(
        ("worker_cpu", None),
        "The CPU that the worker is pinned to, if it is pinned to a single CPU.",
        pairs(devices).filter_map(|(device, pair)| match pair.cpus.as_slice() {
            [cpu] => Some((pair_labels(device, pair), *cpu)),
            _ => None,
        }),
    )?;
    for Counter { name, help, .. } in
        families(pairs(devices).map(|(_, pair)| &pair.worker_counters))
    {
        page.counter(
            (&format!("worker_{name}"), None),
            help,
            pairs(devices).filter_map(|(device, pair)| {
                Some((pair_labels(device, pair), pair.worker_counters.get(name)?))
            }),
        )?;
    }
    Ok(())
}

fn encode_vrings(page: &mut Page<'_>, devices: &[DeviceReport]) -> fmt::Result {
    let has_state = |state: VringStatus| move |vring: &VringReport| u32::from(vring.state == state);
    page.vring_gauge(
        "ring_enabled",
        "Whether the front-end has enabled the vring.",
        devices,
        |vring| u32::from(vring.enabled),
    )?;
    page.vring_gauge(
        "ring_running",
        "Whether the vring is served.",
        devices,
        has_state(VringStatus::Running),
    )?;
    page.vring_gauge(
        "ring_quarantined",
        "Whether the vring is stopped for a fault of the guest until it is configured again.",
        devices,
        has_state(VringStatus::Quarantined),
    )?;
    page.vring_gauge(
        "ring_size",
        "The number of descriptors of the vring; 0 until the front-end sets it.",
        devices,
        |vring| u32::from(vring.size),
    )?;
    for Counter { name, help, .. } in families(vrings(devices).map(|(_, vring)| &vring.counters)) {
        // The encoder appends the unit to the family's name, and describes it in a line of its own.
        let is_bytes = name == "bytes";
        let family = if is_bytes {
            "ring".into()
        } else {
            format!("ring_{name}")
        };
        page.counter(
            (&family, is_bytes.then_some(&Unit::Bytes)),
            help,
            vrings(devices).filter_map(|(labels, vring)| Some((labels, vring.counters.get(name)?))),
        )?;
    }
    Ok(())
}

/// A page of metrics that is being encoded. Each method writes one metric family.
struct Page<'a>(DescriptorEncoder<'a>);

/// The name of a family, without prefix, unit and suffix, and its unit.
type FamilyName<'a> = (&'a str, Option<&'a Unit>);

impl Page<'_> {
    fn info<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = L>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Info)?;
        samples
            .into_iter()
            .try_for_each(|labels| family.encode_info(&labels))
    }

    fn gauge<L: EncodeLabelSet>(
        &mut self,
        (name, unit): FamilyName<'_>,
        help: &str,
        mut samples: impl Iterator<Item = (L, u32)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, unit, MetricType::Gauge)?;
        samples.try_for_each(|(labels, value)| family.encode_family(&labels)?.encode_gauge(&value))
    }

    fn counter<L: EncodeLabelSet>(
        &mut self,
        (name, unit): FamilyName<'_>,
        help: &str,
        mut samples: impl Iterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, unit, MetricType::Counter)?;
        samples.try_for_each(|(labels, value)| {
            family
                .encode_family(&labels)?
                .encode_counter::<NoLabelSet, u64, u64>(&value, None)
        })
    }

    fn vring_gauge(
        &mut self,
        name: &str,
        help: &str,
        devices: &[DeviceReport],
        value: impl Fn(&VringReport) -> u32,
    ) -> fmt::Result {
        self.gauge(
            (name, None),
            help,
            vrings(devices).map(|(labels, vring)| (labels, value(vring))),
        )
    }
}

fn pairs(devices: &[DeviceReport]) -> impl Iterator<Item = (&DeviceReport, &QueuePairReport)> {
    devices
        .iter()
        .flat_map(|device| device.pairs.iter().map(move |pair| (device, pair)))
}

fn vrings(devices: &[DeviceReport]) -> impl Iterator<Item = ([(&str, String); 3], &VringReport)> {
    pairs(devices).flat_map(|(device, pair)| {
        [("rx", &pair.rx), ("tx", &pair.tx)].map(|(direction, vring)| {
            let [name, number] = pair_labels(device, pair);
            ([name, number, ("direction", direction.into())], vring)
        })
    })
}

fn device_label(device: &DeviceReport) -> [(&str, &str); 1] {
    [("device", &device.name)]
}

fn pair_labels<'a>(device: &'a DeviceReport, pair: &QueuePairReport) -> [(&'a str, String); 2] {
    [
        ("device", device.name.clone()),
        ("pair", pair.pair.to_string()),
    ]
}

/// The counters for which there is a family. All blocks of a kind have the same counters, so those
/// of the first block are enough.
fn families<'a>(
    mut blocks: impl Iterator<Item = &'a Counters>,
) -> impl Iterator<Item = &'a Counter> {
    blocks.next().into_iter().flat_map(|block| &block.0)
}

fn comma_separated(numbers: &[u32]) -> String {
    numbers
        .iter()
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::v1::sample;

    /// The name, the labels and the value of a sample line, by the grammar of OpenMetrics 1.0
    /// (§ABNF).
    fn parse_sample(line: &str) -> Option<(&str, HashMap<&str, String>, u64)> {
        let (head, value) = line.rsplit_once(' ')?;
        let (name, labels) = match head.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}')?),
            None => (head, ""),
        };
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        (name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(is_word))
            .then_some((name, parse_labels(labels)?, value.parse().ok()?))
    }

    fn parse_labels(mut text: &str) -> Option<HashMap<&str, String>> {
        let mut labels = HashMap::new();
        while !text.is_empty() {
            let (key, rest) = text.split_once("=\"")?;
            let mut value = String::new();
            let mut chars = rest.char_indices();
            let end = loop {
                match chars.next()? {
                    (_, '\\') => value.push(chars.next()?.1),
                    (at, '"') => break at,
                    (_, c) => value.push(c),
                }
            };
            assert!(labels.insert(key, value).is_none(), "label {key} twice");
            text = &rest[end + 1..];
            text = text.strip_prefix(',').unwrap_or(text);
        }
        Some(labels)
    }

    #[test]
    fn every_line_is_valid_and_belongs_to_its_family() {
        let page = encode(sample()).unwrap();
        let body = page
            .strip_suffix("# EOF\n")
            .expect("the page ends with the EOF marker");
        let (mut family, mut kind) = ("", "");
        let mut seen = std::collections::HashSet::new();
        for line in body.lines() {
            if let Some(rest) = line.strip_prefix("# ") {
                let mut words = rest.splitn(3, ' ');
                match (words.next(), words.next(), words.next()) {
                    (Some("HELP"), Some(name), Some(help)) => {
                        assert!(seen.insert(name), "{name} twice");
                        assert!(help.ends_with('.'), "{line}");
                        family = name;
                    }
                    (Some("TYPE"), Some(name), Some(word)) if name == family => kind = word,
                    (Some("UNIT"), Some(name), Some(unit)) if name == family => {
                        assert!(name.ends_with(unit));
                    }
                    _ => panic!("{line}"),
                }
                continue;
            }
            let (name, labels, value) = parse_sample(line).unwrap_or_else(|| panic!("{line}"));
            let suffix = match kind {
                "counter" => "_total",
                "info" => "_info",
                "gauge" => "",
                _ => panic!("{kind}"),
            };
            assert_eq!(name, format!("{family}{suffix}"));
            assert!(name.starts_with("virtionetd_"));
            assert!(kind != "info" || value == 1);
            let is_of_the_process = [
                "virtionetd_build",
                "virtionetd_log_lines_dropped",
                "virtionetd_panics",
                "virtionetd_helper_running",
            ]
            .contains(&family);
            assert!(is_of_the_process || labels["device"] == "vnet", "{line}");
        }
        assert!(seen.len() > 10, "{seen:?}");
    }

    #[test]
    fn every_counter_has_one_sample_for_each_vring() {
        let page = encode(sample()).unwrap();
        for name in ["frames", "kicks"] {
            let start = format!("virtionetd_ring_{name}_total{{");
            assert_eq!(page.matches(&start).count(), 2, "{name}");
        }
        for line in [
            r#"virtionetd_build_info{version="0.1.0"} 1"#,
            r#"virtionetd_device_info{device="vnet",socket="/run/a \"b\".sock",uplink_kind="tap",uplink="tap0"} 1"#,
            "virtionetd_helper_running{} 1",
            r#"virtionetd_device_connected{device="vnet"} 1"#,
            r#"virtionetd_device_uplink_up{device="vnet"} 1"#,
            r#"virtionetd_device_mtu_bytes{device="vnet"} 1500"#,
            r#"virtionetd_worker_info{device="vnet",pair="0",worker="vnet-q0",cpus="2",vcpus="0"} 1"#,
            r#"virtionetd_worker_cpu{device="vnet",pair="0"} 2"#,
            r#"virtionetd_worker_wakeups_total{device="vnet",pair="0"} 3"#,
            r#"virtionetd_ring_enabled{device="vnet",pair="0",direction="rx"} 1"#,
            r#"virtionetd_ring_running{device="vnet",pair="0",direction="tx"} 0"#,
            r#"virtionetd_ring_quarantined{device="vnet",pair="0",direction="tx"} 1"#,
            r#"virtionetd_ring_size{device="vnet",pair="0",direction="tx"} 256"#,
            r#"virtionetd_ring_frames_total{device="vnet",pair="0",direction="rx"} 5"#,
            r#"virtionetd_ring_bytes_total{device="vnet",pair="0",direction="tx"} 420"#,
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
    }

    #[test]
    fn worker_with_several_cpus_has_no_sample_of_a_single_cpu() {
        let mut report = sample();
        report.devices[0].pairs[0].cpus = vec![0, 1];
        report.devices[0].mtu = None;
        let page = encode(report).unwrap();
        assert!(page.contains(r#"cpus="0,1""#));
        assert!(!page.contains("worker_cpu{"));
        assert!(!page.contains("mtu_bytes{"));
    }
}
