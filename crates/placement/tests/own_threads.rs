//! From discovery to pinned workers with real threads: this process acts as the front-end, with
//! threads that are named and pinned as QEMU's vCPU threads are.

use std::sync::mpsc;

use virtionet_placement::{
    Placement, PlacementPlanner, VcpuSource, allowed_cpus, set_thread_affinity, worker_name,
};

#[test]
fn workers_run_on_the_cpus_of_their_vcpus() {
    let allowed = allowed_cpus().unwrap();
    let (ready, is_ready) = mpsc::channel();
    let mut ends = Vec::new();
    let mut threads = Vec::new();
    for index in 0..2 {
        let (end, ended) = mpsc::channel::<()>();
        // In reverse order, so that the order of the CPUs alone gives no worker the right CPU.
        let cpus = allowed.nth_cyclic(1 - index);
        let ready = ready.clone();
        let vcpu = std::thread::Builder::new().name(format!("CPU {index}/TCG"));
        threads.push(vcpu.spawn(move || {
            ready
                .send(set_thread_affinity(None, &cpus).unwrap())
                .unwrap();
            ended.recv().unwrap_err();
        }));
        ends.push(end);
    }
    for _ in 0..2 {
        assert_eq!(is_ready.recv().unwrap().len(), 1);
    }

    let planner = PlacementPlanner::new(Placement::Auto, allowed.clone(), None).unwrap();
    let map = planner.discover(Some(i32::try_from(std::process::id()).unwrap()));
    assert_eq!(
        (map.source, map.vcpus.len()),
        (VcpuSource::ThreadNames, 2),
        "{map}"
    );
    for pair in 0..2 {
        let decision = planner.place(&map, pair, 2);
        assert_eq!(decision.vcpus, [pair]);
        let worker = std::thread::Builder::new().name(worker_name("vnet", pair));
        let cpus = decision.cpus.clone();
        let pinned =
            worker.spawn(move || set_thread_affinity(None, &cpus).map(|_| allowed_cpus().unwrap()));
        assert_eq!(
            pinned.unwrap().join().unwrap().unwrap(),
            allowed.nth_cyclic(1 - pair),
            "{decision}"
        );
    }

    drop(ends);
    for thread in threads {
        thread.unwrap().join().unwrap();
    }
}
