//! Counts the instructions per packet on the data path, with callgrind (valgrind).
//!
//! A count does not depend on the load, the clock or the caches of the machine. Therefore it shows
//! an increase of a few per cent, which would be within the noise of a measured time. It does not
//! show how long an instruction takes; the other groups measure time.
//!
//! ```text
//! check, accept ──► callgrind ──► count: each case N packets, then 2 N   (a process of its own)
//!                                    offer | run_measured | collect, burst by burst
//!               ◄── one file for each run, with the instructions inside `run_measured`
//! ```
//!
//! [`cases`] contains the cases, [`callgrind`] runs valgrind and reads its files, and [`figures`]
//! compares the counts with the committed ones. The driver's part, the setup and the warm-up are
//! outside `run_measured`. The difference between both runs is the cost of N packets. With the same
//! compiler, the figures are the same in each run.

pub mod callgrind;
pub mod cases;
pub mod figures;
mod setup;

use anyhow::{Result, ensure};

use self::cases::{CaseRunner, InstructionCase};

/// N, which is a multiple of the burst size of every case.
const PACKETS: usize = 4096;
/// Number of packets of the warm-up, after which indices, lists and caches are in their steady
/// state.
const WARM_UP_PACKETS: usize = 512;

/// Runs every case for callgrind, which writes a file after each call of `dump_counts`.
///
/// # Errors
/// When a case fails or processes a wrong number of packets.
pub fn count() -> Result<()> {
    for case in InstructionCase::all() {
        let mut runner = case.prepare()?;
        run(&mut *runner, WARM_UP_PACKETS, |runner| runner.run_device())?;
        for packets in [PACKETS, 2 * PACKETS] {
            run(&mut *runner, packets, run_measured)?;
            dump_counts();
        }
    }
    Ok(())
}

/// Computes the instructions per packet of every case from the counts of its two runs.
///
/// # Errors
/// When there are not two counts for each case, or when they do not differ.
fn per_packet(counts: &[u64]) -> Result<Vec<(String, f64)>> {
    let cases = InstructionCase::all();
    ensure!(
        counts.len() == 2 * cases.len(),
        "callgrind counted {} runs instead of two for each of {} cases: build this program with --release and with symbols",
        counts.len(),
        cases.len()
    );
    let packets = f64::from(u32::try_from(PACKETS)?);
    let figure = |(case, runs): (&InstructionCase, &[u64; 2])| {
        let increase = runs[1].saturating_sub(runs[0]);
        ensure!(increase > 0, "the case '{}' was not counted", case.name());
        let instructions = f64::from(u32::try_from(increase)?) / packets;
        Ok((case.name(), (instructions * 10.0).round() / 10.0))
    };
    cases
        .iter()
        .zip(counts.as_chunks::<2>().0)
        .map(figure)
        .collect()
}

/// Runs offer, device and collect until `packets` packets are processed.
fn run(
    runner: &mut dyn CaseRunner,
    packets: usize,
    mut device: impl FnMut(&mut dyn CaseRunner) -> Result<usize>,
) -> Result<()> {
    let mut done = 0;
    while done < packets {
        runner.offer()?;
        done += device(runner)?;
        runner.collect()?;
    }
    ensure!(
        done == packets,
        "the device processed {done} packets instead of {packets}"
    );
    Ok(())
}

/// Runs the device's part. callgrind counts the instructions inside this function, by its name.
#[inline(never)]
fn run_measured(runner: &mut dyn CaseRunner) -> Result<usize> {
    // Without the black box, the compiler could make a tail call, which callgrind would not count.
    std::hint::black_box(runner.run_device())
}

/// Ends a run. callgrind recognizes this function by its name, writes its counts to a file and
/// resets them.
#[inline(never)]
fn dump_counts() {
    std::hint::black_box(());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_processes_its_packets() {
        for case in InstructionCase::all() {
            let mut runner = case.prepare().unwrap();
            run(&mut *runner, 2 * WARM_UP_PACKETS, |runner| {
                runner.run_device()
            })
            .unwrap_or_else(|error| {
                panic!("{}: {error}", case.name());
            });
        }
    }

    #[test]
    fn names_of_cases_are_unique() {
        let mut names: Vec<_> = InstructionCase::all()
            .iter()
            .map(InstructionCase::name)
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn instructions_that_both_runs_share_are_left_out() {
        let cases = InstructionCase::all().len();
        let n = u64::try_from(PACKETS).unwrap();
        let counts = [1000 + 40 * n, 1000 + 80 * n].repeat(cases);
        for (name, figure) in per_packet(&counts).unwrap() {
            assert_eq!(figure, 40.0, "{name}");
        }
        assert!(per_packet(&counts[1..]).is_err());
        assert!(per_packet(&[7, 7].repeat(cases)).is_err());
    }
}
