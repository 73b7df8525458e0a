//! QEMU's command line for a plan, and the commands that pin its vCPUs.

use std::path::Path;

use super::args::Accel;
use super::guest_plan::{GuestPlan, NetDevicePlan, path_text};
use super::request::Rings;
use super::shell::quote;

/// The words of QEMU's command line, in lines. The user adds disks, a display and the like.
pub(super) fn command(plan: &GuestPlan) -> Vec<Vec<String>> {
    let memory = plan.memory_mib;
    let x2apic = plan.request.needs_x2apic();
    let mut lines = vec![
        words([
            "qemu-system-x86_64",
            "-name",
            &format!("guest={},debug-threads=on", plan.guest),
        ]),
        match (plan.request.accel, x2apic) {
            (Accel::Kvm, _) => words(["-accel", "kvm", "-cpu", "host"]),
            (Accel::Tcg, false) => words(["-accel", "tcg,thread=multi"]),
            (Accel::Tcg, true) => words(["-accel", "tcg,thread=multi", "-cpu", "qemu64,x2apic=on"]),
        },
        words([
            "-machine",
            match x2apic {
                true => "q35,kernel-irqchip=split,memory-backend=mem",
                false => "q35,memory-backend=mem",
            },
            "-smp",
            &plan.vcpus.to_string(),
            "-m",
            &format!("{memory}M"),
        ]),
        words(["-object", &memory_backend(plan)]),
        words(["-pidfile", &path_text(&plan.pid_file())]),
    ];
    if x2apic {
        // The IOMMU must precede the devices whose interrupts it remaps.
        lines.push(words(["-device", "intel-iommu,intremap=on,eim=on"]));
    }
    for device in &plan.net_devices {
        lines.extend(device_lines(device, plan.rings()));
    }
    lines
}

/// Memory that virtionetd can map, on the NUMA node of the vCPUs.
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

fn device_lines(net_device: &NetDevicePlan, rings: Rings) -> [Vec<String>; 3] {
    let NetDevicePlan {
        name,
        pairs,
        vectors,
        mac,
        ..
    } = net_device;
    let socket = option_value(&net_device.socket);
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

/// A path as a value in an option of QEMU, where commas are doubled.
fn option_value(path: &Path) -> String {
    path_text(path).replace(',', ",,")
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).into()
}

/// Shell commands that pin the vCPU threads of QEMU, which they find by the threads' names. `None`
/// where the vCPUs float.
pub(super) fn pin_commands(plan: &GuestPlan) -> Option<String> {
    let pins = plan.pins.as_ref()?;
    let pid_file = quote(&path_text(&plan.pid_file()));
    let mut text = format!(
        "for task in /proc/$(cat {pid_file})/task/*; do\n  case $(cat \"$task/comm\") in\n"
    );
    for (vcpu, cpu) in pins.iter().enumerate() {
        text += &format!("    \"CPU {vcpu}/\"*) taskset -pc {cpu} \"${{task##*/}}\" ;;\n");
    }
    Some(text + "  esac\ndone\n")
}
