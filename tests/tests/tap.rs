//! TAPs that other programs have created, and daemons without privileges.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

use anyhow::Result;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::TestFrontendConfig;
use virtionet_tests::daemon::{DaemonExit, Options};
use virtionet_tests::paths::{self, RunDir};
use virtionet_tests::process::output;
use virtionet_tests::responder::{EchoResponder, ResponderAddresses};
use virtionet_tests::topology::{GUEST, HostNetwork, TAP};

const NOBODY_UID: u32 = 65534;

#[test]
fn unprivileged_daemon_serves_a_tap_that_belongs_to_its_user() {
    let user = UnprivilegedUser::new().unwrap();
    let add = format!("tuntap add dev {TAP} mode tap user {NOBODY_UID} multi_queue vnet_hdr");
    user.network.netns().ip(&add).unwrap();
    user.network.configure().unwrap();
    let daemon = user.options().start(&user.dir, "vnet").unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    for line in ["Uid:\t65534\t65534", "CapEff:\t0000000000000000"] {
        assert!(status.contains(line), "{status}");
    }

    let config = TestFrontendConfig::new(2, 256, MODERN);
    let addresses = ResponderAddresses::from_ipv4(GUEST.v4).unwrap();
    let responder = EchoResponder::connect(daemon.socket(), &config, addresses).unwrap();
    user.network.wait_for_ping(GUEST.v4).unwrap();
    let link = user
        .network
        .netns()
        .ip(&format!("-d link show {TAP}"))
        .unwrap();
    assert!(link.contains("numqueues 2"), "{link}");
    drop(responder);
    drop(daemon);
    user.network
        .netns()
        .ip(&format!("link show {TAP}"))
        .expect("the daemon must not remove a TAP that it has not created");
}

#[test]
fn unprivileged_daemon_without_access_to_its_tap_is_refused_with_the_remedy() {
    let user = UnprivilegedUser::new().unwrap();
    let refused = user.options().run_to_end(&user.dir, "none").unwrap();
    assert_one_error_line(
        &refused,
        &["user 65534 may not make TAP tap0", "CAP_NET_ADMIN"],
    );

    let netns = user.network.netns();
    let tap_options = "mode tap multi_queue vnet_hdr user 1";
    netns
        .ip(&format!("tuntap add dev {TAP} {tap_options}"))
        .unwrap();
    let refused = user.options().run_to_end(&user.dir, "other").unwrap();
    let cause = "does not belong to user 65534";
    assert_one_error_line(&refused, &[cause, "user 65534 multi_queue vnet_hdr"]);

    fs::set_permissions(&user.tun, fs::Permissions::from_mode(0o600)).unwrap();
    let refused = user.options().run_to_end(&user.dir, "closed").unwrap();
    assert_one_error_line(
        &refused,
        &["/dev/net/tun may not be opened by user 65534", "access"],
    );
}

#[test]
fn unusable_tap_or_bridge_is_refused_with_the_remedy() {
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::bare().unwrap();
    let options = Options::new().netns(network.netns()).flag("--tap", TAP);
    let holder = options.start(&dir, "holder").unwrap();
    let refused = options.run_to_end(&dir, "second").unwrap();
    assert_one_error_line(&refused, &["TAP tap0 is held by another process", "stop"]);
    drop(holder);

    let add_single_queue = format!("tuntap add dev {TAP} mode tap vnet_hdr");
    network.netns().ip(&add_single_queue).unwrap();
    let refused = options.run_to_end(&dir, "single").unwrap();
    assert_one_error_line(
        &refused,
        &["TAP tap0 takes one queue only", "multi_queue vnet_hdr"],
    );

    let options = Options::new().netns(network.netns()).flag("--tap", "lo");
    let refused = options.run_to_end(&dir, "lo").unwrap();
    assert_one_error_line(&refused, &["lo is no TAP", "ip tuntap add"]);

    let options = Options::new().netns(network.netns());
    let options = options.flag("--tap", "tap1,bridge=br7");
    let refused = options.run_to_end(&dir, "bridge").unwrap();
    assert_one_error_line(&refused, &["no bridge br7", "ip link add br7 type bridge"]);
}

/// Checks that the daemon has failed, and has printed one line that contains these parts.
fn assert_one_error_line(stopped: &DaemonExit, parts: &[&str]) {
    assert_eq!(stopped.status.code(), Some(1), "{stopped:?}");
    let text = stopped.stderr.trim();
    assert!(text.starts_with("virtionetd: vnet: "), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    for part in parts {
        assert!(text.contains(part), "no '{part}' in: {text}");
    }
}

/// An unprivileged user with a network namespace and a directory.
struct UnprivilegedUser {
    network: HostNetwork,
    dir: RunDir,
    /// A copy of the program, because the user may not have access to the checkout.
    program: PathBuf,
    /// A device node that replaces /dev/net/tun. Every user may open it, as on most hosts.
    tun: PathBuf,
}

impl UnprivilegedUser {
    fn new() -> Result<Self> {
        let dir = RunDir::new()?;
        let program = dir.join("virtionetd");
        fs::copy(paths::virtionetd()?, &program)?;
        let tun = dir.join("tun");
        output(
            "mknod",
            [tun.as_os_str(), "c".as_ref(), "10".as_ref(), "200".as_ref()],
        )?;
        fs::set_permissions(&tun, fs::Permissions::from_mode(0o666))?;
        chown(dir.join("."), Some(NOBODY_UID), Some(NOBODY_UID))?;
        Ok(Self {
            network: HostNetwork::bare()?,
            dir,
            program,
            tun,
        })
    }

    /// Returns the options of a daemon that runs as this user. The bind mount does not affect other
    /// programs, because `ip netns exec` creates a mount namespace for each program.
    fn options(&self) -> Options {
        let bind = format!(
            "mount --bind {} /dev/net/tun && exec setpriv --pdeathsig KILL --reuid {NOBODY_UID} --regid {NOBODY_UID} --clear-groups --inh-caps=-all --bounding-set=-all \"$@\"",
            self.tun.display()
        );
        Options::new()
            .netns(self.network.netns())
            .program(&self.program)
            .wrapped_in(["sh", "-c", &bind, "sh"])
            .flag("--tap", TAP)
    }
}
