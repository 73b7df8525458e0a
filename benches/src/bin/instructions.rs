//! Counts the instructions that the data path executes for each packet, and compares them with the
//! committed figures.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use virtionet_benches::instructions::callgrind;
use virtionet_benches::instructions::figures::{InstructionCounts, Tools};
use virtionet_benches::{instructions, meta};
use virtionet_tests::paths::root;
use virtionet_tests::process::output;

/// Counts the instructions per packet on the data path, with callgrind.
#[derive(Debug, Parser)]
#[command(name = "virtionet-instructions")]
struct Cli {
    /// The command
    command: CliCommand,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CliCommand {
    /// Counts the instructions, and fails when a case exceeds its committed figure by more than 3 %
    Check,
    /// Counts the instructions, and writes the figures that are to be committed
    Accept,
    /// Runs every case; this is the program that callgrind runs
    #[value(hide = true)]
    Count,
}

fn main() -> Result<ExitCode> {
    match Cli::parse().command {
        CliCommand::Check => check(),
        CliCommand::Accept => accept(),
        CliCommand::Count => instructions::count().map(|()| ExitCode::SUCCESS),
    }
}

fn check() -> Result<ExitCode> {
    let (figures_path, tools_path) = result_paths();
    let committed = InstructionCounts::load(&figures_path)?;
    let committed_tools = Tools::load(&tools_path)?;
    let (measured, tools) = measure()?;
    let comparison = committed.compare(&measured, (&committed_tools, &tools));
    print(&format!("{}\n{comparison}", measured.table()))?;
    Ok(match comparison.is_within_tolerance() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn accept() -> Result<ExitCode> {
    let (figures_path, tools_path) = result_paths();
    let (measured, tools) = measure()?;
    print(&measured.table())?;
    if let (Ok(committed), Ok(committed_tools)) = (
        InstructionCounts::load(&figures_path),
        Tools::load(&tools_path),
    ) {
        print(&format!(
            "\nCompared with the figures that this run replaces:\n{}",
            committed.compare(&measured, (&committed_tools, &tools))
        ))?;
    }
    measured.save(&figures_path)?;
    tools.save(&tools_path)?;
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

/// The files of the committed figures and of the tools' versions.
fn result_paths() -> (PathBuf, PathBuf) {
    let results = root().join("benches/results");
    (
        results.join("instructions.json"),
        results.join("instructions.meta.json"),
    )
}

fn print(text: &str) -> io::Result<()> {
    io::stdout().lock().write_all(text.as_bytes())
}
