//! The demo behind `ci/demo`: a guest, the daemon, traffic both ways, and who
//! carried how much.

use std::env;
use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use args::{Args, HELP};
use bars::Bars;
use interrupts::DriverSettings;
use result::{DemoResult, PairRow, PairTraffic};
use sample::CounterSample;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::iperf::{Clients, Direction, Iperf, IperfLoad, IperfReport};
use virtionet_tests::paths::{self, RunDir};
use virtionet_tests::qemu::{Machine, Nic, Qemu, version};
use virtionet_tests::sched;
use virtionet_tests::topology::{GUEST, HostNetwork, TAP, configure_guest};

mod args;
mod bars;
mod interrupts;
mod result;
mod sample;

const BOOT: Duration = Duration::from_secs(120);
const FRAME: Duration = Duration::from_millis(250);
const FLOWS: u16 = 8;

fn main() -> ExitCode {
    let outcome = match Args::parse(env::args().skip(1)) {
        Ok(None) => print(HELP).map_err(Into::into),
        Ok(Some(args)) => run(&args),
        Err(error) => Err(error),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    paths::require_root()?;
    let accel = args.accel.resolve()?;
    let dir = RunDir::new()?;
    let network = HostNetwork::bare()?;
    let monitor = dir.join("monitor.qmp");
    print("starting virtionetd\n")?;
    let daemon = Options::new()
        .netns(network.netns())
        .flag("--tap", TAP)
        .flag("--queues", args.queues.to_string())
        .flag("--qmp", &monitor)
        .arg("-v")
        .start(&dir, "vnet")?;
    network.configure()?;

    print(&format!(
        "booting a guest with {} vCPUs and {} queue pairs ({accel})\n",
        args.vcpus, args.queues
    ))?;
    let (qemu, boot) = Machine::new()
        .vcpus(args.vcpus.into())
        .memory_mib(1024)
        .accel(accel)
        .monitor(&monitor)
        .nic(Nic::vhost_user(daemon.socket()).queues(args.queues))
        .pinned()
        .boot(&dir, "guest", BOOT)
        .with_context(|| format!("virtionetd's log:\n{}", daemon.stderr()))?;
    print(&format!("it is up after {:.1} s\n", boot.as_secs_f64()))?;

    let pairs = args.queues.min(args.vcpus);
    configure_guest(qemu.guest(), pairs)?;
    network
        .wait_for_ping(GUEST.v4)
        .with_context(|| format!("virtionetd's log:\n{}", daemon.stderr()))?;
    let outcome = measure(args, &dir, &network, &daemon, &qemu)
        .with_context(|| format!("virtionetd's log:\n{}", daemon.stderr()))?;
    let outcome = DemoResult {
        accel: accel.to_string(),
        boot_seconds: boot.as_secs_f64(),
        ..outcome
    };
    print(&format!("\n{}", outcome.table()))?;
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&outcome)? + "\n";
        fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    let stopped = daemon.stop(Signal::SIGTERM)?;
    ensure!(
        stopped.status.success(),
        "virtionetd ended with {}; its log:\n{}",
        stopped.status,
        stopped.stderr
    );
    Ok(())
}

/// Both directions, and what each pair moved in them.
fn measure(
    args: &Args,
    dir: &RunDir,
    network: &HostNetwork,
    daemon: &Daemon,
    qemu: &Qemu,
) -> Result<DemoResult> {
    let guest = qemu.guest();
    let processes = args.queues.min(args.vcpus).min(FLOWS);
    let iperf = Iperf::new(network, guest, dir, Clients::Host, processes)?;
    let load = IperfLoad::tcp(args.seconds).flows(FLOWS);
    print(&format!(
        "\nhost to guest, {FLOWS} flows, {} s\n",
        args.seconds
    ))?;
    let time = Duration::from_secs(args.seconds.into());
    let (there, to_guest) = show(&iperf, &load, Direction::HostToGuest, daemon, time)?;
    print(&format!(
        "guest to host, {FLOWS} flows, {} s\n",
        args.seconds
    ))?;
    let (back, to_host) = show(&iperf, &load, Direction::GuestToHost, daemon, time)?;

    let choice = interrupts::choice(guest, args.queues, args.vcpus)?;
    let mut pairs = rows(&choice, daemon)?;
    for (row, (there, back)) in pairs.iter_mut().zip(there.into_iter().zip(back)) {
        row.traffic(there, back);
    }
    Ok(DemoResult {
        pairs,
        guest: choice,
        host_to_guest_gbps: to_guest.gbps,
        guest_to_host_gbps: to_host.gbps,
        accel: String::new(),
        qemu: version()?,
        vcpus: args.vcpus,
        flows: FLOWS,
        seconds: args.seconds,
        boot_seconds: 0.0,
    })
}

/// Runs `load` with the bars moving; returns what each pair moved meanwhile.
fn show(
    iperf: &Iperf<'_>,
    load: &IperfLoad,
    direction: Direction,
    daemon: &Daemon,
    time: Duration,
) -> Result<(Vec<PairTraffic>, IperfReport)> {
    let before = CounterSample::read(daemon)?;
    let mut bars = Bars::new(before.clone());
    let mut running = iperf.start(load, direction)?;
    let mut last = before.clone();
    while !running.is_over()? {
        sleep(FRAME);
        last = CounterSample::read(daemon)?;
        bars.draw(last.clone())?;
    }
    let report = running.finish()?;
    let traffic = last
        .pairs
        .iter()
        .zip(&before.pairs)
        .map(|(new, old)| PairTraffic {
            rx: new.rx.since(old.rx),
            tx: new.tx.since(old.tx),
            time,
        })
        .collect();
    Ok((traffic, report))
}

/// Who serves each pair, and from where. The CPUs are the kernel's word, not
/// the daemon's.
fn rows(choice: &DriverSettings, daemon: &Daemon) -> Result<Vec<PairRow>> {
    let sample = CounterSample::read(daemon)?;
    sample
        .pairs
        .into_iter()
        .enumerate()
        .map(|(pair, it)| {
            let cpus = sched::affinity(it.tid)?;
            let (host_cpu, pinned) = match cpus.as_slice() {
                [one] => (*one, true),
                _ => (sched::last_cpu(it.tid)?, false),
            };
            Ok(PairRow {
                pair,
                guest_cpu: choice.receive_cpu(pair),
                worker: it.worker,
                tid: it.tid,
                host_cpu,
                pinned,
                placement: it.placement,
                tx_frames: 0,
                tx_bytes: 0,
                rx_frames: 0,
                rx_bytes: 0,
                rx_gbps: 0.0,
                tx_gbps: 0.0,
            })
        })
        .collect()
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
