//! The committed figures, and their comparison with measured figures.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The fraction by which a figure may differ from the committed one without being reported.
const TOLERANCE: f64 = 0.03;

/// Instructions per packet, by name of the case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstructionCounts(pub BTreeMap<String, f64>);

/// The versions of the tools with which the instructions were counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tools {
    /// The version of the compiler.
    pub rustc: String,
    /// The version of valgrind.
    pub valgrind: String,
}

/// How a measured figure differs from the committed one. Pairs are the committed and the measured
/// figure.
#[derive(Debug, Clone, PartialEq)]
enum Change {
    /// It is larger by more than [`TOLERANCE`].
    Worse(f64, f64),
    /// It is smaller by more than [`TOLERANCE`].
    Better(f64, f64),
    /// There is no committed figure.
    New(f64),
    /// The case does not exist any more.
    Removed(f64),
}

/// The differences between measured and committed figures.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    changes: Vec<(String, Change)>,
    cases: usize,
    /// The compilers of the committed and of the measured figures, if they differ.
    compilers: Option<(String, String)>,
}

impl InstructionCounts {
    /// Reads the committed figures.
    ///
    /// # Errors
    /// When the file cannot be read or parsed.
    pub fn load(path: &Path) -> Result<Self> {
        read(path)
    }

    /// Writes the figures to the file that is committed.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        write(path, self)
    }

    /// Compares the measured figures with these committed ones. `tools` are those of the committed
    /// and of the measured figures.
    #[must_use]
    pub fn compare(&self, measured: &Self, tools: (&Tools, &Tools)) -> Comparison {
        let (committed_tools, tools) = tools;
        let has_same_compiler = committed_tools.rustc == tools.rustc;
        let mut changes = Vec::new();
        for (case, &figure) in &measured.0 {
            let change = match self.0.get(case) {
                None => Some(Change::New(figure)),
                Some(&old) if figure > old * (1.0 + TOLERANCE) => Some(Change::Worse(old, figure)),
                Some(&old) if figure < old * (1.0 - TOLERANCE) => Some(Change::Better(old, figure)),
                Some(_) => None,
            };
            changes.extend(change.map(|change| (case.clone(), change)));
        }
        for (case, &old) in &self.0 {
            if !measured.0.contains_key(case) {
                changes.push((case.clone(), Change::Removed(old)));
            }
        }
        Comparison {
            changes,
            cases: measured.0.len(),
            compilers: (!has_same_compiler)
                .then(|| (committed_tools.rustc.clone(), tools.rustc.clone())),
        }
    }

    /// Formats the figures as a table.
    #[must_use]
    pub fn table(&self) -> String {
        let width = self.0.keys().map(String::len).max().unwrap_or(0);
        let mut text = String::from("instructions per packet\n");
        for (case, figure) in &self.0 {
            // Writing to a String cannot fail.
            _ = writeln!(text, "{case:width$}  {figure:>9.1}");
        }
        text
    }
}

impl Tools {
    /// Reads the versions of the tools from the file beside the figures.
    ///
    /// # Errors
    /// When the file cannot be read or parsed.
    pub fn load(path: &Path) -> Result<Self> {
        read(path)
    }

    /// Writes the versions of the tools to the file beside the figures.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        write(path, self)
    }
}

impl Comparison {
    /// Whether no figure is worse, every case has a committed figure, and every committed figure
    /// has a case. Another compiler generates different code from the same source, so worse figures
    /// are only reported if the compilers differ.
    #[must_use]
    pub fn is_within_tolerance(&self) -> bool {
        let has_same_compiler = self.compilers.is_none();
        self.changes.iter().all(|(_, change)| match change {
            Change::Better(..) => true,
            Change::Worse(..) => !has_same_compiler,
            Change::New(_) | Change::Removed(_) => false,
        })
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tolerance = 100.0 * TOLERANCE;
        if let Some((committed, measured)) = &self.compilers {
            writeln!(
                f,
                "The committed figures are those of rustc {committed} and these are those of {measured}, so differences are reported but do not fail."
            )?;
        }
        for (case, change) in &self.changes {
            match change {
                Change::Worse(old, new) => writeln!(
                    f,
                    "WORSE: '{case}' needs {new:.1} instructions per packet, {} than the committed {old:.1}.",
                    format_change(*old, *new)
                )?,
                Change::Better(old, new) => writeln!(
                    f,
                    "better: '{case}' needs {new:.1} instructions per packet, {} than the committed {old:.1}.",
                    format_change(*old, *new)
                )?,
                Change::New(new) => writeln!(
                    f,
                    "NEW: '{case}' needs {new:.1} instructions per packet and has no committed figure."
                )?,
                Change::Removed(old) => writeln!(
                    f,
                    "REMOVED: '{case}' has a committed figure, {old:.1}, but the case does not exist any more."
                )?,
            }
        }
        match self.changes.is_empty() {
            true => writeln!(
                f,
                "All {} cases are within {tolerance:.0} % of their committed figures.",
                self.cases
            ),
            false => writeln!(
                f,
                "To accept these figures, run 'ci/bench instructions' and commit them together with the change that causes them."
            ),
        }
    }
}

fn format_change(old: f64, new: f64) -> String {
    let by = 100.0 * (new - old) / old;
    match by > 0.0 {
        true => format!("{by:.1} % more"),
        false => format!("{:.1} % less", -by),
    }
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let message = || {
        format!(
            "the committed figures in {} cannot be read: run 'ci/bench instructions' to write them",
            path.display()
        )
    };
    let text = fs::read_to_string(path).with_context(message)?;
    serde_json::from_str(&text).with_context(message)
}

fn write<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(list: &[(&str, f64)]) -> InstructionCounts {
        let to_owned = |&(case, figure): &(&str, f64)| (case.to_owned(), figure);
        InstructionCounts(list.iter().map(to_owned).collect())
    }

    fn tools(rustc: &str) -> Tools {
        Tools {
            rustc: rustc.into(),
            valgrind: "3.19.0".into(),
        }
    }

    fn compare(committed: &[(&str, f64)], measured: &[(&str, f64)]) -> Comparison {
        figures(committed).compare(&figures(measured), (&tools("1.95.0"), &tools("1.95.0")))
    }

    #[test]
    fn message_of_a_worse_case_has_its_name_both_figures_and_the_remedy() {
        let comparison = compare(&[("a", 100.0), ("b", 50.0)], &[("a", 104.0), ("b", 51.4)]);
        assert!(!comparison.is_within_tolerance());
        let text = comparison.to_string();
        for want in [
            "WORSE: 'a'",
            "104.0",
            "4.0 % more",
            "100.0",
            "ci/bench instructions",
        ] {
            assert!(text.contains(want), "{text}");
        }
        assert!(!text.contains("'b'"), "{text}");
    }

    #[test]
    fn limit_is_three_per_cent() {
        for (measured, is_within_tolerance) in
            [(100.0, true), (102.9, true), (103.1, false), (200.0, false)]
        {
            assert_eq!(
                compare(&[("a", 100.0)], &[("a", measured)]).is_within_tolerance(),
                is_within_tolerance,
                "{measured}"
            );
        }
    }

    #[test]
    fn better_case_is_reported_and_does_not_fail() {
        let comparison = compare(&[("a", 100.0)], &[("a", 90.0)]);
        assert!(comparison.is_within_tolerance());
        let text = comparison.to_string();
        assert!(
            text.contains("better: 'a'") && text.contains("10.0 % less"),
            "{text}"
        );
    }

    #[test]
    fn message_without_changes_is_one_line() {
        let text = compare(&[("a", 100.0)], &[("a", 101.0)]).to_string();
        assert_eq!(
            text,
            "All 1 cases are within 3 % of their committed figures.\n"
        );
    }

    #[test]
    fn case_without_figure_and_figure_without_case_fail() {
        let added = compare(&[], &[("a", 1.0)]);
        assert!(!added.is_within_tolerance() && added.to_string().contains("NEW: 'a'"));
        let removed = compare(&[("a", 1.0)], &[]);
        assert!(!removed.is_within_tolerance() && removed.to_string().contains("REMOVED: 'a'"));
    }

    #[test]
    fn figures_of_another_compiler_are_reported_and_do_not_fail() {
        let committed = figures(&[("a", 100.0)]);
        let compare = |measured| {
            let measured = figures(&[("a", measured)]);
            committed.compare(&measured, (&tools("1.95.0"), &tools("1.96.0")))
        };
        assert!(compare(116.0).is_within_tolerance());
        let text = compare(116.0).to_string();
        for want in [
            "rustc 1.95.0",
            "those of 1.96.0",
            "WORSE: 'a'",
            "16.0 % more",
        ] {
            assert!(text.contains(want), "{text}");
        }
        let other = figures(&[("b", 1.0)]);
        let comparison = committed.compare(&other, (&tools("1.95.0"), &tools("1.96.0")));
        assert!(!comparison.is_within_tolerance(), "{comparison}");
    }

    #[test]
    fn saved_figures_are_loaded() {
        let dir = virtionet_tests::paths::RunDir::new().unwrap();
        let saved = figures(&[("ring, split: 1 descriptor", 12.3)]);
        saved.save(&dir.join("figures.json")).unwrap();
        assert_eq!(
            InstructionCounts::load(&dir.join("figures.json")).unwrap(),
            saved
        );
        let error = InstructionCounts::load(&dir.join("none.json"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("ci/bench instructions"), "{error}");
    }
}
