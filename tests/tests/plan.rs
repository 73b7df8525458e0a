//! `virtionetd plan` carried out: what it prints is taken by the real QEMU, by
//! libvirt's own check and by virtionetd, and a guest started so has the pairs
//! that were planned, with its workers where the plan put them.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use virtionet_tests::accel::Accel;
use virtionet_tests::counters::pairs;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::ethtool::{self, Setting};
use virtionet_tests::http;
use virtionet_tests::paths::{self, RunDir};
use virtionet_tests::process::{Proc, output};
use virtionet_tests::qemu::{Machine, Qemu};
use virtionet_tests::rig::BOOT;
use virtionet_tests::sched;
use virtionet_tests::topology::{GUEST, Lan, configure_guest};

/// Longer than it takes a worker to follow its vCPU.
const FOLLOW: Duration = Duration::from_secs(5);

/// Longer than it takes QEMU to make its vCPUs and connect its cards.
const START: Duration = Duration::from_secs(30);

#[test]
fn a_guest_started_as_planned_is_what_was_planned() {
    let dir = RunDir::new().unwrap();
    let lan = Lan::bare().unwrap();
    // Against the order in which workers take CPUs where no vCPU is pinned.
    let mut cpus = sched::allowed_cpus().unwrap();
    cpus.reverse();
    let cpus: Vec<String> = cpus.iter().map(ToString::to_string).collect();
    let flags = [
        "--vcpus=4",
        "--nic=tap=tap0",
        &format!("--cpus={}", cpus.join(",")),
    ];
    let plan = plan(&dir, &flags).unwrap();
    let card = &plan["cards"][0];
    assert_eq!(card["pairs"], 4);
    let (mut daemon, qemu) = carry_out(&plan, &dir, &lan).unwrap();

    // The driver uses all pairs by itself, each with vectors of its own.
    let guest = qemu.guest();
    let combined = ethtool::combined(guest, "eth0").unwrap();
    assert_eq!(combined, all_of(4));
    let vectors = guest.ok("grep -c virtio0-.*put /proc/interrupts").unwrap();
    assert_eq!(vectors.trim(), "8");
    let mac = guest.ok("cat /sys/class/net/eth0/address").unwrap();
    assert_eq!(mac.trim(), card["mac"]);
    assert_eq!(qemu_property(&qemu, 0, "vectors").unwrap(), card["vectors"]);

    output("bash", ["-c", &part(&dir, &flags, "pin").unwrap()]).unwrap();
    let pins = numbers(&plan["pins"]).unwrap();
    for (tid, pin) in qemu.vcpu_threads().unwrap().into_iter().zip(pins) {
        assert_eq!(sched::affinity(tid).unwrap(), [pin]);
    }
    workers_stand_as_planned(&mut daemon, card).unwrap();
    configure_guest(guest, 4).unwrap();
    lan.reach(GUEST.v4).unwrap();
}

/// The workers' names, vCPUs and CPUs are the plan's, and the kernel says the same.
fn workers_stand_as_planned(daemon: &mut Daemon, card: &Value) -> Result<()> {
    let workers = card["workers"].as_array().context("no workers")?.clone();
    let cpus = |device: &Value| -> Option<Vec<Vec<usize>>> {
        let pairs = pairs(device).ok()?;
        Some(pairs.into_iter().map(|pair| pair.cpus).collect())
    };
    let planned: Option<Vec<_>> = workers.iter().map(|w| numbers(&w["cpus"])).collect();
    let device = daemon.wait_device("placed as planned", FOLLOW, |device| {
        cpus(device) == planned
    })?;
    let threads = sched::threads(daemon.pid())?;
    for (pair, worker) in pairs(&device)?.iter().zip(&workers) {
        assert_eq!(pair.worker, worker["name"]);
        assert!(threads.contains(&(pair.tid, pair.worker.clone())));
        assert_eq!(Some(&pair.vcpus), numbers(&worker["vcpus"]).as_ref());
        let cpus = sched::affinity(pair.tid)?;
        assert_eq!(Some(cpus), numbers(&worker["cpus"]), "{}", pair.worker);
    }
    Ok(())
}

#[test]
fn cards_with_wishes_of_their_own_get_them() {
    let dir = RunDir::new().unwrap();
    let lan = Lan::bare().unwrap();
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
    let (daemon, qemu) = carry_out(&plan, &dir, &lan).unwrap();
    let guest = qemu.guest();
    let devices = daemon.get("/v1/devices").unwrap();
    for (n, planned) in [2, 1].into_iter().enumerate() {
        let card = &plan["cards"][n];
        assert_eq!(card["pairs"], planned);
        let device = &devices["devices"][n];
        assert_eq!(device["name"], card["device"]);
        assert_eq!(pairs(device).unwrap().len(), planned);
        let features = device["frontend"]["features"].to_string();
        assert!(features.contains("RING_PACKED"), "{features}");
        let rings = ethtool::rings(guest, &format!("eth{n}")).unwrap();
        // QEMU 10.0.13 gives each ring 1,024 descriptors, whatever it is asked for.
        assert_eq!(qemu_property(&qemu, n, "rx_queue_size").unwrap(), 1024);
        assert_eq!(qemu_property(&qemu, n, "tx_queue_size").unwrap(), 512);
        let first = &device["pairs"][0];
        assert_eq!(first["rx"]["size"], rings.rx.current);
        assert_eq!(first["tx"]["size"], rings.tx.current);
        let mac = guest.ok(&format!("cat /sys/class/net/eth{n}/address"));
        assert_eq!(mac.unwrap().trim(), card["mac"]);
        assert_eq!(qemu_property(&qemu, n, "vectors").unwrap(), card["vectors"]);
    }
    configure_guest(guest, 2).unwrap();
    lan.reach(GUEST.v4).unwrap();
}

#[test]
fn what_is_printed_can_be_pasted_into_a_shell() {
    // QEMU refuses more than 255 vCPUs where their interrupts cannot be told apart.
    for vcpus in [2, 256] {
        paste_into_a_shell(vcpus).unwrap();
    }
}

fn paste_into_a_shell(vcpus: u32) -> Result<()> {
    let dir = RunDir::new()?;
    let odd = dir.join("a b,'c'$d");
    fs::create_dir(&odd)?;
    let flags = [
        &format!("--vcpus={vcpus}"),
        "--nic=uplink=null",
        "--nic=uplink=null",
        &format!("--socket-dir={}", odd.display()),
    ];
    let program = paths::virtionetd()?;
    let bin = program
        .parent()
        .context("virtionetd is in no folder")?
        .display();
    let line = part(&dir, &flags, "virtionetd")?;
    let script = format!("PATH={bin}:$PATH; exec {line}");
    let mut daemon = Proc::spawn(&dir, "daemon", None, "bash", ["-c", &script])?;
    let line = part(&dir, &flags, "qemu")?;
    let script = format!("exec {} -S -nodefaults -display none", line.trim_end());
    let mut qemu = Proc::spawn(&dir, "qemu", None, "bash", ["-c", &script])?;

    let until = Instant::now() + START;
    loop {
        let answer = http::request(&odd.join("guest.ctl"), "GET", "/v1/devices", "");
        let json = answer.map(|answer| serde_json::from_str::<Value>(&answer.body));
        if let Ok(Ok(json)) = &json
            && (0..2).all(|n| json["devices"][n]["frontend"].is_object())
        {
            return Ok(());
        }
        daemon.check_alive()?;
        qemu.check_alive()?;
        ensure!(Instant::now() < until, "{json:?}");
        sleep(Duration::from_millis(20));
    }
}

#[test]
fn libvirt_and_virtionetd_check_what_is_printed() {
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
        fs::write(&domain, part(&dir, flags, "libvirt").unwrap()).unwrap();
        output("virt-xml-validate", [domain.as_path(), Path::new("domain")])
            .with_context(|| format!("{flags:?}: is it there (libvirt-clients, by ci/setup)?"))
            .unwrap();
        // libvirt's parser, in a driver that runs nothing.
        let define = ["-c", "test:///default", "define"].map(Path::new);
        let said = output("virsh", define.into_iter().chain([domain.as_path()])).unwrap();
        assert!(said.contains("defined from"), "{flags:?}: {said}");
        let config = dir.join("virtionetd.toml");
        fs::write(&config, part(&dir, flags, "config").unwrap()).unwrap();
        let program = paths::virtionetd().unwrap().display().to_string();
        let said = output(&program, ["check", &config.display().to_string()]).unwrap();
        assert!(said.trim().ends_with(", ok"), "{flags:?}: {said}");
    }
}

/// Starts virtionetd and a guest by the words of the plan.
fn carry_out(plan: &Value, dir: &RunDir, lan: &Lan) -> Result<(Daemon, Qemu)> {
    let words = |part: &str| -> Result<Vec<String>> {
        let words = plan["commands"][part].clone();
        Ok(serde_json::from_value(words)?)
    };
    let control = plan["control"].as_str().context("no control socket")?;
    let daemon = Options::new()
        .netns(lan.netns())
        .command(&words("virtionetd")?, Path::new(control))
        .start(dir, "vnet")?;
    lan.configure()?;
    let machine = Machine::new()
        .accel(Accel::Auto.resolve()?)
        .command(&words("qemu")?);
    let (qemu, _) = machine.boot(dir, "guest", BOOT)?;
    Ok((daemon, qemu))
}

/// The plan as JSON, with sockets in `dir` and memory and accelerator of a test's guest.
fn plan(dir: &RunDir, flags: &[&str]) -> Result<Value> {
    let text = ask(dir, flags, &["--json"])?;
    let plan: Value = serde_json::from_str(&text).context("the plan is no JSON")?;
    let vectors = &plan["vectors"];
    ensure!(vectors["total"].as_u64() <= vectors["budget"].as_u64());
    Ok(plan)
}

fn part(dir: &RunDir, flags: &[&str], part: &str) -> Result<String> {
    ask(dir, flags, &["--print", part])
}

fn ask(dir: &RunDir, flags: &[&str], more: &[&str]) -> Result<String> {
    let accel = Accel::Auto.resolve()?;
    let usual = [
        format!("--accel={accel}"),
        "--memory=512M".into(),
        format!("--socket-dir={}", dir.join("").display()),
    ];
    let mut words: Vec<&str> = vec!["plan"];
    // What is asked for once more is left to `flags`.
    words.extend(usual.iter().map(String::as_str).filter(|usual| {
        let key = usual.split('=').next();
        !flags.iter().any(|flag| flag.split('=').next() == key)
    }));
    words.extend_from_slice(flags);
    words.extend_from_slice(more);
    output(&paths::virtionetd()?.display().to_string(), words)
}

/// A property of QEMU's n-th network device.
fn qemu_property(qemu: &Qemu, n: usize, property: &str) -> Result<Value> {
    let path = format!("/machine/peripheral-anon/device[{n}]");
    qemu.qmp("qom-get", &json!({ "path": path, "property": property }))
}

/// A setting that is at its maximum.
fn all_of(maximum: u32) -> Setting {
    Setting {
        current: maximum,
        maximum,
    }
}

fn numbers(list: &Value) -> Option<Vec<usize>> {
    let numbers = list.as_array()?.iter();
    numbers.map(|n| usize::try_from(n.as_u64()?).ok()).collect()
}
