//! The plan as text for a person.

use virtionet_placement::CpuSet;

use super::args::OutputPart;
use super::daemon::{self, SocketRole};
use super::guest_plan::{GuestPlan, NetDevicePlan, WorkerPlan, path_text};
use super::shell::{join_lines, quote};
use super::{libvirt, qemu};

/// The text of one part of the plan, or of all parts.
pub(super) fn render(plan: &GuestPlan, part: OutputPart) -> String {
    match part {
        OutputPart::All => all_text(plan),
        OutputPart::Queues => queues_text(plan),
        OutputPart::Qemu => join_lines(&qemu::command(plan)),
        OutputPart::Pin => qemu::pin_commands(plan).unwrap_or_default(),
        OutputPart::Libvirt => libvirt::domain(plan),
        OutputPart::Virtionetd => join_lines(&daemon::command(plan, SocketRole::Listens)),
        OutputPart::VirtionetdClient => join_lines(&daemon::command(plan, SocketRole::Connects)),
        OutputPart::Config => daemon::config(plan),
    }
}

fn all_text(plan: &GuestPlan) -> String {
    let guest_dir = quote(&path_text(&plan.guest_dir()));
    let make_control_dir = format!(
        "install -d -m 700 {}",
        quote(&path_text(&plan.control_dir()))
    );
    let mut text = queues_text(plan);
    let mut section = |heading: &str, body: &str| {
        text += &format!("\n== {heading}\n\n{body}");
    };
    section(
        "virtionetd beside QEMU (start it first)",
        &format!(
            "install -d {guest_dir}\n{make_control_dir}\n{}",
            render(plan, OutputPart::Virtionetd)
        ),
    );
    section(
        "QEMU (add disks and the like; before QEMU 9.2 write reconnect=1 for reconnect-ms=1000)",
        &render(plan, OutputPart::Qemu),
    );
    if let Some(pin) = qemu::pin_commands(plan) {
        section("Pins for that QEMU's vCPUs, once it runs", &pin);
    }
    section(
        "A domain for libvirt (virsh define; add disks and the like)",
        &render(plan, OutputPart::Libvirt),
    );
    section(
        "virtionetd beside that domain (its QEMU makes the sockets, as a user of the group kvm)",
        &format!(
            "install -d -g kvm -m 2770 {guest_dir}\n{make_control_dir}\n{}",
            render(plan, OutputPart::VirtionetdClient)
        ),
    );
    text
}

fn queues_text(plan: &GuestPlan) -> String {
    let mut text = format!(
        "guest {}: {}, {} MiB of memory{}, {}\n",
        plan.guest,
        count(plan.vcpus, "vCPU"),
        plan.memory_mib,
        plan.memory_node
            .map(|node| format!(" on NUMA node {node}"))
            .unwrap_or_default(),
        pins_text(plan)
    );
    for device in &plan.net_devices {
        text += &device_text(device);
    }
    let vectors = &plan.vectors;
    text += &format!(
        "\ninterrupt vectors: {} of {} ({} for network devices, {} for other devices)\n",
        vectors.total, vectors.budget, vectors.net_devices, vectors.other
    );
    text += &format!(
        "workers' CPU time: {} when idle, up to {} under load\n",
        count(plan.worker_cpus.idle, "CPU"),
        count(plan.worker_cpus.busy, "CPU")
    );
    for note in &plan.notes {
        text += &format!("note: {note}\n");
    }
    text
}

fn pins_text(plan: &GuestPlan) -> String {
    match &plan.pins {
        None => "vCPUs floating".into(),
        Some(pins) => {
            let pins: Vec<String> = pins.iter().map(u32::to_string).collect();
            format!("vCPUs pinned to CPUs {}", pins.join(","))
        }
    }
}

fn device_text(device: &NetDevicePlan) -> String {
    let mut text = format!(
        "\nnetwork device {}: {}, {}; on {}\n  why: {}\n",
        device.name,
        count(device.pairs.into(), "queue pair"),
        count(device.vectors, "interrupt vector"),
        device.uplink,
        device.why
    );
    for worker in &device.workers {
        text += &worker_text(worker);
    }
    if let Some(command) = &device.guest_command {
        text += &format!(
            "  Linux in the guest uses all pairs by itself; where it does not: {command}\n"
        );
    }
    text
}

fn worker_text(worker: &WorkerPlan) -> String {
    let set = |cpus: &[u32]| cpus.iter().copied().collect::<CpuSet>();
    format!(
        "  pair {} -> vCPU {} -> worker {} on {}: {}\n",
        worker.pair,
        set(&worker.vcpus),
        worker.name,
        set(&worker.cpus).describe(),
        worker.why
    )
}

fn count(number: u32, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        _ => format!("{number} {what}s"),
    }
}
