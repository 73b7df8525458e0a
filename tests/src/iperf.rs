//! iperf3 between the host side and the guest, or between two guests.
//!
//! iperf3 before 3.16 runs all of its flows in one thread, which the guest
//! would send from one vCPU: several processes, one for each vCPU, load
//! several queues.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::guest::{Background, Guest};
use crate::paths::RunDir;
use crate::process::Proc;
use crate::topology::{self, Addresses, HostNetwork};

const FIRST_PORT: u16 = 5201;
/// On top of the run's own time.
const SLACK: Duration = Duration::from_secs(60);

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest receives.
    HostToGuest,
    /// The guest sends.
    GuestToHost,
}

/// The end where the clients run; the servers run at the other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// In the host side's namespace.
    Host,
    /// In the guest.
    Guest,
}

/// What to send.
#[derive(Clone, Debug)]
pub struct IperfLoad {
    flows: u16,
    seconds: u32,
    ipv6: bool,
    udp: Option<String>,
    args: Vec<String>,
}

impl IperfLoad {
    /// TCP over IPv4, one flow, for `seconds`.
    pub fn tcp(seconds: u32) -> Self {
        Self {
            flows: 1,
            seconds,
            ipv6: false,
            udp: None,
            args: Vec::new(),
        }
    }

    /// UDP over IPv4, one flow, for `seconds`, each flow at `rate` as iperf3
    /// writes it (`100M`; `0` for no limit).
    pub fn udp(seconds: u32, rate: &str) -> Self {
        Self {
            udp: Some(rate.to_owned()),
            ..Self::tcp(seconds)
        }
    }

    /// The number of flows of all processes together.
    #[must_use]
    pub fn flows(mut self, flows: u16) -> Self {
        self.flows = flows;
        self
    }

    /// Over IPv6.
    #[must_use]
    pub fn ipv6(mut self) -> Self {
        self.ipv6 = true;
        self
    }

    /// A further argument of the client, such as `-l` and `1400`.
    #[must_use]
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// A client's command: `flows` of this to the `server` on `port`.
    fn client(&self, server: Addresses, port: u16, flows: u16) -> Vec<String> {
        let Addresses { v4, v6 } = server;
        let server = if self.ipv6 { v6 } else { v4 };
        let (seconds, flows, port) = (
            self.seconds.to_string(),
            flows.to_string(),
            port.to_string(),
        );
        let mut args = vec!["iperf3", "-J", "-c", server, "-p", &port];
        args.extend(["-t", &seconds, "-P", &flows]);
        if let Some(rate) = &self.udp {
            args.extend(["-u", "-b", rate]);
        }
        let own = self.args.iter().cloned();
        args.into_iter().map(str::to_owned).chain(own).collect()
    }

    /// What each of `processes` carries; the first ones take what does not divide evenly.
    fn shares(&self, processes: u16) -> Result<Vec<u16>> {
        ensure!(
            self.flows >= processes && processes > 0,
            "{} flows are too few for {processes} iperf3 processes: ask for {processes} at least",
            self.flows
        );
        let share = |i| self.flows / processes + u16::from(i < self.flows % processes);
        Ok((0..processes).map(share).collect())
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.seconds.into()) + SLACK
    }
}

/// What came over.
#[derive(Clone, Debug, Default)]
pub struct IperfReport {
    /// Gbit/s at the receivers, all processes together.
    pub gbps: f64,
    /// Gbit/s of each process.
    pub each: Vec<f64>,
    /// TCP segments sent again.
    pub retransmits: u64,
    /// UDP datagrams sent.
    pub packets: u64,
    /// UDP datagrams lost.
    pub lost: u64,
}

/// What runs loads, one after the other.
#[derive(Debug)]
pub struct Iperf<'a> {
    network: &'a HostNetwork,
    guest: &'a Guest,
    dir: &'a RunDir,
    clients: Clients,
    ports: Vec<u16>,
    vcpus: u32,
}

impl<'a> Iperf<'a> {
    /// Loads of so many `processes`. The guest's end of process i runs on a
    /// vCPU of queue pair i, where there are as many pairs.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn new(
        network: &'a HostNetwork,
        guest: &'a Guest,
        dir: &'a RunDir,
        clients: Clients,
        processes: u16,
    ) -> Result<Self> {
        Ok(Self {
            network,
            guest,
            dir,
            clients,
            ports: (FIRST_PORT..).take(usize::from(processes)).collect(),
            vcpus: nproc(guest)?,
        })
    }

    /// Runs `load` to its end.
    ///
    /// # Errors
    /// When a client fails: with its words.
    pub fn run(&self, load: &IperfLoad, direction: Direction) -> Result<IperfReport> {
        self.start(load, direction)?.finish()
    }

    /// Starts `load` with servers of its own: one that has served a load refuses
    /// connections for a moment, while it prepares for the next.
    ///
    /// # Errors
    /// When a server or a client does not start.
    pub fn start(&self, load: &IperfLoad, direction: Direction) -> Result<RunningIperf<'a>> {
        let servers = match self.clients {
            Clients::Host => serve_in(self.guest, &self.ports, self.vcpus).map(|()| Vec::new()),
            Clients::Guest => self.serve_on_host(),
        }?;
        let mut clients = Vec::new();
        let shares = load.shares(u16::try_from(self.ports.len())?)?;
        for ((i, port), flows) in (0..).zip(&self.ports).zip(shares) {
            let args = self.client_args(load, direction, *port, flows);
            clients.push(match self.clients {
                Clients::Host => Client::Host(self.on_host(&args)?),
                Clients::Guest => {
                    let command = format!(
                        "{} {}",
                        on_vcpu(i, self.vcpus, self.processes()),
                        args.join(" ")
                    );
                    Client::Guest(self.guest.spawn(&command)?)
                }
            });
        }
        Ok(RunningIperf {
            clients,
            _servers: servers,
            limit: load.limit(),
        })
    }

    fn client_args(
        &self,
        load: &IperfLoad,
        direction: Direction,
        port: u16,
        flows: u16,
    ) -> Vec<String> {
        // A client sends unless it is told to reverse.
        let (server, sends) = match self.clients {
            Clients::Host => (topology::GUEST, Direction::HostToGuest),
            Clients::Guest => (topology::HOST, Direction::GuestToHost),
        };
        let mut args = load.client(server, port, flows);
        args.extend((direction != sends).then(|| "-R".to_owned()));
        args
    }

    fn on_host(&self, args: &[String]) -> Result<Proc> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("iperf{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let (program, args) = args.split_first().context("an empty command")?;
        Proc::spawn(
            self.dir,
            &name,
            Some(self.network.netns().name()),
            program,
            args,
        )
    }

    fn serve_on_host(&self) -> Result<Vec<Proc>> {
        let serve = |port: &u16| {
            self.on_host(&["iperf3".into(), "-s".into(), "-p".into(), port.to_string()])
        };
        let servers = self.ports.iter().map(serve).collect::<Result<Vec<_>>>()?;
        for port in &self.ports {
            wait(&format!(":{port}"), &|| {
                self.network.netns().run("ss", ["-ltn"])
            })?;
        }
        Ok(servers)
    }

    fn processes(&self) -> u32 {
        u32::try_from(self.ports.len()).unwrap_or(u32::MAX)
    }
}

/// Runs `load` from one guest to another, which has servers of its own for
/// it; `processes` at each end, each on the vCPUs in turn as with [`Iperf`].
///
/// # Errors
/// When a server does not start or a client fails: with its words.
pub fn between(
    (from, to): (&Guest, &Guest),
    server: Addresses,
    load: &IperfLoad,
    processes: u16,
) -> Result<IperfReport> {
    let vcpus = nproc(from)?;
    let ports: Vec<u16> = (FIRST_PORT..).take(usize::from(processes)).collect();
    serve_in(to, &ports, nproc(to)?)?;
    let mut clients = Vec::new();
    for ((i, port), flows) in (0..).zip(ports).zip(load.shares(processes)?) {
        let cpu = on_vcpu(i, vcpus, processes.into());
        // Without intervals: all of the report comes over the serial line.
        let command = load.client(server, port, flows).join(" ");
        clients.push(Client::Guest(from.spawn(&format!("{cpu} {command} -i 0"))?));
    }
    let running = RunningIperf {
        clients,
        _servers: Vec::new(),
        limit: load.limit(),
    };
    running.finish()
}

fn nproc(guest: &Guest) -> Result<u32> {
    let vcpus = guest.ok("nproc")?;
    vcpus.trim().parse().context("the guest has no nproc")
}

/// Starts a server for each of `ports`, each on its vCPU.
fn serve_in(guest: &Guest, ports: &[u16], vcpus: u32) -> Result<()> {
    // What an earlier one left is in the way of the ports until it is gone.
    guest.ok(
        "killall iperf3 2>/dev/null; for i in $(seq 100); do pidof iperf3 >/dev/null || exit 0; sleep 0.05; done; exit 1",
    )?;
    let processes = u32::try_from(ports.len())?;
    for (i, port) in (0..).zip(ports) {
        let cpu = on_vcpu(i, vcpus, processes);
        guest.ok(&format!("{cpu} iperf3 -s -D -p {port}"))?;
        wait(&format!(":{port}"), &|| guest.ok("netstat -ltn"))?;
    }
    Ok(())
}

fn wait(port: &str, listening: &dyn Fn() -> Result<String>) -> Result<()> {
    for _ in 0..100 {
        let list = listening()?;
        if list.split_whitespace().any(|word| word.ends_with(port)) {
            return Ok(());
        }
        sleep(Duration::from_millis(50));
    }
    Err(anyhow!("no iperf3 server listens on {port} after 5 s"))
}

/// Runs what follows on process i's vCPU: the first one of queue pair i's
/// share, as Linux's virtio-net shares vCPUs out to as many pairs.
fn on_vcpu(i: u16, vcpus: u32, processes: u32) -> String {
    let mask = 1_u128 << first_vcpu(i.into(), vcpus, processes).min(127);
    format!("taskset {mask:x}")
}

/// The first `cpus % shares` shares have one CPU more than the others; with
/// fewer CPUs than shares they go round.
fn first_vcpu(share: u32, cpus: u32, shares: u32) -> u32 {
    let (cpus, shares) = (cpus.max(1), shares.max(1));
    if shares >= cpus {
        return share % cpus;
    }
    share * (cpus / shares) + share.min(cpus % shares)
}

/// A load that runs.
#[derive(Debug)]
pub struct RunningIperf<'a> {
    clients: Vec<Client<'a>>,
    /// Those on the host side.
    _servers: Vec<Proc>,
    limit: Duration,
}

#[derive(Debug)]
enum Client<'a> {
    Host(Proc),
    Guest(Background<'a>),
}

impl RunningIperf<'_> {
    /// Whether no client on the host side runs any more.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn is_over(&mut self) -> Result<bool> {
        let mut over = true;
        for client in &mut self.clients {
            if let Client::Host(proc) = client {
                over &= proc.try_wait()?.is_some();
            }
        }
        Ok(over)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When a client fails or hangs: with its words.
    pub fn finish(self) -> Result<IperfReport> {
        let mut report = IperfReport::default();
        for client in self.clients {
            let text = match client {
                Client::Host(mut proc) => {
                    proc.wait(self.limit)?;
                    proc.stdout()
                }
                Client::Guest(job) => job.wait(self.limit)?.text,
            };
            report.add(&text)?;
        }
        Ok(report)
    }
}

impl IperfReport {
    /// Adds what one client wrote with `-J`.
    fn add(&mut self, text: &str) -> Result<()> {
        // It may warn before its JSON.
        let json = text.find('{').and_then(|at| text.get(at..)).unwrap_or("");
        let value: Value = serde_json::from_str(json)
            .with_context(|| format!("iperf3 wrote no JSON: {text:?}"))?;
        if let Some(error) = value["error"].as_str() {
            return Err(anyhow!("iperf3: {error}"));
        }
        let end = &value["end"];
        let bits = end["sum_received"]["bits_per_second"]
            .as_f64()
            .or(end["sum"]["bits_per_second"].as_f64())
            .context("iperf3's JSON has no sum of what was received")?;
        self.gbps += bits / 1e9;
        self.each.push(bits / 1e9);
        self.retransmits += end["sum_sent"]["retransmits"].as_u64().unwrap_or(0);
        self.packets += end["sum"]["packets"].as_u64().unwrap_or(0);
        self.lost += end["sum"]["lost_packets"].as_u64().unwrap_or(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_several_processes_add_up() {
        let mut report = IperfReport::default();
        let tcp = r#"{"end": {"sum_sent": {"bits_per_second": 3e9, "retransmits": 4},
                      "sum_received": {"bits_per_second": 2.5e9}}}"#;
        let udp = r#"warning: x
                     {"end": {"sum": {"bits_per_second": 1e9, "packets": 9, "lost_packets": 2}}}"#;
        report.add(tcp).unwrap();
        report.add(udp).unwrap();
        assert!((report.gbps - 3.5).abs() < 1e-9);
        assert_eq!(report.each.len(), 2);
        assert_eq!((report.retransmits, report.packets, report.lost), (4, 9, 2));
    }

    #[test]
    fn each_process_is_on_a_vcpu_of_its_pair() {
        let all = |cpus, shares| -> Vec<u32> {
            (0..shares).map(|i| first_vcpu(i, cpus, shares)).collect()
        };
        assert_eq!(all(4, 4), [0, 1, 2, 3]);
        assert_eq!(all(4, 2), [0, 2]);
        assert_eq!(all(4, 3), [0, 2, 3]);
        assert_eq!(all(2, 5), [0, 1, 0, 1, 0]);
    }

    #[test]
    fn iperf3s_own_error_is_the_error() {
        let mut report = IperfReport::default();
        let error = report.add(r#"{"error": "unable to connect"}"#).unwrap_err();
        assert!(error.to_string().contains("unable to connect"));
        assert!(report.add("nothing").is_err());
        assert!(report.add(r#"{"end": {}}"#).is_err());
    }
}
