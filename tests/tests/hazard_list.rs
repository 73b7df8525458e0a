//! The list of hazards is complete and names tests that exist.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// The sections of the list: the heading (none for the first), what the rows' names begin with, and
/// the number of rows that the section must have.
const SECTIONS: [(&str, &str, usize); 6] = [
    ("", "", 26),
    ("The guest", "G", 31),
    ("The front-end", "F", 47),
    ("The host", "H", 17),
    ("Resource abuse", "A", 7),
    ("Bugs of others", "B", 14),
];

/// A row: its name, what happens, what must follow, and the tests.
type Row<'a> = Vec<&'a str>;

fn rust_files(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// The code of all crates and tests.
fn sources(root: &Path) -> String {
    let mut files = Vec::new();
    rust_files(&root.join("crates"), &mut files);
    rust_files(&root.join("tests"), &mut files);
    files
        .iter()
        .map(|file| fs::read_to_string(file).unwrap())
        .collect()
}

/// The rows of each section, with the section's heading. The head of a table and the line below it
/// are no rows.
fn sections(list: &str) -> Vec<(&str, Vec<Row<'_>>)> {
    let mut sections = vec![("", Vec::new())];
    for line in list.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            sections.push((heading, Vec::new()));
        } else if let Some(line) = line.strip_prefix("| ").and_then(|l| l.strip_suffix('|')) {
            let row: Row<'_> = line.split('|').map(str::trim).collect();
            let (_, rows) = sections.last_mut().unwrap();
            if row[0] != "#" {
                rows.push(row);
            }
        }
    }
    sections
}

fn assert_has_tests(row: &Row<'_>, sources: &str) {
    let name = row[0];
    assert_eq!(row.len(), 4, "row {name} has another number of cells");
    assert!(row.iter().all(|cell| !cell.is_empty()), "row {name}");
    let tests: Vec<&str> = row[3].split('`').skip(1).step_by(2).collect();
    let is_open = row[2..].iter().any(|cell| cell.starts_with("open: "));
    assert!(is_open || !tests.is_empty(), "row {name} has no test");
    for test in tests {
        let exists = sources.contains(&format!("#[test]\nfn {test}("));
        assert!(exists, "row {name}: there is no test {test}");
    }
}

#[test]
fn hazards_have_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    // Without indentation, as some tests are in modules.
    let sources: Vec<String> = sources(root)
        .lines()
        .map(|line| line.trim().to_owned())
        .collect();
    let sources = sources.join("\n");
    let list = fs::read_to_string(root.join("tests/hazards.md")).unwrap();
    let sections = sections(&list);
    let headings: Vec<&str> = sections.iter().map(|(heading, _)| *heading).collect();
    assert_eq!(headings, SECTIONS.map(|(heading, ..)| heading));
    for ((_, rows), (_, prefix, count)) in sections.iter().zip(SECTIONS) {
        let names: Vec<&str> = rows.iter().map(|row| row[0]).collect();
        let wanted: Vec<String> = (1..=count).map(|n| format!("{prefix}{n}")).collect();
        assert_eq!(names, wanted);
        rows.iter().for_each(|row| assert_has_tests(row, &sources));
    }
}
