//! The configuration file (TOML): read as a whole, with the line of each value.
//!
//! ```toml
//! control = "/run/virtionetd.ctl"
//!
//! [defaults]
//! poll = "adaptive"
//!
//! [[device]]
//! name = "web"
//! socket-path = "/run/web.sock"
//! tap = "tap0"
//! ```

use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::settings::{SettingValue, Origin, Settings};
use super::keys::{KeyScope, KEYS, Key, ValueKind, find_nearest};
use super::problem::{Problem, Problems};

/// Bytes of a file at most: hundreds of devices take a tenth of it.
const MAX_FILE_SIZE: u64 = 1 << 20;
/// Letters of a line that a problem shows of it.
const MAX_SHOWN_CHARS: usize = 80;

/// What may stand at the top of a file.
const TOP_LEVEL_KEYS: [&str; 3] = ["control", "defaults", "device"];

/// What a file says.
#[derive(Debug, Default)]
pub struct File {
    /// Where the control server answers.
    pub control: Option<SettingValue>,
    /// What devices have that do not say otherwise.
    pub defaults: Settings,
    /// Each device, and where it begins.
    pub devices: Vec<(Origin, Settings)>,
    /// Whether it can be read at all, so that what it lacks is worth a word.
    pub is_complete: bool,
}

/// Reads the file at `path`; what is wrong with it becomes `problems`.
#[must_use]
pub fn read(path: &Path, problems: &mut Problems) -> File {
    match read_bounded(path).map(String::from_utf8) {
        Ok(Ok(text)) => parse(path, &text, problems),
        Ok(Err(error)) => {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
            problems.add(Problem::in_line(
                &path.into(),
                line,
                "the file is no text in UTF-8: save it as one".into(),
            ));
            File::default()
        }
        Err(error) => {
            problems.add(Problem::new(format!(
                "cannot read {}: {error}; name a configuration file that exists and that this user may read",
                path.display()
            )));
            File::default()
        }
    }
}

/// The bytes of the file at `path`; an error where they have no end in sight.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path)?;
    file.take(MAX_FILE_SIZE + 1).read_to_end(&mut bytes)?;
    match u64::try_from(bytes.len()) {
        Ok(..=MAX_FILE_SIZE) => Ok(bytes),
        _ => Err(io::Error::other("it is larger than 1 MiB")),
    }
}

/// Reads `text`, the content of the file at `path`; what is wrong with it becomes `problems`.
#[must_use]
pub fn parse(path: &Path, text: &str, problems: &mut Problems) -> File {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader {
        path: path.into(),
        text,
        unreadable_lines: Vec::new(),
        problems,
        file: File::default(),
    };
    reader.file.is_complete = errors.is_empty();
    for error in errors {
        reader.report_syntax_error(&error);
    }
    reader.read_top_level(table.into_inner());
    reader.file
}

struct Reader<'a> {
    path: Rc<Path>,
    text: &'a str,
    /// The lines that cannot be read, of which nothing more is to be said.
    unreadable_lines: Vec<usize>,
    problems: &'a mut Problems,
    file: File,
}

impl Reader<'_> {
    fn report_syntax_error(&mut self, error: &toml::de::Error) {
        let span = error.span().unwrap_or(0..0);
        let line = self.line(&span);
        if self.unreadable_lines.contains(&line) {
            return;
        }
        self.unreadable_lines.push(line);
        let shown = |text: &str| text.trim().chars().take(MAX_SHOWN_CHARS).collect::<String>();
        let what = shown(self.text.get(span).unwrap_or_default());
        let content = shown(self.text.lines().nth(line - 1).unwrap_or_default());
        let sentence = match error.message() {
            "duplicate key" => format!("{what} is given twice: keep one of them"),
            why if why.starts_with("string values") || why.starts_with("invalid boolean") => {
                format!(
                    "`{content}` has a value that cannot be read: write a text in quotes, and a number, true or false without"
                )
            }
            why => format!("`{content}` is not TOML ({why}): write KEY = VALUE or [TABLE]"),
        };
        self.problems
            .add(Problem::in_line(&self.path, line, sentence));
    }

    fn read_top_level(&mut self, table: DeTable<'_>) {
        for (key, value) in table {
            let origin = self.origin(&key.span());
            let line = self.readable_line(&key, &value);
            match (key.get_ref().as_ref(), value.into_inner()) {
                ("control", value) => match flag_text(ValueKind::Text, &value) {
                    Some(text) => self.file.control = Some(SettingValue::new(text, &origin)),
                    None => self.add_problem(line, wrong_kind_message("control", ValueKind::Text, &value)),
                },
                ("defaults", DeValue::Table(table)) => {
                    self.file.defaults = self.read_settings(table, true);
                }
                ("defaults", _) => self.add_problem(line, "defaults is a table: write [defaults]".into()),
                ("device", DeValue::Array(tables)) => {
                    for table in tables {
                        self.read_device(table);
                    }
                }
                ("device", _) => self.add_problem(
                    line,
                    "each device is a table of its own in a list: write [[device]]".into(),
                ),
                (name, _) => self.add_problem(line, unknown_top_level_message(name)),
            }
        }
    }

    fn read_device(&mut self, table: Spanned<DeValue<'_>>) {
        let origin = self.origin(&table.span());
        match table.into_inner() {
            DeValue::Table(table) => {
                let settings = self.read_settings(table, false);
                self.file.devices.push((origin, settings));
            }
            _ => self.problems.add(origin.problem(format_args!(
                "each device is a table of its own: write [[device]], and its keys below"
            ))),
        }
    }

    fn read_settings(&mut self, table: DeTable<'_>, common: bool) -> Settings {
        let mut settings = Settings::default();
        for (name, value) in table {
            let origin = self.origin(&name.span());
            let line = self.readable_line(&name, &value);
            let name = name.get_ref().as_ref();
            let Some(key) = Key::find(name) else {
                self.add_problem(line, unknown_key_message(name));
                continue;
            };
            if common && key.scope == KeyScope::Device {
                self.add_problem(
                    line,
                    format!("{name} describes one device: write it below its [[device]]"),
                );
            } else if let Some(text) = flag_text(key.kind, value.get_ref()) {
                settings.insert(key, SettingValue::new(text, &origin));
            } else {
                self.add_problem(line, wrong_kind_message(name, key.kind, value.get_ref()));
            }
        }
        settings
    }

    /// The line of `key`, to be named in a problem; `None` where it or its value cannot be read,
    /// which is known already.
    fn readable_line<K, V>(&self, key: &Spanned<K>, value: &Spanned<V>) -> Option<usize> {
        let lines = [self.line(&key.span()), self.line(&value.span())];
        let unreadable_lines = lines.iter().any(|line| self.unreadable_lines.contains(line));
        (!unreadable_lines).then_some(lines[0])
    }

    fn add_problem(&mut self, line: Option<usize>, sentence: String) {
        if let Some(line) = line {
            self.problems
                .add(Problem::in_line(&self.path, line, sentence));
        }
    }

    fn origin(&self, span: &Range<usize>) -> Origin {
        Origin::File {
            path: Rc::clone(&self.path),
            line: self.line(span),
        }
    }

    fn line(&self, span: &Range<usize>) -> usize {
        let before = self.text.as_bytes().iter().take(span.start);
        1 + before.filter(|byte| **byte == b'\n').count()
    }
}

/// `value` as a flag spells it; `None` where it is of another kind.
fn flag_text(kind: ValueKind, value: &DeValue<'_>) -> Option<String> {
    match (kind, value) {
        (ValueKind::Text | ValueKind::NumberOrWord | ValueKind::Octal, DeValue::String(text)) => {
            Some(text.to_string())
        }
        (ValueKind::Number | ValueKind::NumberOrWord, DeValue::Integer(number)) if number.radix() == 10 => {
            Some(number.as_str().into())
        }
        (ValueKind::Octal, DeValue::Integer(number)) if number.radix() == 8 => {
            Some(number.as_str().into())
        }
        (ValueKind::Switch, DeValue::Boolean(on)) => Some(if *on { "on" } else { "off" }.into()),
        _ => None,
    }
}

fn wrong_kind_message(key: &str, kind: ValueKind, value: &DeValue<'_>) -> String {
    let found = match value {
        DeValue::String(text) => format!("the text {text:?}"),
        DeValue::Integer(number) => format!("the number {number}"),
        DeValue::Float(number) => format!("the number {number}"),
        DeValue::Boolean(on) => format!("{on}"),
        DeValue::Datetime(date) => format!("the date {date}"),
        DeValue::Array(_) => "a list".into(),
        DeValue::Table(_) => "a table".into(),
    };
    format!("{key} is {found}: write {}", kind.expected())
}

fn unknown_key_message(name: &str) -> String {
    match find_nearest(name, KEYS.map(|key| key.name)) {
        Some(near) => format!("the key {name:?} is not known: write {near}, which is the most similar one"),
        None => format!("the key {name:?} is not known: use {}", Key::names()),
    }
}

fn unknown_top_level_message(name: &str) -> String {
    match (Key::find(name), find_nearest(name, TOP_LEVEL_KEYS)) {
        (Some(_), _) => format!(
            "{name} belongs to a device: write it below a [[device]], or below [defaults] where it is for all"
        ),
        (None, Some(near)) => {
            format!("{name:?} is not known at the top: write {near}, which is the most similar one")
        }
        (None, None) => format!(
            "{name:?} is not known at the top: write control = \"PATH\", [defaults] or [[device]]"
        ),
    }
}
