//! A real guest, whose driver changes the number of queue pairs, goes down and up, and is bound
//! again, while it exchanges pings with the host.

use std::time::{Duration, Instant};

use virtionet_tests::accel::Accel;
use virtionet_tests::ethtool::set_combined;
use virtionet_tests::paths::guest_image;
use virtionet_tests::qemu::{Machine, Nic, Qemu, version};
use virtionet_tests::topology::{GUEST, GUEST_INTERFACE, configure_guest};

use crate::daemon_under_test::{DaemonUnderTest, GUEST_PAIRS};
use virtionet_tests::random::Random;

/// The time that the guest may take to boot. Nothing is measured, so a busy machine may be slow.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);

/// Boots the guest on the device `guest`, if QEMU and the image of the guest are there.
pub fn boot(under_test: &DaemonUnderTest) -> Option<Qemu> {
    version().ok()?;
    guest_image().ok()?;
    let (qemu, _) = Machine::new()
        .vcpus(GUEST_PAIRS.into())
        .accel(Accel::Auto)
        .nic(Nic::vhost_user(&under_test.socket("guest")).queues(GUEST_PAIRS))
        .boot(&under_test.dir, "guest-machine", BOOT_TIMEOUT)
        .unwrap();
    configure(under_test, &qemu);
    Some(qemu)
}

/// Reconfigures the guest until `end`, and then uses all queue pairs.
pub fn reconfigure(under_test: &DaemonUnderTest, qemu: &Qemu, mut random: Random, end: Instant) {
    let guest = qemu.guest();
    let note = |action: &str| under_test.journal.note("guest", action);
    while Instant::now() < end {
        match random.range(0, 4) {
            0 => {
                note("interface down and up");
                guest
                    .ok(&format!("ip link set {GUEST_INTERFACE} down"))
                    .unwrap();
                configure(under_test, qemu);
            }
            1 => {
                note("driver bound again");
                let path = "/sys/bus/virtio/drivers/virtio_net";
                let bind = format!("echo virtio0 >{path}/unbind && echo virtio0 >{path}/bind");
                guest.ok(&bind).unwrap();
                configure(under_test, qemu);
            }
            _ => {
                let pairs = u32::try_from(random.range(1, GUEST_PAIRS.into())).unwrap();
                note(&format!("ethtool -L combined {pairs}"));
                set_combined(guest, GUEST_INTERFACE, pairs).unwrap();
            }
        }
        under_test.network.wait_for_ping(GUEST.v4).unwrap();
        under_test.assert_progress();
    }
    configure(under_test, qemu);
}

fn configure(under_test: &DaemonUnderTest, qemu: &Qemu) {
    configure_guest(qemu.guest(), GUEST_PAIRS).unwrap();
    under_test.network.wait_for_ping(GUEST.v4).unwrap();
}
