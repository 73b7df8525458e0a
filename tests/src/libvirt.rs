//! A libvirt of the test's own: libvirtd with its QEMU driver, apart from one that the machine may
//! have.
//!
//! Where libvirtd keeps its state is compiled in, so it gets a mount namespace in which those
//! places are empty memory; and a process namespace, since the QEMU that it starts is no child of
//! ours: when the namespace's first process ends, the kernel ends all that is in it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::guest::Guest;
use crate::paths::{RunDir, guest_image};
use crate::process::{Proc, output};

const START: Duration = Duration::from_secs(30);
const SERIAL: &str = "domain.serial";

/// The first process of the namespaces, with the directory for libvirtd's sockets as its argument.
/// It stays, to reap what libvirtd does not know. No cgroups: they are the machine's.
const INIT: &str = r#"
set -e
mount -t tmpfs -o mode=755 none /run
for place in /etc /var/lib /var/cache /var/log; do
    mkdir -p $place/libvirt
    mount -t tmpfs -o mode=755 none $place/libvirt
done
cat >/etc/libvirt/qemu.conf <<END
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
END
cat >/etc/libvirt/libvirtd.conf <<END
unix_sock_dir = "$1"
unix_sock_rw_perms = "0700"
auth_unix_rw = "none"
END
libvirtd -f /etc/libvirt/libvirtd.conf &
wait
"#;

/// A running libvirtd. Dropping it ends it, with its domains.
#[derive(Debug)]
pub struct Libvirt {
    proc: Proc,
    uri: String,
}

impl Libvirt {
    /// Starts it; its sockets and log go to `dir`, which is opened to all users, as libvirt's QEMU
    /// is one of its own.
    ///
    /// # Errors
    /// When libvirt is not installed, or does not answer: with its words.
    pub fn start(dir: &RunDir) -> Result<Self> {
        output("virsh", ["--version"]).context("libvirt is missing: run ci/setup test")?;
        let here = dir.join("");
        fs::set_permissions(&here, Permissions::from_mode(0o777))?;
        let here = here.display().to_string();
        let socket = dir.join("libvirt-sock");
        let apart = "--mount --propagation private --pid --fork --kill-child --mount-proc bash -c";
        let args = apart
            .split(' ')
            .chain([INIT, "bash", here.trim_end_matches('/')]);
        let mut libvirt = Self {
            proc: Proc::spawn(dir, "libvirtd", None, "unshare", args)?,
            uri: format!("qemu:///system?socket={}", socket.display()),
        };
        let until = Instant::now() + START;
        // The version is that of its QEMU, which it has then found and asked.
        while let Err(error) = libvirt.virsh(&["version"]) {
            libvirt.proc.check_alive()?;
            ensure!(
                Instant::now() < until,
                "libvirtd does not answer: {error:#}; its words: {}",
                libvirt.proc.stderr().trim()
            );
            sleep(Duration::from_millis(50));
        }
        Ok(libvirt)
    }

    /// Runs virsh with these words and returns what it says.
    ///
    /// # Errors
    /// When it fails: with its words.
    pub fn virsh(&self, words: &[&str]) -> Result<String> {
        output("virsh", [&["-q", "-c", &self.uri], words].concat())
    }

    /// Defines the domain `name` by `xml` and starts it, with what a guest of the tests has and
    /// `xml` lacks: its kernel and a serial line. Returns it once it is up.
    ///
    /// A QEMU that dies of itself in the guest's boot is started anew, as in
    /// [`crate::qemu::Machine::booted`].
    ///
    /// # Errors
    /// When libvirt's own check or libvirtd refuses it, or it is not up within `timeout`: with
    /// their words.
    pub fn boot(&self, dir: &RunDir, name: &str, xml: &str, timeout: Duration) -> Result<Guest> {
        let path = dir.join(&format!("{name}.xml"));
        fs::write(&path, complete(dir, xml)?)?;
        let path = path.display().to_string();
        output("virt-xml-validate", [&path, "domain"])?;
        self.virsh(&["define", &path])?;
        let serial = UnixListener::bind(dir.join(SERIAL))?;
        serial.set_nonblocking(true)?;
        fs::set_permissions(dir.join(SERIAL), Permissions::from_mode(0o666))?;
        let mut again = 2;
        loop {
            self.virsh(&["start", name])?;
            let guest = Guest::new(accept(&serial)?)?;
            let Err(error) = guest.wait_boot(timeout) else {
                return Ok(guest);
            };
            let died = self.virsh(&["domstate", name])?.trim() == "shut off";
            if !died || again == 0 {
                return Err(error);
            }
            again -= 1;
            eprintln!("QEMU itself died in the guest's boot and is started anew: {error:#}");
        }
    }
}

/// `xml` with the test guest's kernel, of which libvirt's QEMU gets a copy, as libvirtd makes it
/// the owner; and with a serial line that the test answers.
fn complete(dir: &RunDir, xml: &str) -> Result<String> {
    let (kernel, initrd) = guest_image()?;
    let copies = [("kernel", kernel), ("initrd", initrd)].map(|(tag, path)| {
        let copy = dir.join(tag);
        fs::copy(&path, &copy)?;
        anyhow::Ok(format!("<{tag}>{}</{tag}>", copy.display()))
    });
    let [kernel, initrd] = copies;
    let boot = format!(
        "{}{}<cmdline>console=ttyS0 quiet panic=-1</cmdline></os>",
        kernel?, initrd?
    );
    let serial = format!(
        r#"<serial type="unix"><source mode="connect" path="{}"/></serial></devices>"#,
        dir.join(SERIAL).display()
    );
    let mut xml = xml.replace(r#"<console type="pty"/>"#, "");
    for (end, with) in [("</os>", boot), ("</devices>", serial)] {
        ensure!(
            xml.matches(end).count() == 1,
            "the domain has no single {end}: {xml}"
        );
        xml = xml.replace(end, &with);
    }
    Ok(xml)
}

fn accept(listener: &UnixListener) -> Result<UnixStream> {
    let until = Instant::now() + START;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) => ensure!(
                Instant::now() < until,
                "the domain's QEMU did not connect in {START:?}: {error}"
            ),
        }
        sleep(Duration::from_millis(5));
    }
}
