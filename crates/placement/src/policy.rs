//! The placement policies that a user can choose.

use std::fmt;
use std::str::FromStr;

use crate::cpuset::{CpuListError, parse_cpulist};

/// How a worker's CPU is chosen: the value of `--placement`.
///
/// It is written as `auto`, `same`, `sibling`, `core-near`, `none`, `list:CPUS`, CPUS alone (the
/// same as `list:CPUS`), or `list` alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Placement {
    /// If the vCPU's thread is pinned, the worker gets its CPU, or a CPU near it if the worker
    /// polls. If the thread floats, the worker floats over the same CPUs, or gets one of them for
    /// itself if it polls.
    #[default]
    Auto,
    /// The worker gets exactly the CPUs that the vCPU's thread may run on, whether it is pinned or
    /// not.
    Same,
    /// The worker gets the SMT sibling of the CPU that the vCPU's thread is pinned to.
    Sibling,
    /// The worker gets a CPU near the one that the vCPU's thread is pinned to: one that shares its
    /// L3 cache, else one of its NUMA node, and none that a vCPU is pinned to.
    CoreNear,
    /// Worker k gets the k-th CPU in the order written, starting again at the end. An empty list
    /// (written `list`) means all allowed CPUs.
    List(Vec<u32>),
    /// The workers get all allowed CPUs, and the scheduler moves them.
    None,
}

/// Why a text is not a [`Placement`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementParseError {
    /// It names none of the policies.
    #[error(
        "placement {0:?} is not known: write auto, same, sibling, core-near, none or list:CPUS, such as list:0-3,8"
    )]
    Unknown(String),
    /// No CPU follows `list:`.
    #[error(
        "placement {0:?} names no CPU: write list:CPUS, such as list:0-3,8, or list for all allowed CPUs"
    )]
    NoCpu(String),
    /// The list is not a CPU list.
    #[error(transparent)]
    List(#[from] CpuListError),
}

impl PlacementParseError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "placement-unknown",
            Self::NoCpu(_) => "placement-list-empty",
            Self::List(error) => error.code(),
        }
    }
}

impl Placement {
    /// Whether the policy depends on the CPUs that the vCPUs' threads may run on.
    #[must_use]
    pub fn follows_vcpus(&self) -> bool {
        !matches!(self, Self::List(_) | Self::None)
    }
}

impl FromStr for Placement {
    type Err = PlacementParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => return Ok(Self::Auto),
            "same" => return Ok(Self::Same),
            "sibling" => return Ok(Self::Sibling),
            "core-near" => return Ok(Self::CoreNear),
            "none" => return Ok(Self::None),
            "list" => return Ok(Self::List(Vec::new())),
            _ => {}
        }
        let list = match text.strip_prefix("list:") {
            Some(list) => list,
            None if text.starts_with(|c: char| c.is_ascii_digit()) => text,
            None => return Err(PlacementParseError::Unknown(text.into())),
        };
        match parse_cpulist(list)? {
            cpus if cpus.is_empty() => Err(PlacementParseError::NoCpu(text.into())),
            cpus => Ok(Self::List(cpus)),
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Same => f.write_str("same"),
            Self::Sibling => f.write_str("sibling"),
            Self::CoreNear => f.write_str("core-near"),
            Self::None => f.write_str("none"),
            Self::List(cpus) => {
                f.write_str("list")?;
                for (at, cpu) in cpus.iter().enumerate() {
                    write!(f, "{}{cpu}", if at == 0 { ":" } else { "," })?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_is_parsed_and_displayed() {
        for (text, placement) in [
            ("auto", Placement::Auto),
            ("same", Placement::Same),
            ("sibling", Placement::Sibling),
            ("core-near", Placement::CoreNear),
            ("none", Placement::None),
            ("list", Placement::List(vec![])),
            ("list:0-3,8", Placement::List(vec![0, 1, 2, 3, 8])),
            ("list:3,1", Placement::List(vec![3, 1])),
            ("2,0", Placement::List(vec![2, 0])),
        ] {
            assert_eq!(text.parse::<Placement>().unwrap(), placement);
            assert_eq!(
                placement.to_string().parse::<Placement>().unwrap(),
                placement
            );
        }
        assert_eq!(Placement::default(), Placement::Auto);
    }

    #[test]
    fn refusal_names_the_value_and_what_to_write() {
        for (text, message) in [
            (
                "Auto",
                "placement \"Auto\" is not known: write auto, same, sibling, core-near, none or list:CPUS, such as list:0-3,8",
            ),
            (
                "",
                "placement \"\" is not known: write auto, same, sibling, core-near, none or list:CPUS, such as list:0-3,8",
            ),
            (
                "list:",
                "placement \"list:\" names no CPU: write list:CPUS, such as list:0-3,8, or list for all allowed CPUs",
            ),
            (
                "list:a",
                "\"a\" in the CPU list \"a\" is not a CPU or a range: write a list such as 0-3,8",
            ),
            (
                "3-1",
                "the range \"3-1\" in the CPU list \"3-1\" runs backwards: write the lower CPU first",
            ),
        ] {
            assert_eq!(text.parse::<Placement>().unwrap_err().to_string(), message);
        }
    }
}
