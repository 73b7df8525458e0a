//! The output of `virtionetctl plan`. QEMU, libvirt's schema and virtionetd must accept it, and a
//! guest that is started with it must have the planned queue pairs and workers on the planned CPUs.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use virtionet_tests::accel::Accel;
use virtionet_tests::counters::pairs;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::ethtool::{self, EthtoolSetting};
use virtionet_tests::http;
use virtionet_tests::paths::{self, RunDir};
use virtionet_tests::process::{Proc, output};
use virtionet_tests::qemu::{Machine, Qemu};
use virtionet_tests::sched;
use virtionet_tests::testbed::BOOT_TIMEOUT;
use virtionet_tests::topology::{GUEST, HostNetwork, configure_guest};

/// The time within which a worker must move to the CPU of its vCPU.
const MAX_FOLLOW_TIME: Duration = Duration::from_secs(5);

/// The time that QEMU may take to create its vCPUs and connect its network devices.
const START_TIMEOUT: Duration = Duration::from_secs(30);

#[test]
fn guest_started_from_a_plan_has_the_planned_pairs_vectors_pins_and_workers() {
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::bare().unwrap();
    // The reverse order differs from the default order in which workers are placed on CPUs.
    let mut cpus = sched::allowed_cpus().unwrap();
    cpus.reverse();
    let cpus: Vec<String> = cpus.iter().map(ToString::to_string).collect();
    let flags = [
        "--vcpus=4",
        "--nic=tap=tap0",
        &format!("--cpus={}", cpus.join(",")),
    ];
    let plan = plan(&dir, &flags).unwrap();
    let planned = &plan["cards"][0];
    assert_eq!(planned["pairs"], 4);
    let (mut daemon, qemu) = start_from_plan(&plan, &dir, &network).unwrap();

    // By default, the driver uses all pairs, and each queue has its own vector.
    let guest = qemu.guest();
    let combined = ethtool::combined(guest, "eth0").unwrap();
    assert_eq!(combined, setting_at_maximum(4));
    let vectors = guest.ok("grep -c virtio0-.*put /proc/interrupts").unwrap();
    assert_eq!(vectors.trim(), "8");
    let mac = guest.ok("cat /sys/class/net/eth0/address").unwrap();
    assert_eq!(mac.trim(), planned["mac"]);
    assert_eq!(
        qemu_property(&qemu, 0, "vectors").unwrap(),
        planned["vectors"]
    );

    output("bash", ["-c", &print_part(&dir, &flags, "pin").unwrap()]).unwrap();
    let pins = parse_numbers(&plan["pins"]).unwrap();
    for (tid, pin) in qemu.vcpu_threads().unwrap().into_iter().zip(pins) {
        assert_eq!(sched::affinity(tid).unwrap(), [pin]);
    }
    assert_workers_as_planned(&mut daemon, planned).unwrap();
    configure_guest(guest, 4).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
}

/// Checks that the names, vCPUs and CPUs of the workers are the planned ones, in the daemon's
/// report and in the kernel.
fn assert_workers_as_planned(daemon: &mut Daemon, planned_device: &Value) -> Result<()> {
    let workers = planned_device["workers"]
        .as_array()
        .context("the planned device has no workers")?
        .clone();
    let cpus = |device: &Value| -> Option<Vec<Vec<usize>>> {
        let pairs = pairs(device).ok()?;
        Some(pairs.into_iter().map(|pair| pair.cpus).collect())
    };
    let planned: Option<Vec<_>> = workers.iter().map(|w| parse_numbers(&w["cpus"])).collect();
    let device = daemon.wait_for_device("placed as planned", MAX_FOLLOW_TIME, |device| {
        cpus(device) == planned
    })?;
    let threads = sched::threads(daemon.pid())?;
    for (pair, worker) in pairs(&device)?.iter().zip(&workers) {
        assert_eq!(pair.worker, worker["name"]);
        assert!(threads.contains(&(pair.tid, pair.worker.clone())));
        assert_eq!(Some(&pair.vcpus), parse_numbers(&worker["vcpus"]).as_ref());
        let cpus = sched::affinity(pair.tid)?;
        assert_eq!(
            Some(cpus),
            parse_numbers(&worker["cpus"]),
            "{}",
            pair.worker
        );
    }
    Ok(())
}

#[test]
fn two_network_devices_with_different_options_have_the_planned_properties() {
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::bare().unwrap();
    let flags = [
        "--vcpus=2",
        "--nic=name=lan,throughput=high,tap=tap0",
        "--nic=name=mgmt,throughput=low,uplink=null,mac=52:54:00:aa:bb:cc",
        "--packed",
        "--rx-queue-size=1024",
        "--tx-queue-size=512",
        "--poll=adaptive",
    ];
    let plan = plan(&dir, &flags).unwrap();
    let (daemon, qemu) = start_from_plan(&plan, &dir, &network).unwrap();
    let guest = qemu.guest();
    let devices = daemon.get("/v1/devices").unwrap();
    for (n, expected_pairs) in [2, 1].into_iter().enumerate() {
        let planned = &plan["cards"][n];
        assert_eq!(planned["pairs"], expected_pairs);
        let device = &devices["devices"][n];
        assert_eq!(device["name"], planned["device"]);
        assert_eq!(pairs(device).unwrap().len(), expected_pairs);
        let features = device["frontend"]["features"].to_string();
        assert!(features.contains("RING_PACKED"), "{features}");
        let rings = ethtool::rings(guest, &format!("eth{n}")).unwrap();
        // QEMU 10.0.13 gives each vring 1,024 descriptors regardless of these properties, so the
        // sizes of the vrings are compared with those that the guest's driver reports.
        assert_eq!(qemu_property(&qemu, n, "rx_queue_size").unwrap(), 1024);
        assert_eq!(qemu_property(&qemu, n, "tx_queue_size").unwrap(), 512);
        let first = &device["pairs"][0];
        assert_eq!(first["rx"]["size"], rings.rx.current);
        assert_eq!(first["tx"]["size"], rings.tx.current);
        let mac = guest.ok(&format!("cat /sys/class/net/eth{n}/address"));
        assert_eq!(mac.unwrap().trim(), planned["mac"]);
        assert_eq!(
            qemu_property(&qemu, n, "vectors").unwrap(),
            planned["vectors"]
        );
    }
    configure_guest(guest, 2).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
}

#[test]
fn printed_commands_run_in_a_shell_if_a_path_has_special_characters() {
    // QEMU refuses more than 255 vCPUs unless the machine supports extended interrupt destinations.
    for vcpus in [2, 256] {
        run_printed_commands(vcpus).unwrap();
    }
}

fn run_printed_commands(vcpus: u32) -> Result<()> {
    let dir = RunDir::new()?;
    let socket_dir = dir.join("a b,'c'$d");
    for name in ["guests/guest", "control"] {
        fs::create_dir_all(socket_dir.join(name))?;
    }
    let flags = [
        &format!("--vcpus={vcpus}"),
        "--nic=uplink=null",
        "--nic=uplink=null",
        &format!("--socket-dir={}", socket_dir.display()),
    ];
    let program = paths::virtionetd()?;
    let bin = program
        .parent()
        .context("the path of virtionetd has no directory")?
        .display();
    let line = print_part(&dir, &flags, "virtionetd")?;
    let script = format!("PATH={bin}:$PATH; exec {line}");
    let mut daemon = Proc::spawn(&dir, "daemon", None, "bash", ["-c", &script])?;
    let line = print_part(&dir, &flags, "qemu")?;
    let script = format!("exec {} -S -nodefaults -display none", line.trim_end());
    let mut qemu = Proc::spawn(&dir, "qemu", None, "bash", ["-c", &script])?;

    let until = Instant::now() + START_TIMEOUT;
    loop {
        let response = http::request(
            &socket_dir.join("control/guest.ctl"),
            "GET",
            "/v1/devices",
            "",
        );
        let json = response.map(|response| serde_json::from_str::<Value>(&response.body));
        if let Ok(Ok(json)) = &json
            && (0..2).all(|n| json["devices"][n]["frontend"].is_object())
        {
            return Ok(());
        }
        daemon.check_alive()?;
        qemu.check_alive()?;
        ensure!(
            Instant::now() < until,
            "QEMU has not connected after {START_TIMEOUT:?}: {json:?}"
        );
        sleep(Duration::from_millis(20));
    }
}

#[test]
fn printed_domain_is_valid_for_libvirt_and_printed_file_for_virtionetctl() {
    let dir = RunDir::new().unwrap();
    for flags in [
        &["--vcpus=1"][..],
        &["--vcpus=4", "--cpus=none", "--accel=kvm"],
        &["--vcpus=4", "--cpus=0", "--nics=2", "--packed"],
        &["--vcpus=300", "--host-cpus=0-299", "--memory=2T"],
        &["--vcpus=2", "--rx-queue-size=1024", "--tx-queue-size=512"],
        &["--vcpus=2", "--nic=throughput=low", "--nic=bridge=br0"],
        &["--vcpus=2", "--poll=always", "--placement=list:0"],
        &[
            "--vcpus=2",
            "--name=a.b-c_d",
            "--socket-dir=/tmp/a 'b' <c>&\"d\"",
        ],
    ] {
        let domain = dir.join("domain.xml");
        fs::write(&domain, print_part(&dir, flags, "libvirt").unwrap()).unwrap();
        output("virt-xml-validate", [domain.as_path(), Path::new("domain")])
            .with_context(|| {
                format!("{flags:?}: run ci/setup if virt-xml-validate is not installed")
            })
            .unwrap();
        // The test driver parses the domain and runs nothing.
        let define = ["-c", "test:///default", "define"].map(Path::new);
        let reply = output("virsh", define.into_iter().chain([domain.as_path()])).unwrap();
        assert!(reply.contains("defined from"), "{flags:?}: {reply}");
        let config = dir.join("virtionetd.toml");
        fs::write(&config, print_part(&dir, flags, "config").unwrap()).unwrap();
        let program = paths::virtionetctl().unwrap().display().to_string();
        let reply = output(&program, ["check", &config.display().to_string()]).unwrap();
        assert!(reply.trim().ends_with(", ok"), "{flags:?}: {reply}");
    }
}

/// Starts virtionetd and a guest with the planned commands.
fn start_from_plan(plan: &Value, dir: &RunDir, network: &HostNetwork) -> Result<(Daemon, Qemu)> {
    let command = |name: &str| -> Result<Vec<String>> {
        let words = plan["commands"][name].clone();
        Ok(serde_json::from_value(words)?)
    };
    let control = plan["control"]
        .as_str()
        .context("the plan has no control socket")?;
    for name in ["guests/guest", "control"] {
        fs::create_dir_all(dir.join(name))?;
    }
    let daemon = Options::new()
        .netns(network.netns())
        .command(&command("virtionetd")?, Path::new(control))
        .start(dir, "vnet")?;
    network.configure()?;
    let machine = Machine::new()
        .accel(Accel::Auto.resolve()?)
        .command(&command("qemu")?);
    let (qemu, _) = machine.boot(dir, "guest", BOOT_TIMEOUT)?;
    Ok((daemon, qemu))
}

/// Returns the plan as JSON, with sockets in `dir` and with the memory and the accelerator of a
/// test.
fn plan(dir: &RunDir, flags: &[&str]) -> Result<Value> {
    let text = run_plan(dir, flags, &["--json"])?;
    let plan: Value = serde_json::from_str(&text).context("the plan is not JSON")?;
    let vectors = &plan["vectors"];
    ensure!(vectors["total"].as_u64() <= vectors["budget"].as_u64());
    Ok(plan)
}

/// Returns the text that `virtionetctl plan --print PART` prints.
fn print_part(dir: &RunDir, flags: &[&str], part: &str) -> Result<String> {
    run_plan(dir, flags, &["--print", part])
}

fn run_plan(dir: &RunDir, flags: &[&str], output_flags: &[&str]) -> Result<String> {
    let accel = Accel::Auto.resolve()?;
    let defaults = [
        format!("--accel={accel}"),
        "--memory=512M".into(),
        format!("--socket-dir={}", dir.join("").display()),
    ];
    let mut args: Vec<&str> = vec!["plan"];
    // `flags` may replace a default, and a flag must not occur twice.
    args.extend(defaults.iter().map(String::as_str).filter(|default| {
        let key = default.split('=').next();
        !flags.iter().any(|flag| flag.split('=').next() == key)
    }));
    args.extend_from_slice(flags);
    args.extend_from_slice(output_flags);
    output(&paths::virtionetctl()?.display().to_string(), args)
}

/// Reads a property of QEMU's n-th network device.
fn qemu_property(qemu: &Qemu, n: usize, property: &str) -> Result<Value> {
    let path = format!("/machine/peripheral-anon/device[{n}]");
    qemu.qmp("qom-get", &json!({ "path": path, "property": property }))
}

/// Returns a setting that is at its maximum.
fn setting_at_maximum(maximum: u32) -> EthtoolSetting {
    EthtoolSetting {
        current: maximum,
        maximum,
    }
}

fn parse_numbers(list: &Value) -> Option<Vec<usize>> {
    let numbers = list.as_array()?.iter();
    numbers.map(|n| usize::try_from(n.as_u64()?).ok()).collect()
}
