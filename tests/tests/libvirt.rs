//! A libvirt domain with the XML that `virtionetctl plan` prints. Its guest has the planned queue
//! pairs, traffic passes, and the workers move to the CPUs that `virsh vcpupin` gives the vCPUs.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;
use virtionet_tests::accel::Accel;
use virtionet_tests::counters::pairs;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::iperf::{Clients, Direction, Iperf, IperfLoad};
use virtionet_tests::libvirt::Libvirt;
use virtionet_tests::paths::{self, RunDir};
use virtionet_tests::process::output;
use virtionet_tests::sched;
use virtionet_tests::topology::{GUEST, HostNetwork, TAP, configure_guest};

/// The time for the guest's boot, which includes the work of libvirtd.
const BOOT_TIMEOUT: Duration = Duration::from_secs(90);
/// The timeout for steps that have no specified limit.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The time within which a worker must move to the CPU of its vCPU.
const MAX_FOLLOW_TIME: Duration = Duration::from_secs(1);

#[test]
fn planned_domain_carries_traffic_and_its_workers_move_after_vcpupin() {
    let cpus = sched::allowed_cpus().unwrap();
    let [first, second, ..] = cpus[..] else {
        eprintln!("skipped: this test needs two CPUs");
        return;
    };
    run_planned_domain([first, second]).unwrap();
}

fn run_planned_domain(cpus: [usize; 2]) -> Result<()> {
    let dir = RunDir::new()?;
    let network = HostNetwork::bare()?;
    let plan = plan(&dir, cpus)?;
    let mut daemon = start_daemon(&plan, &dir, &network)?;
    let libvirt = Libvirt::start(&dir)?;
    let xml = plan["commands"]["libvirt"]
        .as_str()
        .context("the plan has no libvirt XML")?;
    let guest = libvirt.boot(&dir, "planned", xml, BOOT_TIMEOUT)?;
    configure_guest(&guest, 2)?;
    network.wait_for_ping(GUEST.v4)?;

    let uses_both_pairs = |device: &Value| {
        let pairs = pairs(device).unwrap_or_default();
        pairs.len() == 2 && pairs.iter().all(|pair| pair.rx.enabled && pair.tx.enabled)
    };
    let device = daemon.wait_for_device("using both queue pairs", TIMEOUT, uses_both_pairs)?;
    let qemu = device["frontend"]["pid"].as_u64();
    let qemu = u32::try_from(qemu.context("the front-end has no process id")?)?;
    let workers = pairs(&device)?
        .iter()
        .map(|pair| pair.tid)
        .collect::<Vec<_>>();
    for (tid, cpu) in workers.iter().zip(cpus) {
        wait_for_cpu(*tid, cpu, TIMEOUT)?;
    }
    let iperf = Iperf::new(&network, &guest, &dir, Clients::Host, 2)?;
    for direction in [Direction::HostToGuest, Direction::GuestToHost] {
        let report = iperf.run(&IperfLoad::tcp(1).flows(4), direction)?;
        eprintln!("{direction:?}: {:.2} Gbit/s", report.gbps);
        assert!(report.gbps > 0.02, "{report:?}");
    }

    // The vCPUs exchange their CPUs under load, and exchange them again without load.
    let running = iperf.start(&IperfLoad::tcp(4).flows(2), Direction::HostToGuest)?;
    for (pair, cpu) in [(0, cpus[1]), (1, cpus[0])] {
        move_vcpu(&libvirt, qemu, pair, workers[pair], cpu)?;
    }
    assert!(running.finish()?.gbps > 0.02);
    for (pair, cpu) in [(0, cpus[0]), (1, cpus[1])] {
        move_vcpu(&libvirt, qemu, pair, workers[pair], cpu)?;
    }
    network.wait_for_ping(GUEST.v4)?;

    libvirt.virsh(&["destroy", "planned"])?;
    libvirt.virsh(&["undefine", "planned"])?;
    daemon.wait_for_device("disconnected", TIMEOUT, |device| {
        device["connected"] == false
    })?;
    wait_for_exit(qemu)?;
    drop(libvirt);
    let stopped = daemon.stop(Signal::SIGTERM)?;
    assert!(stopped.status.success(), "{stopped:?}");
    let links = network.netns().ip("link")?;
    assert!(!links.contains(TAP), "{links}");
    Ok(())
}

/// Moves a vCPU with `virsh vcpupin`, and checks that its worker moves to the same CPU within
/// [`MAX_FOLLOW_TIME`].
fn move_vcpu(libvirt: &Libvirt, qemu: u32, vcpu: usize, worker: i32, cpu: usize) -> Result<()> {
    let args = [vcpu.to_string(), cpu.to_string()];
    libvirt.virsh(&["vcpupin", "planned", &args[0], &args[1], "--live"])?;
    let started_at = Instant::now();
    let name = format!("CPU {vcpu}/");
    let threads = sched::threads(qemu)?;
    let thread = threads.iter().find(|(_, comm)| comm.starts_with(&name));
    let (thread, _) = thread.with_context(|| format!("QEMU has no thread {name}: {threads:?}"))?;
    assert_eq!(sched::affinity(*thread)?, [cpu]);
    wait_for_cpu(worker, cpu, MAX_FOLLOW_TIME)?;
    eprintln!(
        "worker {vcpu} runs on CPU {cpu} after {:?}",
        started_at.elapsed()
    );
    Ok(())
}

/// Waits until the affinity of thread `tid` is `cpu`.
fn wait_for_cpu(tid: i32, cpu: usize, timeout: Duration) -> Result<()> {
    let until = Instant::now() + timeout;
    loop {
        let cpus = sched::affinity(tid)?;
        if cpus == [cpu] {
            return Ok(());
        }
        if Instant::now() > until {
            bail!(
                "the affinity of thread {tid} is {cpus:?} after {timeout:?}, but should be CPU {cpu}"
            );
        }
        sleep(Duration::from_millis(5));
    }
}

fn wait_for_exit(pid: u32) -> Result<()> {
    let path = format!("/proc/{pid}");
    let until = Instant::now() + TIMEOUT;
    while Path::new(&path).exists() {
        if Instant::now() > until {
            bail!("the domain's QEMU (pid {pid}) has not exited after {TIMEOUT:?}");
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Returns the plan of a guest with two vCPUs, whose sockets are in `dir`.
fn plan(dir: &RunDir, cpus: [usize; 2]) -> Result<Value> {
    // libvirtd would use KVM if /dev/kvm exists, but only `resolve` tests whether the guest boots
    // then.
    let accel = format!("--accel={}", Accel::Auto.resolve()?);
    let sockets = format!("--socket-dir={}", dir.join("").display());
    let cpus = format!("--cpus={},{}", cpus[0], cpus[1]);
    let nic = format!("--nic=tap={TAP}");
    let args = "plan --vcpus=2 --name=planned --memory=512M --json".split(' ');
    let args = args.chain([accel.as_str(), &sockets, &cpus, &nic]);
    let text = output(&paths::virtionetctl()?.display().to_string(), args)?;
    fs::write(dir.join("plan.json"), &text)?;
    Ok(serde_json::from_str(&text)?)
}

/// Starts virtionetd with the planned command, before the domain exists.
fn start_daemon(plan: &Value, dir: &RunDir, network: &HostNetwork) -> Result<Daemon> {
    let command = plan["commands"]["virtionetd_client"].clone();
    let command: Vec<String> = serde_json::from_value(command)?;
    let control = plan["control"]
        .as_str()
        .context("the plan has no control socket")?;
    fs::create_dir_all(dir.join("control"))?;
    // libvirt runs QEMU, which makes the socket, as another user.
    let guest_dir = dir.join("guests/planned");
    fs::create_dir_all(&guest_dir)?;
    fs::set_permissions(&guest_dir, Permissions::from_mode(0o777))?;
    let daemon = Options::new()
        .netns(network.netns())
        .command(&command, Path::new(control))
        .start(dir, "vnet")?;
    network.configure()?;
    Ok(daemon)
}
