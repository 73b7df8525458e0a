//! A soak test: one daemon, seven devices, and for as long as `SOAK_SECONDS` says (default: 20)
//! random actions of hostile drivers, of front-ends that die, of the host, and of a real guest. All
//! the while, a well-behaved pair of devices carries numbered frames.
//!
//! The time is divided into rounds. In a round, one thread for each attacked device acts, and waits
//! after each action until its device and the well-behaved one carry frames. At the end of a round,
//! the attacked devices are disconnected. Then the daemon must hold exactly the descriptors and
//! threads that it held after the first round, little more memory than then, and its counters must
//! match those of the drivers. At the end of the run, all devices are disconnected, and the daemon
//! must hold what it held when all had been connected once.
//!
//! `SOAK_SEED` repeats the actions of a run. Each thread has a sequence of its own, so that the
//! order within a thread is the same again; the order between the threads depends on the machine.
#![allow(clippy::unwrap_used)]

mod attackers;
mod daemon_under_test;
mod endpoint;
mod guest;
mod journal;
mod tap_attacker;
mod usage;
mod well_behaved;

use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use virtionet_tests::qemu::Qemu;
use virtionet_tests::random::Random;
use virtionet_tests::settings::{number, seed};

use attackers::{assert_switch_counters, attack_null, attack_switch};
use daemon_under_test::DaemonUnderTest;
use endpoint::Endpoint;
use tap_attacker::TapAttacker;
use usage::Usage;
use well_behaved::WellBehavedPair;

/// The duration without `SOAK_SECONDS`, in seconds.
const DEFAULT_SECONDS: u64 = 20;
/// The shortest and the longest round, in milliseconds.
const ROUND_MILLISECONDS: (u64, u64) = (2000, 6000);

/// The devices that are attacked.
struct Attacked {
    null: Endpoint,
    switch: [Endpoint; 2],
    tap: TapAttacker,
}

impl Attacked {
    fn new(under_test: &DaemonUnderTest) -> Self {
        let on_switch = |(n, name)| Endpoint::new(name, attackers::mac(n));
        Self {
            null: Endpoint::new("null", 0x40),
            switch: [(0, "bad0"), (1, "bad1")].map(on_switch),
            tap: TapAttacker::new(under_test),
        }
    }

    /// Attacks all devices at the same time until `end`. No front-end of them is connected
    /// afterwards.
    fn attack(
        &mut self,
        under_test: &DaemonUnderTest,
        guest: Option<&Qemu>,
        seed: u64,
        end: Instant,
    ) {
        thread::scope(|scope| {
            let (null, switch, tap) = (&mut self.null, &mut self.switch, &mut self.tap);
            scope.spawn(move || attack_null(under_test, null, Random::new(seed, 1), end));
            scope.spawn(move || attack_switch(under_test, switch, Random::new(seed, 2), end));
            scope.spawn(move || tap.attack(under_test, Random::new(seed, 3), end));
            if let Some(guest) = guest {
                scope.spawn(move || {
                    guest::reconfigure(under_test, guest, Random::new(seed, 4), end);
                });
            }
        });
    }

    /// Attacks for `duration`, and checks after each round what the daemon holds and counts.
    fn attack_in_rounds(
        &mut self,
        under_test: &DaemonUnderTest,
        guest: Option<&Qemu>,
        random: &mut Random,
        duration: Duration,
    ) {
        let end = Instant::now() + duration;
        let pid = under_test.daemon.pid();
        let mut first: Option<Usage> = None;
        while Instant::now() < end {
            let (shortest, longest) = ROUND_MILLISECONDS;
            let length = Duration::from_millis(random.range(shortest, longest));
            let round_end = end.min(Instant::now() + length);
            self.attack(under_test, guest, random.range(0, u64::MAX - 1), round_end);
            self.assert_counters(under_test);
            assert_healthy(under_test);
            let usage = match first {
                None => Usage::read_settled(pid),
                Some(first) => first.assert_returned(pid),
            };
            let left = end.saturating_duration_since(Instant::now());
            eprintln!("{left:.1?} left: {usage:?}");
            first.get_or_insert(usage);
        }
    }

    fn devices(&self) -> [&Endpoint; 4] {
        let [bad0, bad1] = &self.switch;
        [&self.null, bad0, bad1, &self.tap.device]
    }

    /// The number of frames that the drivers have sent and received.
    fn totals(&self) -> (u64, u64) {
        let totals = self.devices().map(Endpoint::totals);
        totals
            .iter()
            .fold((0, 0), |sum, (tx, rx)| (sum.0 + tx, sum.1 + rx))
    }

    fn assert_counters(&self, under_test: &DaemonUnderTest) {
        for device in self.devices() {
            device.assert_counters(&under_test.device(device.name));
        }
        assert_switch_counters(under_test);
    }
}

#[test]
fn a_daemon_under_random_attacks_neither_stalls_nor_leaks_and_counts_every_frame() {
    let seed = seed("SOAK_SEED").unwrap();
    let duration = Duration::from_secs(number("SOAK_SECONDS", DEFAULT_SECONDS).unwrap());
    eprintln!("SOAK_SEED={seed} for {duration:?}");
    let under_test = DaemonUnderTest::start(seed);
    let pid = under_test.daemon.pid();
    let mut attacked = Attacked::new(&under_test);
    let mut random = Random::new(seed, 0);

    let warm_up = Instant::now() + Duration::from_secs(2);
    let well_behaved = WellBehavedPair::start(&under_test);
    attacked.attack(&under_test, None, random.range(0, u64::MAX - 1), warm_up);
    well_behaved.stop(&under_test);
    let unconnected = Usage::read_settled(pid);
    eprintln!("after the warm-up: {unconnected:?}");

    // The well-behaved devices would slow an emulated guest's boot down.
    let guest = guest::boot(&under_test);
    if guest.is_none() {
        eprintln!("there is no guest: install QEMU and run ci/guest-image");
    }
    let well_behaved = WellBehavedPair::start(&under_test);
    attacked.attack_in_rounds(&under_test, guest.as_ref(), &mut random, duration);

    drop(guest);
    well_behaved.stop(&under_test);
    under_test.wait_for("guest", "disconnected", |d| d["connected"] == false);
    let at_end = unconnected.assert_all_returned(pid);
    let actions = under_test.journal.count();
    let (sent, received) = attacked.totals();
    eprintln!(
        "{actions} actions; attacked devices took {sent} chains and delivered {received} frames, \
         the well-behaved one {:?}; {at_end:?}",
        under_test.progress
    );
    let exit = under_test.daemon.stop(Signal::SIGTERM).unwrap();
    assert!(exit.status.success(), "{exit:?}");
}

fn assert_healthy(under_test: &DaemonUnderTest) {
    let report = under_test.daemon.get("/v1/devices").unwrap();
    assert_eq!(report["panics"], 0, "{report}");
}
