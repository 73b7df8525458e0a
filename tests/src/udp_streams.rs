//! Numbered UDP datagrams between the host and a guest, both ways at the same time, and how many of
//! them were lost.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::netns::Netns;
use crate::paths::RunDir;
use crate::process::Proc;

/// 1,000 datagrams of 200 bytes a second, each way.
const RATE: &str = "1.6M";
const LENGTH: &str = "200";
/// How long iperf3 may take after its load.
const MARGIN: Duration = Duration::from_secs(30);

/// Datagrams that are being sent.
#[derive(Debug)]
pub struct UdpStreams {
    client: Proc,
    seconds: u32,
}

/// The datagrams of one direction.
#[derive(Clone, Copy, Debug)]
pub struct UdpCount {
    /// What was sent.
    pub sent: u64,
    /// What did not arrive, by the numbers of those that did.
    pub lost: u64,
}

impl UdpStreams {
    /// Starts to send from `netns` to the iperf3 server of a guest at `address`, and back.
    ///
    /// # Errors
    /// When iperf3 cannot be started.
    pub fn start(netns: &Netns, dir: &RunDir, address: &str, seconds: u32) -> Result<Self> {
        let time = seconds.to_string();
        let mut args = vec!["-J", "-c", address, "-u", "-b", RATE, "-l", LENGTH];
        args.extend(["-t", &time, "--bidir"]);
        let client = Proc::spawn(dir, "iperf3-udp", Some(netns.name()), "iperf3", args)?;
        Ok(Self { client, seconds })
    }

    /// Waits for the end, and counts the datagrams to the guest and those from it.
    ///
    /// # Errors
    /// When iperf3 fails.
    pub fn finish(mut self) -> Result<[UdpCount; 2]> {
        let limit = Duration::from_secs(self.seconds.into()) + MARGIN;
        self.client.wait(limit)?;
        let report = self.client.stdout();
        let report: Value = serde_json::from_str(&report).context("iperf3 reports no JSON")?;
        let end = &report["end"];
        Ok([
            count(end, "").with_context(|| report.to_string())?,
            count(end, "_bidir_reverse").with_context(|| report.to_string())?,
        ])
    }
}

fn count(end: &Value, direction: &str) -> Option<UdpCount> {
    let number = |sum: &str, name: &str| end[format!("{sum}{direction}")][name].as_u64();
    Some(UdpCount {
        sent: number("sum_sent", "packets")?,
        lost: number("sum_received", "lost_packets")?,
    })
}
