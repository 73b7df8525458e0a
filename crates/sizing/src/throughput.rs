//! The throughput that is requested for a network device, as a share of the guest's vCPUs.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// The throughput that is requested for a network device. It says how many queue pairs the device
/// gets for the guest's vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Throughput {
    /// A queue pair for each vCPU.
    High,
    /// A queue pair for every two vCPUs, rounded up.
    Medium,
    /// One queue pair.
    Low,
}

/// Why a text is not a [`Throughput`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ThroughputParseError {
    /// The text is none of the three words.
    #[error("throughput {0:?} is not known: write high, medium or low")]
    Unknown(String),
}

impl ThroughputParseError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "throughput-unknown",
        }
    }
}

impl Throughput {
    /// The number of queue pairs for `vcpus` vCPUs, before any limit. It is at least 1.
    #[must_use]
    pub fn share_of(self, vcpus: u32) -> u32 {
        match self {
            Self::High => vcpus.max(1),
            Self::Medium => vcpus.div_ceil(2).max(1),
            Self::Low => 1,
        }
    }

    /// The share in words.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::High => "one for each vCPU",
            Self::Medium => "one for every two vCPUs",
            Self::Low => "one",
        }
    }
}

impl FromStr for Throughput {
    type Err = ThroughputParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "high" => Ok(Self::High),
            "medium" => Ok(Self::Medium),
            "low" => Ok(Self::Low),
            _ => Err(ThroughputParseError::Unknown(text.into())),
        }
    }
}

impl fmt::Display for Throughput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::High => "high",
            Self::Medium => "medium",
            Self::Low => "low",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_gives_its_share_of_the_vcpus() {
        for (text, shares) in [
            ("high", [1, 2, 3, 4, 5]),
            ("medium", [1, 1, 2, 2, 3]),
            ("low", [1, 1, 1, 1, 1]),
        ] {
            let throughput: Throughput = text.parse().unwrap();
            assert_eq!(throughput.to_string(), text);
            assert_eq!(serde_json::to_value(throughput).unwrap(), text);
            assert_eq!([1, 2, 3, 4, 5].map(|n| throughput.share_of(n)), shares);
            assert_eq!(throughput.share_of(0), 1);
        }
        assert_eq!(Throughput::Medium.share_of(u32::MAX), 1 << 31);
    }

    #[test]
    fn unknown_word_is_refused_with_the_words_to_write() {
        for text in ["", "High", "50%", "auto"] {
            let error = text.parse::<Throughput>().unwrap_err().to_string();
            assert_eq!(
                error,
                format!("throughput {text:?} is not known: write high, medium or low")
            );
        }
    }
}
