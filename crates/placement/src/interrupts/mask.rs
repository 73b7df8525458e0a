//! The kernel's CPU masks: groups of 32 bits in hexadecimal, the highest group first.

use crate::cpuset::{CpuSet, MAX_CPU};

/// Bits of a group.
const GROUP_BITS: u32 = 32;

/// `cpus` as a mask in the kernel's form, such as `3` or `1,00000000`.
#[must_use]
pub fn format_mask(cpus: &CpuSet) -> String {
    let highest = cpus.last().unwrap_or(0) / GROUP_BITS;
    let mut text = String::new();
    for group in (0..=highest).rev() {
        let bits = (0..GROUP_BITS)
            .filter(|bit| cpus.contains(group * GROUP_BITS + bit))
            .fold(0_u32, |bits, bit| bits | 1 << bit);
        text += &match group == highest {
            true => format!("{bits:x}"),
            false => format!(",{bits:08x}"),
        };
    }
    text
}

/// The CPUs of a mask in the kernel's form; `None` where the text is not a mask.
#[must_use]
pub fn parse_mask(text: &str) -> Option<CpuSet> {
    let mut cpus = CpuSet::default();
    let mut base = 0_u32;
    for group in text.trim().rsplit(',') {
        if group.is_empty() || !group.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let bits = u32::from_str_radix(group, 16).ok()?;
        for bit in (0..GROUP_BITS).filter(|bit| bits >> bit & 1 == 1) {
            cpus.insert(base + bit);
        }
        base = base
            .checked_add(GROUP_BITS)
            .filter(|base| *base <= MAX_CPU)?;
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_formatted_and_parsed() {
        for (list, text) in [
            ("", "0"),
            ("0", "1"),
            ("0-1", "3"),
            ("31", "80000000"),
            ("32", "1,00000000"),
            ("0,33,127", "80000000,00000000,00000002,00000001"),
        ] {
            let cpus: CpuSet = list.parse().unwrap();
            assert_eq!(format_mask(&cpus), text);
            assert_eq!(parse_mask(text), Some(cpus));
        }
        assert_eq!(
            parse_mask("00000000,00000003\n"),
            Some("0-1".parse().unwrap())
        );
        for text in ["", "x", "1,", "1,,2", "100000000", "+1"] {
            assert_eq!(parse_mask(text), None, "{text:?}");
        }
    }
}
