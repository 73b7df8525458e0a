//! The placement of a device's workers, without a front-end's process.

use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use virtionet_placement::{Placement, PlacementPlanner};
use virtionet_uplink::null::Null;
use virtionet_vhost_user::Backend;

use super::*;
use crate::host_cpus::HostCpus;
use crate::placement_monitor;

#[test]
fn worker_that_starts_is_placed_without_waiting_for_the_next_check() {
    let host = Arc::new(HostCpus::read().unwrap());
    let cpu = host.allowed().last().unwrap();
    let planner = PlacementPlanner::new(Placement::List(vec![cpu]), host.allowed(), None).unwrap();
    let placer = Placer::new("test", planner, Arc::clone(&host));
    let (uplink, pool) = (Arc::new(Null), Arc::default());
    let device = NetDevice::new("test", 1, uplink, placer, PollMode::Off, pool);
    let device = Arc::new(device);
    let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let monitor = placement_monitor::start(vec![Arc::clone(&device)], host, Arc::clone(&stop));
    let mut slowest = Duration::ZERO;
    for _ in 0..3 {
        device.on_connect(None);
        let worker = &device.open_pair(0, 0).unwrap().worker;
        let started_at = Instant::now();
        worker.start().unwrap();
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
    rustix::io::write(&*stop, &1_u64.to_ne_bytes()).unwrap();
    monitor.unwrap().join().unwrap();
}
