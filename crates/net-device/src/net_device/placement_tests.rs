//! The placement of a device's workers and of its memory.

use std::time::Duration;

use virtionet_placement::{Placement, PlacementPlanner};
use virtionet_uplink::null::Null;
use virtionet_vhost_user::Backend;

use super::*;
use crate::device_list::DeviceList;
use crate::host_cpus::HostCpus;
use crate::placement_monitor;
use crate::stop::Stop;
use crate::testing::{
    ONE_TEST_WITH_VCPUS_AT_A_TIME, net_device, start_vcpu, two_pairs, vring_start, wait_until,
    with_frontend,
};

#[test]
fn worker_that_starts_is_placed_without_waiting_for_the_next_check() {
    let host = Arc::new(HostCpus::read().unwrap());
    let cpu = host.allowed().last().unwrap();
    let planner = PlacementPlanner::new(Placement::List(vec![cpu]), host.allowed(), None).unwrap();
    let placer = Placer::new("test", planner, Arc::clone(&host));
    let (uplink, pool) = (Arc::new(Null), Arc::default());
    let device = NetDevice::new("test", 1, uplink, placer, PollMode::Off, pool);
    let device = Arc::new(device);
    let stop = Arc::new(Stop::new().unwrap());
    let monitor = placement_monitor::start(
        Arc::new(DeviceList::new([Arc::clone(&device)])),
        host,
        Arc::clone(&stop),
    );
    let mut slowest = Duration::ZERO;
    for _ in 0..3 {
        device.on_connect(None);
        let served = device.open_pair(0, 0).unwrap();
        let worker = &served.worker;
        let started_at = Instant::now();
        worker.start(served.position).unwrap();
        let is_placed = || {
            let placement = worker.placement();
            placement.is_some_and(|placement| !placement.is_pending())
        };
        while !is_placed() {
            assert!(started_at.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(1));
        }
        slowest = slowest.max(started_at.elapsed());
        let placement = worker.placement().unwrap();
        assert_eq!(placement.decision.cpus, CpuSet::from_iter([cpu]));
        device.on_disconnect(None);
        assert!(worker.placement().is_none());
    }
    eprintln!("the slowest worker was placed after {slowest:?}");
    stop.end();
    monitor.unwrap().join().unwrap();
}

/// The vCPUs that the worker of queue pair `pair` serves.
fn served_vcpus(net_device: &NetDevice, pair: usize) -> Vec<u32> {
    let placement = net_device.pairs().nth(pair).unwrap().worker.placement();
    // A worker has none until it has taken its first one.
    placement.map_or_else(Vec::new, |placement| placement.decision.vcpus)
}

#[test]
fn vcpus_are_divided_among_the_pairs_in_use_without_waiting_for_the_next_check() {
    let _guard = ONE_TEST_WITH_VCPUS_AT_A_TIME.lock();
    let vcpus = [0, 1].map(start_vcpu);
    let net_device = net_device(2, Null, PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        net_device.update_placement();
        wait_until("each worker serves one vCPU", || {
            served_vcpus(&net_device, 0) == [0] && served_vcpus(&net_device, 1) == [1]
        });
        assert_eq!(net_device.queue_usage().unwrap().vcpus, Some(2));
        frontend.enable(1, false).unwrap();
        net_device.update_placement();
        wait_until("the worker in use serves both", || {
            served_vcpus(&net_device, 0) == [0, 1]
        });
        assert_eq!(net_device.queue_usage().unwrap().vcpus, Some(2));
    });
    for (_, end, thread) in vcpus {
        drop(end);
        thread.join().unwrap();
    }
}

#[test]
fn memory_of_a_pair_is_that_of_its_receiveq_while_a_front_end_is_connected() {
    let net_device = net_device(2, Null, PollMode::Off);
    with_frontend(&net_device, &two_pairs(), |frontend| {
        let pair = &net_device.pairs().next().unwrap().pair;
        // A kernel without NUMA knows the node of no page.
        let here = 0_u8;
        let has_node = virtionet_placement::node_of_address((&raw const here).addr()).is_some();
        assert_eq!(pair.memory_node().is_some(), has_node);
        frontend.stop().unwrap();
        pair.clear_memory_location();
        for (vring, is_known) in [(1, false), (0, has_node)] {
            let start = vring_start(&net_device, frontend, vring);
            net_device.start_vring(vring, start).unwrap();
            assert_eq!(pair.memory_node().is_some(), is_known, "vring {vring}");
        }
        assert_eq!(
            [0, 1].map(|vring| net_device.stop_vring(vring)),
            [Some(0); 2]
        );
    });
    assert!(
        net_device
            .pairs()
            .all(|served| served.pair.memory_node().is_none())
    );
}
