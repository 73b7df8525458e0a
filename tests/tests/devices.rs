//! Two devices in one process, and their state and metrics on the control socket.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::TestFrontendConfig;
use virtionet_tests::daemon::Options;
use virtionet_tests::http;
use virtionet_tests::paths::RunDir;
use virtionet_tests::responder::{EchoResponder, ResponderAddresses};
use virtionet_tests::topology::HostNetwork;

/// The number of queue pairs of each device.
const PAIRS: [u16; 2] = [1, 2];

#[test]
fn two_devices_carry_frames_independently_and_have_separate_state_and_metrics() {
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::bare().unwrap();
    let sockets = ["a.sock", "b.sock"].map(|name| dir.join(name));
    let device =
        |n: usize, keys: &str| format!("socket-path={},tap=tap{n}{keys}", sockets[n].display());
    let daemon = Options::new()
        .no_socket()
        .netns(network.netns())
        .flag("--device", device(0, ""))
        .flag("--device", device(1, ",name=other,queues=2"))
        .start(&dir, "vnet")
        .unwrap();
    let responders: Vec<EchoResponder> = (0..2)
        .map(|n| connect(&network, &sockets[n], n).unwrap())
        .collect();
    for n in 0..2 {
        network.wait_for_ping(&address(n, 2)).unwrap();
    }

    let all = daemon.get("/v1/devices").unwrap();
    let list = all["devices"].as_array().unwrap();
    let names: Vec<_> = list.iter().map(|d| d["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["vnet0", "other"]);
    for (n, device) in list.iter().enumerate() {
        assert_eq!(device["uplink"]["name"], format!("tap{n}"));
        assert_eq!(device["socket"], sockets[n].display().to_string());
        assert_eq!(device["frontend"]["pid"], std::process::id());
        let pairs = device["pairs"].as_array().unwrap();
        assert_eq!(pairs.len(), usize::from(PAIRS[n]));
        let carried = |ring: &str| -> u64 {
            let frames = |pair: &Value| pair[ring]["counters"]["frames"].as_u64().unwrap();
            pairs.iter().map(frames).sum()
        };
        assert!(carried("rx") > 1 && carried("tx") > 1, "{device}");
    }
    let page = daemon.get_text("/metrics").unwrap();
    assert_metrics_contain_counters(&page, list).unwrap();

    // Disconnecting one device does not affect the other.
    let mut responders = responders.into_iter();
    drop(responders.next());
    network.wait_for_ping(&address(1, 2)).unwrap();
    let all = daemon.get("/v1/devices").unwrap();
    assert_eq!(all["devices"][0]["connected"], false);
    assert_eq!(all["devices"][1]["connected"], true);
    let first = connect(&network, &sockets[0], 0).unwrap();
    network.wait_for_ping(&address(0, 2)).unwrap();
    drop(first);

    let response = http::request(daemon.control(), "GET", "/nothing", "").unwrap();
    assert_eq!(response.status, 404);
    let error: Value = serde_json::from_str(&response.body).unwrap();
    assert!(error["error"].as_str().unwrap().contains("/v1/devices"));

    let stopped = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    assert!(sockets.iter().all(|socket| !socket.exists()));
}

/// Returns an address on network n. The `host` number is 1 for the host and 2 for the responder.
fn address(n: usize, host: u8) -> String {
    format!("10.77.{n}.{host}")
}

fn connect(network: &HostNetwork, socket: &Path, n: usize) -> Result<EchoResponder> {
    let host = address(n, 1);
    network
        .netns()
        .ip(&format!("addr replace {host}/24 dev tap{n}"))?;
    let config = TestFrontendConfig::new(PAIRS[n], 256, MODERN);
    EchoResponder::connect(
        socket,
        &config,
        ResponderAddresses::from_ipv4(&address(n, 2))?,
    )
}

/// Checks that the metrics page contains every counter of every ring and worker in `devices`, with
/// the labels of its device and queue pair. The values on the page may be larger, because the page
/// was read later.
fn assert_metrics_contain_counters(page: &str, devices: &[Value]) -> Result<()> {
    let samples = parse(page)?;
    let mut found = 0;
    for device in devices {
        let name = &device["name"];
        let connected = format!("virtionetd_device_connected{{device={name}}}");
        ensure!(samples.get(&connected) == Some(&1), "{connected}: {page}");
        for pair in device["pairs"]
            .as_array()
            .context("a device has no list of pairs")?
        {
            let labels = format!("device={name},pair=\"{}\"", pair["pair"]);
            found += check_samples(&samples, "worker", &labels, &pair["worker_counters"])?;
            for direction in ["rx", "tx"] {
                let labels = format!("{labels},direction=\"{direction}\"");
                found += check_samples(&samples, "ring", &labels, &pair[direction]["counters"])?;
            }
        }
    }
    eprintln!("{found} counters in {} samples", samples.len());
    ensure!(found > 3 * 2 * 30, "the page has only {found} counters");
    Ok(())
}

/// Checks the samples of one object with counters, and returns their number.
fn check_samples(
    samples: &BTreeMap<String, u64>,
    family: &str,
    labels: &str,
    counters: &Value,
) -> Result<usize> {
    let counters = counters
        .as_object()
        .context("a ring or worker has no counters")?;
    for (counter, value) in counters {
        let sample = format!("virtionetd_{family}_{counter}_total{{{labels}}}");
        let found = samples.get(&sample);
        ensure!(
            found.is_some() && found.copied() >= value.as_u64(),
            "{sample} is {found:?} on the page and {value} in the device"
        );
    }
    Ok(counters.len())
}

/// Parses a page in the OpenMetrics text format. Returns the samples by name and labels.
fn parse(page: &str) -> Result<BTreeMap<String, u64>> {
    let body = page
        .strip_suffix("# EOF\n")
        .context("the page does not end with # EOF")?;
    let mut samples = BTreeMap::new();
    for line in body.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let word = comment.split(' ').next().unwrap_or("");
            ensure!(
                ["HELP", "TYPE", "UNIT"].contains(&word),
                "a comment is invalid: {line}"
            );
            continue;
        }
        let sample = line.rsplit_once(' ');
        let (name, value) = sample.with_context(|| format!("a sample has no value: {line}"))?;
        let value = value
            .parse()
            .with_context(|| format!("the value of a sample is not a number: {line}"))?;
        ensure!(
            samples.insert(name.to_owned(), value).is_none(),
            "a sample occurs twice: {line}"
        );
    }
    Ok(samples)
}
