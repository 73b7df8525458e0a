//! Measures what an upgrade costs each vring: every 100 µs the driver sends a small frame and is fed
//! one, and the table says for how long none arrived, for each upgrade the longest such time of all
//! vrings. Before each upgrade a chain of bare wake-ups is measured beside the same load, as many as an
//! upgrade needs one after the other: it cannot be faster than that. `VIRTIONETD` names the program, the
//! arguments are the number of upgrades and of queue pairs:
//!
//! ```text
//! VIRTIONETD=target/release/virtionetd cargo run --release -p virtionet-tests --example upgrade 100 1
//! ```

#![allow(clippy::print_stdout)]

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use virtionet_tests::quantile::quantile;
use virtionet_tests::traffic::Flow;
use virtionet_tests::traffic::probe::Probe;
use virtionet_tests::traffic::testbed::{Setup, TrafficTestbed};
use virtionet_tests::wake_chain::WakeChain;

/// The wake-ups of an upgrade: a worker, the main thread that joins it, a session, the main thread, the
/// new daemon for the state, the old one, the new one for the commit, a session, a worker.
const WAKE_UPS: usize = 9;

/// The time between two upgrades, in which all frames that waited arrive.
const PAUSE: Duration = Duration::from_millis(50);

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let upgrades: u32 = args.next().map_or(Ok(100), |n| n.parse())?;
    let pairs: Vec<u16> = args.map(|n| n.parse()).collect::<Result<_, _>>()?;
    let pairs = match pairs.is_empty() {
        true => vec![1, 4],
        false => pairs,
    };
    println!(
        "| setup | pause by the daemon: median, longest | bare wake-ups: median, longest | without a frame: median, p99, longest | without an upgrade | probe late | sent | lost, reordered, repeated |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for setup in pairs.into_iter().flat_map(Setup::all) {
        println!("{}", measure(setup, upgrades)?);
    }
    Ok(())
}

fn measure(setup: Setup, upgrades: u32) -> Result<String> {
    let mut testbed = TrafficTestbed::start(setup)?;
    let probe = Probe::start(testbed.connect()?)?;
    sleep(PAUSE);
    let chain = WakeChain::start(WAKE_UPS)?;
    let (mut pauses, mut floor) = (vec![], vec![]);
    let (mut gaps, mut quiet, mut late) = (vec![], vec![], vec![]);
    let longest = |gaps: Vec<Duration>| gaps.into_iter().max().context("there is no flow");
    for n in 0..upgrades {
        probe.take_round()?;
        sleep(PAUSE);
        quiet.push(longest(probe.take_round()?.gaps)?);
        floor.push(chain.measure(|| {
            sleep(Duration::from_micros(100));
            Ok(())
        })?);
        pauses.push(testbed.upgrade(&format!("vnet-{n}"))?);
        sleep(PAUSE);
        let round = probe.take_round()?;
        gaps.push(longest(round.gaps)?);
        late.push(round.own_gap);
    }
    let traffic = probe.stop()?;
    let sum = |of: fn(&Flow) -> u64| -> u64 { traffic.flows.iter().map(of).sum() };
    Ok(format!(
        "| {:?}, {}, {} pairs | {:.1?}, {:.1?} | {:.1?}, {:.1?} | {:.1?}, {:.1?}, {:.1?} | {:.1?} | {:.1?} | {} | {}, {}, {} |",
        setup.uplink,
        if setup.is_packed { "packed" } else { "split" },
        setup.pairs,
        quantile(&mut pauses, 0.5),
        quantile(&mut pauses, 1.0),
        quantile(&mut floor, 0.5),
        quantile(&mut floor, 1.0),
        quantile(&mut gaps, 0.5),
        quantile(&mut gaps, 0.99),
        quantile(&mut gaps, 1.0),
        quantile(&mut quiet, 1.0),
        quantile(&mut late, 1.0),
        sum(|flow| flow.sent),
        sum(|flow| flow.check.lost()),
        sum(|flow| flow.check.reordered),
        sum(|flow| flow.check.repeated),
    ))
}
