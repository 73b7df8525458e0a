//! What is worth knowing when a guest that has booted does not answer: shown at once, because
//! what could be looked at later is gone with the run.

use anyhow::{Error, Result};

use crate::daemon::Daemon;
use crate::guest::Guest;
use crate::topology::{GUEST, HOST, HostNetwork, TAP};

/// In the guest: does the card have its addresses, do its interrupts come, does it know the host,
/// and what did its kernel say.
const GUEST_COMMANDS: [&str; 5] = [
    "ip -s link; ip addr; ip neigh",
    "ethtool -l eth0; for q in /sys/class/net/eth0/queues/*; do echo $q; cat $q/xps_cpus 2>/dev/null; done",
    "grep -E 'CPU|virtio' /proc/interrupts",
    "sleep 2; grep -E 'virtio' /proc/interrupts; cat /proc/net/softnet_stat",
    "dmesg | tail -n 40",
];

/// Waits until the guest answers a ping.
///
/// # Errors
/// When it does not, after the daemon's, the host's and the guest's account of it are on stderr.
pub fn wait_for_ping(network: &HostNetwork, guest: &Guest, daemon: Option<&Daemon>) -> Result<()> {
    network
        .wait_for_ping(GUEST.v4)
        .inspect_err(|error| print_diagnostics(error, network, guest, daemon))
}

fn print_diagnostics(error: &Error, network: &HostNetwork, guest: &Guest, daemon: Option<&Daemon>) {
    eprintln!("EVIDENCE of a guest that does not answer ({error:#}):");
    // A ring that stands still shows by counters that do not change while it is pinged.
    let account = |what: &str| {
        if let Some(daemon) = daemon {
            print_section(what, daemon.get_text("/v1/devices"));
        }
    };
    account("devices");
    let netns = network.netns();
    print_section("host's link", netns.ip(&format!("-s link show {TAP}")));
    print_section("host's neighbours", netns.ip("neigh"));
    let one_ping = ["ping", "-c", "3", "-W", "1", GUEST.v4];
    print_section("host's ping", netns.run("busybox", one_ping));
    account("devices after 3 pings");
    for command in GUEST_COMMANDS {
        print_section(&format!("guest: {command}"), guest.ok(command));
    }
    // The other direction, which needs no frame from the host first.
    let back = format!("ping -c 3 -W 1 {}; ip neigh", HOST.v4);
    print_section("guest: ping to the host", guest.ok(&back));
    account("devices after the guest's pings");
    if let Some(daemon) = daemon {
        eprintln!("-- daemon's log:\n{}", daemon.stderr());
    }
    eprintln!("-- guest's console:\n{}", guest.console());
}

fn print_section(what: &str, output: Result<String>) {
    match output {
        Ok(text) => eprintln!("-- {what}:\n{text}"),
        Err(error) => eprintln!("-- {what}: {error:#}"),
    }
}
