//! A daemon by a configuration file: checked, started, and overridden from the command line.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use virtionet_tests::accel::Accel;
use virtionet_tests::counters::pairs;
use virtionet_tests::daemon::{Options, Stopped};
use virtionet_tests::paths::{self, RunDir};
use virtionet_tests::qemu::{Machine, Nic};
use virtionet_tests::testbed::BOOT;
use virtionet_tests::topology::{GUEST, HostNetwork, TAP, configure_guest};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_guest_is_served_by_one_of_two_devices_of_a_file() {
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

    // The command line wins: over a key of one device, and over a key of all.
    let words = [
        "virtionetd",
        "--config",
        &path,
        "--device",
        "name=spare,uplink=null,queues=7",
        "--placement=same",
    ];
    let mut daemon = Options::new()
        .netns(network.netns())
        .command(&words.map(str::to_owned), &control)
        .start(&dir, "vnet")
        .unwrap();
    network.configure().unwrap();
    let all = daemon.get("/v1/devices").unwrap();
    let seen = |n: usize| {
        let device = &all["devices"][n];
        [
            &device["name"],
            &device["uplink"]["kind"],
            &device["socket"],
        ]
        .map(Value::clone)
    };
    assert_eq!(seen(0), [json!("guest"), json!("tap"), json!(guest)]);
    assert_eq!(seen(1), [json!("spare"), json!("null"), json!(spare)]);
    assert_eq!(all["devices"].as_array().unwrap().len(), 2);

    // Half as many pairs as the 4 vCPUs that the file tells of.
    let nic = Nic::vhost_user(&guest).queues(2);
    let machine = Machine::new().vcpus(2).accel(Accel::Auto).nic(nic);
    let (qemu, _) = machine.pinned().boot(&dir, "guest", BOOT).unwrap();
    configure_guest(qemu.guest(), 2).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
    let used = |device: &Value| {
        let pairs = pairs(device).unwrap_or_default();
        pairs.len() == 2 && pairs.iter().all(|pair| pair.rx.enabled)
    };
    let device = daemon.wait_device("using 2 pairs", SOON, used).unwrap();
    assert_eq!(device["name"], "guest");
    let log = daemon.stderr();
    assert!(log.contains("up to 2 queue pairs"), "{log}");
    for pair in device["pairs"].as_array().unwrap() {
        // Placement none would have left them everywhere.
        assert_eq!(pair["cpus"].as_array().unwrap().len(), 1, "{pair}");
    }
    drop(qemu);
    let stopped = daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
    assert!(!control.exists() && !guest.exists() && !spare.exists());
}

#[test]
fn all_that_is_wrong_with_a_file_is_told_before_anything_is_opened() {
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
    let said: Vec<&str> = refused.stderr.lines().collect();
    assert_eq!(said, lines.map(|line| format!("virtionetd: {line}")));
    assert!(!socket.exists());
}

#[test]
fn a_command_that_moved_to_virtionetctl_is_refused_with_status_2_and_one_line() {
    let dir = RunDir::new().unwrap();
    for (words, command) in [(&["plan"][..], "plan"), (&["check", "x"], "check")] {
        let refused = virtionetd(&dir, words).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{words:?}: {refused:?}");
        assert_eq!(refused.stderr.lines().count(), 1, "{words:?}: {refused:?}");
        let hint = format!("run 'virtionetctl {command}'");
        assert!(refused.stderr.contains(&hint), "{words:?}: {refused:?}");
    }
}

/// Runs virtionetd with these arguments alone until it ends.
fn virtionetd(dir: &RunDir, arguments: &[&str]) -> Result<Stopped> {
    command(dir, "virtionetd", arguments).run_to_end(dir, "virtionetd")
}

/// Runs virtionetctl with these arguments until it ends.
fn virtionetctl(dir: &RunDir, arguments: &[&str]) -> Result<Stopped> {
    command(dir, "virtionetctl", arguments)
        .program(&paths::virtionetctl()?)
        .run_to_end(dir, "virtionetctl")
}

fn command(dir: &RunDir, program: &str, arguments: &[&str]) -> Options {
    let words: Vec<String> = [program]
        .iter()
        .chain(arguments)
        .map(|word| (*word).to_owned())
        .collect();
    Options::new().command(&words, &dir.join("control"))
}
