//! From lists of calls to programs for the kernel.
//!
//! A program compares the number of a call with those of its list, in ascending order; on x86_64
//! the calls of the data path have the lowest numbers. The kernel (Linux 5.11) also keeps a bitmap
//! of the calls that all filters of a thread allow whatever their arguments are, and runs no
//! program for those, so the data path's calls cost one look-up there.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use crate::Enforcement;
use crate::calls::{self, Arguments, Call};

/// Allows only `list`; another call fails with EPERM.
pub(crate) fn allow_only(
    list: &[Call],
    enforcement: Enforcement,
) -> Result<BpfProgram, BackendError> {
    let other = match enforcement {
        Enforcement::Deny => SeccompAction::Errno(errno(libc::EPERM)),
        Enforcement::Log => SeccompAction::Log,
    };
    compile(list, other, SeccompAction::Allow)
}

/// The filters for all threads: of calls that are never used, and one that makes the C library
/// start threads by clone(2), whose flags a filter can see, and not by clone3(2), where they lie in
/// memory.
pub(crate) fn process_wide(enforcement: Enforcement) -> Result<[BpfProgram; 2], BackendError> {
    let never_used = match enforcement {
        Enforcement::Deny => SeccompAction::KillProcess,
        Enforcement::Log => SeccompAction::Log,
    };
    let no_clone3 = SeccompAction::Errno(errno(libc::ENOSYS));
    Ok([
        compile(&calls::never_used(), SeccompAction::Allow, never_used)?,
        compile(&calls::clone3(), SeccompAction::Allow, no_clone3)?,
    ])
}

fn errno(number: i32) -> u32 {
    number.unsigned_abs()
}

fn compile(
    list: &[Call],
    other: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in list {
        let alternatives = alternatives(call.arguments)?;
        let is_new = !rules.contains_key(&call.number);
        let known = rules.entry(call.number).or_default();
        // No rule means any arguments, which includes those of every rule.
        match alternatives.is_empty() {
            true => known.clear(),
            false if is_new || !known.is_empty() => known.extend(alternatives),
            false => {}
        }
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, other, listed, arch)?.try_into()
}

/// The rules of which one must hold; empty if the arguments do not matter.
fn alternatives(arguments: Arguments) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |argument, operator, value: u32| {
        let length = SeccompCmpArgLen::Dword;
        let condition = SeccompCondition::new(argument, length, operator, u64::from(value))?;
        SeccompRule::new(vec![condition])
    };
    match arguments {
        Arguments::Any => Ok(Vec::new()),
        Arguments::OneOf(argument, values) => values
            .iter()
            .map(|value| rule(argument, SeccompCmpOp::Eq, *value))
            .collect(),
        Arguments::Bits {
            argument,
            mask,
            value,
        } => Ok(vec![rule(
            argument,
            SeccompCmpOp::MaskedEq(u64::from(mask)),
            value,
        )?]),
        Arguments::OwnProcess(argument) => {
            Ok(vec![rule(argument, SeccompCmpOp::Eq, std::process::id())?])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ThreadKind;

    #[test]
    fn every_list_compiles_to_a_program_that_the_kernel_takes() {
        // BPF_MAXINSNS of linux/bpf_common.h.
        let longest = 4096;
        for kind in ThreadKind::ALL {
            for enforcement in [Enforcement::Deny, Enforcement::Log] {
                let program = allow_only(&kind.calls(), enforcement).unwrap();
                assert!(program.len() < longest, "{kind}: {}", program.len());
            }
        }
        for program in process_wide(Enforcement::Deny).unwrap() {
            assert!(program.len() < longest, "{}", program.len());
        }
    }

    #[test]
    fn call_that_is_also_listed_with_any_arguments_has_no_condition() {
        let any = Call::new("read", libc::SYS_read, Arguments::Any);
        let some = Call::new("read", libc::SYS_read, Arguments::OneOf(0, &[1]));
        let compile = |list: &[Call]| {
            compile(list, SeccompAction::Allow, SeccompAction::KillProcess)
                .unwrap()
                .len()
        };
        let shortest = compile(&[any]);
        assert_eq!(compile(&[any, some]), shortest);
        assert_eq!(compile(&[some, any]), shortest);
        assert!(compile(&[some]) > shortest);
    }
}
