//! A guest whose network device is behind an emulated Intel IOMMU (VIRTIO_F_ACCESS_PLATFORM): each
//! address of its driver is one that QEMU must translate, and each mapping that the driver ends is
//! invalidated.

use anyhow::{Result, ensure};
use virtionet_tests::iperf::{Direction, IperfLoad};
use virtionet_tests::testbed::{Testbed, TestbedConfig};

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";
/// The IOMMU invalidates many mappings at once, some milliseconds after they ended.
const LAZY: &str = "intel_iommu=on iommu.strict=0";
/// It invalidates each mapping when that ends.
const STRICT: &str = "intel_iommu=on iommu.strict=1";

#[test]
fn packed_virtqueues_move_data_behind_an_iommu_and_after_the_driver_was_bound_again() {
    check(TestbedConfig::new(1).prop("packed=on").intel_iommu(LAZY)).unwrap();
}

#[test]
fn two_split_queue_pairs_move_data_behind_a_strict_iommu() {
    check(TestbedConfig::new(2).intel_iommu(STRICT)).unwrap();
}

/// The other combinations of format, queue pairs and mode, with `IOMMU_GUESTS=all`.
#[test]
fn guests_of_every_kind_move_data_behind_an_iommu() {
    if std::env::var_os("IOMMU_GUESTS").is_none() {
        return;
    }
    let config = TestbedConfig::new;
    let guests = [
        config(1).intel_iommu(LAZY),
        config(2).prop("packed=on").intel_iommu(STRICT),
        // Linux allocates the areas of such vrings page by page, and not all of the pages follow each
        // other.
        config(1)
            .prop("rx_queue_size=1024")
            .prop("tx_queue_size=1024")
            .intel_iommu(LAZY),
    ];
    for guest in guests {
        eprintln!("{guest:?}");
        check(guest).unwrap();
    }
}

/// The rate that shows that data moves, in Gbit/s.
const MIN_GBPS: f64 = 0.0005;

fn check(config: TestbedConfig) -> Result<()> {
    let mut testbed = config.start()?;
    move_data_both_ways(&testbed)?;
    check_device(&testbed)?;
    let guest = testbed.qemu.guest();
    guest.ok(&format!("echo virtio0 >{DRIVER}/unbind"))?;
    guest.ok(&format!("echo virtio0 >{DRIVER}/bind"))?;
    testbed.configure_guest()?;
    move_data_both_ways(&testbed)?;
    check_device(&testbed)
}

/// Sends TCP data for three seconds in each direction. Each page of a buffer costs QEMU at least one
/// turn of its main loop, and with a strict IOMMU several, so the rate is low.
fn move_data_both_ways(testbed: &Testbed) -> Result<()> {
    let iperf = testbed.iperf()?;
    for direction in [Direction::HostToGuest, Direction::GuestToHost] {
        let report = iperf.run(&IperfLoad::tcp(3).flows(2), direction)?;
        eprintln!("{direction:?}: {:.4} Gbit/s", report.gbps);
        ensure!(
            report.gbps > MIN_GBPS,
            "the rate {direction:?} is too low: {report:?}; {}",
            testbed.daemon.device()?
        );
    }
    Ok(())
}

/// Checks that addresses were translated, and that nothing went wrong meanwhile.
fn check_device(testbed: &Testbed) -> Result<()> {
    let device = testbed.daemon.device()?;
    let features = device["frontend"]["features"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    ensure!(
        features.iter().any(|name| name == "ACCESS_PLATFORM"),
        "the guest is not behind an IOMMU: {features:?}"
    );
    let iotlb = &device["frontend"]["iotlb"];
    eprintln!("{iotlb}");
    for name in ["misses", "updates", "invalidations"] {
        ensure!(iotlb[name].as_u64().unwrap_or(0) > 0, "{name} of {iotlb}");
    }
    let pair = &device["pairs"][0];
    for direction in ["rx", "tx"] {
        let counters = &pair[direction]["counters"];
        eprintln!(
            "{direction}: {} frames, {} misses, {} invalidations",
            counters["frames"], counters["iotlb_misses"], counters["iotlb_invalidations"]
        );
        for (name, is_wanted) in [
            ("frames", true),
            ("iotlb_misses", true),
            ("iotlb_invalidations", true),
            ("quarantines", false),
            ("address_invalid", false),
            ("indirect_unmapped", false),
            ("dropped_untranslated", false),
        ] {
            let count = counters[name].as_u64().unwrap_or(0);
            ensure!((count > 0) == is_wanted, "{direction}: {name} is {count}");
        }
    }
    Ok(())
}
