//! The configuration file (TOML), read as a whole, with the line of each value.
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

use crate::keys::{Key, ValueKind, find_nearest};
use crate::problem::{Problem, ProblemCode, Problems};
use crate::settings::{Origin, SettingValue, Settings};

/// The maximum size of a file in bytes. A file with hundreds of devices has a tenth of it.
const MAX_FILE_SIZE: u64 = 1 << 20;
/// The number of characters of a line that a problem shows.
const MAX_SHOWN_CHARS: usize = 80;

/// The tables at the top level of a file.
const TABLES: [&str; 2] = [DEFAULTS, DEVICE];
/// The table of the settings that devices have in common.
const DEFAULTS: &str = "defaults";
/// The list of tables of which each one describes a device.
const DEVICE: &str = "device";

/// The content of a file.
#[derive(Debug, Default)]
pub(crate) struct ConfigFile {
    /// The settings of the whole process.
    pub process: Settings,
    /// The settings of devices that do not set these keys themselves.
    pub defaults: Settings,
    /// The devices, each with the line where it begins.
    pub devices: Vec<(Origin, Settings)>,
    /// Whether the file has no syntax errors. Where it has some, devices and keys may be missing
    /// because of them.
    pub is_complete: bool,
}

/// Reads the file at `path`, and adds its problems to `problems`.
#[must_use]
pub(crate) fn read(path: &Path, problems: &mut Problems) -> ConfigFile {
    match read_bounded(path).map(String::from_utf8) {
        Ok(Ok(text)) => parse(path, &text, problems),
        Ok(Err(error)) => {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
            problems.add(Problem::in_line(
                &path.into(),
                line,
                ProblemCode::SyntaxInvalid,
                "the file is not UTF-8 text: save it as UTF-8".into(),
            ));
            ConfigFile::default()
        }
        Err(error) => {
            problems.add(Problem::new(
                ProblemCode::FileUnreadable,
                format!(
                    "cannot read {}: {error}; name a configuration file that exists and that this \
                     user may read",
                    path.display()
                ),
            ));
            ConfigFile::default()
        }
    }
}

/// The bytes of the file at `path`; an error where it is too large, such as an endless device file.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path)?;
    file.take(MAX_FILE_SIZE + 1).read_to_end(&mut bytes)?;
    match u64::try_from(bytes.len()) {
        Ok(..=MAX_FILE_SIZE) => Ok(bytes),
        _ => Err(io::Error::other("it is larger than 1 MiB")),
    }
}

/// Parses `text`, the content of the file at `path`, and adds its problems to `problems`.
fn parse(path: &Path, text: &str, problems: &mut Problems) -> ConfigFile {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader {
        path: path.into(),
        text,
        unreadable_lines: Vec::new(),
        problems,
        file: ConfigFile::default(),
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
    /// The lines with syntax errors, for which no further problem is reported.
    unreadable_lines: Vec<usize>,
    problems: &'a mut Problems,
    file: ConfigFile,
}

impl Reader<'_> {
    fn report_syntax_error(&mut self, error: &toml::de::Error) {
        let span = error.span().unwrap_or(0..0);
        let line = self.line(&span);
        if self.unreadable_lines.contains(&line) {
            return;
        }
        self.unreadable_lines.push(line);
        let shown = |text: &str| {
            text.trim()
                .chars()
                .take(MAX_SHOWN_CHARS)
                .collect::<String>()
        };
        let what = shown(self.text.get(span).unwrap_or_default());
        let content = shown(self.text.lines().nth(line - 1).unwrap_or_default());
        let message = match error.message() {
            "duplicate key" => {
                self.problems.add(Problem::in_line(
                    &self.path,
                    line,
                    ProblemCode::KeyRepeated,
                    format!("{what} is given twice: keep one of them"),
                ));
                return;
            }
            why if why.starts_with("string values") || why.starts_with("invalid boolean") => {
                format!(
                    "`{content}` has a value that cannot be read: write a text in quotes, and a \
                     number, true or false without quotes"
                )
            }
            why => format!("`{content}` is not TOML ({why}): write KEY = VALUE or [TABLE]"),
        };
        self.problems.add(Problem::in_line(
            &self.path,
            line,
            ProblemCode::SyntaxInvalid,
            message,
        ));
    }

    fn read_top_level(&mut self, table: DeTable<'_>) {
        for (key, value) in table {
            let origin = self.origin(&key.span());
            let line = self.readable_line(&key, &value);
            match (key.get_ref().as_ref(), value.into_inner()) {
                (DEFAULTS, DeValue::Table(table)) => {
                    self.file.defaults = self.read_settings(table, true);
                }
                (DEFAULTS, _) => {
                    let message = "defaults is a table: write [defaults]".into();
                    self.add_problem(line, ProblemCode::KeyMisplaced, message);
                }
                (DEVICE, DeValue::Array(tables)) => {
                    for table in tables {
                        self.read_device(table);
                    }
                }
                (DEVICE, _) => {
                    let message = "each device is a table of its own in a list: write [[device]]";
                    self.add_problem(line, ProblemCode::KeyMisplaced, message.into());
                }
                (name, value) => self.read_process_key(name, &value, line, &origin),
            }
        }
    }

    /// Reads a key of the whole process.
    fn read_process_key(
        &mut self,
        name: &str,
        value: &DeValue<'_>,
        line: Option<usize>,
        origin: &Origin,
    ) {
        let Some(key) = Key::of_process().find(|key| key.name == name) else {
            let (code, message) = unknown_top_level_message(name);
            self.add_problem(line, code, message);
            return;
        };
        match flag_text(key.kind, value) {
            Some(text) => {
                _ = self
                    .file
                    .process
                    .insert(key, SettingValue::new(text, origin))
            }
            None => self.add_problem(
                line,
                ProblemCode::KindWrong,
                wrong_kind_message(key.name, key.kind, value),
            ),
        }
    }

    fn read_device(&mut self, table: Spanned<DeValue<'_>>) {
        let origin = self.origin(&table.span());
        match table.into_inner() {
            DeValue::Table(table) => {
                let settings = self.read_settings(table, false);
                self.file.devices.push((origin, settings));
            }
            _ => self.problems.add(origin.problem(
                ProblemCode::KeyMisplaced,
                format_args!(
                    "each device is a table of its own: write [[device]], and its keys below"
                ),
            )),
        }
    }

    fn read_settings(&mut self, table: DeTable<'_>, is_common: bool) -> Settings {
        let mut settings = Settings::default();
        for (name, value) in table {
            let origin = self.origin(&name.span());
            let line = self.readable_line(&name, &value);
            let name = name.get_ref().as_ref();
            let Some(key) = Key::find(name) else {
                self.add_problem(line, ProblemCode::KeyUnknown, unknown_key_message(name));
                continue;
            };
            if is_common && !key.is_common() {
                let message = format!("{name} describes one device: write it below its [[device]]");
                self.add_problem(line, ProblemCode::KeyMisplaced, message);
            } else if let Some(text) = flag_text(key.kind, value.get_ref()) {
                settings.insert(key, SettingValue::new(text, &origin));
            } else {
                let message = wrong_kind_message(name, key.kind, value.get_ref());
                self.add_problem(line, ProblemCode::KindWrong, message);
            }
        }
        settings
    }

    /// The line of `key`, for a problem of the key. `None` where the line of the key or of its
    /// value has a syntax error, which is reported already.
    fn readable_line<K, V>(&self, key: &Spanned<K>, value: &Spanned<V>) -> Option<usize> {
        let lines = [self.line(&key.span()), self.line(&value.span())];
        let has_error = lines
            .iter()
            .any(|line| self.unreadable_lines.contains(line));
        (!has_error).then_some(lines[0])
    }

    fn add_problem(&mut self, line: Option<usize>, code: ProblemCode, message: String) {
        if let Some(line) = line {
            self.problems
                .add(Problem::in_line(&self.path, line, code, message));
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
        (
            ValueKind::Text | ValueKind::Path | ValueKind::NumberOrWord | ValueKind::Octal,
            DeValue::String(text),
        ) => Some(text.to_string()),
        (ValueKind::Number | ValueKind::NumberOrWord, DeValue::Integer(number))
            if number.radix() == 10 =>
        {
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
    match find_nearest(name, Key::of_devices().map(|key| key.name)) {
        Some(nearest) => {
            format!("the key {name:?} is not known: write {nearest}, which is the most similar one")
        }
        None => format!("the key {name:?} is not known: use {}", Key::names()),
    }
}

fn unknown_top_level_message(name: &str) -> (ProblemCode, String) {
    if Key::find(name).is_some() {
        let message = format!(
            "{name} belongs to a device: write it below a [[device]], or below [defaults] where it \
             is for all"
        );
        return (ProblemCode::KeyMisplaced, message);
    }
    let known = Key::of_process().map(|key| key.name).chain(TABLES);
    let message = match find_nearest(name, known) {
        Some(nearest) => format!(
            "{name:?} is not known at the top: write {nearest}, which is the most similar one"
        ),
        None => format!(
            "{name:?} is not known at the top: write control = \"PATH\", [defaults] or [[device]]"
        ),
    };
    (ProblemCode::KeyUnknown, message)
}
