//! QEMU's command line.

use std::path::Path;

use super::args::Accel;
use super::guest_plan::{GuestPlan, NetDevicePlan, path_text};
use super::request::Rings;
use super::shell::quote;

/// The command, by lines; it lacks disks, a display and the like, which follow it.
pub(super) fn command(plan: &GuestPlan) -> Vec<Vec<String>> {
    let memory = plan.memory_mib;
    let wide = plan.request.needs_x2apic();
    let mut lines = vec![
        words([
            "qemu-system-x86_64",
            "-name",
            &format!("guest={},debug-threads=on", plan.guest),
        ]),
        match (plan.request.accel, wide) {
            (Accel::Kvm, _) => words(["-accel", "kvm", "-cpu", "host"]),
            (Accel::Tcg, false) => words(["-accel", "tcg,thread=multi"]),
            (Accel::Tcg, true) => words(["-accel", "tcg,thread=multi", "-cpu", "qemu64,x2apic=on"]),
        },
        words([
            "-machine",
            match wide {
                true => "q35,kernel-irqchip=split,memory-backend=mem",
                false => "q35,memory-backend=mem",
            },
            "-smp",
            &plan.vcpus.to_string(),
            "-m",
            &format!("{memory}M"),
        ]),
        words(["-object", &memory_backend(plan)]),
        words(["-pidfile", &path_text(&plan.pidfile())]),
    ];
    if wide {
        // Before the devices whose interrupts it remaps.
        lines.push(words(["-device", "intel-iommu,intremap=on,eim=on"]));
    }
    for card in &plan.cards {
        lines.extend(device_lines(card, plan.rings()));
    }
    lines
}

/// Memory that virtionetd can map, near the vCPUs.
fn memory_backend(plan: &GuestPlan) -> String {
    let size = plan.memory_mib;
    let node = plan
        .memory_node
        .map(|node| format!(",host-nodes={node},policy=bind"));
    format!(
        "memory-backend-memfd,id=mem,size={size}M,share=on{}",
        node.unwrap_or_default()
    )
}

fn device_lines(card: &NetDevicePlan, rings: Rings) -> [Vec<String>; 3] {
    let NetDevicePlan {
        name,
        pairs,
        vectors,
        mac,
        ..
    } = card;
    let socket = value(&card.socket);
    let mut device = format!("virtio-net-pci,netdev={name},mac={mac},vectors={vectors}");
    if *pairs > 1 {
        device += ",mq=on";
    }
    if rings.packed {
        device += ",packed=on";
    }
    for (key, size) in [("rx_queue_size", rings.rx), ("tx_queue_size", rings.tx)] {
        if let Some(size) = size {
            device += &format!(",{key}={size}");
        }
    }
    [
        words([
            "-chardev",
            &format!("socket,id={name}-socket,path={socket},reconnect-ms=1000"),
        ]),
        words([
            "-netdev",
            &format!("vhost-user,id={name},chardev={name}-socket,queues={pairs}"),
        ]),
        words(["-device", &device]),
    ]
}

/// A path inside an option of QEMU, where commas are doubled.
fn value(path: &Path) -> String {
    path_text(path).replace(',', ",,")
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).into()
}

/// Shell lines that pin the vCPUs of the QEMU above, found by their threads' names; none where they
/// float.
pub(super) fn pin_commands(plan: &GuestPlan) -> Option<String> {
    let pins = plan.pins.as_ref()?;
    let pidfile = quote(&path_text(&plan.pidfile()));
    let mut text =
        format!("for task in /proc/$(cat {pidfile})/task/*; do\n  case $(cat \"$task/comm\") in\n");
    for (vcpu, cpu) in pins.iter().enumerate() {
        text += &format!("    \"CPU {vcpu}/\"*) taskset -pc {cpu} \"${{task##*/}}\" ;;\n");
    }
    Some(text + "  esac\ndone\n")
}
