//! The cases of the group `ring` under criterion. Each side is measured by itself, which helps
//! while one side is optimized.

use criterion::{BenchmarkId, Criterion, Throughput};
use virtionet_benches::harness::pin_to_last_cpu;
use virtionet_benches::ring::case::CASES;
use virtionet_benches::ring::{prepare_ours, prepare_peer};

fn main() -> anyhow::Result<()> {
    pin_to_last_cpu()?;
    let mut criterion = Criterion::default().configure_from_args();
    bench_cases(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}

fn bench_cases(criterion: &mut Criterion) -> anyhow::Result<()> {
    let mut group = criterion.benchmark_group("ring");
    for case in &CASES {
        group.throughput(Throughput::Elements(case.burst.into()));
        let (mut driver, mut ours) = prepare_ours(case)?;
        group.bench_function(
            BenchmarkId::new("virtionet-virtqueue", case.name()),
            |bencher| {
                bencher.iter(|| {
                    driver.offer(case.burst);
                    ours.process_burst(case.burst)
                });
            },
        );
        let (mut driver, mut peer) = prepare_peer(case)?;
        group.bench_function(
            BenchmarkId::new(case.method.name(), case.name()),
            |bencher| {
                bencher.iter(|| {
                    driver.offer(case.burst);
                    peer.process_burst(case.burst)
                });
            },
        );
    }
    group.finish();
    Ok(())
}
