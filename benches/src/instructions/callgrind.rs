//! Runs this program again under callgrind, and reads the counts.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use virtionet_tests::paths::RunDir;
use virtionet_tests::process::Proc;

/// A run takes a few seconds. One that takes this long hangs.
const TIMEOUT: Duration = Duration::from_secs(300);

/// The C library selects its `memcpy` by the features of the CPU. With these features disabled it
/// selects the same one on every CPU, so that the counts are the same, too.
const GLIBC_TUNABLES: &str = "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX2,-AVX512F,-AVX512VL,-AVX_Fast_Unaligned_Load,-ERMS,-FSRM,-SSSE3";

/// Counts the instructions per packet of every case. `subcommand` is the argument with which this
/// program calls [`super::count`].
///
/// # Errors
/// When valgrind cannot be run or a case fails. The error contains the message.
pub fn measure(subcommand: &str) -> Result<Vec<(String, f64)>> {
    let dir = RunDir::new()?;
    let out = dir.join("counts");
    let mut file = OsString::from("--callgrind-out-file=");
    file.push(&out);
    let program = env::current_exe().context("the path of this program is unknown")?;
    let mut args: Vec<OsString> = [
        GLIBC_TUNABLES,
        "valgrind",
        "--quiet",
        "--tool=callgrind",
        "--collect-atstart=no",
        "--toggle-collect=virtionet_benches::instructions::run_measured*",
        "--dump-after=virtionet_benches::instructions::dump_counts*",
        "--dump-line=no",
    ]
    .map(OsString::from)
    .to_vec();
    args.extend([file, program.into(), subcommand.into()]);
    let mut valgrind = Proc::spawn(&dir, "valgrind", None, "env", args)?;
    let status = valgrind.wait(TIMEOUT)?;
    ensure!(
        status.success(),
        "valgrind failed ({status}); if it is not installed, run ci/setup: {}",
        valgrind.stderr().trim()
    );
    super::per_packet(&read_totals(&out)?)
}

/// Reads the totals of `OUT.1`, `OUT.2` and so on.
fn read_totals(out: &Path) -> Result<Vec<u64>> {
    let mut totals = Vec::new();
    loop {
        let part = out.with_extension((totals.len() + 1).to_string());
        if !part.exists() {
            // The instructions after the last run are in a file without a number, which is not
            // used.
            return Ok(totals);
        }
        totals.push(parse_total(&fs::read_to_string(&part)?)?);
    }
}

fn parse_total(text: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("totals:"));
    let line = line.context("a file of callgrind has no line 'totals:', so it is incomplete")?;
    Ok(line.trim().parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_found_and_their_absence_is_an_error() {
        let text = "events: Ir\nsummary: 5\n\nfn=(1) x\n0 17\n\ntotals: 17\n";
        assert_eq!(parse_total(text).unwrap(), 17);
        assert!(parse_total(&text.replace("totals", "")).is_err());
        assert!(parse_total(&text.replace("17", "")).is_err());
    }
}
