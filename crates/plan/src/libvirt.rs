//! The domain for libvirt.

use std::io;

use quick_xml::Writer;
use quick_xml::events::BytesText;

use super::args::Accel;
use super::guest_plan::{GuestPlan, NetDevicePlan, path_text};

type Xml = Writer<Vec<u8>>;

/// The domain's XML; it lacks disks, a display and the like.
pub(super) fn domain(plan: &GuestPlan) -> String {
    let mut xml = Writer::new_with_indent(Vec::new(), b' ', 2);
    // A vector takes all that is written, and it is text.
    let written = write(&mut xml, plan);
    let text = written
        .ok()
        .and_then(|()| String::from_utf8(xml.into_inner()).ok());
    text.map(|text| text + "\n").unwrap_or_default()
}

fn write(xml: &mut Xml, plan: &GuestPlan) -> io::Result<()> {
    let wide = plan.request.needs_x2apic();
    let kind = match plan.request.accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "qemu",
    };
    xml.create_element("domain")
        .with_attribute(("type", kind))
        .write_inner_content(|xml| {
            text(xml, "name", &[], &plan.guest)?;
            let memory = plan.memory_mib.to_string();
            text(xml, "memory", &[("unit", "MiB")], &memory)?;
            // Memory that virtionetd can map, as vhost-user wants it.
            group(xml, "memoryBacking", |xml| {
                empty(xml, "source", &[("type", "memfd")])?;
                empty(xml, "access", &[("mode", "shared")])
            })?;
            let vcpus = plan.vcpus.to_string();
            text(xml, "vcpu", &[("placement", "static")], &vcpus)?;
            cputune(xml, plan)?;
            if let Some(node) = plan.memory_node {
                let node = node.to_string();
                let memory = [("mode", "strict"), ("nodeset", node.as_str())];
                group(xml, "numatune", |xml| empty(xml, "memory", &memory))?;
            }
            group(xml, "os", |xml| {
                let machine = [("arch", "x86_64"), ("machine", "q35")];
                text(xml, "type", &machine, "hvm")
            })?;
            group(xml, "features", |xml| {
                empty(xml, "acpi", &[])?;
                empty(xml, "apic", &[])?;
                match wide {
                    true => empty(xml, "ioapic", &[("driver", "qemu")]),
                    false => Ok(()),
                }
            })?;
            match (plan.request.accel, wide) {
                (Accel::Kvm, _) => empty(xml, "cpu", &[("mode", "host-passthrough")])?,
                (Accel::Tcg, true) => x2apic(xml)?,
                (Accel::Tcg, false) => {}
            }
            group(xml, "devices", |xml| {
                if wide {
                    remapping(xml)?;
                }
                for card in &plan.cards {
                    interface(xml, plan, card)?;
                }
                empty(xml, "console", &[("type", "pty")])
            })
        })?;
    Ok(())
}

/// Pins the vCPUs, and QEMU's other threads to the same CPUs, so that they disturb no other guest.
fn cputune(xml: &mut Xml, plan: &GuestPlan) -> io::Result<()> {
    let (Some(pins), Some(all)) = (&plan.pins, plan.pinned()) else {
        return Ok(());
    };
    group(xml, "cputune", |xml| {
        for (vcpu, cpu) in pins.iter().enumerate() {
            let (vcpu, cpu) = (vcpu.to_string(), cpu.to_string());
            empty(xml, "vcpupin", &[("vcpu", &vcpu), ("cpuset", &cpu)])?;
        }
        empty(xml, "emulatorpin", &[("cpuset", &all.to_string())])
    })
}

/// Software emulation's usual CPU, with numbers wide enough for all of its vCPUs.
fn x2apic(xml: &mut Xml) -> io::Result<()> {
    xml.create_element("cpu")
        .with_attributes([("mode", "custom"), ("match", "exact")])
        .write_inner_content(|xml| {
            text(xml, "model", &[], "qemu64")?;
            empty(xml, "feature", &[("policy", "require"), ("name", "x2apic")])
        })?;
    Ok(())
}

/// What lets interrupts reach the vCPUs beyond the first 255.
fn remapping(xml: &mut Xml) -> io::Result<()> {
    xml.create_element("iommu")
        .with_attribute(("model", "intel"))
        .write_inner_content(|xml| empty(xml, "driver", &[("intremap", "on"), ("eim", "on")]))?;
    Ok(())
}

/// A network device whose socket QEMU creates: QEMU runs as another user, who cannot connect to a
/// socket of virtionetd.
fn interface(xml: &mut Xml, plan: &GuestPlan, card: &NetDevicePlan) -> io::Result<()> {
    xml.create_element("interface")
        .with_attribute(("type", "vhostuser"))
        .write_inner_content(|xml| {
            empty(xml, "mac", &[("address", &card.mac)])?;
            let path = path_text(&card.socket);
            let source = [("type", "unix"), ("path", &path), ("mode", "server")];
            empty(xml, "source", &source)?;
            empty(xml, "model", &[("type", "virtio")])?;
            let rings = plan.rings();
            let driver = [
                ("queues", (card.pairs > 1).then(|| card.pairs.to_string())),
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
                false => empty(xml, "driver", &driver),
            }
        })?;
    Ok(())
}

fn group(
    xml: &mut Xml,
    name: &str,
    inner: impl FnOnce(&mut Xml) -> io::Result<()>,
) -> io::Result<()> {
    xml.create_element(name).write_inner_content(inner)?;
    Ok(())
}

fn empty(xml: &mut Xml, name: &str, attributes: &[(&str, &str)]) -> io::Result<()> {
    let element = xml.create_element(name);
    element
        .with_attributes(attributes.iter().copied())
        .write_empty()?;
    Ok(())
}

fn text(xml: &mut Xml, name: &str, attributes: &[(&str, &str)], text: &str) -> io::Result<()> {
    let element = xml.create_element(name);
    element
        .with_attributes(attributes.iter().copied())
        .write_text_content(BytesText::new(text))?;
    Ok(())
}
