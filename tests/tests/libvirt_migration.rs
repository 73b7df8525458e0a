//! A domain that `virsh migrate` moves between two libvirtds, each with a virtionetd of its own.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::file_transfer::FileTransfer;
use virtionet_tests::libvirt::Libvirt;
use virtionet_tests::paths::RunDir;
use virtionet_tests::settings::number;
use virtionet_tests::topology::{Bridge, GUEST, HOST, configure_guest};

/// The time for the guest's boot, which includes the work of libvirtd.
const BOOT_TIMEOUT: Duration = Duration::from_secs(90);
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(40);
/// What the guest receives between two steps.
const PROGRESS: u64 = 1 << 20;
const HOSTS: [&str; 2] = ["source", "dest"];

/// Several times with `MIGRATIONS=N`.
#[test]
fn domain_that_virsh_migrates_receives_a_file_meanwhile_if_asked_for() {
    for _ in 0..number("MIGRATIONS", 0).unwrap() {
        migrate_domain().unwrap();
    }
}

fn migrate_domain() -> Result<()> {
    let dir = RunDir::new()?;
    let bridge = Bridge::with_taps(&HOSTS, 2)?;
    let v4 = HOST.v4;
    bridge.netns().ip(&format!("addr add {v4}/24 dev br0"))?;
    let start = |name| {
        let options = Options::new().netns(bridge.netns()).flag("--tap", name);
        // libvirt runs QEMU as another user.
        let options = options.flag("--socket-mode", "666");
        options.start(&dir, &format!("vnet-{name}"))
    };
    let daemons: [Daemon; 2] = [start(HOSTS[0])?, start(HOSTS[1])?];
    let source = Libvirt::start_host(&dir, 0)?;
    let dest = Libvirt::start_host(&dir, 1)?;
    let guest = source.boot(&dir, "moved", &domain(daemons[0].socket()), BOOT_TIMEOUT)?;
    configure_guest(&guest, 1)?;
    let file = FileTransfer::start(bridge.netns(), &guest, GUEST.v4)?;
    file.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    let sockets = daemons
        .each_ref()
        .map(|daemon| daemon.socket().display().to_string());
    let change = (sockets[0].as_str(), sockets[1].as_str());
    let guest = source.migrate(&dest, &dir, "moved", &[change])?;
    file.wait_for_progress(PROGRESS, PROGRESS_TIMEOUT)?;
    let size = file.finish(&guest, &dir)?;
    eprintln!("{size} bytes received");
    assert_eq!(dest.virsh(&["domstate", "moved"])?.trim(), "running");
    assert_eq!(daemons[0].device()?["connected"], false);
    assert_eq!(daemons[1].device()?["connected"], true);
    Ok(())
}

/// The description of a domain whose network device is served on `socket`.
fn domain(socket: &Path) -> String {
    format!(
        r#"<domain type="qemu">
  <name>moved</name>
  <memory unit="MiB">256</memory>
  <memoryBacking><source type="memfd"/><access mode="shared"/></memoryBacking>
  <vcpu>1</vcpu>
  <os><type arch="x86_64" machine="q35">hvm</type></os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <interface type="vhostuser">
      <mac address="52:54:00:77:00:01"/>
      <source type="unix" path="{}" mode="client"/>
      <model type="virtio"/>
    </interface>
    <memballoon model="none"/>
  </devices>
</domain>
"#,
        socket.display()
    )
}
