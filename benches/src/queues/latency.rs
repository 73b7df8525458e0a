//! Measures the latency of requests from the host to the guest with sockperf's ping-pong, without
//! other load and beside a TCP flow.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use virtionet_tests::iperf::Direction;
use virtionet_tests::process::Proc;
use virtionet_tests::topology::GUEST;

use super::bulk;
use super::testbed::GuestTestbed;

/// Runs the server on another vCPU than the TCP flow. With one queue pair, both use the same queue.
const RUN_ON_VCPU_1: &str = "taskset 2";
/// Payload of a request and of a response, in bytes.
const PAYLOAD: &str = "64";
const TIMEOUT_MARGIN: Duration = Duration::from_secs(30);

/// The load beside the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackgroundLoad {
    /// No other load.
    Nothing,
    /// One TCP flow.
    Flow(Direction),
}

impl BackgroundLoad {
    /// Returns the name in a table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "idle",
            Self::Flow(Direction::HostToGuest) => "beside TCP to guest",
            Self::Flow(Direction::GuestToHost) => "beside TCP to host",
        }
    }
}

/// Percentiles of the time from a request to its response, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatencyPercentiles {
    /// The median.
    pub median: f64,
    /// The 99th percentile.
    pub p99: f64,
}

/// Sends requests one after the other for `seconds`, while the guest uses `queue_pairs` queue
/// pairs.
///
/// # Errors
/// When a part of the testbed fails. The error contains its message.
pub fn measure(
    testbed: &GuestTestbed,
    background: BackgroundLoad,
    queue_pairs: u16,
    seconds: u32,
) -> Result<LatencyPercentiles> {
    let percentiles = testbed.run_resumed(queue_pairs, || {
        start_server(testbed)?;
        match background {
            BackgroundLoad::Nothing => ping_pong(testbed, seconds),
            BackgroundLoad::Flow(direction) => {
                bulk::run_with_background_flow(testbed, direction, seconds, || {
                    ping_pong(testbed, seconds)
                })
            }
        }
    });
    percentiles.with_context(|| {
        format!(
            "requests, {}, {queue_pairs} queue pair(s)",
            background.name()
        )
    })
}

/// Starts a server in the guest if none runs.
fn start_server(testbed: &GuestTestbed) -> Result<()> {
    let command = format!(
        "pidof sockperf >/dev/null || {{ setsid {RUN_ON_VCPU_1} sockperf server -i {} >/tmp/sockperf 2>&1 & }}; for i in $(seq 100); do netstat -lnu | grep -q :11111 && exit 0; sleep 0.05; done; cat /tmp/sockperf; exit 1",
        GUEST.v4
    );
    testbed.qemu().guest().ok(&command).map(drop)
}

fn ping_pong(testbed: &GuestTestbed, seconds: u32) -> Result<LatencyPercentiles> {
    let seconds_text = seconds.to_string();
    let args = [
        "ping-pong",
        "-i",
        GUEST.v4,
        "-m",
        PAYLOAD,
        "--full-rtt",
        "-t",
        &seconds_text,
    ];
    let netns = testbed.network().netns().name();
    let mut client = Proc::spawn(testbed.dir(), "sockperf", Some(netns), "sockperf", args)?;
    let status = client.wait(Duration::from_secs(seconds.into()) + TIMEOUT_MARGIN)?;
    let output = client.stdout();
    ensure!(
        status.success(),
        "sockperf ended with {status}: {output} {}",
        client.stderr()
    );
    parse_percentiles(&output)
}

/// Parses the output of sockperf.
fn parse_percentiles(text: &str) -> Result<LatencyPercentiles> {
    let value = |name: &str| -> Result<f64> {
        text.lines()
            .find_map(|line| line.split_once(name)?.1.split_once('='))
            .and_then(|(_, value)| value.trim().parse().ok())
            .with_context(|| format!("the output of sockperf has no '{name}': {text}"))
    };
    Ok(LatencyPercentiles {
        median: value("percentile 50.000")?,
        p99: value("percentile 99.000")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOCKPERF_OUTPUT: &str = "\
sockperf: ---> <MAX> observation = 9118.921
sockperf: ---> percentile 99.900 = 1874.104
sockperf: ---> percentile 99.000 =  412.334
sockperf: ---> percentile 50.000 =  187.500
sockperf: ---> <MIN> observation =   98.114
";

    #[test]
    fn percentiles_are_parsed_from_the_output_of_sockperf() {
        let percentiles = parse_percentiles(SOCKPERF_OUTPUT).unwrap();
        assert_eq!((percentiles.median, percentiles.p99), (187.5, 412.334));
        assert!(parse_percentiles("sockperf: ERROR").is_err());
    }
}
