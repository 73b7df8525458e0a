//! What is asked for: the flags, checked and complete.

use std::collections::BTreeSet;
use std::path::PathBuf;

use virtionet_placement::{CpuSet, Placement, parse_cpulist};
use virtionet_sizing::{GuestRequest, MultiqueueDefault};

use super::args::{Accel, PlanArgs};
use super::nic::{NetDeviceSpec, is_name};
use super::{PlanError, TargetHost};

/// Most vCPUs of a guest that are planned for; above QEMU's limit on any machine.
const MAX_VCPUS: u32 = 4096;

/// The most network devices of a guest: those for which QEMU finds a slot on q35's root bus, beside a display.
const MAX_NET_DEVICES: usize = 28;

/// The request behind a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// The guest's name.
    pub name: String,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// How QEMU runs it.
    pub accel: Accel,
    /// The host CPU of each vCPU; none where they float.
    pub pins: Option<Vec<u32>>,
    /// The NUMA node of these CPUs, on a host with several, if it is one alone.
    pub node: Option<u32>,
    /// What is asked of the policy.
    pub queues: GuestRequest,
    /// The network devices, in the order of the request.
    pub cards: Vec<NetDeviceSpec>,
    /// Sizes and format of the virtqueues.
    pub rings: Rings,
    /// Folder of the sockets.
    pub dir: PathBuf,
    /// The workers' CPUs.
    pub placement: Placement,
    /// How workers wait, as the daemon's flags spell it.
    pub poll: PollFlags,
    /// Notes for the reader of the plan.
    pub notes: Vec<String>,
}

/// Sizes and format of a device's virtqueues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rings {
    pub rx: Option<u16>,
    pub tx: Option<u16>,
    pub packed: bool,
}

/// How workers wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PollFlags {
    pub mode: Option<String>,
    pub us: Option<String>,
}

impl PollFlags {
    /// Whether workers poll for frames instead of sleeping.
    pub(super) fn is_polling(&self) -> bool {
        matches!(self.mode.as_deref(), Some("adaptive" | "always"))
    }
}

impl Request {
    /// Whether the guest has more vCPUs than an interrupt reaches without remapping: its APIC's
    /// numbers have 8 bits, of which the last means all.
    pub(super) fn needs_x2apic(&self) -> bool {
        self.queues.vcpus > 255
    }

    /// What `args` mean on `host`.
    pub(super) fn resolve(args: &PlanArgs, host: &TargetHost) -> Result<Self, PlanError> {
        if !is_name(&args.name) {
            return Err(PlanError::Usage(format!(
                "--name {:?} cannot be used: write a letter and up to 31 letters, digits, '.', '_' or '-'",
                args.name
            )));
        }
        if args.vcpus > MAX_VCPUS {
            return Err(PlanError::Usage(format!(
                "--vcpus {} is more than QEMU can run: write 1 to {MAX_VCPUS}",
                args.vcpus
            )));
        }
        let cards = cards(args)?;
        let mut notes = Vec::new();
        let pins = pins(args, host, &mut notes)?;
        Ok(Self {
            name: args.name.clone(),
            memory_mib: parse_memory(&args.memory)?,
            accel: args.accel,
            node: pins.as_deref().and_then(|pins| node_of(pins, host)),
            pins,
            queues: GuestRequest {
                vcpus: args.vcpus,
                image: args.image_multiqueue,
                flavor: args.flavor_multiqueue,
                unset: match args.nova {
                    true => MultiqueueDefault::Off,
                    false => MultiqueueDefault::On,
                },
                max_queues: args.max_queues,
                cards: cards.iter().map(NetDeviceSpec::request).collect(),
                other_vectors: args
                    .other_vectors
                    .unwrap_or_else(|| disk_vectors(args.vcpus).min(args.msix_budget / 2)),
                budget: args.msix_budget,
            },
            cards,
            rings: Rings {
                rx: ring_size("--rx-queue-size", args.rx_queue_size)?,
                tx: ring_size("--tx-queue-size", args.tx_queue_size)?,
                packed: args.packed,
            },
            dir: directory(args)?,
            placement: args.placement.parse()?,
            poll: PollFlags {
                mode: args.poll.clone(),
                us: args.poll_us.clone(),
            },
            notes,
        })
    }
}

fn cards(args: &PlanArgs) -> Result<Vec<NetDeviceSpec>, PlanError> {
    let plain = usize::from(args.nics.unwrap_or(1));
    let count = match args.nic.len() {
        0 => plain,
        some => some,
    };
    if !(1..=MAX_NET_DEVICES).contains(&count) {
        return Err(PlanError::Usage(format!(
            "a guest cannot have {count} cards: ask for 1 to {MAX_NET_DEVICES}, for which its PCI root bus has room"
        )));
    }
    let cards = (0..count)
        .map(|at| {
            let text = args.nic.get(at).map_or("", String::as_str);
            NetDeviceSpec::parse(&args.name, at, text)
        })
        .collect::<Result<Vec<_>, _>>()?;
    for (at, card) in cards.iter().enumerate() {
        let others = cards.get(..at).unwrap_or_default();
        if others.iter().any(|other| other.name == card.name) {
            return Err(PlanError::Usage(format!(
                "two cards are called {}: give each a name of its own",
                card.name
            )));
        }
        if let Some(other) = others.iter().find(|other| other.mac == card.mac) {
            return Err(PlanError::Usage(format!(
                "cards {} and {} both have the address {}: give each one of its own with mac=",
                other.name, card.name, card.mac
            )));
        }
    }
    Ok(cards)
}

/// Vectors of a virtio disk as QEMU makes it: a queue for each vCPU, and one more.
fn disk_vectors(vcpus: u32) -> u32 {
    vcpus.saturating_add(1)
}

/// MiB in `4G`, `512M`, `1T` or `512`.
fn parse_memory(text: &str) -> Result<u64, PlanError> {
    let (digits, factor) = match text.char_indices().next_back() {
        Some((at, 'M' | 'm')) => (text.get(..at), 1),
        Some((at, 'G' | 'g')) => (text.get(..at), 1024),
        Some((at, 'T' | 't')) => (text.get(..at), 1024 * 1024),
        _ => (Some(text), 1),
    };
    // 4 PiB: the most that 52 bits of a physical address reach.
    const MAX_MIB: u64 = 1 << 32;
    digits
        .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()))
        .and_then(|digits| digits.parse::<u64>().ok()?.checked_mul(factor))
        .filter(|mib| (1..=MAX_MIB).contains(mib))
        .ok_or_else(|| {
            PlanError::Usage(format!(
                "--memory {text} is no size: write MiB, or a number with M, G or T, such as 4G"
            ))
        })
}

fn ring_size(flag: &str, size: Option<u16>) -> Result<Option<u16>, PlanError> {
    match size {
        None | Some(256 | 512 | 1024) => Ok(size),
        Some(other) => Err(PlanError::Usage(format!(
            "{flag} {other} is no size that QEMU takes: write 256, 512 or 1024"
        ))),
    }
}

fn directory(args: &PlanArgs) -> Result<PathBuf, PlanError> {
    let dir = &args.socket_dir;
    // It stands in a shell's line, in XML and in TOML, which are all text.
    match dir.to_str() {
        Some(text) if dir.is_absolute() && text.chars().all(is_printable) => Ok(dir.clone()),
        _ => Err(PlanError::Usage(format!(
            "--socket-dir {} cannot be used: write an absolute path of printable characters",
            dir.display()
        ))),
    }
}

/// Whether a character can stand in XML, which has neither control characters nor these two.
fn is_printable(c: char) -> bool {
    !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}')
}

/// The CPU of each vCPU, or none.
fn pins(
    args: &PlanArgs,
    host: &TargetHost,
    notes: &mut Vec<String>,
) -> Result<Option<Vec<u32>>, PlanError> {
    let vcpus = usize::try_from(args.vcpus).unwrap_or(usize::MAX);
    let list = match args.cpus.as_str() {
        "none" => return Ok(None),
        "auto" => match choose_cpus(host, vcpus) {
            Some(list) => {
                notes.push(format!(
                    "the vCPUs take the first CPUs that the host has, {}: give a guest beside this one others with --cpus LIST",
                    list.iter().copied().collect::<CpuSet>()
                ));
                list
            }
            None => {
                notes.push(format!(
                    "the vCPUs float, as the host has {} for {vcpus} of them; pin them with --cpus LIST if they are to share CPUs",
                    host.cpus.describe()
                ));
                return Ok(None);
            }
        },
        list => parse_explicit_pins(list, &host.cpus)?,
    };
    let unused: CpuSet = list.iter().copied().skip(vcpus).collect();
    let pins: Vec<u32> = list.into_iter().cycle().take(vcpus).collect();
    let used: CpuSet = pins.iter().copied().collect();
    if used.len() < vcpus {
        notes.push(format!(
            "{vcpus} vCPUs share {}: name as many CPUs as there are vCPUs, where the host has them",
            used.describe()
        ));
    }
    let unused = unused.difference(&used);
    if !unused.is_empty() {
        notes.push(format!(
            "no vCPU is pinned to {} of --cpus: name as many CPUs as there are vCPUs",
            unused.describe()
        ));
    }
    Ok(Some(pins))
}

/// The first CPUs that are online and not isolated, on one node where one has enough.
fn choose_cpus(host: &TargetHost, vcpus: usize) -> Option<Vec<u32>> {
    let topology = &host.topology;
    let free = |cpu: &u32| topology.is_online(*cpu) && !topology.is_isolated(*cpu);
    let cpus: Vec<u32> = host.cpus.iter().filter(free).collect();
    let nodes: BTreeSet<u32> = cpus
        .iter()
        .filter_map(|cpu| topology.node_of(*cpu))
        .collect();
    let of_node = |node: u32| -> Vec<u32> {
        let there = |cpu: &u32| topology.node_of(*cpu) == Some(node);
        cpus.iter().copied().filter(there).collect()
    };
    let whole = nodes.into_iter().map(of_node);
    let mut chosen = whole
        .filter(|cpus| cpus.len() >= vcpus)
        .chain([cpus.clone()])
        .find(|cpus| cpus.len() >= vcpus)?;
    chosen.truncate(vcpus);
    Some(chosen)
}

/// The node that the guest's memory should be on, where there is a choice.
fn node_of(pins: &[u32], host: &TargetHost) -> Option<u32> {
    let several = host.topology.node_count() > 1;
    let cpus: CpuSet = pins.iter().copied().collect();
    several.then(|| host.topology.node_of_all(&cpus)).flatten()
}

fn parse_explicit_pins(list: &str, host: &CpuSet) -> Result<Vec<u32>, PlanError> {
    let cpus = parse_cpulist(list)?;
    if cpus.is_empty() {
        return Err(PlanError::Usage(
            "--cpus names no CPU: write a list such as 2-5, auto or none".into(),
        ));
    }
    let outside: CpuSet = cpus
        .iter()
        .copied()
        .filter(|cpu| !host.contains(*cpu))
        .collect();
    if outside.is_empty() {
        return Ok(cpus);
    }
    Err(PlanError::Usage(format!(
        "--cpus {list} names {}, but virtionetd may run on {} only: choose among those, or say with --host-cpus what the host has",
        outside.describe(),
        host.describe()
    )))
}
