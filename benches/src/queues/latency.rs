//! Request and response: sockperf's ping-pong from the host to the guest, on no load and beside a
//! bulk flow.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use virtionet_tests::iperf::Direction;
use virtionet_tests::process::Proc;
use virtionet_tests::topology::GUEST;

use super::bulk;
use super::testbed::GuestTestbed;

/// The server's vCPU is not the bulk flow's, but with one pair its queue is.
const ON_VCPU_1: &str = "taskset 2";
/// Payload of a request and of a response, in bytes.
const SIZE: &str = "64";
const TIMEOUT_MARGIN: Duration = Duration::from_secs(30);

/// What goes on beside the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackgroundLoad {
    /// Nothing.
    Nothing,
    /// One TCP flow.
    Flow(Direction),
}

impl BackgroundLoad {
    /// In a table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "idle",
            Self::Flow(Direction::HostToGuest) => "beside TCP to guest",
            Self::Flow(Direction::GuestToHost) => "beside TCP to host",
        }
    }
}

/// Times from a request to its response, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatencyPercentiles {
    /// The middle one.
    pub median: f64,
    /// The one that 99 of 100 keep.
    pub p99: f64,
}

/// Sends requests for `seconds`, one after the other, with `pairs` of the guest's pairs in use.
///
/// # Errors
/// When a part fails: with its words.
pub fn measure(
    testbed: &GuestTestbed,
    beside: BackgroundLoad,
    pairs: u16,
    seconds: u32,
) -> Result<LatencyPercentiles> {
    let times = testbed.run_resumed(pairs, || {
        serve(testbed)?;
        match beside {
            BackgroundLoad::Nothing => ping_pong(testbed, seconds),
            BackgroundLoad::Flow(way) => {
                bulk::background(testbed, way, seconds, || ping_pong(testbed, seconds))
            }
        }
    });
    times.with_context(|| format!("requests, {}, {pairs} pair(s)", beside.name()))
}

/// Starts a server in the guest, where none runs.
fn serve(testbed: &GuestTestbed) -> Result<()> {
    let start = format!(
        "pidof sockperf >/dev/null || {{ setsid {ON_VCPU_1} sockperf server -i {} >/tmp/sockperf 2>&1 & }}; for i in $(seq 100); do netstat -lnu | grep -q :11111 && exit 0; sleep 0.05; done; cat /tmp/sockperf; exit 1",
        GUEST.v4
    );
    testbed.qemu().guest().ok(&start).map(drop)
}

fn ping_pong(testbed: &GuestTestbed, seconds: u32) -> Result<LatencyPercentiles> {
    let seconds_text = seconds.to_string();
    let args = [
        "ping-pong",
        "-i",
        GUEST.v4,
        "-m",
        SIZE,
        "--full-rtt",
        "-t",
        &seconds_text,
    ];
    let netns = testbed.network().netns().name();
    let mut client = Proc::spawn(testbed.dir(), "sockperf", Some(netns), "sockperf", args)?;
    let status = client.wait(Duration::from_secs(seconds.into()) + TIMEOUT_MARGIN)?;
    let said = client.stdout();
    ensure!(
        status.success(),
        "sockperf ended with {status}: {said} {}",
        client.stderr()
    );
    read(&said)
}

/// From what sockperf prints.
fn read(text: &str) -> Result<LatencyPercentiles> {
    let value = |name: &str| -> Result<f64> {
        text.lines()
            .find_map(|line| line.split_once(name)?.1.split_once('='))
            .and_then(|(_, value)| value.trim().parse().ok())
            .with_context(|| format!("sockperf did not say '{name}': {text}"))
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
    fn percentiles_are_read_from_sockperfs_words() {
        let times = read(SOCKPERF_OUTPUT).unwrap();
        assert_eq!((times.median, times.p99), (187.5, 412.334));
        assert!(read("sockperf: ERROR").is_err());
    }
}
