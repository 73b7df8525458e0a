//! Figures as they are committed, and whether the ones of now are worse.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The share by which a case may grow before it is reported.
const TOLERANCE: f64 = 0.03;

/// Instructions a packet by case, in the file that is committed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstructionCounts(pub BTreeMap<String, f64>);

/// What they were counted with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tools {
    /// The compiler's version.
    pub rustc: String,
    /// valgrind's.
    pub valgrind: String,
}

/// How a case differs from its committed figure.
#[derive(Debug, Clone, PartialEq)]
enum Change {
    /// It grew by more than is tolerated.
    Worse(f64, f64),
    /// It shrank by more than that.
    Better(f64, f64),
    /// There is no committed figure.
    New(f64),
    /// There is no such case any more.
    Removed(f64),
}

/// All that differs.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    changes: Vec<(String, Change)>,
    cases: usize,
    /// The compilers of the committed figures and of these, where they differ.
    compilers: Option<(String, String)>,
}

impl InstructionCounts {
    /// From the committed file.
    ///
    /// # Errors
    /// When it cannot be read or is none.
    pub fn load(path: &Path) -> Result<Self> {
        read(path)
    }

    /// To the committed file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        write(path, self)
    }

    /// Compares the figures of now with these.
    #[must_use]
    pub fn compare(&self, now: &Self, tools: (&Tools, &Tools)) -> Verdict {
        let (then, today) = tools;
        let same = then.rustc == today.rustc;
        let mut changes = Vec::new();
        for (case, &figure) in &now.0 {
            let change = match self.0.get(case) {
                None => Some(Change::New(figure)),
                Some(&old) if figure > old * (1.0 + TOLERANCE) => Some(Change::Worse(old, figure)),
                Some(&old) if figure < old * (1.0 - TOLERANCE) => Some(Change::Better(old, figure)),
                Some(_) => None,
            };
            changes.extend(change.map(|change| (case.clone(), change)));
        }
        for (case, &old) in &self.0 {
            if !now.0.contains_key(case) {
                changes.push((case.clone(), Change::Removed(old)));
            }
        }
        Verdict {
            changes,
            cases: now.0.len(),
            compilers: (!same).then(|| (then.rustc.clone(), today.rustc.clone())),
        }
    }

    /// A table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let width = self.0.keys().map(String::len).max().unwrap_or(0);
        let mut text = String::from("instructions a packet\n");
        for (case, figure) in &self.0 {
            // Writing to a String cannot fail.
            _ = writeln!(text, "{case:width$}  {figure:>9.1}");
        }
        text
    }
}

impl Tools {
    /// From the file beside the figures.
    ///
    /// # Errors
    /// When it cannot be read or is none.
    pub fn load(path: &Path) -> Result<Self> {
        read(path)
    }

    /// To the file beside the figures.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        write(path, self)
    }
}

impl Verdict {
    /// Whether no case got worse, and every case has its figure and every figure its case. Another
    /// compiler makes other code of the same source, so its figures are reported and judge nothing.
    #[must_use]
    pub fn is_within_tolerance(&self) -> bool {
        let same_compiler = self.compilers.is_none();
        self.changes.iter().all(|(_, change)| match change {
            Change::Better(..) => true,
            Change::Worse(..) => !same_compiler,
            Change::New(_) | Change::Removed(_) => false,
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tolerance = 100.0 * TOLERANCE;
        if let Some((then, now)) = &self.compilers {
            writeln!(
                f,
                "The committed figures are of rustc {then} and these of {now}: differences are reported and do not fail."
            )?;
        }
        for (case, change) in &self.changes {
            match change {
                Change::Worse(old, new) => writeln!(
                    f,
                    "WORSE: '{case}' takes {new:.1} instructions a packet, {} than the committed {old:.1}.",
                    percent(*old, *new)
                )?,
                Change::Better(old, new) => writeln!(
                    f,
                    "better: '{case}' takes {new:.1} instructions a packet, {} than the committed {old:.1}.",
                    percent(*old, *new)
                )?,
                Change::New(new) => writeln!(
                    f,
                    "NEW: '{case}' takes {new:.1} instructions a packet and has no committed figure."
                )?,
                Change::Removed(old) => writeln!(
                    f,
                    "GONE: '{case}' has a committed figure, {old:.1}, and is no case any more."
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
                "To accept: 'ci/bench instructions' writes these figures; commit them with the change that they come from."
            ),
        }
    }
}

fn percent(old: f64, new: f64) -> String {
    let by = 100.0 * (new - old) / old;
    match by > 0.0 {
        true => format!("{by:.1} % more"),
        false => format!("{:.1} % less", -by),
    }
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let what = || {
        format!(
            "the committed figures in {} cannot be read: 'ci/bench instructions' makes them",
            path.display()
        )
    };
    let text = fs::read_to_string(path).with_context(what)?;
    serde_json::from_str(&text).with_context(what)
}

fn write<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(list: &[(&str, f64)]) -> InstructionCounts {
        let own = |&(case, figure): &(&str, f64)| (case.to_owned(), figure);
        InstructionCounts(list.iter().map(own).collect())
    }

    fn tools(rustc: &str) -> Tools {
        Tools {
            rustc: rustc.into(),
            valgrind: "3.19.0".into(),
        }
    }

    fn verdict(then: &[(&str, f64)], now: &[(&str, f64)]) -> Verdict {
        figures(then).compare(&figures(now), (&tools("1.95.0"), &tools("1.95.0")))
    }

    #[test]
    fn a_case_that_grows_fails_and_says_which_by_how_much_and_what_to_do() {
        let verdict = verdict(&[("a", 100.0), ("b", 50.0)], &[("a", 104.0), ("b", 51.4)]);
        assert!(!verdict.is_within_tolerance());
        let text = verdict.to_string();
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
    fn the_limit_is_three_per_cent() {
        for (now, is_within_tolerance) in
            [(100.0, true), (102.9, true), (103.1, false), (200.0, false)]
        {
            assert_eq!(
                verdict(&[("a", 100.0)], &[("a", now)]).is_within_tolerance(),
                is_within_tolerance,
                "{now}"
            );
        }
    }

    #[test]
    fn less_is_said_and_does_not_fail() {
        let verdict = verdict(&[("a", 100.0)], &[("a", 90.0)]);
        assert!(verdict.is_within_tolerance());
        let text = verdict.to_string();
        assert!(
            text.contains("better: 'a'") && text.contains("10.0 % less"),
            "{text}"
        );
    }

    #[test]
    fn nothing_changed_is_said_in_one_line() {
        let text = verdict(&[("a", 100.0)], &[("a", 101.0)]).to_string();
        assert_eq!(
            text,
            "All 1 cases are within 3 % of their committed figures.\n"
        );
    }

    #[test]
    fn a_case_without_figure_and_a_figure_without_case_fail() {
        let new = verdict(&[], &[("a", 1.0)]);
        assert!(!new.is_within_tolerance() && new.to_string().contains("NEW: 'a'"));
        let gone = verdict(&[("a", 1.0)], &[]);
        assert!(!gone.is_within_tolerance() && gone.to_string().contains("GONE: 'a'"));
    }

    #[test]
    fn figures_of_another_compiler_are_reported_and_do_not_fail() {
        let then = figures(&[("a", 100.0)]);
        let compare = |now| {
            let now = figures(&[("a", now)]);
            then.compare(&now, (&tools("1.95.0"), &tools("1.96.0")))
        };
        assert!(compare(116.0).is_within_tolerance());
        let text = compare(116.0).to_string();
        for want in ["rustc 1.95.0", "of 1.96.0", "WORSE: 'a'", "16.0 % more"] {
            assert!(text.contains(want), "{text}");
        }
        let other = figures(&[("b", 1.0)]);
        let verdict = then.compare(&other, (&tools("1.95.0"), &tools("1.96.0")));
        assert!(!verdict.is_within_tolerance(), "{verdict}");
    }

    #[test]
    fn what_is_saved_is_loaded() {
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
