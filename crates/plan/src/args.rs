//! The command line of `virtionetctl plan`, unchecked.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

const RULES: &str = "\
Nothing is started or changed: the command lines are printed, ready to paste.

How many queue pairs a card gets:
  As many as the guest has vCPUs, which is what Linux's driver makes best use of: each vCPU then has \
a pair, an interrupt and a worker of its own. With OpenStack Nova's rules: a guest with one vCPU has \
one pair, whatever else is said; the image's property and the flavor's extra spec decide, and are an \
error where they contradict each other; never more than vCPUs, than --max-queues, than the 128 that \
vhost-user can address. Where neither property is set, Nova leaves multiqueue off (--nova does so, \
too); planned by hand it is on.

  A card's own queues=N or throughput=high|medium|low (a pair for each vCPU, for every two, or one) \
comes before that, but must not contradict a property that turns multiqueue off.

Interrupt vectors:
  A card has two for each pair and two more. Where all devices need more than --msix-budget, the \
cards with the most pairs get fewer, except those with queues=N; where that is not enough, it is an \
error. Linux since 4.15 has about 200 vectors for each vCPU: with such guests the budget may be \
raised.

Examples:
  virtionetctl plan --vcpus 4
  virtionetctl plan --vcpus 8 --cpus 8-15 --nic name=lan,bridge=br0 --nic name=mgmt,throughput=low
  virtionetctl plan --vcpus 4 --name web --print libvirt > web.xml
  virtionetctl plan --vcpus 4 --image-multiqueue true --nova --json

Exit status:
  0, or 2 when the request contradicts itself.";

/// How many queue pairs, and the command lines for them.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(after_help = RULES)]
pub struct PlanArgs {
    /// The guest's vCPUs
    #[arg(long, value_name = "N", help_heading = "Guest")]
    pub vcpus: u32,

    /// The guest's name, from which sockets and TAPs get theirs
    #[arg(
        long,
        value_name = "NAME",
        default_value = "guest",
        help_heading = "Guest"
    )]
    pub name: String,

    /// The guest's memory, in MiB or with one of the suffixes M, G and T
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "4G",
        help_heading = "Guest"
    )]
    pub memory: String,

    /// Host CPUs that the vCPUs are pinned to, in this order, such as 2-5 or 8,10,12,14; none leaves
    /// them floating; auto takes the first CPUs that this process may run on, where there are enough
    #[arg(
        long,
        value_name = "LIST|auto|none",
        default_value = "auto",
        help_heading = "Guest"
    )]
    pub cpus: String,

    /// How QEMU runs the guest
    #[arg(
        long,
        value_name = "kvm|tcg",
        default_value = "kvm",
        help_heading = "Guest"
    )]
    pub accel: Accel,

    /// Number of network cards, called net0, net1, ...; see --nic for cards with wishes of their own
    /// [default: 1]
    #[arg(long, value_name = "N", conflicts_with = "nic", help_heading = "Cards")]
    pub nics: Option<u16>,

    /// A network card, with the keys name, queues (a number of pairs) or throughput (high, medium or
    /// low), mac, and tap, bridge or uplink as virtionetd's flags have them; may be repeated. A comma
    /// inside a value is written twice
    #[arg(long, value_name = "KEY=VALUE,...", help_heading = "Cards")]
    pub nic: Vec<String>,

    /// Size of the receive rings: 256, 512 or 1024 [default: QEMU's, 256]
    #[arg(long, value_name = "N", help_heading = "Cards")]
    pub rx_queue_size: Option<u16>,

    /// Size of the transmit rings: 256, 512 or 1024 [default: QEMU's, 256]
    #[arg(long, value_name = "N", help_heading = "Cards")]
    pub tx_queue_size: Option<u16>,

    /// Offer packed rings
    #[arg(long, help_heading = "Cards")]
    pub packed: bool,

    /// The image's property hw_vif_multiqueue_enabled (also a name of this flag)
    #[arg(
        long,
        alias = "hw_vif_multiqueue_enabled",
        value_name = "true|false",
        action = ArgAction::Set,
        value_parser = clap::builder::BoolishValueParser::new(),
        help_heading = "Policy"
    )]
    pub image_multiqueue: Option<bool>,

    /// The flavor's extra spec hw:vif_multiqueue_enabled (also a name of this flag)
    #[arg(
        long,
        alias = "hw:vif_multiqueue_enabled",
        value_name = "true|false",
        action = ArgAction::Set,
        value_parser = clap::builder::BoolishValueParser::new(),
        help_heading = "Policy"
    )]
    pub flavor_multiqueue: Option<bool>,

    /// Multiqueue is off where neither property turns it on, as in Nova
    #[arg(long, help_heading = "Policy")]
    pub nova: bool,

    /// Most queue pairs of a card [default: no limit but the vCPUs and vhost-user's 128]
    #[arg(long, value_name = "N", help_heading = "Policy")]
    pub max_queues: Option<u16>,

    /// Interrupt vectors that all devices of the guest may use together
    #[arg(
        long,
        value_name = "N",
        default_value_t = virtionet_sizing::MSIX_BUDGET,
        help_heading = "Policy"
    )]
    pub msix_budget: u32,

    /// Interrupt vectors of the guest's other devices [default: those of one virtio disk, which has a
    /// queue for each vCPU: vCPUs + 1, but half of the budget at most]
    #[arg(long, value_name = "N", help_heading = "Policy")]
    pub other_vectors: Option<u32>,

    /// The workers' CPUs, as virtionetd's --placement
    #[arg(
        long,
        value_name = "MODE",
        default_value = "auto",
        help_heading = "Workers"
    )]
    pub placement: String,

    /// How workers wait for frames, as virtionetd's --poll [default: off]
    #[arg(long, value_name = "off|adaptive|always", help_heading = "Workers")]
    pub poll: Option<String>,

    /// How long --poll adaptive looks on, as virtionetd's --poll-us
    #[arg(long, value_name = "N", help_heading = "Workers")]
    pub poll_us: Option<String>,

    /// CPUs that virtionetd may run on, for a plan that is carried out elsewhere [default: those
    /// that this process may run on]
    #[arg(long, value_name = "LIST", help_heading = "Workers")]
    pub host_cpus: Option<String>,

    /// Folder for the sockets
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/run/virtionetd",
        help_heading = "Output"
    )]
    pub socket_dir: PathBuf,

    /// Print one part alone
    #[arg(
        long,
        value_name = "PART",
        default_value = "all",
        help_heading = "Output"
    )]
    pub print: OutputPart,

    /// Print all of it as JSON
    #[arg(long, conflicts_with = "print", help_heading = "Output")]
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

/// What is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputPart {
    /// Everything, under headings.
    All,
    /// The numbers and their reasons.
    Queues,
    /// QEMU's command line.
    Qemu,
    /// Shell commands that pin its vCPUs.
    Pin,
    /// The domain for libvirt.
    Libvirt,
    /// virtionetd's command line beside QEMU.
    Virtionetd,
    /// virtionetd's command line beside the domain.
    VirtionetdClient,
    /// virtionetd's configuration file beside QEMU.
    Config,
}
