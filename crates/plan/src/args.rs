//! The command line of `virtionetctl plan`. Its values are not checked yet.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

const RULES: &str = "\
The command prints command lines that can be pasted into a shell. It starts and changes nothing.

How many queue pairs a network device gets:
  As many as the guest has vCPUs, because Linux's driver then gives each vCPU a queue pair, an \
interrupt and a worker of its own. OpenStack Nova's rules apply: a guest with one vCPU has one \
queue pair, whatever else is set; the image's property and the flavor's extra spec decide, and it \
is an error when they contradict each other; a device has at most as many queue pairs as there are \
vCPUs, as --max-queues allows and as vhost-user can address (128). Where neither property is set, \
multiqueue is on, unless --nova turns it off as Nova does.

  A device's own queues=N or throughput=high|medium|low (a queue pair for each vCPU, for every two \
vCPUs, or one) overrides the number of vCPUs, but must not contradict a property that turns \
multiqueue off.

Interrupt vectors:
  A network device has two for each queue pair and two more. When all devices together need more \
than --msix-budget, the network devices with the most queue pairs get fewer, except those with \
queues=N. When that is not enough, it is an error. Linux since 4.15 has about 200 vectors for each \
vCPU, so that the budget can be raised for such guests.

Examples:
  virtionetctl plan --vcpus 4
  virtionetctl plan --vcpus 8 --cpus 8-15 --nic name=lan,bridge=br0 --nic name=mgmt,throughput=low
  virtionetctl plan --vcpus 4 --name web --print libvirt > web.xml
  virtionetctl plan --vcpus 4 --image-multiqueue true --nova --json

Exit status:
  0  the plan is printed
  1  the plan cannot be printed, or the CPUs of this process cannot be read
  2  the request cannot be used, for example because it contradicts itself";

/// The headings of the groups of flags.
const GUEST: &str = "Guest";
const NET_DEVICES: &str = "Network devices";
const POLICY: &str = "Policy";
const WORKERS: &str = "Workers";
const OUTPUT: &str = "Output";

/// Plan the queue pairs of a guest, and print the command lines for them.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(after_help = RULES)]
pub struct PlanArgs {
    /// The number of the guest's vCPUs
    #[arg(long, value_name = "N", help_heading = GUEST)]
    pub vcpus: u32,

    /// The guest's name, which the names of sockets and TAPs contain
    #[arg(
        long,
        value_name = "NAME",
        default_value = "guest",
        help_heading = GUEST
    )]
    pub name: String,

    /// The size of the guest's memory, in MiB or with one of the suffixes M, G and T
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "4G",
        help_heading = GUEST
    )]
    pub memory: String,

    /// The host CPUs that the vCPUs are pinned to, in this order, such as 2-5 or 8,10,12,14. none:
    /// the vCPUs float. auto: the first CPUs that this process may run on, if there are enough
    #[arg(
        long,
        value_name = "LIST|auto|none",
        default_value = "auto",
        help_heading = GUEST
    )]
    pub cpus: String,

    /// How QEMU runs the guest
    #[arg(
        long,
        value_name = "kvm|tcg",
        default_value = "kvm",
        help_heading = GUEST
    )]
    pub accel: Accel,

    /// The number of network devices, called net0, net1, ...; --nic describes devices with keys of
    /// their own [default: 1]
    #[arg(long, value_name = "N", conflicts_with = "nic", help_heading = NET_DEVICES)]
    pub nics: Option<u16>,

    /// A network device, with the keys name, queues (a number of queue pairs) or throughput (high,
    /// medium or low), mac, and tap, bridge or uplink with the values of virtionetd's flags; may be
    /// repeated. A comma inside a value is written twice
    #[arg(long, value_name = "KEY=VALUE,...", help_heading = NET_DEVICES)]
    pub nic: Vec<String>,

    /// The size of each receiveq, in descriptors: 256, 512 or 1024 [default: QEMU's, 256]
    #[arg(long, value_name = "N", help_heading = NET_DEVICES)]
    pub rx_queue_size: Option<u16>,

    /// The size of each transmitq, in descriptors: 256, 512 or 1024 [default: QEMU's, 256]
    #[arg(long, value_name = "N", help_heading = NET_DEVICES)]
    pub tx_queue_size: Option<u16>,

    /// Offer packed virtqueues
    #[arg(long, help_heading = NET_DEVICES)]
    pub packed: bool,

    /// The image's property hw_vif_multiqueue_enabled (also a name of this flag)
    #[arg(
        long,
        alias = "hw_vif_multiqueue_enabled",
        value_name = "true|false",
        action = ArgAction::Set,
        value_parser = clap::builder::BoolishValueParser::new(),
        help_heading = POLICY
    )]
    pub image_multiqueue: Option<bool>,

    /// The flavor's extra spec hw:vif_multiqueue_enabled (also a name of this flag)
    #[arg(
        long,
        alias = "hw:vif_multiqueue_enabled",
        value_name = "true|false",
        action = ArgAction::Set,
        value_parser = clap::builder::BoolishValueParser::new(),
        help_heading = POLICY
    )]
    pub flavor_multiqueue: Option<bool>,

    /// Turn multiqueue off where neither property turns it on, as Nova does
    #[arg(long, help_heading = POLICY)]
    pub nova: bool,

    /// The largest number of queue pairs of a network device [default: the number of vCPUs, and at
    /// most the 128 of vhost-user]
    #[arg(long, value_name = "N", help_heading = POLICY)]
    pub max_queues: Option<u16>,

    /// The number of interrupt vectors that all devices of the guest may use together
    #[arg(
        long,
        value_name = "N",
        default_value_t = virtionet_sizing::MSIX_BUDGET,
        help_heading = POLICY
    )]
    pub msix_budget: u32,

    /// The number of interrupt vectors of the guest's other devices [default: those of one virtio
    /// disk with a virtqueue for each vCPU, which are vCPUs + 1, but at most half of the budget]
    #[arg(long, value_name = "N", help_heading = POLICY)]
    pub other_vectors: Option<u32>,

    /// The placement of the workers, with the values of virtionetd's --placement
    #[arg(
        long,
        value_name = "MODE",
        default_value = "auto",
        help_heading = WORKERS
    )]
    pub placement: String,

    /// How workers wait for frames, with the values of virtionetd's --poll [default: off]
    #[arg(long, value_name = "off|adaptive|always", help_heading = WORKERS)]
    pub poll: Option<String>,

    /// The longest time that --poll adaptive polls, in microseconds, as virtionetd's --poll-us
    #[arg(long, value_name = "N", help_heading = WORKERS)]
    pub poll_us: Option<String>,

    /// The CPUs that virtionetd may run on, for a plan for another host [default: the CPUs that
    /// this process may run on]
    #[arg(long, value_name = "LIST", help_heading = WORKERS)]
    pub host_cpus: Option<String>,

    /// The directory of the sockets: the guest's are in guests/NAME, the control socket in control
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/run/virtionetd",
        help_heading = OUTPUT
    )]
    pub socket_dir: PathBuf,

    /// Print only one part
    #[arg(
        long,
        value_name = "PART",
        default_value = "all",
        help_heading = OUTPUT
    )]
    pub print: OutputPart,

    /// Print the whole plan as JSON
    #[arg(long, conflicts_with = "print", help_heading = OUTPUT)]
    pub json: bool,
}

/// How QEMU runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// Hardware virtualization.
    Kvm,
    /// Software emulation.
    Tcg,
}

/// The part of a plan that is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputPart {
    /// All parts except the configuration file, with headings.
    All,
    /// The queue pairs, the interrupt vectors and the workers, with the reasons.
    Queues,
    /// QEMU's command line.
    Qemu,
    /// Shell commands that pin QEMU's vCPUs.
    Pin,
    /// The domain for libvirt.
    Libvirt,
    /// virtionetd's command line for that QEMU.
    Virtionetd,
    /// virtionetd's command line for the domain.
    VirtionetdClient,
    /// virtionetd's configuration file for that QEMU.
    Config,
}
