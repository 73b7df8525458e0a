//! The problems of a configuration. Every problem has a stable code, and a message of one sentence
//! that says what to do.

use std::fmt;
use std::path::Path;
use std::rc::Rc;

/// The kind of a problem. The code of a kind stays the same in later versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProblemCode {
    /// The configuration file cannot be read.
    FileUnreadable,
    /// The configuration file is not TOML in UTF-8.
    SyntaxInvalid,
    /// A key does not exist.
    KeyUnknown,
    /// A key has no value.
    ValueMissing,
    /// A key is given twice.
    KeyRepeated,
    /// A key or a table is in a place where it cannot be.
    KeyMisplaced,
    /// The value of a key has the wrong kind, such as a number for a text.
    KindWrong,
    /// The value of a key cannot be used.
    ValueInvalid,
    /// Keys are given that exclude each other.
    KeysConflict,
    /// A key has no effect because of the other keys.
    KeyUnused,
    /// No device is described.
    DeviceMissing,
    /// Two descriptions on the command line name the same device.
    DeviceRepeated,
    /// A device has no socket.
    SocketMissing,
    /// A device has no uplink.
    UplinkMissing,
    /// The number of queue pairs depends on the number of vCPUs, which is not given.
    VcpusMissing,
    /// A resource is given to two devices.
    ResourceShared,
    /// A device that is added later would use something that is not allowed.
    NotAllowed,
}

impl ProblemCode {
    /// The code for programs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FileUnreadable => "file-unreadable",
            Self::SyntaxInvalid => "syntax-invalid",
            Self::KeyUnknown => "key-unknown",
            Self::ValueMissing => "value-missing",
            Self::KeyRepeated => "key-repeated",
            Self::KeyMisplaced => "key-misplaced",
            Self::KindWrong => "kind-wrong",
            Self::ValueInvalid => "value-invalid",
            Self::KeysConflict => "keys-conflict",
            Self::KeyUnused => "key-unused",
            Self::DeviceMissing => "device-missing",
            Self::DeviceRepeated => "device-repeated",
            Self::SocketMissing => "socket-missing",
            Self::UplinkMissing => "uplink-missing",
            Self::VcpusMissing => "vcpus-missing",
            Self::ResourceShared => "resource-shared",
            Self::NotAllowed => "not-allowed",
        }
    }
}

/// One problem of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file and the line in it, counted from 1; `None` for a problem of the command line.
    line: Option<(Rc<Path>, usize)>,
    code: ProblemCode,
    message: String,
}

impl Problem {
    /// A problem of the command line.
    #[must_use]
    pub(crate) fn new(code: ProblemCode, message: String) -> Self {
        let line = None;
        Self {
            line,
            code,
            message,
        }
    }

    /// A problem of a line of a file.
    #[must_use]
    pub(crate) fn in_line(
        path: &Rc<Path>,
        line: usize,
        code: ProblemCode,
        message: String,
    ) -> Self {
        let line = Some((Rc::clone(path), line));
        Self {
            line,
            code,
            message,
        }
    }

    /// The kind of the problem, as a stable name for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.code.as_str()
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((path, line)) = &self.line {
            write!(f, "{}:{line}: ", path.display())?;
        }
        f.write_str(&self.message)
    }
}

/// The problems found so far.
#[derive(Debug, Default)]
pub(crate) struct Problems(Vec<Problem>);

impl Problems {
    /// Adds `problem`.
    pub(crate) fn add(&mut self, problem: Problem) {
        self.0.push(problem);
    }

    /// Returns the value of `result`, or adds its problem and returns `None`.
    pub(crate) fn record<T>(&mut self, result: Result<T, Problem>) -> Option<T> {
        result.map_err(|problem| self.add(problem)).ok()
    }

    /// Succeeds when there is no problem.
    ///
    /// # Errors
    /// All problems, each one once: those of the command line first, then the others by line.
    pub(crate) fn into_result(mut self) -> Result<(), ConfigError> {
        self.0.sort_by(|a, b| a.line.cmp(&b.line));
        let mut found: Vec<Problem> = Vec::new();
        for problem in self.0 {
            if !found.contains(&problem) {
                found.push(problem);
            }
        }
        match found.is_empty() {
            true => Ok(()),
            false => Err(ConfigError(found)),
        }
    }
}

/// The error of a configuration that cannot be used. It has at least one problem, and is displayed
/// with one line for each problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(Vec<Problem>);

impl ConfigError {
    /// The problems: those of the command line first, then the others by line.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }
}

impl ConfigError {
    /// The error of a configuration whose problems were not recorded.
    pub(crate) fn unknown() -> Self {
        let message = "the configuration cannot be used".into();
        Self(vec![Problem::new(ProblemCode::ValueInvalid, message)])
    }
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if at == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_reported_in_order_and_once() {
        let path: Rc<Path> = Path::new("f").into();
        let code = ProblemCode::KeyUnknown;
        let mut problems = Problems::default();
        for line in [12, 3, 12] {
            problems.add(Problem::in_line(&path, line, code, format!("x{line}")));
        }
        assert_eq!(
            problems.record(Err::<(), _>(Problem::new(code, "y".into()))),
            None
        );
        assert_eq!(problems.record(Ok(1)), Some(1));
        let error = problems.into_result().unwrap_err();
        assert_eq!(error.to_string(), "y\nf:3: x3\nf:12: x12");
        assert_eq!(error.problems().count(), 3);
        assert!(
            error
                .problems()
                .all(|problem| problem.code() == "key-unknown")
        );
        assert_eq!(Problems::default().into_result(), Ok(()));
    }
}
