//! Measures what seccomp filters by themselves cost: the cycles of one `writev` of a frame to
//! /dev/null, in threads that differ in their filters only. The call does nearly nothing, so
//! that what the kernel does on the way to it is most of the figure.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Scope, scope};

use anyhow::{Context, Result, anyhow, ensure};
use seccompiler::{apply_filter, sock_filter};
use virtionet_net_device::sys::read_cycles;
use virtionet_sandbox::{Enforcement, FileRules, Sandbox, ThreadKind};
use virtionet_tests::sched;

use super::PAYLOAD;
use crate::harness::progress;
use crate::outcome::{Better, GroupResult};
use crate::sampling::{Effort, PairedSamples};

/// The system calls of one sample, which take a few milliseconds.
const CALLS: u32 = 20_000;

/// The shortest filter: it returns SECCOMP_RET_ALLOW (BPF_RET | BPF_K of linux/filter.h).
const ALLOW_ALL: [sock_filter; 1] = [sock_filter {
    code: 0x06,
    jt: 0,
    jf: 0,
    k: 0x7fff_0000,
}];

/// The filters of a thread.
#[derive(Debug, Clone, Copy)]
enum Filters {
    None,
    /// One, which allows everything.
    AllowAll,
    /// All that a worker has: two of the process, that of the session and its own.
    Worker,
}

/// Measures all pairs of threads, which run on `cpu`.
pub(super) fn measure(cpu: usize, effort: Effort, outcome: &mut GroupResult) -> Result<()> {
    let rounds = effort.choose(101, 11);
    let [mut one, mut all, mut more] = [0; 3].map(|_| PairedSamples::default());
    scope(|scope| {
        let [without, with_one, with_all] = [Filters::None, Filters::AllowAll, Filters::Worker]
            .map(|filters| Caller::start(scope, filters, cpu));
        // The first round warms up the caches and is not counted.
        for n in 0..=rounds {
            // Each pair is measured in both orders, because a machine changes its speed.
            let (a, b, c) = if n % 2 == 0 {
                let (a, b) = (without.sample()?, with_one.sample()?);
                (a, b, with_all.sample()?)
            } else {
                let (c, b) = (with_all.sample()?, with_one.sample()?);
                (without.sample()?, b, c)
            };
            if n > 0 {
                one.push(b, a);
                all.push(c, a);
                more.push(c, b);
            }
        }
        anyhow::Ok(())
    })?;
    for (samples, case, peer) in [
        (one, "writev with one filter", "no filter"),
        (all, "writev with a worker's filters", "no filter"),
        (more, "writev with a worker's filters", "one filter"),
    ] {
        let row = samples.row(case, "cycles", Better::Lower, peer);
        progress(&format!(
            "sandbox: {case}: {:.0} cycles, {peer}: {:.0}",
            row.ours, row.peer
        ));
        outcome.rows.push(row);
    }
    Ok(())
}

/// A thread that makes system calls when it is asked to. It ends when this is dropped.
struct Caller {
    start: Sender<()>,
    cycles: Receiver<Result<f64>>,
}

impl Caller {
    fn start<'scope>(scope: &'scope Scope<'scope, '_>, filters: Filters, cpu: usize) -> Self {
        let (start, started) = channel();
        let (report, cycles) = channel();
        scope.spawn(move || {
            let null = match prepare(filters, cpu) {
                Ok(null) => null,
                Err(error) => return drop(report.send(Err(error))),
            };
            for () in started {
                if report.send(time_calls(&null)).is_err() {
                    break;
                }
            }
        });
        Self { start, cycles }
    }

    /// The cycles of one call.
    fn sample(&self) -> Result<f64> {
        // A thread that has failed has left its error.
        let _ = self.start.send(());
        let ended = |_| anyhow!("the thread of the measurement ended");
        self.cycles.recv().map_err(ended)?
    }
}

/// Restricts this thread. Opens what it writes to before.
fn prepare(filters: Filters, cpu: usize) -> Result<File> {
    sched::pin(0, cpu)?;
    let null = File::options().write(true).open("/dev/null")?;
    match filters {
        Filters::None => {}
        Filters::AllowAll => apply_filter(&ALLOW_ALL)?,
        Filters::Worker => {
            let sandbox = Sandbox::new(Enforcement::Deny, FileRules::default())?;
            sandbox.confine_process()?;
            for kind in [ThreadKind::Session, ThreadKind::Worker] {
                let confined = sandbox.confine_thread(kind);
                confined.with_context(|| format!("confining the thread as a {kind}"))?;
            }
        }
    }
    Ok(null)
}

fn time_calls(mut null: &File) -> Result<f64> {
    let before = read_cycles();
    for _ in 0..CALLS {
        // As a frame to a TAP: the header and the data.
        let frame = [IoSlice::new(&PAYLOAD[..12]), IoSlice::new(&PAYLOAD[12..])];
        let written = null.write_vectored(&frame)?;
        ensure!(
            written == PAYLOAD.len(),
            "a frame was cut to {written} bytes"
        );
    }
    let cycles = u32::try_from(read_cycles() - before)?;
    Ok(f64::from(cycles) / f64::from(CALLS))
}
