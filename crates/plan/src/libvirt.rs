//! The domain of a plan for libvirt.

use std::io;

use quick_xml::Writer;
use quick_xml::events::BytesText;

use super::args::Accel;
use super::guest_plan::{GuestPlan, NetDevicePlan, path_text};

type Xml = Writer<Vec<u8>>;

/// The XML of the domain. The user adds disks, a display and the like.
pub(super) fn domain(plan: &GuestPlan) -> String {
    let mut xml = Writer::new_with_indent(Vec::new(), b' ', 2);
    // Writing to a vector cannot fail, and the writer produces UTF-8.
    let written = write_domain(&mut xml, plan);
    let text = written
        .ok()
        .and_then(|()| String::from_utf8(xml.into_inner()).ok());
    text.map(|text| text + "\n").unwrap_or_default()
}

fn write_domain(xml: &mut Xml, plan: &GuestPlan) -> io::Result<()> {
    let needs_x2apic = plan.request.needs_x2apic();
    let kind = match plan.request.accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "qemu",
    };
    xml.create_element("domain")
        .with_attribute(("type", kind))
        .write_inner_content(|xml| {
            write_text(xml, "name", &[], &plan.guest)?;
            let memory = plan.memory_mib.to_string();
            write_text(xml, "memory", &[("unit", "MiB")], &memory)?;
            // vhost-user requires memory that virtionetd can map.
            write_group(xml, "memoryBacking", |xml| {
                write_empty(xml, "source", &[("type", "memfd")])?;
                write_empty(xml, "access", &[("mode", "shared")])
            })?;
            let vcpus = plan.vcpus.to_string();
            write_text(xml, "vcpu", &[("placement", "static")], &vcpus)?;
            write_cputune(xml, plan)?;
            if let Some(node) = plan.memory_node {
                let node = node.to_string();
                let memory = [("mode", "strict"), ("nodeset", node.as_str())];
                write_group(xml, "numatune", |xml| write_empty(xml, "memory", &memory))?;
            }
            write_group(xml, "os", |xml| {
                let machine = [("arch", "x86_64"), ("machine", "q35")];
                write_text(xml, "type", &machine, "hvm")
            })?;
            write_group(xml, "features", |xml| {
                write_empty(xml, "acpi", &[])?;
                write_empty(xml, "apic", &[])?;
                match needs_x2apic {
                    true => write_empty(xml, "ioapic", &[("driver", "qemu")]),
                    false => Ok(()),
                }
            })?;
            match (plan.request.accel, needs_x2apic) {
                (Accel::Kvm, _) => write_empty(xml, "cpu", &[("mode", "host-passthrough")])?,
                (Accel::Tcg, true) => write_x2apic_cpu(xml)?,
                (Accel::Tcg, false) => {}
            }
            write_group(xml, "devices", |xml| {
                if needs_x2apic {
                    write_iommu(xml)?;
                }
                for device in &plan.net_devices {
                    write_interface(xml, plan, device)?;
                }
                write_empty(xml, "console", &[("type", "pty")])
            })
        })?;
    Ok(())
}

/// Pins each vCPU to its CPU, and QEMU's other threads to the CPUs of all vCPUs, so that they
/// disturb no other guest.
fn write_cputune(xml: &mut Xml, plan: &GuestPlan) -> io::Result<()> {
    let (Some(pins), Some(all)) = (&plan.pins, plan.pinned_cpus()) else {
        return Ok(());
    };
    write_group(xml, "cputune", |xml| {
        for (vcpu, cpu) in pins.iter().enumerate() {
            let (vcpu, cpu) = (vcpu.to_string(), cpu.to_string());
            write_empty(xml, "vcpupin", &[("vcpu", &vcpu), ("cpuset", &cpu)])?;
        }
        write_empty(xml, "emulatorpin", &[("cpuset", &all.to_string())])
    })
}

/// The default CPU model of software emulation, with APIC IDs that are wide enough for all vCPUs.
fn write_x2apic_cpu(xml: &mut Xml) -> io::Result<()> {
    xml.create_element("cpu")
        .with_attributes([("mode", "custom"), ("match", "exact")])
        .write_inner_content(|xml| {
            write_text(xml, "model", &[], "qemu64")?;
            write_empty(xml, "feature", &[("policy", "require"), ("name", "x2apic")])
        })?;
    Ok(())
}

/// An IOMMU with interrupt remapping, which more than 255 vCPUs require.
fn write_iommu(xml: &mut Xml) -> io::Result<()> {
    xml.create_element("iommu")
        .with_attribute(("model", "intel"))
        .write_inner_content(|xml| {
            write_empty(xml, "driver", &[("intremap", "on"), ("eim", "on")])
        })?;
    Ok(())
}

/// A network device whose socket QEMU creates, because libvirt runs QEMU as another user, who
/// cannot connect to a socket of virtionetd.
fn write_interface(xml: &mut Xml, plan: &GuestPlan, device: &NetDevicePlan) -> io::Result<()> {
    xml.create_element("interface")
        .with_attribute(("type", "vhostuser"))
        .write_inner_content(|xml| {
            write_empty(xml, "mac", &[("address", &device.mac)])?;
            let path = path_text(&device.socket);
            let source = [("type", "unix"), ("path", &path), ("mode", "server")];
            write_empty(xml, "source", &source)?;
            write_empty(xml, "model", &[("type", "virtio")])?;
            let rings = plan.rings();
            let driver = [
                (
                    "queues",
                    (device.pairs > 1).then(|| device.pairs.to_string()),
                ),
                ("rx_queue_size", rings.rx.map(|size| size.to_string())),
                ("tx_queue_size", rings.tx.map(|size| size.to_string())),
                ("packed", rings.packed.then(|| "on".into())),
            ];
            let driver: Vec<(&str, &str)> = driver
                .iter()
                .filter_map(|(key, value)| Some((*key, value.as_deref()?)))
                .collect();
            match driver.is_empty() {
                true => Ok(()),
                false => write_empty(xml, "driver", &driver),
            }
        })?;
    Ok(())
}

fn write_group(
    xml: &mut Xml,
    name: &str,
    inner: impl FnOnce(&mut Xml) -> io::Result<()>,
) -> io::Result<()> {
    xml.create_element(name).write_inner_content(inner)?;
    Ok(())
}

fn write_empty(xml: &mut Xml, name: &str, attributes: &[(&str, &str)]) -> io::Result<()> {
    let element = xml.create_element(name);
    element
        .with_attributes(attributes.iter().copied())
        .write_empty()?;
    Ok(())
}

fn write_text(
    xml: &mut Xml,
    name: &str,
    attributes: &[(&str, &str)],
    text: &str,
) -> io::Result<()> {
    let element = xml.create_element(name);
    element
        .with_attributes(attributes.iter().copied())
        .write_text_content(BytesText::new(text))?;
    Ok(())
}
