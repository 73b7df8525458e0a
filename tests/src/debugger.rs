//! gdb, which kills a process at a line of its source.

use std::ffi::OsString;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::paths::{RunDir, root};
use crate::process::Proc;

/// How long gdb may take to end after the process was killed.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A line of the source, which contains a text that no other line of its file contains.
#[derive(Clone, Copy, Debug)]
pub struct SourceLine {
    /// The file, from the root of the checkout on.
    pub file: &'static str,
    /// The text.
    pub text: &'static str,
}

impl SourceLine {
    /// The line in the form `FILE:NUMBER`.
    ///
    /// # Errors
    /// When not exactly one line contains the text.
    pub fn location(self) -> Result<String> {
        let Self { file, text } = self;
        let source = fs::read_to_string(root().join(file)).context(file)?;
        let lines = (1..).zip(source.lines());
        let found: Vec<u32> = lines
            .filter(|(_, line)| line.contains(text))
            .map(|(number, _)| number)
            .collect();
        ensure!(
            found.len() == 1,
            "'{text}' is in the lines {found:?} of {file}: adapt the test to the code"
        );
        Ok(format!("{file}:{}", found[0]))
    }
}

/// A gdb that is attached to a process and kills it.
#[derive(Debug)]
pub struct Killer {
    gdb: Proc,
    /// The line, as gdb writes it.
    location: String,
}

impl Killer {
    /// Kills process `pid` when one of its threads has come to `line` for the `nth` time.
    ///
    /// # Errors
    /// When gdb cannot be started, or the line is not known.
    pub fn attach(dir: &RunDir, pid: u32, line: SourceLine, nth: u64) -> Result<Self> {
        let location = line.location()?;
        let script = dir.join("kill.gdb");
        let commands = [
            "set debuginfod enabled off".to_owned(),
            "set breakpoint pending off".to_owned(),
            "handle all nostop noprint pass".to_owned(),
            format!("attach {pid}"),
            format!("break {location}"),
            format!("ignore 1 {}", nth.saturating_sub(1)),
            "continue".to_owned(),
            "backtrace 4".to_owned(),
            "kill".to_owned(),
        ];
        fs::write(&script, commands.join("\n"))?;
        let args = ["-nx", "-batch", "-x"].map(OsString::from);
        let args = args.into_iter().chain([script.into_os_string()]);
        let gdb = Proc::spawn(dir, "gdb", None, "gdb", args);
        Ok(Self {
            gdb: gdb.context("run ci/setup, which installs gdb")?,
            location,
        })
    }

    /// What gdb has written.
    #[must_use]
    pub fn output(&self) -> String {
        self.gdb.stdout() + &self.gdb.stderr()
    }

    /// Waits until gdb has killed the process, and checks that it did so at the line: where a line
    /// has no code of its own, gdb stops at the next one that has.
    ///
    /// # Errors
    /// When it did not.
    pub fn finish(mut self) -> Result<()> {
        self.gdb.wait(END_TIMEOUT)?;
        let (location, output) = (&self.location, self.output());
        let frame = output.lines().find(|line| line.starts_with("#0"));
        let is_there = frame.is_some_and(|frame| frame.ends_with(location.as_str()));
        ensure!(is_there, "gdb has not stopped at {location}: {output}");
        Ok(())
    }
}
