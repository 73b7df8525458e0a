//! A private libvirtd with its QEMU driver, separate from a libvirtd that the machine may run.
//!
//! libvirtd stores its state in directories that are compiled in, so it runs in a mount namespace
//! in which these directories are empty tmpfs mounts. It also runs in a PID namespace, because the
//! QEMU process that it starts is not a child of this process: when the first process of the
//! namespace exits, the kernel kills all other processes in it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::guest::Guest;
use crate::paths::{RunDir, guest_image};
use crate::process::{Proc, output};

const START_TIMEOUT: Duration = Duration::from_secs(30);
const SERIAL: &str = "domain.serial";

/// The script of the first process in the namespaces. Its arguments are the directory for libvirtd's
/// sockets, the name of the host and the host's UUID. It waits, because the first process of a PID namespace must reap orphaned processes.
/// libvirtd does not use cgroups, because those belong to the machine.
const INIT: &str = r#"
set -e
hostname "$2"
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
host_uuid = "$3"
END
libvirtd -f /etc/libvirt/libvirtd.conf &
wait
"#;

/// A running libvirtd. Dropping this value kills it and its domains.
#[derive(Debug)]
pub struct Libvirt {
    proc: Proc,
    uri: String,
}

impl Libvirt {
    /// Starts libvirtd with its sockets and its log in `dir`. All users get access to `dir`,
    /// because libvirt runs QEMU as a different user.
    ///
    /// # Errors
    /// When libvirt is not installed, or libvirtd does not answer within 30 s. The error contains
    /// its output.
    pub fn start(dir: &RunDir) -> Result<Self> {
        Self::start_host(dir, 0)
    }

    /// Does the same for one of several hosts, numbered from 0, between which domains can be migrated.
    ///
    /// # Errors
    /// As for [`Libvirt::start`].
    pub fn start_host(dir: &RunDir, number: u8) -> Result<Self> {
        output("virsh", ["--version"]).context("libvirt is missing: run ci/setup test")?;
        let run_dir = dir.join("");
        fs::set_permissions(&run_dir, Permissions::from_mode(0o777))?;
        let name = format!("host{number}");
        let uuid = format!("6e0d4a1c-7f3b-4c52-9a68-2b1f0c9d5e{number:02x}");
        let socket_dir = dir.join(&name);
        fs::create_dir_all(&socket_dir)?;
        fs::set_permissions(&socket_dir, Permissions::from_mode(0o777))?;
        let socket = socket_dir.join("libvirt-sock");
        let socket_dir = socket_dir.display().to_string();
        let namespaces =
            "--mount --propagation private --uts --pid --fork --kill-child --mount-proc bash -c";
        let args = namespaces
            .split(' ')
            .chain([INIT, "bash", &socket_dir, &name, &uuid]);
        let mut libvirt = Self {
            proc: Proc::spawn(dir, &format!("libvirtd{number}"), None, "unshare", args)?,
            uri: format!("qemu:///system?socket={}", socket.display()),
        };
        let until = Instant::now() + START_TIMEOUT;
        // `virsh version` includes the version of QEMU, so it succeeds only after libvirtd has
        // probed QEMU.
        while let Err(error) = libvirt.virsh(&["version"]) {
            libvirt.proc.check_alive()?;
            ensure!(
                Instant::now() < until,
                "libvirtd does not answer: {error:#}; its stderr: {}",
                libvirt.proc.stderr().trim()
            );
            sleep(Duration::from_millis(50));
        }
        Ok(libvirt)
    }

    /// The URI of this libvirtd, for virsh.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Migrates the running domain `name` to the libvirtd `dest`, where its sockets have other paths:
    /// `changes` are texts of its description and what is there instead. Its serial line is another one,
    /// too. Returns its guest.
    ///
    /// # Errors
    /// When the migration fails. The error contains the message of virsh.
    pub fn migrate(
        &self,
        dest: &Self,
        dir: &RunDir,
        name: &str,
        changes: &[(&str, &str)],
    ) -> Result<Guest> {
        let serial = dir.join(&format!("{SERIAL}.dest"));
        let listener = listen(&serial)?;
        let mut xml = self.virsh(&["dumpxml", "--migratable", name])?;
        let (old, new) = (dir.join(SERIAL), serial);
        xml = xml.replace(&old.display().to_string(), &new.display().to_string());
        for (old, new) in changes {
            xml = xml.replace(old, new);
        }
        let path = dir.join("dest.xml");
        fs::write(&path, xml)?;
        let socket = format!("unix://{}", dir.join("migration.sock").display());
        let path = path.display().to_string();
        let options = ["--migrateuri", &socket, "--xml", &path];
        self.virsh(&[&["migrate", "--live", name, dest.uri()], &options[..]].concat())?;
        Guest::new(accept(&listener)?)
    }

    /// Runs virsh with these arguments and returns its output.
    ///
    /// # Errors
    /// When virsh fails. The error contains its message.
    pub fn virsh(&self, args: &[&str]) -> Result<String> {
        output("virsh", [&["-q", "-c", &self.uri], args].concat())
    }

    /// Defines the domain `name` by `xml`, starts it, and returns its guest when it has booted.
    /// Adds the kernel of the test guest and a serial line to `xml`.
    ///
    /// Starts the domain again if QEMU crashes while the guest boots, as
    /// [`crate::qemu::Machine::wait_boot_or_restart`] does.
    ///
    /// # Errors
    /// When virt-xml-validate or libvirtd rejects the domain, or the guest does not boot within
    /// `timeout`. The error contains the message.
    pub fn boot(&self, dir: &RunDir, name: &str, xml: &str, timeout: Duration) -> Result<Guest> {
        let path = dir.join(&format!("{name}.xml"));
        fs::write(&path, add_kernel_and_serial(dir, xml)?)?;
        let path = path.display().to_string();
        output("virt-xml-validate", [&path, "domain"])?;
        self.virsh(&["define", &path])?;
        let serial = listen(&dir.join(SERIAL))?;
        let mut restarts_left = 2;
        loop {
            self.virsh(&["start", name])?;
            let guest = Guest::new(accept(&serial)?)?;
            let Err(error) = guest.wait_boot(timeout) else {
                return Ok(guest);
            };
            let has_crashed = self.virsh(&["domstate", name])?.trim() == "shut off";
            if !has_crashed || restarts_left == 0 {
                return Err(error);
            }
            restarts_left -= 1;
            eprintln!("QEMU crashed while the guest booted and is started again: {error:#}");
        }
    }
}

/// Adds the kernel of the test guest and a serial line, on which the test listens, to `xml`. The
/// domain gets copies of the kernel files, because libvirtd changes their owner to the user of
/// QEMU.
fn add_kernel_and_serial(dir: &RunDir, xml: &str) -> Result<String> {
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
    for (tag, replacement) in [("</os>", boot), ("</devices>", serial)] {
        ensure!(
            xml.matches(tag).count() == 1,
            "the domain must contain {tag} exactly once: {xml}"
        );
        xml = xml.replace(tag, &replacement);
    }
    Ok(xml)
}

/// Listens for a QEMU of any user.
fn listen(path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    fs::set_permissions(path, Permissions::from_mode(0o666))?;
    Ok(listener)
}

fn accept(listener: &UnixListener) -> Result<UnixStream> {
    let until = Instant::now() + START_TIMEOUT;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) => ensure!(
                Instant::now() < until,
                "QEMU did not connect to the domain's serial line within {START_TIMEOUT:?}: {error}"
            ),
        }
        sleep(Duration::from_millis(5));
    }
}
