//! Counts the instructions that the data path takes a packet, and compares them with the committed
//! figures.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use virtionet_benches::instructions::callgrind;
use virtionet_benches::instructions::figures::{InstructionCounts, Tools};
use virtionet_benches::{instructions, meta};
use virtionet_tests::paths::root;
use virtionet_tests::process::output;

/// Instructions a packet on the data path, counted by callgrind.
#[derive(Debug, Parser)]
#[command(name = "virtionet-instructions")]
struct Cli {
    /// What to do
    what: CliCommand,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CliCommand {
    /// Counts, and fails when a case takes more than 3 % more than its committed figure
    Check,
    /// Counts, and writes the figures to be committed
    Accept,
    /// What callgrind runs: every case, once
    #[value(hide = true)]
    Count,
}

fn main() -> Result<ExitCode> {
    match Cli::parse().what {
        CliCommand::Check => check(),
        CliCommand::Accept => accept(),
        CliCommand::Count => instructions::count().map(|()| ExitCode::SUCCESS),
    }
}

fn check() -> Result<ExitCode> {
    let (figures, tools) = paths();
    let then = InstructionCounts::load(&figures)?;
    let with = Tools::load(&tools)?;
    let (now, today) = measure()?;
    let verdict = then.compare(&now, (&with, &today));
    say(&format!("{}\n{verdict}", now.table()))?;
    Ok(match verdict.is_within_tolerance() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn accept() -> Result<ExitCode> {
    let (figures, tools) = paths();
    let (now, today) = measure()?;
    say(&now.table())?;
    if let (Ok(then), Ok(with)) = (InstructionCounts::load(&figures), Tools::load(&tools)) {
        say(&format!(
            "\nBefore this:\n{}",
            then.compare(&now, (&with, &today))
        ))?;
    }
    now.save(&figures)?;
    today.save(&tools)?;
    Ok(ExitCode::SUCCESS)
}

fn measure() -> Result<(InstructionCounts, Tools)> {
    let figures = InstructionCounts(callgrind::measure("count")?.into_iter().collect());
    let valgrind = output("valgrind", ["--version"])?;
    let tools = Tools {
        rustc: meta::rustc(),
        valgrind: valgrind.trim().trim_start_matches("valgrind-").to_owned(),
    };
    Ok((figures, tools))
}

/// The committed figures, and what they were counted with.
fn paths() -> (std::path::PathBuf, std::path::PathBuf) {
    let results = root().join("benches/results");
    (
        results.join("instructions.json"),
        results.join("instructions.meta.json"),
    )
}

fn say(text: &str) -> io::Result<()> {
    io::stdout().lock().write_all(text.as_bytes())
}
