//! A domain of libvirt, by the XML that `virtionetctl plan` prints: its guest has the planned pairs,
//! traffic passes, and workers follow `virsh vcpupin`.

use std::fs;
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

/// The guest's boot, beside libvirtd's own work.
const BOOT: Duration = Duration::from_secs(90);
/// Longer than anything here takes that has no bound of its own.
const SOON: Duration = Duration::from_secs(10);
/// The time in which a worker must have followed its vCPU.
const MAX_FOLLOW_TIME: Duration = Duration::from_secs(1);

#[test]
fn a_planned_domain_runs_and_workers_follow_vcpupin() {
    let cpus = sched::allowed_cpus().unwrap();
    let [first, second, ..] = cpus[..] else {
        eprintln!("skipped: on one CPU no vCPU can be moved");
        return;
    };
    planned([first, second]).unwrap();
}

fn planned(cpus: [usize; 2]) -> Result<()> {
    let dir = RunDir::new()?;
    let network = HostNetwork::bare()?;
    let plan = plan(&dir, cpus)?;
    let mut daemon = start(&plan, &dir, &network)?;
    let libvirt = Libvirt::start(&dir)?;
    let xml = plan["commands"]["libvirt"].as_str().context("no XML")?;
    let guest = libvirt.boot(&dir, "planned", xml, BOOT)?;
    configure_guest(&guest, 2)?;
    network.wait_for_ping(GUEST.v4)?;

    let both = |device: &Value| {
        let pairs = pairs(device).unwrap_or_default();
        pairs.len() == 2 && pairs.iter().all(|pair| pair.rx.enabled && pair.tx.enabled)
    };
    let device = daemon.wait_device("using both pairs", SOON, both)?;
    let qemu = u32::try_from(device["frontend"]["pid"].as_u64().context("no QEMU")?)?;
    let workers = pairs(&device)?
        .iter()
        .map(|pair| pair.tid)
        .collect::<Vec<_>>();
    for (tid, cpu) in workers.iter().zip(cpus) {
        wait_for_cpu(*tid, cpu, SOON)?;
    }
    let iperf = Iperf::new(&network, &guest, &dir, Clients::Host, 2)?;
    for direction in [Direction::HostToGuest, Direction::GuestToHost] {
        let report = iperf.run(&IperfLoad::tcp(1).flows(4), direction)?;
        eprintln!("{direction:?}: {:.2} Gbit/s", report.gbps);
        assert!(report.gbps > 0.02, "{report:?}");
    }

    // Each vCPU to the other's CPU, under load, and back without.
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
    daemon.wait_device("alone again", SOON, |device| device["connected"] == false)?;
    wait_for_exit(qemu)?;
    drop(libvirt);
    let stopped = daemon.stop(Signal::SIGTERM)?;
    assert!(stopped.status.success(), "{stopped:?}");
    let links = network.netns().ip("link")?;
    assert!(!links.contains(TAP), "{links}");
    Ok(())
}

/// `virsh vcpupin` moves the thread of a vCPU, and the worker stands there in a second.
fn move_vcpu(libvirt: &Libvirt, qemu: u32, vcpu: usize, worker: i32, cpu: usize) -> Result<()> {
    let words = [vcpu.to_string(), cpu.to_string()];
    libvirt.virsh(&["vcpupin", "planned", &words[0], &words[1], "--live"])?;
    let started_at = Instant::now();
    let name = format!("CPU {vcpu}/");
    let threads = sched::threads(qemu)?;
    let thread = threads.iter().find(|(_, comm)| comm.starts_with(&name));
    let (thread, _) = thread.with_context(|| format!("no {name} in {threads:?}"))?;
    assert_eq!(sched::affinity(*thread)?, [cpu]);
    wait_for_cpu(worker, cpu, MAX_FOLLOW_TIME)?;
    eprintln!(
        "worker {vcpu} on CPU {cpu} after {:?}",
        started_at.elapsed()
    );
    Ok(())
}

/// Waits until the kernel lets thread `tid` run on `cpu` alone.
fn wait_for_cpu(tid: i32, cpu: usize, limit: Duration) -> Result<()> {
    let until = Instant::now() + limit;
    loop {
        let now = sched::affinity(tid)?;
        if now == [cpu] {
            return Ok(());
        }
        if Instant::now() > until {
            bail!("thread {tid} may run on {now:?} after {limit:?}, not on CPU {cpu} alone");
        }
        sleep(Duration::from_millis(5));
    }
}

fn wait_for_exit(pid: u32) -> Result<()> {
    let path = format!("/proc/{pid}");
    let until = Instant::now() + SOON;
    while Path::new(&path).exists() {
        if Instant::now() > until {
            bail!("the domain's QEMU {pid} is still there");
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The plan of a guest with two vCPUs, with sockets in `dir`.
fn plan(dir: &RunDir, cpus: [usize; 2]) -> Result<Value> {
    // libvirtd looks for KVM by itself; what runs must be what was tried.
    let accel = format!("--accel={}", Accel::Auto.resolve()?);
    let sockets = format!("--socket-dir={}", dir.join("").display());
    let cpus = format!("--cpus={},{}", cpus[0], cpus[1]);
    let card = format!("--nic=tap={TAP}");
    let words = "plan --vcpus=2 --name=planned --memory=512M --json".split(' ');
    let words = words.chain([accel.as_str(), &sockets, &cpus, &card]);
    let text = output(&paths::virtionetctl()?.display().to_string(), words)?;
    fs::write(dir.join("plan.json"), &text)?;
    Ok(serde_json::from_str(&text)?)
}

/// Starts virtionetd as the plan says, to wait for the domain.
fn start(plan: &Value, dir: &RunDir, network: &HostNetwork) -> Result<Daemon> {
    let words = plan["commands"]["virtionetd_client"].clone();
    let words: Vec<String> = serde_json::from_value(words)?;
    let control = plan["control"].as_str().context("no control socket")?;
    let daemon = Options::new()
        .netns(network.netns())
        .command(&words, Path::new(control))
        .start(dir, "vnet")?;
    network.configure()?;
    Ok(daemon)
}
