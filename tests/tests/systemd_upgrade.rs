//! `systemctl reload` upgrades the daemon of a service: a new main process, no restart, and no
//! front-end is disconnected. `systemctl restart` keeps the TAPs.
#![allow(clippy::unwrap_used)]

use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::TestFrontendConfig;
use virtionet_tests::paths::RunDir;
use virtionet_tests::process::Proc;
use virtionet_tests::responder::{EchoResponder, ResponderAddresses};
use virtionet_tests::systemd_service::Service;
use virtionet_tests::topology::{GUEST, HOST};

const CONFIG: &str = r#"
[[device]]
name = "web"
socket-path = "/run/virtionetd/web.sock"
tap = "vnet0"
"#;
/// The same with a device that the running daemon does not have.
const OTHER_CONFIG: &str = r#"
[[device]]
name = "other"
socket-path = "/run/virtionetd/web.sock"
tap = "vnet0"
"#;
/// With a second TAP.
const TWO_TAPS: &str = r#"
[[device]]
name = "web"
socket-path = "/run/virtionetd/web.sock"
tap = "vnet0"

[[device]]
name = "db"
socket-path = "/run/virtionetd/db.sock"
uplink = "switch:lan,tap=vnet1"
"#;
const TAP: &str = "vnet0";
const OTHER_TAP: &str = "vnet1";
/// What an administrator has added to the TAP.
const ROUTE: &str = "198.51.100.0/24";
const PAIRS: u16 = 2;
const TIMEOUT: Duration = Duration::from_secs(10);
/// What a ping that runs during an upgrade sends: about 4 s.
const PINGS: &str = "200";
const PING_INTERVAL: &str = "0.02";

#[test]
fn reload_upgrades_the_daemon_without_a_restart_or_a_disconnect() {
    let dir = RunDir::new().unwrap();
    let Some(service) = Service::boot(&dir, CONFIG).unwrap() else {
        return;
    };
    service.systemctl("start").unwrap();
    ip(&service, &format!("addr add {}/24 dev {TAP}", HOST.v4));
    let responder = connect(&service);
    for n in 0..2 {
        reload(&service, &dir, n);
    }
    refuse_other_configuration(&service);
    // systemd supervises the successor as it supervised the first process.
    drop(responder);
    crash(&service);
    service.systemctl("stop").unwrap();
    let log = service.log();
    assert!(log.contains(&Service::success()), "{log}");
    assert!(!service.control().exists(), "{log}");
    service.power_off().unwrap();
}

#[test]
fn restart_and_crash_keep_the_taps_with_their_addresses_and_routes() {
    let dir = RunDir::new().unwrap();
    let Some(service) = Service::boot(&dir, TWO_TAPS).unwrap() else {
        return;
    };
    service.systemctl("start").unwrap();
    ip(&service, &format!("addr add {}/24 dev {TAP}", HOST.v4));
    ip(
        &service,
        &format!("route add {ROUTE} via {} dev {TAP}", GUEST.v4),
    );
    let before = [TAP, OTHER_TAP].map(|tap| interface(&service, tap));
    assert!(
        before[0].contains(HOST.v4) && before[0].contains(ROUTE),
        "{before:?}"
    );
    let stays = |how: &str, taps: &[&str]| {
        for (tap, before) in taps.iter().zip(&before) {
            assert_eq!(
                &interface(&service, tap),
                before,
                "{how}: {}",
                service.log()
            );
        }
        drop(connect(&service));
    };
    stays("start", &[TAP, OTHER_TAP]);
    service.systemctl("restart").unwrap();
    stays("restart", &[TAP, OTHER_TAP]);
    // A successor has the TAPs from its predecessor, and after its crash they are still kept.
    service.systemctl("reload").unwrap();
    stays("reload", &[TAP, OTHER_TAP]);
    crash(&service);
    stays("crash", &[TAP, OTHER_TAP]);
    // One that the configuration has no more is removed.
    service.configure(CONFIG).unwrap();
    service.systemctl("restart").unwrap();
    stays("restart with one device", &[TAP]);
    wait_for(&service, "the end of a TAP", || {
        !exists(&service, OTHER_TAP)
    });
    service.systemctl("stop").unwrap();
    wait_for(&service, "the end of a TAP", || !exists(&service, TAP));
    service.systemctl("start").unwrap();
    assert!(!interface(&service, TAP).contains(HOST.v4));
    service.power_off().unwrap();
}

/// The number of an interface, its addresses and its routes.
fn interface(service: &Service, name: &str) -> String {
    let ip = |args: &str| ip(service, &format!("{args} dev {name}"));
    let link = ip("-oneline -4 addr show") + &ip("-4 route show");
    let path = format!("/sys/class/net/{name}/ifindex");
    let index = service.machine().run("cat", [&*path]).unwrap();
    // Without a front-end the kernel may add that the link is down.
    index + &link.replace(" linkdown", "")
}

fn exists(service: &Service, interface: &str) -> bool {
    let path = format!("/sys/class/net/{interface}");
    service.machine().run("test", ["-d", &*path]).is_ok()
}

/// Kills the main process, and waits until systemd has restarted the service.
fn crash(service: &Service) {
    let main = service.property("MainPID").unwrap();
    service.machine().run("kill", ["-KILL", &main]).unwrap();
    wait_for(service, "a restart", || {
        service.property("NRestarts").unwrap() == "1"
            && service.property("SubState").unwrap() == "running"
    });
    assert_ne!(service.property("MainPID").unwrap(), main);
}

/// Upgrades while pings are sent, all of which are answered.
fn reload(service: &Service, dir: &RunDir, n: usize) {
    let before = main_process(service);
    let frames = frames(&service.report().unwrap());
    let mut ping = start_ping(service, dir, &format!("ping{n}"));
    wait_for(service, "pings", || {
        self::frames(&service.report().unwrap()) > frames + 2
    });
    service.systemctl("reload").unwrap();
    let log = service.log();
    let after = main_process(service);
    assert_ne!(after, before, "{log}");
    let summaries = log.matches("has taken over from virtionetd").count();
    assert_eq!(summaries, n + 1, "{log}");
    let report = service.report().unwrap();
    assert_eq!(report["process"]["pid"].to_string(), after, "{log}");
    let device = &report["devices"][0];
    assert_eq!(device["connected"], true, "{log}");
    assert!(!service.has_process(&before), "{log}");
    let status = ping.wait(TIMEOUT).unwrap();
    let statistics = ping.stdout();
    assert!(status.success(), "{statistics} {log}");
    let link = ip(service, &format!("-s link show {TAP}"));
    let device = &service.report().unwrap()["devices"][0];
    assert!(
        statistics.contains(" 0% packet loss"),
        "{statistics} {link} {device:#} {log}"
    );
    assert!(self::frames(&service.report().unwrap()) > frames, "{log}");
}

/// The main process of the service, which was never restarted.
fn main_process(service: &Service) -> String {
    for (property, value) in [
        ("ActiveState", "active"),
        ("SubState", "running"),
        ("NRestarts", "0"),
    ] {
        let now = service.property(property).unwrap();
        assert_eq!(now, value, "{property}: {}", service.log());
    }
    service.property("MainPID").unwrap()
}

/// A successor that cannot take over costs nothing but the reload.
fn refuse_other_configuration(service: &Service) {
    let before = main_process(service);
    service.configure(OTHER_CONFIG).unwrap();
    service.systemctl("reload").unwrap_err();
    service.configure(CONFIG).unwrap();
    let log = service.log();
    assert_eq!(main_process(service), before, "{log}");
    assert!(log.contains("its devices are web"), "{log}");
    assert!(
        log.contains(&format!("(process {before}) goes on")),
        "{log}"
    );
    assert_eq!(service.report().unwrap()["devices"][0]["connected"], true);
    let one = ["ping", "-c", "1", "-W", "5", GUEST.v4];
    service.machine().run("busybox", one).unwrap();
}

fn connect(service: &Service) -> EchoResponder {
    let socket = service.path("/run/virtionetd/web.sock");
    let config = TestFrontendConfig::new(PAIRS, 256, MODERN);
    let addresses = ResponderAddresses::from_ipv4(GUEST.v4).unwrap();
    let responder = EchoResponder::connect(&socket, &config, addresses).unwrap();
    let one = ["ping", "-c", "1", "-W", "5", GUEST.v4];
    wait_for(service, "an answer", || {
        service.machine().run("busybox", one).is_ok()
    });
    responder
}

/// Starts to send pings.
fn start_ping(service: &Service, dir: &RunDir, name: &str) -> Proc {
    let args = ["-q", "-i", PING_INTERVAL, "-c", PINGS, "-W", "5", GUEST.v4];
    let args = ["ping"].into_iter().chain(args);
    let command = service.machine().command("busybox", args);
    Proc::spawn(dir, name, None, "nsenter", command).unwrap()
}

fn ip(service: &Service, args: &str) -> String {
    service.machine().run("ip", args.split(' ')).unwrap()
}

/// The frames that the device has carried, both ways.
fn frames(report: &Value) -> u64 {
    let pairs = report["devices"][0]["pairs"].as_array().unwrap();
    let vrings = pairs.iter().flat_map(|pair| [&pair["rx"], &pair["tx"]]);
    vrings
        .map(|vring| vring["counters"]["frames"].as_u64().unwrap())
        .sum()
}

fn wait_for(service: &Service, what: &str, is_done: impl Fn() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_done() {
        assert!(Instant::now() < deadline, "{what}: {}", service.log());
        sleep(Duration::from_millis(20));
    }
}
