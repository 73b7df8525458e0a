//! The load that has nothing to do with virtionetd: one process on each CPU.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use virtionet_tests::cleanup::{Action, Entry, register};

/// The shortest and the longest period of a load. A sleep takes at least 50 microseconds (the
/// kernel's timer slack).
const PERIODS: (f64, f64) = (100e-6, 10e-3);

/// How much a thread or a group of threads ran on one CPU during an interval.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CpuLoad {
    /// Share of the CPU, 0 to 1.
    pub share: f64,
    /// Voluntary context switches per second, which are sleeps.
    pub sleeps: f64,
}

impl CpuLoad {
    /// Returns the period of a load that sleeps as often, in seconds.
    fn period(self) -> f64 {
        let (shortest, longest) = PERIODS;
        (1.0 / self.sleeps.max(1.0)).clamp(shortest, longest)
    }
}

/// A process that burns CPU time on one CPU.
#[derive(Debug)]
pub struct ControlLoad {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    _entry: Entry,
}

impl ControlLoad {
    /// Starts the process. It burns nothing yet.
    ///
    /// # Errors
    /// When the program `virtionet-load` is not beside this one.
    pub fn spawn(cpu: usize) -> Result<Self> {
        let this_program =
            std::env::current_exe().context("the path of this program is unknown")?;
        let mut child = Command::new(this_program.with_file_name("virtionet-load"))
            .arg(cpu.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("virtionet-load cannot be started: build it beside virtionet-bench")?;
        Ok(Self {
            _entry: register(Action::Kill(i32::try_from(child.id())?)),
            stdin: child.stdin.take().context("virtionet-load has no stdin")?,
            stdout: BufReader::new(
                child
                    .stdout
                    .take()
                    .context("virtionet-load has no stdout")?,
            ),
            child,
        })
    }

    /// Starts to burn.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn start(&mut self, load: CpuLoad) -> Result<()> {
        writeln!(self.stdin, "{} {}", load.share, load.period())?;
        Ok(self.stdin.flush()?)
    }

    /// Stops and returns the CPU time that was burned.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn stop(&mut self) -> Result<Duration> {
        writeln!(self.stdin, "0 0")?;
        self.stdin.flush()?;
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        let seconds = line.trim().parse();
        let seconds: f64 = seconds.with_context(|| format!("virtionet-load printed {line:?}"))?;
        Ok(Duration::try_from_secs_f64(seconds)?)
    }
}

impl Drop for ControlLoad {
    fn drop(&mut self) {
        // An error means that the process has already ended, which is the purpose of this function.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_period_follows_the_sleeps_within_its_bounds() {
        let period = |sleeps| CpuLoad { share: 0.5, sleeps }.period();
        assert_eq!(period(1000.0), 1e-3);
        assert_eq!((period(0.0), period(1e6)), (10e-3, 100e-6));
    }
}
