//! One daemon hands its devices over to the next one, while a guest carries TCP connections of which
//! each byte is checked. The guest's link does not go down, and QEMU notices nothing.
//!
//! `UPGRADES=N` makes N upgrades of each kind, also of those that the others cover in short.

use std::os::unix::net::UnixStream;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use virtionet_handover::NewSide;
use virtionet_tests::attachment::Attachment;
use virtionet_tests::daemon::Options;
use virtionet_tests::echo_stream::EchoStreams;
use virtionet_tests::paths::virtionetctl;
use virtionet_tests::pause::pause_in_log;
use virtionet_tests::process::Proc;
use virtionet_tests::settings::number;
use virtionet_tests::testbed::{Testbed, TestbedConfig};
use virtionet_tests::topology::{GUEST, TAP};

const PAIRS: u16 = 2;
const DEFAULT_UPGRADES: u64 = 3;
/// How long the old daemon may take to end, all of its successor's start included.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// What each connection carries between two upgrades.
const PROGRESS: u64 = 256 << 10;
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(40);

#[test]
fn guest_with_split_virtqueues_on_a_tap_notices_no_upgrade() {
    check_if_long(Attachment::SPLIT_ON_TAP).unwrap();
}

#[test]
fn guest_with_packed_virtqueues_on_a_tap_notices_no_upgrade() {
    check(Attachment::PACKED_ON_TAP).unwrap();
}

#[test]
fn guest_with_split_virtqueues_on_a_switch_notices_no_upgrade() {
    check(Attachment::SPLIT_ON_SWITCH).unwrap();
}

#[test]
fn guest_with_packed_virtqueues_on_a_switch_notices_no_upgrade() {
    check_if_long(Attachment::PACKED_ON_SWITCH).unwrap();
}

#[test]
fn daemon_goes_on_if_its_successor_fails() {
    check_failures(Attachment::PACKED_ON_SWITCH.config(PAIRS)).unwrap();
}

#[test]
fn virtionetctl_upgrades_the_daemon_of_a_guest() {
    check_virtionetctl(Attachment::PACKED_ON_TAP.config(PAIRS)).unwrap();
}

/// Checks it if the long form is asked for.
fn check_if_long(attachment: Attachment) -> Result<()> {
    match std::env::var_os("UPGRADES") {
        Some(_) => check(attachment),
        None => Ok(()),
    }
}

fn check(attachment: Attachment) -> Result<()> {
    let upgrades = number("UPGRADES", DEFAULT_UPGRADES)?;
    let mut guest = UpgradedGuest::start(attachment.config(PAIRS))?;
    let mut pauses = Vec::new();
    for n in 0..upgrades {
        let pause = guest.upgrade(n);
        pauses.push(pause.map_err(|error| guest.explain(error))?);
    }
    pauses.sort_unstable();
    eprintln!(
        "{attachment:?}: {upgrades} upgrades, the devices were paused for {:?} (median), {:?} (longest)",
        pauses.get(pauses.len() / 2),
        pauses.last()
    );
    guest.finish()
}

fn check_failures(config: TestbedConfig) -> Result<()> {
    let mut guest = UpgradedGuest::start(config)?;
    let testbed = &guest.testbed;
    // One with other devices refuses by itself.
    let options = guest.options().flag("--name", "other");
    let exit = options
        .take_over("other")
        .run_to_end(&testbed.dir, "vnet")?;
    ensure!(exit.status.code() == Some(1), "{exit:?}");
    ensure!(exit.stderr.contains("its devices are vnet"), "{exit:?}");
    guest.wait_for_progress()?;
    // One is gone while the devices are paused.
    for _ in 0..3 {
        let path = guest.testbed.dir.join("handover");
        let (side, _) = NewSide::hello(UnixStream::connect(path)?, "test")?;
        let state = side.ready()?;
        ensure!(state.devices.len() == 1, "{state:?}");
        drop((side, state));
        guest.wait_for_progress()?;
    }
    let log = guest.testbed.daemon.stderr();
    let failures = log.matches("the devices are not handed over").count();
    ensure!(failures == 4, "{failures} failures: {log}");
    // And then one succeeds, also with other settings.
    guest.upgrade(0)?;
    guest.other_flags = &[
        ("--queues", "2"),
        ("--poll", "adaptive"),
        ("--placement", "none"),
        ("--sandbox", "log"),
        ("--helper", "off"),
    ];
    guest.upgrade(1)?;
    guest.finish()
}

fn check_virtionetctl(config: TestbedConfig) -> Result<()> {
    let mut guest = UpgradedGuest::start(config)?;
    let old = guest.testbed.daemon.pid();
    // What takes over nothing leaves the devices where they are.
    let (status, output) = guest.virtionetctl("failing", &["--binary", "/bin/false"])?;
    ensure!(status.code() == Some(1), "{status}: {output}");
    ensure!(
        output.contains(&format!("(process {old}) goes on")),
        "{output}"
    );
    guest.wait_for_progress()?;
    let (status, output) = guest.virtionetctl("upgrading", &[])?;
    let new = &guest.testbed.daemon.get("/v1/devices")?["process"];
    let _ended = EndedAtLast::of(new)?;
    ensure!(status.success(), "{status}: {output}");
    let sentence = format!("(process {}) has taken over from virtionetd", new["pid"]);
    ensure!(output.contains(&sentence), "{output}");
    ensure!(
        output.contains("1 device, which was paused for"),
        "{output}"
    );
    ensure!(new["pid"] != old && new["taken_over"].is_object(), "{new}");
    guest.wait_for_progress()?;
    // The next successor has all that this one had, which is no child of this process.
    guest.upgrade(0)?;
    guest.finish()
}

/// A process that is killed when this value is dropped.
struct EndedAtLast(Pid);

impl EndedAtLast {
    /// The process of a report.
    fn of(process: &Value) -> Result<Self> {
        let pid = process["pid"].as_i64().context("no process id")?;
        Ok(Self(Pid::from_raw(i32::try_from(pid)?)))
    }
}

impl Drop for EndedAtLast {
    fn drop(&mut self) {
        // An error means that it has ended already.
        _ = kill(self.0, Signal::SIGKILL);
    }
}

/// A guest whose daemon has a successor, again and again.
struct UpgradedGuest {
    testbed: Testbed,
    config: TestbedConfig,
    echo: EchoStreams,
    link: String,
    frames: u64,
    /// Flags of the next daemons.
    other_flags: &'static [(&'static str, &'static str)],
}

impl UpgradedGuest {
    /// QEMU does not connect again, so a connection that is lost is the guest's network lost.
    fn start(config: TestbedConfig) -> Result<Self> {
        let testbed = config
            .start_with(|options, dir| options.flag("--handover-socket", dir.join("handover")))?;
        let guest = testbed.qemu.guest();
        let echo = EchoStreams::start(testbed.network.netns(), guest, GUEST.v4, PAIRS)?;
        echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
        Ok(Self {
            link: link_changes(&testbed)?,
            testbed,
            config,
            echo,
            frames: 0,
            other_flags: &[],
        })
    }

    fn options(&self) -> Options {
        let socket = self.testbed.dir.join("handover");
        let options = self.config.options(&self.testbed.network);
        options.flag("--handover-socket", socket)
    }

    /// Starts a successor, and returns how long the devices were paused.
    fn upgrade(&mut self, n: u64) -> Result<Duration> {
        let mut options = self.options().take_over(&format!("vnet-{n}"));
        for (flag, value) in self.other_flags {
            options = options.flag(flag, value);
        }
        let successor = options.start(&self.testbed.dir, "vnet")?;
        let mut old = std::mem::replace(&mut self.testbed.daemon, successor);
        let status = old.proc().wait(END_TIMEOUT)?;
        let log = old.stderr();
        ensure!(status.success(), "the old daemon: {status}: {log}");
        self.wait_for_progress()?;
        ensure!(
            link_changes(&self.testbed)? == self.link,
            "the link of the guest went down"
        );
        let device = self.testbed.daemon.device()?;
        let frames = frames(&device);
        ensure!(
            frames > self.frames,
            "the successor has counted {frames} frames, and the daemons before it {}",
            self.frames
        );
        self.frames = frames;
        pause_in_log(&log)
    }

    /// Runs `virtionetctl upgrade` with these arguments. Returns its status and its output, to which
    /// the messages of the daemon that it started belong.
    fn virtionetctl(&self, name: &str, args: &[&str]) -> Result<(ExitStatus, String)> {
        let Testbed { dir, network, .. } = &self.testbed;
        let control = self.testbed.daemon.control().display().to_string();
        let all = [&["upgrade", "--control", &control], args].concat();
        let netns = Some(network.netns().name());
        let mut proc = Proc::spawn(dir, name, netns, virtionetctl()?, all)?;
        let status = proc.wait(END_TIMEOUT)?;
        Ok((status, proc.stdout() + &proc.stderr()))
    }

    fn wait_for_progress(&self) -> Result<()> {
        self.echo.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)
    }

    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let device = self.testbed.daemon.device();
        error.context(format!("{}\n{device:#?}", self.testbed.daemon.stderr()))
    }

    /// Checks every byte, and that the last daemon removes what the first one made.
    fn finish(self) -> Result<()> {
        let bytes = self.echo.finish()?;
        eprintln!("{bytes} bytes came back as they were sent");
        let (dir, network) = (&self.testbed.dir, &self.testbed.network);
        let exit = self.testbed.daemon.stop(Signal::SIGTERM)?;
        ensure!(exit.status.success(), "{exit:?}");
        for socket in ["handover", "vnet.control"] {
            ensure!(!dir.join(socket).exists(), "{socket} is left");
        }
        let links = network.netns().run("ip", ["link"])?;
        ensure!(!links.contains(TAP), "the TAP is left: {links}");
        Ok(())
    }
}

/// How often the guest's link changed, and its boot.
fn link_changes(testbed: &Testbed) -> Result<String> {
    let guest = testbed.qemu.guest();
    guest.ok("cat /sys/class/net/eth0/carrier_changes /proc/sys/kernel/random/boot_id")
}

/// The frames that the device has carried, both ways.
fn frames(device: &Value) -> u64 {
    let pairs = device["pairs"].as_array().into_iter().flatten();
    pairs
        .flat_map(|pair| [&pair["rx"], &pair["tx"]])
        .filter_map(|vring| vring["counters"]["frames"].as_u64())
        .sum()
}
