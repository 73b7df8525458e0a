//! An upgrade loses no frame, repeats none and changes no order, in any vring, while each carries
//! 10,000 frames a second. How long it takes is measured by the example `upgrade`.
//!
//! `UPGRADES=N` makes N upgrades of each kind.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use virtionet_tests::quantile::quantile;
use virtionet_tests::settings::number;
use virtionet_tests::traffic::probe::Probe;
use virtionet_tests::traffic::testbed::{Setup, TrafficTestbed};

const PAIRS: u16 = 2;
const DEFAULT_UPGRADES: u64 = 3;
/// The time between two upgrades.
const PAUSE: Duration = Duration::from_millis(50);
/// What each flow must have carried after each upgrade, at least.
const MIN_FRAMES: u64 = 50;

#[test]
fn upgrade_neither_loses_nor_repeats_nor_reorders_a_frame() {
    for setup in Setup::all(PAIRS) {
        check(setup).unwrap();
    }
}

#[test]
fn upgrade_with_a_worker_for_all_queue_pairs_neither_loses_nor_reorders_a_frame() {
    for setup in Setup::all(PAIRS)
        .into_iter()
        .filter(|setup| setup.is_packed)
    {
        check(Setup {
            shares_worker: true,
            ..setup
        })
        .unwrap();
    }
}

fn check(setup: Setup) -> Result<()> {
    let upgrades = number("UPGRADES", DEFAULT_UPGRADES)?;
    let mut testbed = TrafficTestbed::start(setup)?;
    let probe = Probe::start(testbed.connect()?)?;
    let mut gaps = Vec::new();
    for n in 0..upgrades {
        sleep(PAUSE);
        probe.take_round()?;
        let upgraded = testbed.upgrade(&format!("vnet-{n}"));
        upgraded.map_err(|error| error.context(testbed.daemon.stderr()))?;
        sleep(PAUSE);
        let round = probe.take_round()?;
        gaps.extend(round.gaps.into_iter().max());
    }
    let traffic = probe.stop()?;
    eprintln!(
        "{setup:?}: {upgrades} upgrades, no frame for {:.1?} (median), {:.1?} (longest)",
        quantile(&mut gaps, 0.5),
        quantile(&mut gaps, 1.0)
    );
    for flow in &traffic.flows {
        let check = &flow.check;
        let wrong = [check.lost(), check.reordered, check.repeated];
        ensure!(
            wrong == [0; 3] && check.received > MIN_FRAMES * upgrades,
            "lost, reordered, repeated: {wrong:?}\n{}",
            traffic.describe()
        );
    }
    Ok(())
}
