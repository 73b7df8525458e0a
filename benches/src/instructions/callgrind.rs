//! Runs this program once more, under callgrind, and reads what that counted.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use virtionet_tests::paths::RunDir;
use virtionet_tests::process::Proc;

/// A run takes some seconds; one that takes so long hangs.
const LIMIT: Duration = Duration::from_secs(300);

/// The C library chooses its `memcpy` by what the CPU has; the plainest one is there on every CPU,
/// and so are its counts.
const SAME_COPIES: &str = "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX2,-AVX512F,-AVX512VL,-AVX_Fast_Unaligned_Load,-ERMS,-FSRM,-SSSE3";

/// Instructions a packet in every case, as counted now. `word` is what this program takes as its
/// argument to call [`super::count`].
///
/// # Errors
/// When valgrind cannot be run or a case fails: with its words.
pub fn measure(word: &str) -> Result<Vec<(String, f64)>> {
    let dir = RunDir::new()?;
    let out = dir.join("counts");
    let mut file = OsString::from("--callgrind-out-file=");
    file.push(&out);
    let me = env::current_exe().context("this program's own path is unknown")?;
    let mut args: Vec<OsString> = [
        SAME_COPIES,
        "valgrind",
        "--quiet",
        "--tool=callgrind",
        "--collect-atstart=no",
        "--toggle-collect=virtionet_benches::instructions::measured*",
        "--dump-after=virtionet_benches::instructions::counted*",
        "--dump-line=no",
    ]
    .map(OsString::from)
    .to_vec();
    args.extend([file, me.into(), word.into()]);
    let mut valgrind = Proc::spawn(&dir, "valgrind", None, "env", args)?;
    let status = valgrind.wait(LIMIT)?;
    ensure!(
        status.success(),
        "valgrind failed ({status}); run ci/setup if it is not there: {}",
        valgrind.stderr().trim()
    );
    super::per_packet(&read(&out)?)
}

/// The totals of `OUT.1`, `OUT.2` and so on.
fn read(out: &Path) -> Result<Vec<u64>> {
    let mut totals = Vec::new();
    loop {
        let part = out.with_extension((totals.len() + 1).to_string());
        if !part.exists() {
            // What comes after the last run is in a file without number, and nothing to us.
            return Ok(totals);
        }
        totals.push(total(&fs::read_to_string(&part)?)?);
    }
}

fn total(text: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("totals:"));
    let line = line.context("a file of callgrind's has no totals: it was cut off")?;
    Ok(line.trim().parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_found_and_their_absence_is_told() {
        let text = "events: Ir\nsummary: 5\n\nfn=(1) x\n0 17\n\ntotals: 17\n";
        assert_eq!(total(text).unwrap(), 17);
        assert!(total(&text.replace("totals", "")).is_err());
        assert!(total(&text.replace("17", "")).is_err());
    }
}
