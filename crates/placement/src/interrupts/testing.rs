//! A fake host: a folder with the files that procfs and sysfs have.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::desired::KernelPaths;
use crate::testing::TempDir;

pub(crate) struct FakeHost(TempDir);

impl FakeHost {
    pub(crate) fn new(name: &str, online: &str) -> Self {
        let host = Self(TempDir::new(name));
        host.put("sys/devices/system/cpu/online", online);
        host
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn roots(&self) -> KernelPaths {
        KernelPaths {
            sys: self.path().join("sys"),
            proc: self.path().join("proc"),
        }
    }

    pub(crate) fn put(&self, file: &str, text: &str) {
        let file = self.path().join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, format!("{text}\n")).unwrap();
    }

    pub(crate) fn get(&self, file: &str) -> String {
        let text = fs::read_to_string(self.path().join(file)).unwrap();
        text.trim_end().to_owned()
    }

    pub(crate) fn tap(&self, name: &str, index: u32, queues: usize) {
        let dir = format!("sys/class/net/{name}");
        self.put(&format!("{dir}/ifindex"), &index.to_string());
        self.put(&format!("{dir}/tun_flags"), "0x5102");
        for queue in 0..queues {
            self.put(&format!("{dir}/queues/tx-{queue}/xps_cpus"), "0");
            self.put(&format!("{dir}/queues/rx-{queue}/rps_cpus"), "0");
        }
    }

    pub(crate) fn bridge(&self, name: &str, ports: &[&str]) {
        for port in ports {
            self.put(&format!("sys/class/net/{name}/brif/{port}/state"), "3");
            let brport = self.path().join(format!("sys/class/net/{port}/brport"));
            fs::create_dir_all(&brport).unwrap();
            symlink(
                self.path().join(format!("sys/class/net/{name}")),
                brport.join("bridge"),
            )
            .unwrap();
        }
    }

    pub(crate) fn stacked(&self, name: &str, on: &[&str]) {
        self.put(&format!("sys/class/net/{name}/ifindex"), "99");
        for lower in on {
            self.put(&format!("sys/class/net/{name}/lower_{lower}"), "");
        }
    }

    pub(crate) fn nic(&self, name: &str, irqs: &[(u32, &str)]) {
        let device = format!("sys/devices/pci/{name}");
        self.irqs(&device, irqs);
        self.device(name, &device);
    }

    pub(crate) fn virtio_nic(&self, name: &str, irqs: &[(u32, &str)]) {
        let device = format!("sys/devices/pci/{name}");
        self.irqs(&device, irqs);
        let inner = format!("{device}/virtio3");
        fs::create_dir_all(self.path().join(&inner)).unwrap();
        self.device(name, &inner);
    }

    fn device(&self, name: &str, device: &str) {
        let dir = self.path().join(format!("sys/class/net/{name}"));
        fs::create_dir_all(&dir).unwrap();
        symlink(self.path().join(device), dir.join("device")).unwrap();
    }

    fn irqs(&self, device: &str, irqs: &[(u32, &str)]) {
        for (irq, handler) in irqs {
            self.put(&format!("{device}/msi_irqs/{irq}"), "msix");
            self.put(&format!("proc/irq/{irq}/smp_affinity_list"), "0-7");
            let handler = self.path().join(format!("proc/irq/{irq}/{handler}"));
            fs::create_dir_all(handler).unwrap();
        }
    }
}
