//! Devices that are added, changed and removed while the daemon works, over its control socket, and
//! clients of that socket which ask for too much.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::http::{self, Response};
use virtionet_tests::paths::RunDir;
use virtionet_tests::procfs::open_fds;
use virtionet_tests::settings::number;
use virtionet_tests::traffic::probe::Probe;
use virtionet_tests::traffic::testbed::{Setup, TrafficTestbed, Uplink};

const TIMEOUT: Duration = Duration::from_secs(10);
const DEFAULT_ROUNDS: u64 = 50;
/// What may be left of a removed device: memory that the allocator keeps for the next one.
const MAX_GROWTH_KIB: u64 = 2048;
/// The most connections of the control server.
const MAX_CONNECTIONS: usize = 256;

#[test]
fn devices_come_and_go_beside_one_that_loses_no_frame() {
    check_beside_traffic().unwrap();
}

#[test]
fn added_device_survives_an_upgrade_and_a_removed_one_does_not_return() {
    check_upgrade().unwrap();
}

#[test]
fn link_that_is_down_closes_the_session_and_serves_no_front_end() {
    check_link().unwrap();
}

#[test]
fn reload_applies_the_differences_of_the_file_or_nothing() {
    check_reload().unwrap();
}

#[test]
fn wrong_requests_are_refused_and_change_nothing() {
    check_wrong_requests().unwrap();
}

#[test]
fn helper_makes_and_removes_the_socket_where_the_daemon_may_not() {
    check_helper().unwrap();
}

#[test]
fn connections_beyond_the_limit_are_refused() {
    check_connection_limit().unwrap();
}

/// Two devices of the daemon carry numbered frames meanwhile.
fn check_beside_traffic() -> Result<()> {
    let rounds = number("ROUNDS", DEFAULT_ROUNDS)?;
    let testbed = TrafficTestbed::start(setup())?;
    let daemon = &testbed.daemon;
    let probe = Probe::start(testbed.connect()?)?;
    // What is made once for all devices is made.
    for _ in 0..3 {
        add_use_and_remove(&testbed)?;
    }
    let before = usage(daemon)?;
    probe.take_round()?;
    for _ in 0..rounds {
        add_use_and_remove(&testbed)?;
    }
    wait_for("threads and descriptors are as before", || {
        let now = usage(daemon)?;
        Ok((now.threads, now.descriptors) == (before.threads, before.descriptors))
    })
    .with_context(|| format!("{before:?}, now {:?}", usage(daemon)))?;
    let after = usage(daemon)?;
    ensure!(
        after.memory_kib <= before.memory_kib + MAX_GROWTH_KIB,
        "{before:?}, and after {rounds} devices {after:?}"
    );
    let traffic = probe.stop()?;
    for flow in &traffic.flows {
        let check = &flow.check;
        let wrong = [check.lost(), check.reordered, check.repeated];
        ensure!(
            wrong == [0; 3] && check.received > 1000,
            "lost, reordered, repeated: {wrong:?}\n{}",
            traffic.describe()
        );
    }
    eprintln!("{rounds} devices were added and removed: {before:?}, then {after:?}");
    Ok(())
}

/// Adds two devices on a switch of their own, one of them beside a TAP that is added, too; passes frames
/// between them, and removes all.
fn add_use_and_remove(testbed: &TrafficTestbed) -> Result<()> {
    let daemon = &testbed.daemon;
    let socket = |name: &str| testbed.dir().join(&format!("{name}.sock"));
    for name in ["added-a", "added-b"] {
        let body = json!({"socket-path": socket(name), "uplink": "switch:added", "queues": 1});
        let added = put(daemon, name, &body)?;
        ensure!(added.status == 201, "{added:?}");
    }
    let tap = json!({"socket-path": socket("added-t"), "tap": "added0"});
    let added = put(daemon, "added-t", &tap)?;
    ensure!(added.status == 201, "{added:?}");
    let config = TestFrontendConfig::new(1, 256, MODERN);
    let mut a = TestFrontend::connect(&socket("added-a"), &config)?;
    let mut b = TestFrontend::connect(&socket("added-b"), &config)?;
    let frame = FrameSpec::v4(Transport::Udp).build(b"through the new device")?;
    a.pairs[0].tx.send(&frame)?;
    let received = b.pairs[0].rx.wait_frames(1, TIMEOUT)?;
    ensure!(received.len() == 1, "{received:?}");
    for name in ["added-a", "added-b", "added-t"] {
        let removed = request(daemon, "DELETE", &format!("/v1/devices/{name}"), "")?;
        ensure!(removed.status == 200, "{removed:?}");
        ensure!(!socket(name).exists(), "{name} has left its socket");
    }
    Ok(())
}

fn check_upgrade() -> Result<()> {
    let mut testbed = TrafficTestbed::start(setup())?;
    let socket = testbed.dir().join("added-a.sock");
    let body = json!({"socket-path": socket, "uplink": "switch:added"});
    let added = put(&testbed.daemon, "added-a", &body)?;
    ensure!(added.status == 201, "{added:?}");
    let removed = request(&testbed.daemon, "DELETE", "/v1/devices/d1", "")?;
    ensure!(removed.status == 200, "{removed:?}");
    let _frontend = TestFrontend::connect(&socket, &TestFrontendConfig::new(1, 256, MODERN))?;
    set_link(&testbed.daemon, "d0", "down")?;
    for n in 0..2 {
        let upgraded = testbed.upgrade(&format!("vnet-{n}"));
        upgraded.map_err(|error| error.context(testbed.daemon.stderr()))?;
        let found = devices(&testbed.daemon)?;
        ensure!(found == ["d0", "added-a"], "{found:?}");
        let device = testbed.daemon.get("/v1/devices/added-a")?;
        ensure!(device["connected"] == true, "{device}");
        ensure!(device["origin"] == "request", "{device}");
        let device = testbed.daemon.get("/v1/devices/d0")?;
        ensure!(device["link"] == "down", "{device}");
    }
    let removed = request(&testbed.daemon, "DELETE", "/v1/devices/added-a", "")?;
    ensure!(removed.status == 200 && !socket.exists(), "{removed:?}");
    Ok(())
}

fn check_link() -> Result<()> {
    let dir = RunDir::new()?;
    let mut daemon = Options::new()
        .flag("--uplink", "null")
        .start(&dir, "vnet")?;
    let config = TestFrontendConfig::new(1, 256, MODERN);
    let mut frontend = TestFrontend::connect(daemon.socket(), &config)?;
    let before = daemon.device()?["revision"].clone();
    set_link(&daemon, "vnet", "down")?;
    let device = daemon.device()?;
    ensure!(
        device["connected"] == false && device["link"] == "down",
        "{device}"
    );
    ensure!(device["revision"] != before, "{device}");
    ensure!(
        frontend.connection.get_features().is_err(),
        "the session goes on"
    );
    // A front-end is not left waiting for an answer.
    let mut refused = UnixStream::connect(daemon.socket())?;
    refused.set_read_timeout(Some(TIMEOUT))?;
    ensure!(refused.read(&mut [0])? == 0, "the front-end got an answer");
    set_link(&daemon, "vnet", "up")?;
    let mut frontend = TestFrontend::connect(daemon.socket(), &config)?;
    let frame = FrameSpec::v4(Transport::Udp).build(b"up again")?;
    frontend.pairs[0].tx.send(&frame)?;
    daemon.wait_for_device("used", TIMEOUT, |device| {
        device["pairs"][0]["tx"]["counters"]["frames"] == 1
    })?;
    set_link(&daemon, "vnet", "down")?;
    let exit = daemon.stop(Signal::SIGTERM)?;
    ensure!(
        exit.status.success() && exit.duration < Duration::from_secs(1),
        "{exit:?}"
    );
    Ok(())
}

fn check_reload() -> Result<()> {
    let dir = RunDir::new()?;
    let file = dir.join("vnet.toml");
    let folder = dir.path().display();
    let device = |name: &str, more: &str| {
        format!(
            "[[device]]\nname = \"{name}\"\nsocket-path = \"{folder}/{name}.sock\"\nuplink = \"null\"\n{more}\n"
        )
    };
    let head = format!("allow-add = \"socket={folder}/*.sock\"\n");
    std::fs::write(
        &file,
        format!("{head}{}{}", device("a", ""), device("b", "")),
    )?;
    let options = Options::new().no_socket().flag("--config", &file);
    let mut daemon = options.start(&dir, "vnet")?;
    let body = json!({"socket-path": dir.join("r.sock"), "uplink": "null"});
    put(&daemon, "r", &body)?;
    let config = TestFrontendConfig::new(1, 256, MODERN);
    let _frontend = TestFrontend::connect(&dir.join("a.sock"), &config)?;

    // Nothing is applied if something cannot be.
    let outside = device("x", "").replace(&format!("{folder}/x"), "/nowhere/x");
    std::fs::write(&file, format!("{head}{}{outside}", device("a", "")))?;
    let refused = request(&daemon, "POST", "/v1/reload", "")?;
    ensure!(
        refused.status == 403 && code(&refused)? == "not-allowed",
        "{refused:?}"
    );
    std::fs::write(&file, format!("{head}{}", device("a", "queues = 0")))?;
    let refused = request(&daemon, "POST", "/v1/reload", "")?;
    ensure!(
        refused.status == 400 && code(&refused)? == "value-invalid",
        "{refused:?}"
    );
    std::fs::write(
        &file,
        format!("{head}workers = \"list:0\"\n{}", device("a", "")),
    )?;
    let refused = request(&daemon, "POST", "/v1/reload", "")?;
    ensure!(
        refused.status == 409 && code(&refused)? == "restart-needed",
        "{refused:?}"
    );
    ensure!(
        devices(&daemon)? == ["a", "b", "r"],
        "{:?}",
        devices(&daemon)?
    );

    let text = format!(
        "{head}{}{}{}",
        device("a", ""),
        device("b", "queues = 2"),
        device("c", "")
    );
    std::fs::write(&file, text)?;
    let planned = request(&daemon, "POST", "/v1/reload?dry-run=true", "")?;
    let expected = json!({
        "dry_run": true, "added": ["c"], "removed": [], "changed": ["b"], "unchanged": ["a"],
    });
    ensure!(
        serde_json::from_str::<Value>(&planned.body)? == expected,
        "{planned:?}"
    );
    ensure!(
        devices(&daemon)? == ["a", "b", "r"],
        "the dry run changed something"
    );
    daemon.proc().signal(Signal::SIGHUP)?;
    wait_for("the reload by the signal is done", || {
        Ok(devices(&daemon)? == ["a", "r", "b", "c"])
    })?;
    let device_a = daemon.get("/v1/devices/a")?;
    ensure!(
        device_a["connected"] == true,
        "the front-end of a has gone: {device_a}"
    );

    std::fs::write(&file, format!("{head}{}", device("a", "")))?;
    let applied = request(&daemon, "POST", "/v1/reload", "")?;
    ensure!(applied.status == 200, "{applied:?}");
    ensure!(devices(&daemon)? == ["a", "r"], "{:?}", devices(&daemon)?);
    Ok(())
}

fn check_wrong_requests() -> Result<()> {
    let dir = RunDir::new()?;
    let read_only = dir.join("ro");
    let daemon = Options::new()
        .flag("--uplink", "null")
        .flag("--control-read-only", &read_only)
        .flag(
            "--allow-add",
            format!("socket={}/*.sock", dir.path().display()),
        )
        .start(&dir, "vnet")?;
    let good = json!({"socket-path": dir.join("b.sock"), "uplink": "null"}).to_string();
    let with = |key: &str, value: Value| {
        let mut body: Value = serde_json::from_str(&good).unwrap_or_default();
        body[key] = value;
        body.to_string()
    };
    let large = with("name", "x".repeat(66_000).into());
    for (method, target, body, status, expected) in [
        ("PUT", "/v1/devices/b", "{", 400, "body-invalid"),
        ("PUT", "/v1/devices/b", "[]", 400, "body-invalid"),
        (
            "PUT",
            "/v1/devices/b",
            &with("queues", 0.into()),
            400,
            "value-invalid",
        ),
        (
            "PUT",
            "/v1/devices/b",
            &with("queues", json!([])),
            400,
            "kind-wrong",
        ),
        (
            "PUT",
            "/v1/devices/b",
            &with("colour", 1.into()),
            400,
            "key-unknown",
        ),
        (
            "PUT",
            "/v1/devices/b",
            &with("name", "c".into()),
            400,
            "name-differs",
        ),
        ("PUT", "/v1/devices/a%2Fb", &good, 400, "value-invalid"),
        (
            "PUT",
            "/v1/devices/b",
            &with("socket-path", "/etc/b.sock".into()),
            403,
            "not-allowed",
        ),
        (
            "PUT",
            "/v1/devices/b",
            &with("qmp", "/run/x".into()),
            403,
            "not-allowed",
        ),
        (
            "PUT",
            "/v1/devices/b",
            &with("uplink", "switch:s".into()),
            403,
            "not-allowed",
        ),
        ("PUT", "/v1/devices/vnet", &good, 409, "device-exists"),
        (
            "PUT",
            "/v1/devices/b",
            &with("socket-path", daemon.socket().display().to_string().into()),
            409,
            "resource-shared",
        ),
        ("POST", "/v1/devices", &good, 400, "value-missing"),
        ("DELETE", "/v1/devices/nobody", "", 404, "no-such-device"),
        ("PATCH", "/v1/devices/nobody", "{}", 404, "no-such-device"),
        (
            "PATCH",
            "/v1/devices/vnet",
            r#"{"link": "sideways"}"#,
            400,
            "body-invalid",
        ),
        (
            "PATCH",
            "/v1/devices/vnet",
            r#"{"queues": 3}"#,
            400,
            "body-invalid",
        ),
        ("POST", "/v1/reload?now", "", 400, "query-invalid"),
        ("GET", "/v1/devices/nobody", "", 404, "no-such-device"),
        ("GET", "/v2/devices", "", 404, "no-such-path"),
        ("PUT", "/metrics", "", 405, "method-not-allowed"),
    ] {
        let response = request(&daemon, method, target, body)?;
        ensure!(
            (response.status, code(&response)?.as_str()) == (status, expected),
            "{method} {target} {body:.80}: {response:?}"
        );
    }
    let answer = raw(
        daemon.control(),
        &format!(
            "PUT /v1/devices/b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{large}",
            large.len()
        ),
    )?;
    ensure!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    ensure!(answer.contains("\"code\":\"body-too-large\""), "{answer}");
    for (condition, status) in [
        ("If-Match: \"999\"", 412),
        ("If-None-Match: *", 412),
        ("If-Match: soon", 400),
        ("If-Match: *", 200),
    ] {
        let answer = raw(
            daemon.control(),
            &format!(
                "PATCH /v1/devices/vnet HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{condition}\r\nContent-Length: 2\r\n\r\n{{}}"
            ),
        )?;
        ensure!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{condition}: {answer}"
        );
    }
    for (method, target) in [
        ("PUT", "/v1/devices/b"),
        ("DELETE", "/v1/devices/vnet"),
        ("POST", "/v1/reload"),
    ] {
        let response = http::request(&read_only, method, target, &good)?;
        ensure!(code(&response)? == "read-only-socket", "{response:?}");
    }
    ensure!(http::request(&read_only, "GET", "/v1/health", "")?.status == 200);
    ensure!(devices(&daemon)? == ["vnet"], "{:?}", devices(&daemon)?);
    let added = put(&daemon, "b", &serde_json::from_str(&good)?)?;
    let again = put(&daemon, "b", &serde_json::from_str(&good)?)?;
    ensure!(
        (added.status, again.status) == (201, 200),
        "{added:?} {again:?}"
    );
    let log = daemon.stderr();
    ensure!(log.matches("device b is added").count() == 1, "{log}");
    ensure!(log.contains("user 0, process "), "{log}");
    Ok(())
}

/// The directory belongs to root, and the daemon runs as another user.
fn check_helper() -> Result<()> {
    let dir = RunDir::new()?;
    let state = dir.join("state");
    std::fs::create_dir(&state)?;
    std::os::unix::fs::chown(&state, Some(65534), Some(65534))?;
    let daemon = Options::new()
        .flag("--uplink", "null")
        .flag("--user", "65534")
        .flag("--group", "65534")
        .flag(
            "--allow-add",
            format!("socket={}/added*.sock", dir.path().display()),
        )
        .start(&dir, "vnet")?;
    let socket = dir.join("added.sock");
    let added = put(
        &daemon,
        "added",
        &json!({"socket-path": socket, "uplink": "null"}),
    )?;
    ensure!(added.status == 201, "{added:?}\n{}", daemon.stderr());
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&socket)?);
    ensure!(mode & 0o777 == 0o600, "{mode:o}");
    let mut frontend = TestFrontend::connect(&socket, &TestFrontendConfig::new(1, 256, MODERN))?;
    let frame = FrameSpec::v4(Transport::Udp).build(b"made by the helper")?;
    frontend.pairs[0].tx.send(&frame)?;
    frontend.pairs[0].tx.drain(TIMEOUT)?;
    let outside = json!({"socket-path": dir.join("other.sock"), "uplink": "null"});
    ensure!(put(&daemon, "other", &outside)?.status == 403);
    let removed = request(&daemon, "DELETE", "/v1/devices/added", "")?;
    ensure!(removed.status == 200 && !socket.exists(), "{removed:?}");
    Ok(())
}

fn check_connection_limit() -> Result<()> {
    let dir = RunDir::new()?;
    let daemon = Options::new()
        .flag("--uplink", "null")
        .start(&dir, "vnet")?;
    let mut clients = Vec::new();
    let mut refused = 0;
    for n in 0..300 {
        let mut client = UnixStream::connect(daemon.control())?;
        client.set_read_timeout(Some(TIMEOUT))?;
        if n < MAX_CONNECTIONS {
            // Each of them is accepted before the next one comes.
            client.write_all(b"GET /v1/version HTTP/1.1\r\nHost: x\r\n\r\n")?;
            ensure!(client.read(&mut [0; 512])? > 0);
            clients.push(client);
        } else {
            let mut answer = String::new();
            client.read_to_string(&mut answer)?;
            ensure!(answer.starts_with("HTTP/1.1 503 "), "client {n}: {answer}");
            ensure!(answer.contains("too-many-clients"), "{answer}");
            refused += 1;
        }
    }
    ensure!(refused == 300 - MAX_CONNECTIONS);
    // The device does not notice.
    let config = TestFrontendConfig::new(1, 256, MODERN);
    let mut frontend = TestFrontend::connect(daemon.socket(), &config)?;
    let frame = FrameSpec::v4(Transport::Udp).build(b"beside the clients")?;
    frontend.pairs[0].tx.send(&frame)?;
    frontend.pairs[0].tx.drain(TIMEOUT)?;
    drop(clients);
    wait_for("there are connections again", || {
        Ok(
            http::request(daemon.control(), "GET", "/v1/version", "")
                .is_ok_and(|r| r.status == 200),
        )
    })
}

fn setup() -> Setup {
    Setup {
        uplink: Uplink::Switch,
        is_packed: true,
        pairs: 2,
        shares_worker: false,
    }
}

/// What a daemon uses.
#[derive(Debug, Clone, Copy)]
struct Usage {
    threads: usize,
    descriptors: usize,
    memory_kib: u64,
}

fn usage(daemon: &Daemon) -> Result<Usage> {
    let pid = daemon.pid();
    Ok(Usage {
        threads: std::fs::read_dir(format!("/proc/{pid}/task"))?.count(),
        descriptors: open_fds(pid)?,
        memory_kib: virtionet_tests::procfs::private_memory_kib(pid)?,
    })
}

fn request(daemon: &Daemon, method: &str, target: &str, body: &str) -> Result<Response> {
    http::request(daemon.control(), method, target, body)
}

fn put(daemon: &Daemon, name: &str, body: &Value) -> Result<Response> {
    request(
        daemon,
        "PUT",
        &format!("/v1/devices/{name}"),
        &body.to_string(),
    )
}

fn set_link(daemon: &Daemon, name: &str, link: &str) -> Result<()> {
    let body = json!({ "link": link }).to_string();
    let set = request(daemon, "PATCH", &format!("/v1/devices/{name}"), &body)?;
    ensure!(set.status == 200, "{set:?}");
    Ok(())
}

/// The names of the devices.
fn devices(daemon: &Daemon) -> Result<Vec<String>> {
    let report = daemon.get("/v1/devices")?;
    let devices = report["devices"].as_array().context("no devices")?;
    let names = devices.iter().filter_map(|device| device["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

fn code(response: &Response) -> Result<String> {
    let body: Value =
        serde_json::from_str(&response.body).with_context(|| format!("no JSON: {response:?}"))?;
    ensure!(body["error"].is_string(), "{response:?}");
    Ok(body["code"].as_str().unwrap_or_default().to_owned())
}

/// The answer to `request`, which is sent as it is. A server that has answered may close the connection
/// before it has read all.
fn raw(socket: &Path, request: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let _ = stream.write_all(request.as_bytes());
    let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        answer.extend_from_slice(&buffer[..count]);
    }
    Ok(String::from_utf8(answer)?)
}

fn wait_for(state: &str, is_reached: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !is_reached()? {
        ensure!(Instant::now() < deadline, "not within {TIMEOUT:?}: {state}");
        sleep(Duration::from_millis(20));
    }
    Ok(())
}
