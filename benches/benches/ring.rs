//! The cases of the group `ring` under criterion, each side by itself: for work on one side.

use criterion::{BenchmarkId, Criterion, Throughput};
use virtionet_benches::harness::pin_to_last_cpu;
use virtionet_benches::ring::case::CASES;
use virtionet_benches::ring::{our_side, peer_side};

fn main() -> anyhow::Result<()> {
    pin_to_last_cpu()?;
    let mut criterion = Criterion::default().configure_from_args();
    rings(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}

fn rings(criterion: &mut Criterion) -> anyhow::Result<()> {
    let mut group = criterion.benchmark_group("ring");
    for case in &CASES {
        group.throughput(Throughput::Elements(case.burst.into()));
        let (mut driver, mut ours) = our_side(case)?;
        group.bench_function(
            BenchmarkId::new("virtionet-virtqueue", case.name()),
            |bencher| {
                bencher.iter(|| {
                    driver.offer(case.burst);
                    ours.burst(case.burst)
                });
            },
        );
        let (mut driver, mut peer) = peer_side(case)?;
        group.bench_function(
            BenchmarkId::new(case.method.name(), case.name()),
            |bencher| {
                bencher.iter(|| {
                    driver.offer(case.burst);
                    peer.burst(case.burst)
                });
            },
        );
    }
    group.finish();
    Ok(())
}
