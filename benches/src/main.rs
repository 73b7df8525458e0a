//! Runs the named groups, shows each as a table, and writes NAME.json, NAME.meta.json and NAME.svg,
//! and NAME.md where a group has a page.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use virtionet_benches::groups::Group;
use virtionet_benches::meta::Meta;
use virtionet_benches::outcome::GroupResult;
use virtionet_benches::sampling::Effort;
use virtionet_benches::{chart, measure, table};
use virtionet_tests::paths::root;

/// Measures virtionetd side by side with its peers.
#[derive(Debug, Parser)]
#[command(name = "ci/bench")]
struct Cli {
    /// What to measure [default: everything]
    #[arg(value_name = "NAME")]
    groups: Vec<Group>,

    /// Few repetitions: shows that everything runs, not how fast
    #[arg(long)]
    quick: bool,

    /// Where the results go [default: benches/results]
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,

    /// The numbers of queue pairs that the group 'queues' compares with one
    #[arg(long, value_name = "N,N", default_value = "4", value_delimiter = ',',
          value_parser = clap::value_parser!(u16).range(2..=8))]
    pairs: Vec<u16>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let groups = match cli.groups.is_empty() {
        true => Group::value_variants().to_vec(),
        false => cli.groups,
    };
    let effort = match cli.quick {
        true => Effort::Quick,
        false => Effort::Full,
    };
    let results = cli
        .results
        .unwrap_or_else(|| root().join("benches/results"));
    fs::create_dir_all(&results)
        .with_context(|| format!("the folder {} cannot be made", results.display()))?;
    for group in groups {
        measure(group, effort, &cli.pairs, &results)?;
    }
    Ok(())
}

fn measure(group: Group, effort: Effort, pairs: &[u16], results: &Path) -> Result<()> {
    let mut meta = Meta::gather(group, effort)?;
    if group == Group::Queues {
        let list: Vec<String> = pairs.iter().map(u16::to_string).collect();
        meta.command
            .push_str(&format!(" --pairs {}", list.join(",")));
    }
    let outcome = measure::measure(group, effort, pairs)
        .with_context(|| format!("the group '{}' could not be measured", group.name()))?;
    let meta = meta.with_notes(&outcome.notes);
    io::stdout()
        .lock()
        .write_all(table::render(&meta, &outcome).as_bytes())?;
    write(results, group, &meta, &outcome)
}

fn write(results: &Path, group: Group, meta: &Meta, outcome: &GroupResult) -> Result<()> {
    let rows = serde_json::to_string_pretty(&outcome.rows)?;
    let side = serde_json::to_string_pretty(meta)?;
    let page = outcome.page.as_ref();
    let page = page.map(|page| ("md", format!("# {}\n\n{page}", meta.title)));
    let files = [
        ("json", rows + "\n"),
        ("meta.json", side + "\n"),
        ("svg", chart::render(meta, outcome)),
    ];
    for (ending, text) in files.into_iter().chain(page) {
        let path = results.join(format!("{}.{ending}", group.name()));
        // Written whole or not at all: a result that was cut off would still look like one.
        let unfinished = path.with_extension("tmp");
        fs::write(&unfinished, text)
            .and_then(|()| fs::rename(&unfinished, &path))
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(())
}
