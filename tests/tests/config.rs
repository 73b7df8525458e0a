//! The configuration file: checking it, starting the daemon with it, and overriding it on the
//! command line.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use virtionet_tests::accel::Accel;
use virtionet_tests::counters::pairs;
use virtionet_tests::daemon::{DaemonExit, Options};
use virtionet_tests::paths::{self, RunDir};
use virtionet_tests::qemu::{Machine, Nic};
use virtionet_tests::testbed::BOOT_TIMEOUT;
use virtionet_tests::topology::{GUEST, HostNetwork, TAP, configure_guest};

const TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn guest_is_served_by_a_device_of_the_file_and_command_line_keys_override_the_file() {
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::bare().unwrap();
    let file = dir.join("virtionetd.toml");
    let [control, guest, spare] =
        ["control", "guest.sock", "spare.sock"].map(|name| dir.join(name));
    let text = format!(
        "control = {control:?}\n\
         [defaults]\n\
         poll = \"adaptive\"\n\
         placement = \"none\"\n\
         [[device]]\n\
         name = \"guest\"\n\
         socket-path = {guest:?}\n\
         tap = \"{TAP}\"\n\
         queues = \"medium\"\n\
         vcpus = 4\n\
         [[device]]\n\
         name = \"spare\"\n\
         socket-path = {spare:?}\n\
         tap = \"other0\"\n"
    );
    fs::write(&file, text).unwrap();
    let path = file.display().to_string();
    let checked = virtionetctl(&dir, &["check", &path]).unwrap();
    assert!(checked.status.success(), "{checked:?}");
    assert!(!control.exists() && !guest.exists() && !spare.exists());

    // The command line overrides the uplink of one device, and the default placement of all
    // devices.
    let command_line = [
        "virtionetd",
        "--config",
        &path,
        "--device",
        "name=spare,uplink=null,queues=7",
        "--placement=same",
    ];
    let mut daemon = Options::new()
        .netns(network.netns())
        .command(&command_line.map(str::to_owned), &control)
        .start(&dir, "vnet")
        .unwrap();
    network.configure().unwrap();
    let all = daemon.get("/v1/devices").unwrap();
    let identity = |n: usize| {
        let device = &all["devices"][n];
        [
            &device["name"],
            &device["uplink"]["kind"],
            &device["socket"],
        ]
        .map(Value::clone)
    };
    assert_eq!(identity(0), [json!("guest"), json!("tap"), json!(guest)]);
    assert_eq!(identity(1), [json!("spare"), json!("null"), json!(spare)]);
    assert_eq!(all["devices"].as_array().unwrap().len(), 2);

    // `medium` means half as many queue pairs as the 4 vCPUs in the file.
    let nic = Nic::vhost_user(&guest).queues(2);
    let machine = Machine::new().vcpus(2).accel(Accel::Auto).nic(nic);
    let (qemu, _) = machine.pinned().boot(&dir, "guest", BOOT_TIMEOUT).unwrap();
    configure_guest(qemu.guest(), 2).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
    let uses_both_pairs = |device: &Value| {
        let pairs = pairs(device).unwrap_or_default();
        pairs.len() == 2 && pairs.iter().all(|pair| pair.rx.enabled)
    };
    let device = daemon
        .wait_for_device("using 2 queue pairs", TIMEOUT, uses_both_pairs)
        .unwrap();
    assert_eq!(device["name"], "guest");
    let log = daemon.stderr();
    assert!(log.contains("up to 2 queue pairs"), "{log}");
    for pair in device["pairs"].as_array().unwrap() {
        // With the placement `none` of the file, a worker could run on all CPUs.
        assert_eq!(pair["cpus"].as_array().unwrap().len(), 1, "{pair}");
    }
    drop(qemu);
    let stopped = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    assert!(!control.exists() && !guest.exists() && !spare.exists());
}

#[test]
fn file_with_errors_is_refused_with_all_errors_before_a_socket_is_created() {
    let dir = RunDir::new().unwrap();
    let file = dir.join("f.toml");
    let socket = dir.join("a.sock");
    let text = format!(
        "[[device]]\nsocket-path = {socket:?}\nuplink = \"null\"\n\
         [[device]]\nsocket-path = {socket:?}\nuplnk = \"null\"\ntap = \"t0\"\nqueues = 0\n\
         [[device]]\nsocket-path = {socket:?}\nuplink = \"null\"\n"
    );
    fs::write(&file, text).unwrap();
    let path = file.display().to_string();
    let lines = [
        format!(
            "{path}:6: the key \"uplnk\" is not known: write uplink, which is the most similar one"
        ),
        format!(
            "{path}:8: queues = 0 cannot be used: write 1 to 128 queue pairs, auto for as many as the front-end asks for, or high, medium or low with vcpus = N"
        ),
        format!(
            "{path}:10: socket {} is given to both vnet0 ({path}:2) and vnet2: give each one of its own",
            socket.display()
        ),
    ];
    let checked = virtionetctl(&dir, &["check", &path]).unwrap();
    assert_eq!(checked.status.code(), Some(2));
    assert_eq!(checked.stderr.lines().collect::<Vec<_>>(), lines);

    let refused = virtionetd(&dir, &["--config", &path]).unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let errors: Vec<&str> = refused.stderr.lines().collect();
    assert_eq!(errors, lines.map(|line| format!("virtionetd: {line}")));
    assert!(!socket.exists());
}

#[test]
fn command_that_moved_to_virtionetctl_is_refused_with_status_2_and_one_line() {
    let dir = RunDir::new().unwrap();
    for (arguments, command) in [(&["plan"][..], "plan"), (&["check", "x"], "check")] {
        let refused = virtionetd(&dir, arguments).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {refused:?}");
        assert_eq!(
            refused.stderr.lines().count(),
            1,
            "{arguments:?}: {refused:?}"
        );
        let hint = format!("run 'virtionetctl {command}'");
        assert!(refused.stderr.contains(&hint), "{arguments:?}: {refused:?}");
    }
}

/// Runs virtionetd with only these arguments until it exits.
fn virtionetd(dir: &RunDir, arguments: &[&str]) -> Result<DaemonExit> {
    options(dir, "virtionetd", arguments).run_to_end(dir, "virtionetd")
}

/// Runs virtionetctl with these arguments until it exits.
fn virtionetctl(dir: &RunDir, arguments: &[&str]) -> Result<DaemonExit> {
    options(dir, "virtionetctl", arguments)
        .program(&paths::virtionetctl()?)
        .run_to_end(dir, "virtionetctl")
}

fn options(dir: &RunDir, program: &str, arguments: &[&str]) -> Options {
    let words: Vec<String> = [program]
        .iter()
        .chain(arguments)
        .map(|word| (*word).to_owned())
        .collect();
    Options::new().command(&words, &dir.join("control"))
}
