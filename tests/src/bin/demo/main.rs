//! The demo that `ci/demo` runs: it starts the daemon and a guest, sends traffic in both
//! directions, and prints how much each queue pair and worker carried.

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

const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
const REFRESH_INTERVAL: Duration = Duration::from_millis(250);
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
    let (qemu, boot_time) = Machine::new()
        .vcpus(args.vcpus.into())
        .memory_mib(1024)
        .accel(accel)
        .monitor(&monitor)
        .nic(Nic::vhost_user(daemon.socket()).queues(args.queues))
        .pinned()
        .boot(&dir, "guest", BOOT_TIMEOUT)
        .with_context(|| format!("virtionetd's log:\n{}", daemon.stderr()))?;
    print(&format!(
        "the guest has booted after {:.1} s\n",
        boot_time.as_secs_f64()
    ))?;

    let pairs = args.queues.min(args.vcpus);
    configure_guest(qemu.guest(), pairs)?;
    network
        .wait_for_ping(GUEST.v4)
        .with_context(|| format!("virtionetd's log:\n{}", daemon.stderr()))?;
    let outcome = measure(args, &dir, &network, &daemon, &qemu)
        .with_context(|| format!("virtionetd's log:\n{}", daemon.stderr()))?;
    let outcome = DemoResult {
        accel: accel.to_string(),
        boot_seconds: boot_time.as_secs_f64(),
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
        "virtionetd failed ({}); its log:\n{}",
        stopped.status,
        stopped.stderr
    );
    Ok(())
}

/// Runs iperf3 in both directions and returns the traffic of each queue pair.
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
    let duration = Duration::from_secs(args.seconds.into());
    let (to_guest, to_guest_report) =
        run_with_bars(&iperf, &load, Direction::HostToGuest, daemon, duration)?;
    print(&format!(
        "guest to host, {FLOWS} flows, {} s\n",
        args.seconds
    ))?;
    let (from_guest, from_guest_report) =
        run_with_bars(&iperf, &load, Direction::GuestToHost, daemon, duration)?;

    let settings = interrupts::read_settings(guest, args.queues, args.vcpus)?;
    let mut pairs = pair_rows(&settings, daemon)?;
    let traffic = to_guest.into_iter().zip(from_guest);
    for (row, (to_guest, from_guest)) in pairs.iter_mut().zip(traffic) {
        row.set_traffic(to_guest, from_guest);
    }
    Ok(DemoResult {
        pairs,
        guest: settings,
        host_to_guest_gbps: to_guest_report.gbps,
        guest_to_host_gbps: from_guest_report.gbps,
        accel: String::new(),
        qemu: version()?,
        vcpus: args.vcpus,
        flows: FLOWS,
        seconds: args.seconds,
        boot_seconds: 0.0,
    })
}

/// Runs `load` while the bars are drawn, and returns the traffic of each queue pair during the
/// load.
fn run_with_bars(
    iperf: &Iperf<'_>,
    load: &IperfLoad,
    direction: Direction,
    daemon: &Daemon,
    duration: Duration,
) -> Result<(Vec<PairTraffic>, IperfReport)> {
    let before = CounterSample::read(daemon)?;
    let mut bars = Bars::new(before.clone());
    let mut running = iperf.start(load, direction)?;
    let mut last = before.clone();
    while !running.is_finished()? {
        sleep(REFRESH_INTERVAL);
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
            duration,
        })
        .collect();
    Ok((traffic, report))
}

/// Returns a row for each queue pair, without traffic. The CPUs of the workers come from the
/// kernel, not from the daemon.
fn pair_rows(settings: &DriverSettings, daemon: &Daemon) -> Result<Vec<PairRow>> {
    let sample = CounterSample::read(daemon)?;
    sample
        .pairs
        .into_iter()
        .enumerate()
        .map(|(number, pair)| {
            let cpus = sched::affinity(pair.tid)?;
            let (host_cpu, pinned) = match cpus.as_slice() {
                [cpu] => (*cpu, true),
                _ => (sched::last_cpu(pair.tid)?, false),
            };
            Ok(PairRow {
                pair: number,
                guest_cpu: settings.receive_cpu(number),
                worker: pair.worker,
                tid: pair.tid,
                host_cpu,
                pinned,
                placement: pair.placement,
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
