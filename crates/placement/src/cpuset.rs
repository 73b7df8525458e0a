//! Sets of CPUs in the kernel's CPU list format.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// The highest CPU number that is accepted. It is above the limit of any Linux build, and low
/// enough that a mistyped range cannot exhaust memory.
pub const MAX_CPU: u32 = 65_535;

/// A set of host CPU numbers, parsed from and displayed as a CPU list such as `0-3,8`.
///
/// The empty set is displayed as the empty string, as the kernel writes it.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct CpuSet(BTreeSet<u32>);

/// Why a text is not a CPU list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuListError {
    /// An element is neither a number nor a range.
    #[error(
        "{element:?} in the CPU list {list:?} is not a CPU or a range: write a list such as 0-3,8"
    )]
    Element {
        /// The element.
        element: String,
        /// The whole list.
        list: String,
    },
    /// The end of a range is below its start.
    #[error(
        "the range {element:?} in the CPU list {list:?} runs backwards: write the lower CPU first"
    )]
    Backwards {
        /// The range.
        element: String,
        /// The whole list.
        list: String,
    },
    /// A CPU number is above [`MAX_CPU`].
    #[error("CPU {cpu} in the CPU list {list:?} is above {MAX_CPU}: name a CPU that this host has")]
    TooHigh {
        /// The CPU number.
        cpu: u32,
        /// The whole list.
        list: String,
    },
}

impl CpuListError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Element { .. } => "cpu-list-element-invalid",
            Self::Backwards { .. } => "cpu-list-range-backwards",
            Self::TooHigh { .. } => "cpu-number-too-high",
        }
    }
}

impl CpuSet {
    /// Adds `cpu`.
    pub fn insert(&mut self, cpu: u32) {
        self.0.insert(cpu);
    }

    /// Whether `cpu` is in the set.
    #[must_use]
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.contains(&cpu)
    }

    /// The number of CPUs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no CPU in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The CPUs in rising order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// The highest CPU.
    #[must_use]
    pub fn last(&self) -> Option<u32> {
        self.0.last().copied()
    }

    /// The CPUs that are in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        Self(&self.0 & &other.0)
    }

    /// The CPUs of this set that are not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        Self(&self.0 - &other.0)
    }

    /// The set of the `turn`-th CPU alone, counted from 0 and starting again at the end; empty only
    /// if this set is empty.
    #[must_use]
    pub fn nth_cyclic(&self, turn: u32) -> Self {
        let turn = usize::try_from(turn).unwrap_or(usize::MAX);
        let at = turn.checked_rem(self.len()).unwrap_or(0);
        self.iter().skip(at).take(1).collect()
    }

    /// The set as words of a message: `CPU 0`, `CPUs 0-3,8`, `no CPU`.
    #[must_use]
    pub fn describe(&self) -> String {
        match self.len() {
            0 => String::from("no CPU"),
            1 => format!("CPU {self}"),
            _ => format!("CPUs {self}"),
        }
    }
}

/// Parses a CPU list and keeps the order in which the CPUs are written.
///
/// Accepts the numeric forms of Linux's `bitmap_parselist`, separated by commas: `N`, `A-B` and
/// `A-B:USED/GROUP` (the first USED CPUs of every GROUP). An empty text is an empty list.
///
/// # Errors
///
/// [`CpuListError`] names the first element that is invalid.
pub fn parse_cpulist(list: &str) -> Result<Vec<u32>, CpuListError> {
    let list = list.trim();
    let mut cpus = Vec::new();
    if !list.is_empty() {
        for element in list.split(',') {
            parse_element(element.trim(), list, &mut cpus)?;
        }
    }
    Ok(cpus)
}

fn parse_element(element: &str, list: &str, cpus: &mut Vec<u32>) -> Result<(), CpuListError> {
    let invalid = || CpuListError::Element {
        element: element.into(),
        list: list.into(),
    };
    let (range, group) = match element.split_once(':') {
        Some((range, group)) => (range, parse_group(group).ok_or_else(invalid)?),
        None => (element, (1, 1)),
    };
    let (first, last) = match range.split_once('-') {
        Some((first, last)) => (
            parse_decimal(first).ok_or_else(invalid)?,
            parse_decimal(last).ok_or_else(invalid)?,
        ),
        None if range == element => parse_decimal(range)
            .map(|cpu| (cpu, cpu))
            .ok_or_else(invalid)?,
        None => return Err(invalid()),
    };
    if last < first {
        return Err(CpuListError::Backwards {
            element: element.into(),
            list: list.into(),
        });
    }
    if last > MAX_CPU {
        return Err(CpuListError::TooHigh {
            cpu: last,
            list: list.into(),
        });
    }
    let (used, size) = group;
    cpus.extend((first..=last).filter(|cpu| (cpu - first) % size < used));
    Ok(())
}

/// `USED/GROUP`, with 0 < USED <= GROUP.
fn parse_group(text: &str) -> Option<(u32, u32)> {
    let (used, size) = text.split_once('/')?;
    let (used, size) = (parse_decimal(used)?, parse_decimal(size)?);
    (0 < used && used <= size).then_some((used, size))
}

/// A number of decimal digits alone; `u32::from_str` would accept `+3` too.
pub(crate) fn parse_decimal(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

impl FromStr for CpuSet {
    type Err = CpuListError;

    fn from_str(list: &str) -> Result<Self, Self::Err> {
        parse_cpulist(list).map(Self::from_iter)
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> Self {
        Self(cpus.into_iter().collect())
    }
}

impl Extend<u32> for CpuSet {
    fn extend<I: IntoIterator<Item = u32>>(&mut self, cpus: I) {
        self.0.extend(cpus);
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.iter().peekable();
        let mut comma = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while let Some(next) = cpus.next_if(|&next| Some(next) == last.checked_add(1)) {
                last = next;
            }
            match last == first {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuSet({self})")
    }
}

impl Serialize for CpuSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_parsed_and_displayed() {
        for (text, cpus, written) in [
            ("", vec![], ""),
            ("0", vec![0], "0"),
            ("0-3,8", vec![0, 1, 2, 3, 8], "0-3,8"),
            ("0-3,8\n", vec![0, 1, 2, 3, 8], "0-3,8"),
            ("8,0-1", vec![8, 0, 1], "0-1,8"),
            ("1,2, 3", vec![1, 2, 3], "1-3"),
            ("0-7:1/2", vec![0, 2, 4, 6], "0,2,4,6"),
            ("4-9:2/4", vec![4, 5, 8, 9], "4-5,8-9"),
            ("2,2", vec![2, 2], "2"),
            ("65535", vec![65535], "65535"),
        ] {
            assert_eq!(parse_cpulist(text).unwrap(), cpus, "{text:?}");
            assert_eq!(
                text.parse::<CpuSet>().unwrap().to_string(),
                written,
                "{text:?}"
            );
        }
    }

    #[test]
    fn texts_that_are_no_cpu_list_are_refused() {
        for text in [
            "x",
            "1,",
            ",",
            "1,,2",
            "-1",
            "1-",
            "+1",
            "1-2-3",
            "0x1",
            "99999999999",
            "0-3:",
            "0-3:1",
            "0-3:0/2",
            "0-3:3/2",
            "0-3:1/0",
            "3:1/2",
        ] {
            let error = text.parse::<CpuSet>().unwrap_err();
            assert!(
                matches!(error, CpuListError::Element { .. }),
                "{text:?}: {error}"
            );
        }
        assert!(matches!(
            "3-1".parse::<CpuSet>(),
            Err(CpuListError::Backwards { .. })
        ));
        assert_eq!(
            "0-4000000000".parse::<CpuSet>().unwrap_err().to_string(),
            "CPU 4000000000 in the CPU list \"0-4000000000\" is above 65535: name a CPU that this host has"
        );
    }

    #[test]
    fn nth_cpu_starts_again_at_the_end() {
        let cpus: CpuSet = "1,4-5".parse().unwrap();
        let turns: Vec<_> = (0..5)
            .map(|turn| cpus.nth_cyclic(turn).to_string())
            .collect();
        assert_eq!(turns, ["1", "4", "5", "1", "4"]);
        assert!(CpuSet::default().nth_cyclic(3).is_empty());
    }

    #[test]
    fn sets_are_subtracted_and_extended() {
        let set = |list: &str| list.parse::<CpuSet>().unwrap();
        assert_eq!(set("0-3").difference(&set("1,5")), set("0,2-3"));
        let mut joined = set("0");
        joined.extend(set("2-3").iter());
        assert_eq!(joined, set("0,2-3"));
    }

    #[test]
    fn description_is_singular_for_one_cpu() {
        for (text, words) in [("", "no CPU"), ("7", "CPU 7"), ("0-1", "CPUs 0-1")] {
            assert_eq!(text.parse::<CpuSet>().unwrap().describe(), words);
        }
    }
}
