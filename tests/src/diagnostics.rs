//! Diagnostics for a guest that has booted but does not answer. They are printed immediately,
//! because the guest, the daemon and the network are removed at the end of the run.

use anyhow::{Error, Result};

use crate::daemon::Daemon;
use crate::guest::Guest;
use crate::topology::{GUEST, HOST, HostNetwork, TAP};

/// Commands for the guest. They show whether the interface has its addresses, whether interrupts
/// arrive, whether the guest has resolved the host's address, and what the kernel has logged.
const GUEST_COMMANDS: [&str; 5] = [
    "ip -s link; ip addr; ip neigh",
    "ethtool -l eth0; for q in /sys/class/net/eth0/queues/*; do echo $q; cat $q/xps_cpus 2>/dev/null; done",
    "grep -E 'CPU|virtio' /proc/interrupts",
    "sleep 2; grep -E 'virtio' /proc/interrupts; cat /proc/net/softnet_stat",
    "dmesg | tail -n 40",
];

/// Waits until the guest answers a ping, for at most 30 s.
///
/// # Errors
/// When it does not answer. The state of the daemon, the host and the guest is then printed on
/// stderr.
pub fn wait_for_ping(network: &HostNetwork, guest: &Guest, daemon: Option<&Daemon>) -> Result<()> {
    network
        .wait_for_ping(GUEST.v4)
        .inspect_err(|error| print_diagnostics(error, network, guest, daemon))
}

fn print_diagnostics(error: &Error, network: &HostNetwork, guest: &Guest, daemon: Option<&Daemon>) {
    eprintln!("DIAGNOSTICS of a guest that does not answer ({error:#}):");
    // The counters are printed before and after pings: those of a stalled ring do not change.
    let print_devices = |title: &str| {
        if let Some(daemon) = daemon {
            print_section(title, daemon.get_text("/v1/devices"));
        }
    };
    print_devices("devices");
    let netns = network.netns();
    print_section("host's link", netns.ip(&format!("-s link show {TAP}")));
    print_section("host's neighbours", netns.ip("neigh"));
    let one_ping = ["ping", "-c", "3", "-W", "1", GUEST.v4];
    print_section("host's ping", netns.run("busybox", one_ping));
    print_devices("devices after 3 pings from the host");
    for command in GUEST_COMMANDS {
        print_section(&format!("guest: {command}"), guest.ok(command));
    }
    // These pings test the other direction without an earlier frame from the host.
    let guest_ping = format!("ping -c 3 -W 1 {}; ip neigh", HOST.v4);
    print_section("guest: ping to the host", guest.ok(&guest_ping));
    print_devices("devices after 3 pings from the guest");
    if let Some(daemon) = daemon {
        eprintln!("-- daemon's log:\n{}", daemon.stderr());
    }
    eprintln!("-- guest's console:\n{}", guest.console());
}

fn print_section(title: &str, output: Result<String>) {
    match output {
        Ok(text) => eprintln!("-- {title}:\n{text}"),
        Err(error) => eprintln!("-- {title}: {error:#}"),
    }
}
