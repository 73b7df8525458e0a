//! Arguments of QEMU for hardware that some machines have.

/// Additional arguments for vCPU hotplug under software emulation. QEMU's ACPI tables describe
/// vCPUs that are not plugged in as disabled processors. Newer kernels (6.12.117 and 7.2, but not
/// 6.1) ignore disabled processors unless they detect a known hypervisor. QEMU's software emulation
/// is not one, but VMware is detected by the serial number and by QEMU's emulation of its I/O port.
/// This `-cpu` overrides the earlier one; this `-machine` adds to the earlier one.
pub(crate) const PLUGGABLE_WITHOUT_KVM: [&str; 6] = [
    "-machine",
    "vmport=on",
    "-cpu",
    "qemu64,hypervisor=off",
    "-smbios",
    "type=1,serial=VMware-test",
];

/// The IOMMU must precede the devices for which it translates. The interrupt controller of KVM as a
/// whole would not go with it.
pub(crate) const INTEL_IOMMU: [&str; 4] = [
    "-machine",
    "kernel-irqchip=split",
    "-device",
    "intel-iommu,intremap=off,device-iotlb=on",
];

/// A slot in which devices can be plugged while the machine runs. It must precede them.
pub(crate) const SLOT: [&str; 2] = ["-device", "pcie-root-port,id=hot,chassis=1"];
