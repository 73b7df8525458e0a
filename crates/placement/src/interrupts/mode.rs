//! Whether interrupts and masks are set at all.

use std::fmt;
use std::str::FromStr;

/// What happens to interrupts and masks: the value of `--irq-affinity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IrqAffinity {
    /// They are set, and restored at the end.
    Apply,
    /// They are not set; the log says how they would be set.
    Print,
    /// Nothing is set or logged, because the administrator owns the host's masks and a NIC's
    /// interrupts serve other interfaces too.
    #[default]
    Off,
}

/// Why a text is not an [`IrqAffinity`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IrqAffinityError {
    /// It names none of the modes.
    #[error("there is no interrupt affinity mode {0:?}: use apply, print or off")]
    Unknown(String),
}

impl IrqAffinityError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "irq-affinity-unknown",
        }
    }
}

impl FromStr for IrqAffinity {
    type Err = IrqAffinityError;

    /// An empty text is the default.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" => Ok(Self::default()),
            "apply" => Ok(Self::Apply),
            "print" => Ok(Self::Print),
            "off" => Ok(Self::Off),
            _ => Err(IrqAffinityError::Unknown(text.into())),
        }
    }
}

impl fmt::Display for IrqAffinity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Apply => "apply",
            Self::Print => "print",
            Self::Off => "off",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_parsed_and_unknown_ones_refused() {
        for (text, mode) in [
            ("apply", IrqAffinity::Apply),
            ("print", IrqAffinity::Print),
            ("off", IrqAffinity::Off),
        ] {
            assert_eq!(text.parse(), Ok(mode));
            assert_eq!(mode.to_string(), text);
        }
        assert_eq!("".parse(), Ok(IrqAffinity::Off));
        assert_eq!(
            "on".parse::<IrqAffinity>().unwrap_err().to_string(),
            "there is no interrupt affinity mode \"on\": use apply, print or off"
        );
    }
}
