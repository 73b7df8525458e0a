//! iperf3 between the host and the guest, or between two guests.
//!
//! Before version 3.16, iperf3 runs all of its flows in one thread, so one process loads only the
//! queues of one vCPU. This module starts several processes on different vCPUs to load several
//! queues.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::guest::{BackgroundCommand, Guest};
use crate::paths::RunDir;
use crate::process::Proc;
use crate::topology::{self, Addresses, HostNetwork};

const FIRST_PORT: u16 = 5201;
/// The time that a run may take in addition to the duration of its load.
const TIMEOUT_MARGIN: Duration = Duration::from_secs(60);

/// The direction of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest receives.
    HostToGuest,
    /// The guest sends.
    GuestToHost,
}

/// The end at which the clients run. The servers run at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// In the host's namespace.
    Host,
    /// In the guest.
    Guest,
}

/// The traffic that iperf3 generates.
#[derive(Clone, Debug)]
pub struct IperfLoad {
    flows: u16,
    seconds: u32,
    is_ipv6: bool,
    udp_rate: Option<String>,
    args: Vec<String>,
}

impl IperfLoad {
    /// Creates a load of one TCP flow over IPv4 for `seconds`.
    pub fn tcp(seconds: u32) -> Self {
        Self {
            flows: 1,
            seconds,
            is_ipv6: false,
            udp_rate: None,
            args: Vec::new(),
        }
    }

    /// Creates a load of one UDP flow over IPv4 for `seconds`. Each flow sends at `rate`, in bit/s
    /// as iperf3 writes it (`100M`, or `0` for no limit).
    pub fn udp(seconds: u32, rate: &str) -> Self {
        Self {
            udp_rate: Some(rate.to_owned()),
            ..Self::tcp(seconds)
        }
    }

    /// Sets the total number of flows of all processes.
    #[must_use]
    pub fn flows(mut self, flows: u16) -> Self {
        self.flows = flows;
        self
    }

    /// Uses IPv6.
    #[must_use]
    pub fn ipv6(mut self) -> Self {
        self.is_ipv6 = true;
        self
    }

    /// Adds an argument of the client, such as `-l` or `1400`.
    #[must_use]
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// Returns the command of a client that runs `flows` flows of this load to `server` on `port`.
    fn client_command(&self, server: Addresses, port: u16, flows: u16) -> Vec<String> {
        let Addresses { v4, v6 } = server;
        let server = if self.is_ipv6 { v6 } else { v4 };
        let (seconds, flows, port) = (
            self.seconds.to_string(),
            flows.to_string(),
            port.to_string(),
        );
        let mut args = vec!["iperf3", "-J", "-c", server, "-p", &port];
        args.extend(["-t", &seconds, "-P", &flows]);
        if let Some(rate) = &self.udp_rate {
            args.extend(["-u", "-b", rate]);
        }
        let extra = self.args.iter().cloned();
        args.into_iter().map(str::to_owned).chain(extra).collect()
    }

    /// Divides the flows among `processes`. If the number does not divide evenly, the first
    /// processes get one flow more.
    fn flows_by_process(&self, processes: u16) -> Result<Vec<u16>> {
        ensure!(
            self.flows >= processes && processes > 0,
            "{} flows are too few for {processes} iperf3 processes: use at least {processes} flows",
            self.flows
        );
        let flows = |i| self.flows / processes + u16::from(i < self.flows % processes);
        Ok((0..processes).map(flows).collect())
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.seconds.into()) + TIMEOUT_MARGIN
    }
}

/// The result of a load.
#[derive(Clone, Debug, Default)]
pub struct IperfReport {
    /// The rate at the receivers in Gbit/s, summed over all processes.
    pub gbps: f64,
    /// The rate at the receiver of each process in Gbit/s.
    pub gbps_by_process: Vec<f64>,
    /// The number of TCP segments that were retransmitted.
    pub retransmits: u64,
    /// The number of UDP datagrams that were sent.
    pub packets: u64,
    /// The number of UDP datagrams that were lost.
    pub lost: u64,
}

/// Runs loads between the host and a guest, one after the other.
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
    /// Prepares loads of `processes` processes. If the driver uses as many queue pairs, the guest's
    /// end of process i runs on a vCPU of queue pair i.
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
            vcpus: count_vcpus(guest)?,
        })
    }

    /// Runs `load` and waits for its end.
    ///
    /// # Errors
    /// When a client fails. The error contains its message.
    pub fn run(&self, load: &IperfLoad, direction: Direction) -> Result<IperfReport> {
        self.start(load, direction)?.finish()
    }

    /// Starts `load` with new servers, because a server that has served a load refuses connections
    /// for a short time afterwards.
    ///
    /// # Errors
    /// When a server or a client does not start.
    pub fn start(&self, load: &IperfLoad, direction: Direction) -> Result<RunningIperf<'a>> {
        let servers = match self.clients {
            Clients::Host => {
                start_guest_servers(self.guest, &self.ports, self.vcpus).map(|()| Vec::new())
            }
            Clients::Guest => self.start_host_servers(),
        }?;
        let mut clients = Vec::new();
        let flows = load.flows_by_process(u16::try_from(self.ports.len())?)?;
        for ((i, port), flows) in (0..).zip(&self.ports).zip(flows) {
            let args = self.client_args(load, direction, *port, flows);
            clients.push(match self.clients {
                Clients::Host => Client::Host(self.spawn_on_host(&args)?),
                Clients::Guest => {
                    let command = format!(
                        "{} {}",
                        taskset_command(i, self.vcpus, self.processes()),
                        args.join(" ")
                    );
                    Client::Guest(self.guest.spawn(&command)?)
                }
            });
        }
        Ok(RunningIperf {
            clients,
            _servers: servers,
            timeout: load.timeout(),
        })
    }

    fn client_args(
        &self,
        load: &IperfLoad,
        direction: Direction,
        port: u16,
        flows: u16,
    ) -> Vec<String> {
        // A client sends by default; -R makes it receive.
        let (server, default_direction) = match self.clients {
            Clients::Host => (topology::GUEST, Direction::HostToGuest),
            Clients::Guest => (topology::HOST, Direction::GuestToHost),
        };
        let mut args = load.client_command(server, port, flows);
        args.extend((direction != default_direction).then(|| "-R".to_owned()));
        args
    }

    fn spawn_on_host(&self, args: &[String]) -> Result<Proc> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("iperf{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let (program, args) = args.split_first().context("the command is empty")?;
        Proc::spawn(
            self.dir,
            &name,
            Some(self.network.netns().name()),
            program,
            args,
        )
    }

    fn start_host_servers(&self) -> Result<Vec<Proc>> {
        let start = |port: &u16| {
            self.spawn_on_host(&["iperf3".into(), "-s".into(), "-p".into(), port.to_string()])
        };
        let servers = self.ports.iter().map(start).collect::<Result<Vec<_>>>()?;
        for port in &self.ports {
            wait_for_listener(&format!(":{port}"), &|| {
                self.network.netns().run("ss", ["-ltn"])
            })?;
        }
        Ok(servers)
    }

    fn processes(&self) -> u32 {
        u32::try_from(self.ports.len()).unwrap_or(u32::MAX)
    }
}

/// Runs `load` from one guest to another with `processes` processes at each end, which are
/// distributed over the vCPUs as by [`Iperf`].
///
/// # Errors
/// When a server does not start or a client fails. The error contains its message.
pub fn run_between_guests(
    (from, to): (&Guest, &Guest),
    server: Addresses,
    load: &IperfLoad,
    processes: u16,
) -> Result<IperfReport> {
    let vcpus = count_vcpus(from)?;
    let ports: Vec<u16> = (FIRST_PORT..).take(usize::from(processes)).collect();
    start_guest_servers(to, &ports, count_vcpus(to)?)?;
    let mut clients = Vec::new();
    let flows = load.flows_by_process(processes)?;
    for ((i, port), flows) in (0..).zip(ports).zip(flows) {
        let taskset = taskset_command(i, vcpus, processes.into());
        let command = load.client_command(server, port, flows).join(" ");
        // The report is read over the slow serial line, so -i 0 omits the interval reports.
        clients.push(Client::Guest(
            from.spawn(&format!("{taskset} {command} -i 0"))?,
        ));
    }
    let running = RunningIperf {
        clients,
        _servers: Vec::new(),
        timeout: load.timeout(),
    };
    running.finish()
}

fn count_vcpus(guest: &Guest) -> Result<u32> {
    let vcpus = guest.ok("nproc")?;
    vcpus
        .trim()
        .parse()
        .with_context(|| format!("nproc in the guest printed {vcpus:?}, not a number"))
}

/// Starts a server for each of `ports`, each on its own vCPU.
fn start_guest_servers(guest: &Guest, ports: &[u16], vcpus: u32) -> Result<()> {
    // Servers of an earlier load occupy the ports until they have exited.
    guest.ok(
        "killall iperf3 2>/dev/null; for i in $(seq 100); do pidof iperf3 >/dev/null || exit 0; sleep 0.05; done; exit 1",
    )?;
    let processes = u32::try_from(ports.len())?;
    for (i, port) in (0..).zip(ports) {
        let taskset = taskset_command(i, vcpus, processes);
        guest.ok(&format!("{taskset} iperf3 -s -D -p {port}"))?;
        wait_for_listener(&format!(":{port}"), &|| guest.ok("netstat -ltn"))?;
    }
    Ok(())
}

fn wait_for_listener(port: &str, list_listeners: &dyn Fn() -> Result<String>) -> Result<()> {
    for _ in 0..100 {
        let list = list_listeners()?;
        if list.split_whitespace().any(|word| word.ends_with(port)) {
            return Ok(());
        }
        sleep(Duration::from_millis(50));
    }
    Err(anyhow!("no iperf3 server listens on {port} after 5 s"))
}

/// Returns the beginning of a command that runs on the vCPU of process i. That is the first of the
/// vCPUs that the virtio-net driver of Linux assigns to queue pair i of `processes` pairs.
fn taskset_command(i: u16, vcpus: u32, processes: u32) -> String {
    let mask = 1_u128 << first_vcpu(i.into(), vcpus, processes).min(127);
    format!("taskset {mask:x}")
}

/// Returns the first vCPU of queue pair `pair`. Consecutive vCPUs belong to the same pair, and the
/// first `vcpus % pairs` pairs have one vCPU more than the others. If there are fewer vCPUs than
/// pairs, several pairs share one vCPU.
fn first_vcpu(pair: u32, vcpus: u32, pairs: u32) -> u32 {
    let (vcpus, pairs) = (vcpus.max(1), pairs.max(1));
    if pairs >= vcpus {
        return pair % vcpus;
    }
    pair * (vcpus / pairs) + pair.min(vcpus % pairs)
}

/// A running load.
#[derive(Debug)]
pub struct RunningIperf<'a> {
    clients: Vec<Client<'a>>,
    /// The servers on the host.
    _servers: Vec<Proc>,
    timeout: Duration,
}

#[derive(Debug)]
enum Client<'a> {
    Host(Proc),
    Guest(BackgroundCommand<'a>),
}

impl RunningIperf<'_> {
    /// Returns whether all clients on the host have exited.
    ///
    /// # Errors
    /// When the state of a client cannot be read.
    pub fn is_finished(&mut self) -> Result<bool> {
        let mut is_finished = true;
        for client in &mut self.clients {
            if let Client::Host(proc) = client {
                is_finished &= proc.try_wait()?.is_some();
            }
        }
        Ok(is_finished)
    }

    /// Waits for the end of the load.
    ///
    /// # Errors
    /// When a client fails or does not exit. The error contains its message.
    pub fn finish(self) -> Result<IperfReport> {
        let mut report = IperfReport::default();
        for client in self.clients {
            let text = match client {
                Client::Host(mut proc) => {
                    proc.wait(self.timeout)?;
                    proc.stdout()
                }
                Client::Guest(job) => job.wait(self.timeout)?.text,
            };
            report.add(&text)?;
        }
        Ok(report)
    }
}

impl IperfReport {
    /// Adds the output of one client, which ran with `-J`.
    fn add(&mut self, text: &str) -> Result<()> {
        // iperf3 may print warnings before the JSON.
        let json = text.find('{').and_then(|at| text.get(at..)).unwrap_or("");
        let value: Value = serde_json::from_str(json)
            .with_context(|| format!("the output of iperf3 is not JSON: {text:?}"))?;
        if let Some(error) = value["error"].as_str() {
            return Err(anyhow!("iperf3 failed: {error}"));
        }
        let end = &value["end"];
        let bits = end["sum_received"]["bits_per_second"]
            .as_f64()
            .or(end["sum"]["bits_per_second"].as_f64())
            .context("the JSON of iperf3 has no sum of received bits")?;
        self.gbps += bits / 1e9;
        self.gbps_by_process.push(bits / 1e9);
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
    fn reports_of_several_processes_are_summed() {
        let mut report = IperfReport::default();
        let tcp = r#"{"end": {"sum_sent": {"bits_per_second": 3e9, "retransmits": 4},
                      "sum_received": {"bits_per_second": 2.5e9}}}"#;
        let udp = r#"warning: x
                     {"end": {"sum": {"bits_per_second": 1e9, "packets": 9, "lost_packets": 2}}}"#;
        report.add(tcp).unwrap();
        report.add(udp).unwrap();
        assert!((report.gbps - 3.5).abs() < 1e-9);
        assert_eq!(report.gbps_by_process.len(), 2);
        assert_eq!((report.retransmits, report.packets, report.lost), (4, 9, 2));
    }

    #[test]
    fn each_process_runs_on_the_first_vcpu_of_its_queue_pair() {
        let first_vcpus = |vcpus, pairs| -> Vec<u32> {
            (0..pairs)
                .map(|pair| first_vcpu(pair, vcpus, pairs))
                .collect()
        };
        assert_eq!(first_vcpus(4, 4), [0, 1, 2, 3]);
        assert_eq!(first_vcpus(4, 2), [0, 2]);
        assert_eq!(first_vcpus(4, 3), [0, 2, 3]);
        assert_eq!(first_vcpus(2, 5), [0, 1, 0, 1, 0]);
    }

    #[test]
    fn error_from_iperf3_or_incomplete_output_is_an_error() {
        let mut report = IperfReport::default();
        let error = report.add(r#"{"error": "unable to connect"}"#).unwrap_err();
        assert!(error.to_string().contains("unable to connect"));
        assert!(report.add("nothing").is_err());
        assert!(report.add(r#"{"end": {}}"#).is_err());
    }
}
