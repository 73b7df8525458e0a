//! How many instructions the data path takes a packet, counted by callgrind (valgrind).
//!
//! A count does not change with the load, the clock or the caches of a machine, so a few per cent
//! more are seen where a measured time would only be noise. What it does not tell is how long an
//! instruction takes: the other groups do.
//!
//! ```text
//! check, accept ──► callgrind ──► count: each case N packets, then 2 N   (a process of its own)
//!                                    offer | measured | collect, burst by burst
//!               ◄── one file a run of packets, with the instructions inside `measured`
//! ```
//!
//! [`cases`] is what is measured, [`callgrind`] runs and reads valgrind, [`figures`] compares with
//! what is committed. The driver's part, setting up and warming up lie outside of `measured`, and
//! the difference between both runs is what N packets cost. With the same compiler the figures are
//! the same each time.

pub mod callgrind;
pub mod cases;
pub mod figures;

use anyhow::{Result, ensure};

use self::cases::{CaseRunner, InstructionCase};

/// N, a multiple of every burst's packets.
const PACKETS: usize = 4096;
/// Packets of the warm-up: indices, lists and memos are in their steady state after it.
const WARM_UP_PACKETS: usize = 512;

/// Runs every case for callgrind, which makes a file of each call of `counted`.
///
/// # Errors
/// When a case does not do its work.
pub fn count() -> Result<()> {
    for case in InstructionCase::all() {
        let mut work = case.prepare()?;
        run(&mut *work, WARM_UP_PACKETS, |work| work.device())?;
        for packets in [PACKETS, 2 * PACKETS] {
            run(&mut *work, packets, measured)?;
            counted();
        }
    }
    Ok(())
}

/// Instructions a packet in every case, from those of both runs of each.
///
/// # Errors
/// When there are not two counts a case, or they cannot be right.
fn per_packet(counts: &[u64]) -> Result<Vec<(String, f64)>> {
    let cases = InstructionCase::all();
    ensure!(
        counts.len() == 2 * cases.len(),
        "callgrind counted {} runs where {} cases have two each: was this program built for release, with its symbols?",
        counts.len(),
        cases.len()
    );
    let packets = f64::from(u32::try_from(PACKETS)?);
    let each = |(case, runs): (&InstructionCase, &[u64])| {
        let more = runs[1].saturating_sub(runs[0]);
        ensure!(more > 0, "the case '{}' was not counted", case.name());
        let figure = f64::from(u32::try_from(more)?) / packets;
        Ok((case.name(), (figure * 10.0).round() / 10.0))
    };
    cases.iter().zip(counts.chunks_exact(2)).map(each).collect()
}

/// Offers and collects around the device's part until so many packets have passed.
fn run(
    work: &mut dyn CaseRunner,
    packets: usize,
    mut device: impl FnMut(&mut dyn CaseRunner) -> Result<usize>,
) -> Result<()> {
    let mut done = 0;
    while done < packets {
        work.offer()?;
        done += device(work)?;
        work.collect()?;
    }
    ensure!(
        done == packets,
        "the device did {done} packets where {packets} were offered"
    );
    Ok(())
}

/// What is inside this is counted.
#[inline(never)]
fn measured(work: &mut dyn CaseRunner) -> Result<usize> {
    // Not the last call: as a jump it would not be inside any more.
    std::hint::black_box(work.device())
}

/// Ends a run of packets: callgrind writes down what it has counted, and counts anew.
#[inline(never)]
fn counted() {
    std::hint::black_box(());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_does_its_work() {
        for case in InstructionCase::all() {
            let mut work = case.prepare().unwrap();
            run(&mut *work, 2 * WARM_UP_PACKETS, |work| work.device()).unwrap_or_else(|error| {
                panic!("{}: {error}", case.name());
            });
        }
    }

    #[test]
    fn names_are_unlike_each_other() {
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
    fn what_both_runs_have_in_common_is_left_out() {
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
