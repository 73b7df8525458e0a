//! The request for a plan: the flags, checked and with their defaults.

use std::collections::BTreeSet;
use std::path::PathBuf;

use virtionet_placement::{CpuSet, Placement, parse_cpulist};
use virtionet_sizing::{GuestRequest, MultiqueueDefault};

use super::TargetHost;
use super::args::{Accel, PlanArgs};
use super::error::PlanError;
use super::nic::{NetDeviceSpec, is_name};

/// The largest number of vCPUs of a plan, which is above QEMU's limit for any machine.
const MAX_VCPUS: u32 = 4096;

/// The largest number of network devices of a guest: QEMU finds a slot for so many on q35's root
/// bus, beside a display.
const MAX_NET_DEVICES: usize = 28;

/// The request behind a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// The guest's name.
    pub name: String,
    /// The guest's memory in MiB.
    pub memory_mib: u64,
    /// How QEMU runs the guest.
    pub accel: Accel,
    /// The host CPU of each vCPU; `None` where the vCPUs float.
    pub pins: Option<Vec<u32>>,
    /// The NUMA node of all these CPUs; `None` where they are on several nodes, or where the host
    /// has only one node.
    pub node: Option<u32>,
    /// The request for queue pairs.
    pub queues: GuestRequest,
    /// The network devices, in the order of the request.
    pub net_devices: Vec<NetDeviceSpec>,
    /// Sizes and format of the virtqueues.
    pub rings: Rings,
    /// The directory that the directories of the sockets are in.
    pub socket_dir: PathBuf,
    /// The placement of the workers.
    pub placement: Placement,
    /// How workers wait for frames.
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

/// How workers wait for frames, as the flags `--poll` and `--poll-us` spell it.
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
    /// Whether the guest has more vCPUs than an interrupt can address without interrupt remapping.
    /// An APIC ID has 8 bits, and 255 addresses all CPUs.
    pub(super) fn needs_x2apic(&self) -> bool {
        self.queues.vcpus > 255
    }

    /// Checks `args` for `host`, and fills in the defaults.
    pub(super) fn resolve(args: &PlanArgs, host: &TargetHost) -> Result<Self, PlanError> {
        if !is_name(&args.name) {
            return Err(PlanError::GuestName(args.name.clone()));
        }
        if args.vcpus > MAX_VCPUS {
            return Err(PlanError::TooManyVcpus {
                vcpus: args.vcpus,
                max: MAX_VCPUS,
            });
        }
        let net_devices = parse_net_devices(args)?;
        let mut notes = Vec::new();
        let pins = resolve_pins(args, host, &mut notes)?;
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
                multiqueue_default: match args.nova {
                    true => MultiqueueDefault::Off,
                    false => MultiqueueDefault::On,
                },
                max_queues: args.max_queues,
                net_devices: net_devices
                    .iter()
                    .map(NetDeviceSpec::to_queue_request)
                    .collect(),
                other_vectors: args
                    .other_vectors
                    .unwrap_or_else(|| disk_vectors(args.vcpus).min(args.msix_budget / 2)),
                budget: args.msix_budget,
            },
            net_devices,
            rings: Rings {
                rx: check_ring_size("--rx-queue-size", args.rx_queue_size)?,
                tx: check_ring_size("--tx-queue-size", args.tx_queue_size)?,
                packed: args.packed,
            },
            socket_dir: check_socket_dir(args)?,
            placement: args.placement.parse()?,
            poll: PollFlags {
                mode: args.poll.clone(),
                us: args.poll_us.clone(),
            },
            notes,
        })
    }
}

fn parse_net_devices(args: &PlanArgs) -> Result<Vec<NetDeviceSpec>, PlanError> {
    let count = match args.nic.len() {
        0 => usize::from(args.nics.unwrap_or(1)),
        some => some,
    };
    if !(1..=MAX_NET_DEVICES).contains(&count) {
        return Err(PlanError::NetDeviceCount {
            count,
            max: MAX_NET_DEVICES,
        });
    }
    let net_devices = (0..count)
        .map(|at| {
            let text = args.nic.get(at).map_or("", String::as_str);
            NetDeviceSpec::parse(&args.name, at, text)
        })
        .collect::<Result<Vec<_>, _>>()?;
    for (at, device) in net_devices.iter().enumerate() {
        let others = net_devices.get(..at).unwrap_or_default();
        if others.iter().any(|other| other.name == device.name) {
            return Err(PlanError::NetDeviceNameRepeated(device.name.clone()));
        }
        if let Some(other) = others.iter().find(|other| other.mac == device.mac) {
            return Err(PlanError::MacRepeated {
                first: other.name.clone(),
                second: device.name.clone(),
                mac: device.mac.to_string(),
            });
        }
    }
    Ok(net_devices)
}

/// Interrupt vectors of a virtio disk as QEMU configures it: one for each vCPU's virtqueue, and one
/// for changes of the configuration.
fn disk_vectors(vcpus: u32) -> u32 {
    vcpus.saturating_add(1)
}

/// Parses a size such as `4G`, `512M`, `1T` or `512` into MiB.
fn parse_memory(text: &str) -> Result<u64, PlanError> {
    let (digits, factor) = match text.char_indices().next_back() {
        Some((at, 'M' | 'm')) => (text.get(..at), 1),
        Some((at, 'G' | 'g')) => (text.get(..at), 1024),
        Some((at, 'T' | 't')) => (text.get(..at), 1024 * 1024),
        _ => (Some(text), 1),
    };
    // 4 PiB, which is what the 52 bits of a physical address can reach.
    const MAX_MIB: u64 = 1 << 32;
    digits
        .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()))
        .and_then(|digits| digits.parse::<u64>().ok()?.checked_mul(factor))
        .filter(|mib| (1..=MAX_MIB).contains(mib))
        .ok_or_else(|| PlanError::Memory(text.into()))
}

fn check_ring_size(flag: &'static str, size: Option<u16>) -> Result<Option<u16>, PlanError> {
    match size {
        None | Some(256 | 512 | 1024) => Ok(size),
        Some(size) => Err(PlanError::RingSize { flag, size }),
    }
}

fn check_socket_dir(args: &PlanArgs) -> Result<PathBuf, PlanError> {
    let dir = &args.socket_dir;
    // The path is printed in shell commands, XML and TOML, which are text.
    match dir.to_str() {
        Some(text) if dir.is_absolute() && text.chars().all(is_printable) => Ok(dir.clone()),
        _ => Err(PlanError::SocketDir(dir.clone())),
    }
}

/// Whether `c` can occur in XML, which allows neither control characters nor U+FFFE and U+FFFF.
fn is_printable(c: char) -> bool {
    !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}')
}

/// The host CPU of each vCPU; `None` where the vCPUs float. What the user should know about the
/// choice is added to `notes`.
fn resolve_pins(
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
                    "the vCPUs take the first CPUs that the host has, {}: give a guest beside this \
                     one others with --cpus LIST",
                    list.iter().copied().collect::<CpuSet>()
                ));
                list
            }
            None => {
                notes.push(format!(
                    "the vCPUs float, as the host has {} for {vcpus} of them; pin them with --cpus \
                     LIST if they are to share CPUs",
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

/// Chooses the first CPUs that are online and not isolated, on a single NUMA node if one has
/// enough. `None` where the host has too few.
fn choose_cpus(host: &TargetHost, vcpus: usize) -> Option<Vec<u32>> {
    let topology = &host.topology;
    let is_usable = |cpu: &u32| topology.is_online(*cpu) && !topology.is_isolated(*cpu);
    let cpus: Vec<u32> = host.cpus.iter().filter(is_usable).collect();
    let nodes: BTreeSet<u32> = cpus
        .iter()
        .filter_map(|cpu| topology.node_of(*cpu))
        .collect();
    let of_node = |node: u32| -> Vec<u32> {
        let is_local = |cpu: &u32| topology.node_of(*cpu) == Some(node);
        cpus.iter().copied().filter(is_local).collect()
    };
    let mut chosen = nodes
        .into_iter()
        .map(of_node)
        .chain([cpus.clone()])
        .find(|cpus| cpus.len() >= vcpus)?;
    chosen.truncate(vcpus);
    Some(chosen)
}

/// The NUMA node of all `pins`, to which the guest's memory is bound. `None` where the pins are on
/// several nodes, or where the host has only one node.
fn node_of(pins: &[u32], host: &TargetHost) -> Option<u32> {
    let several = host.topology.node_count() > 1;
    let cpus: CpuSet = pins.iter().copied().collect();
    several.then(|| host.topology.node_of_all(&cpus)).flatten()
}

/// Parses a list of CPUs, in its order, all of which `host` must have.
fn parse_explicit_pins(list: &str, host: &CpuSet) -> Result<Vec<u32>, PlanError> {
    let cpus = parse_cpulist(list)?;
    if cpus.is_empty() {
        return Err(PlanError::NoCpus);
    }
    let outside: CpuSet = cpus
        .iter()
        .copied()
        .filter(|cpu| !host.contains(*cpu))
        .collect();
    if outside.is_empty() {
        return Ok(cpus);
    }
    Err(PlanError::CpusNotAllowed {
        list: list.into(),
        outside,
        host: host.clone(),
    })
}
