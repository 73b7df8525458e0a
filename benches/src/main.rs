//! Measures the named groups, prints a table of each, and writes NAME.json, NAME.meta.json,
//! NAME.svg and, for a group with a page, NAME.md.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use virtionet_benches::groups::Group;
use virtionet_benches::measure::Parameters;
use virtionet_benches::meta::Meta;
use virtionet_benches::outcome::GroupResult;
use virtionet_benches::sampling::Effort;
use virtionet_benches::{chart, measure, table};
use virtionet_tests::paths::root;

/// Measures virtionetd side by side with other implementations.
#[derive(Debug, Parser)]
#[command(name = "ci/bench")]
struct Cli {
    /// The groups to measure [default: all]
    #[arg(value_name = "NAME")]
    groups: Vec<Group>,

    /// Makes few repetitions, which only show that everything runs
    #[arg(long)]
    quick: bool,

    /// The directory of the results [default: benches/results]
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,

    /// The numbers of queue pairs that the group 'queues' compares with one
    #[arg(long = "pairs", value_name = "N,N", default_value = "4", value_delimiter = ',',
          value_parser = clap::value_parser!(u16).range(2..=8))]
    queue_pairs: Vec<u16>,

    /// The virtionetd that the group 'builds' compares with this build
    #[arg(long, value_name = "PROGRAM")]
    against: Option<PathBuf>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let groups = match cli.groups.is_empty() {
        // Without a word of the user's, nothing says what 'builds' is to be compared with.
        true => Group::value_variants()
            .iter()
            .copied()
            .filter(|group| *group != Group::Builds || cli.against.is_some())
            .collect(),
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
        .with_context(|| format!("the directory {} cannot be created", results.display()))?;
    let parameters = Parameters {
        queue_pairs: cli.queue_pairs,
        // It is needed until the program ends.
        other_build: cli.against.map(|path| &*Box::leak(path.into_boxed_path())),
    };
    for group in groups {
        measure(group, effort, &parameters, &results)?;
    }
    Ok(())
}

fn measure(group: Group, effort: Effort, parameters: &Parameters, results: &Path) -> Result<()> {
    let mut meta = Meta::gather(group, effort)?;
    if group == Group::Queues {
        let list: Vec<String> = parameters.queue_pairs.iter().map(u16::to_string).collect();
        meta.command
            .push_str(&format!(" --pairs {}", list.join(",")));
    }
    let outcome = measure::measure(group, effort, parameters)
        .with_context(|| format!("the group '{}' could not be measured", group.name()))?;
    let meta = meta.with_notes(&outcome.notes);
    io::stdout()
        .lock()
        .write_all(table::render(&meta, &outcome).as_bytes())?;
    write(results, group, &meta, &outcome)
}

fn write(results: &Path, group: Group, meta: &Meta, outcome: &GroupResult) -> Result<()> {
    let rows = serde_json::to_string_pretty(&outcome.rows)?;
    let meta_text = serde_json::to_string_pretty(meta)?;
    let page = outcome.page.as_ref();
    let page = page.map(|page| ("md", format!("# {}\n\n{page}", meta.title)));
    let files = [
        ("json", rows + "\n"),
        ("meta.json", meta_text + "\n"),
        ("svg", chart::render(meta, outcome)),
    ];
    for (extension, text) in files.into_iter().chain(page) {
        let path = results.join(format!("{}.{extension}", group.name()));
        // A partly written file could be mistaken for a result, so the file is renamed when it is
        // complete.
        let unfinished = path.with_extension("tmp");
        fs::write(&unfinished, text)
            .and_then(|()| fs::rename(&unfinished, &path))
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(())
}
