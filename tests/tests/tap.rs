//! A TAP that somebody else made, and what a daemon without privileges may do.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

use anyhow::Result;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::TestFrontendConfig;
use virtionet_tests::daemon::{Options, Stopped};
use virtionet_tests::paths::{self, RunDir};
use virtionet_tests::process::output;
use virtionet_tests::responder::{EchoResponder, Identity};
use virtionet_tests::topology::{GUEST, HostNetwork, TAP};

const NOBODY: u32 = 65534;

#[test]
fn an_unprivileged_user_serves_a_tap_of_its_own() {
    let user = User::new().unwrap();
    let add = format!("tuntap add dev {TAP} mode tap user {NOBODY} multi_queue vnet_hdr");
    user.network.netns().ip(&add).unwrap();
    user.network.configure().unwrap();
    let daemon = user.options().start(&user.dir, "vnet").unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    for line in ["Uid:\t65534\t65534", "CapEff:\t0000000000000000"] {
        assert!(status.contains(line), "{status}");
    }

    let config = TestFrontendConfig::new(2, 256, MODERN);
    let who = Identity::at(GUEST.v4).unwrap();
    let responder = EchoResponder::connect(daemon.socket(), &config, who).unwrap();
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
        .expect("the TAP outlives its users");
}

#[test]
fn an_unprivileged_user_is_told_what_to_ask_for() {
    let user = User::new().unwrap();
    let refused = user.options().run_to_end(&user.dir, "none").unwrap();
    assert_one_error_line(
        &refused,
        &["user 65534 may not make TAP tap0", "CAP_NET_ADMIN"],
    );

    let netns = user.network.netns();
    let add = "mode tap multi_queue vnet_hdr user 1";
    netns.ip(&format!("tuntap add dev {TAP} {add}")).unwrap();
    let refused = user.options().run_to_end(&user.dir, "other").unwrap();
    let wanted = "does not belong to user 65534";
    assert_one_error_line(&refused, &[wanted, "user 65534 multi_queue vnet_hdr"]);

    fs::set_permissions(&user.tun, fs::Permissions::from_mode(0o600)).unwrap();
    let refused = user.options().run_to_end(&user.dir, "closed").unwrap();
    assert_one_error_line(
        &refused,
        &["/dev/net/tun may not be opened by user 65534", "access"],
    );
}

#[test]
fn a_tap_that_cannot_be_used_is_named_with_the_remedy() {
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::bare().unwrap();
    let options = Options::new().netns(network.netns()).flag("--tap", TAP);
    let holder = options.start(&dir, "holder").unwrap();
    let refused = options.run_to_end(&dir, "second").unwrap();
    assert_one_error_line(&refused, &["TAP tap0 is held by another process", "stop"]);
    drop(holder);

    let single = format!("tuntap add dev {TAP} mode tap vnet_hdr");
    network.netns().ip(&single).unwrap();
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

/// All that it said is one sentence with these parts, and it failed.
fn assert_one_error_line(stopped: &Stopped, parts: &[&str]) {
    assert_eq!(stopped.status.code(), Some(1), "{stopped:?}");
    let text = stopped.stderr.trim();
    assert!(text.starts_with("virtionetd: vnet: "), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    for part in parts {
        assert!(text.contains(part), "no '{part}' in: {text}");
    }
}

/// A user without privileges in a namespace, with a directory of its own.
struct User {
    network: HostNetwork,
    dir: RunDir,
    /// Where it may read the program: the checkout may be closed to it.
    program: PathBuf,
    /// A /dev/net/tun that everybody may open, as it is on most hosts.
    tun: PathBuf,
}

impl User {
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
        chown(dir.join("."), Some(NOBODY), Some(NOBODY))?;
        Ok(Self {
            network: HostNetwork::bare()?,
            dir,
            program,
            tun,
        })
    }

    /// `ip netns exec` gives each program a mount namespace of its own.
    fn options(&self) -> Options {
        let bind = format!(
            "mount --bind {} /dev/net/tun && exec setpriv --pdeathsig KILL --reuid {NOBODY} --regid {NOBODY} --clear-groups --inh-caps=-all --bounding-set=-all \"$@\"",
            self.tun.display()
        );
        Options::new()
            .netns(self.network.netns())
            .program(&self.program)
            .wrapped_in(["sh", "-c", &bind, "sh"])
            .flag("--tap", TAP)
    }
}
