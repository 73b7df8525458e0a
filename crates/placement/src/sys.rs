//! The system calls that std does not offer: thread affinity with masks of any size, the NUMA node
//! of memory, and a connect that does not block. All unsafe code of the crate is in this file.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_ulong};
use std::io;
use std::mem::{size_of, size_of_val};
use std::ptr;

use crate::cpuset::{CpuSet, MAX_CPU};

/// The number of words of a mask for 1,024 CPUs, which is glibc's fixed size and is enough on
/// nearly every host.
const USUAL_WORDS: usize = 128 / size_of::<c_ulong>();
const BITS: u32 = c_ulong::BITS;
/// The highest NUMA node of any Linux build.
const MAX_NODE: u32 = 1023;
/// The flags of get_mempolicy(2) from linux/mempolicy.h: return a node instead of a policy, and
/// return that of the page at the address.
const MPOL_F_NODE: c_ulong = 1 << 0;
const MPOL_F_ADDR: c_ulong = 1 << 1;

/// Lets thread `tid` (0: the calling thread) run on `cpus` only.
// syscalls: sched_setaffinity
pub(crate) fn set_affinity(tid: i32, cpus: &CpuSet) -> io::Result<()> {
    let mask = to_mask(cpus);
    // SAFETY: the pointer and the length describe `mask`, which outlives the
    // call and is aligned as cpu_set_t (an array of c_ulong); it is only read.
    let rc =
        unsafe { libc::sched_setaffinity(tid, size_of_val(mask.as_slice()), mask.as_ptr().cast()) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A thread's affinity as the kernel stores it, which is cheap to read and to compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AffinityMask(Vec<c_ulong>);

/// The CPUs that thread `tid` (0: the calling thread) may run on.
pub(crate) fn get_affinity(tid: i32) -> io::Result<CpuSet> {
    get_mask(tid).map(|mask| from_mask(&mask.0))
}

/// The affinity of thread `tid` (0: the calling thread) as an [`AffinityMask`].
// syscalls: sched_getaffinity
pub(crate) fn get_mask(tid: i32) -> io::Result<AffinityMask> {
    let mut words = USUAL_WORDS;
    loop {
        let mut mask: Vec<c_ulong> = vec![0; words];
        // SAFETY: the pointer and the length describe `mask`, which is alive, aligned as cpu_set_t
        // and not borrowed elsewhere during the call.
        let rc = unsafe {
            libc::sched_getaffinity(tid, size_of_val(mask.as_slice()), mask.as_mut_ptr().cast())
        };
        if rc == 0 {
            return Ok(AffinityMask(mask));
        }
        let error = io::Error::last_os_error();
        // EINVAL means that the kernel supports more CPUs than the mask has bits.
        let longest = MAX_CPU.div_ceil(BITS);
        let can_grow = u32::try_from(words).is_ok_and(|words| words < longest);
        if error.raw_os_error() != Some(libc::EINVAL) || !can_grow {
            return Err(error);
        }
        words *= 2;
    }
}

/// The NUMA node of the page at `address`.
// syscalls: get_mempolicy
pub(crate) fn node_of_address(address: usize) -> io::Result<u32> {
    let mut node: c_int = -1;
    // SAFETY: the kernel writes to `node` alone, a c_int that outlives the call, because the
    // pointer to the mask is null. It only looks `address` up, and returns EFAULT where nothing is
    // mapped.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            ptr::from_mut(&mut node),
            ptr::null_mut::<c_ulong>(),
            0 as c_ulong,
            address,
            MPOL_F_NODE | MPOL_F_ADDR,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(node).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The scheduling policy and parameters of thread `tid` (0: the calling thread).
pub(crate) fn scheduling(tid: i32) -> io::Result<libc::sched_attr> {
    // SAFETY: the structure consists of integers, for all of which zero is valid.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes no more than the given size to `attributes`, which outlives the call.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            tid,
            ptr::from_mut(&mut attributes),
            size_of::<libc::sched_attr>(),
            0,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(attributes)
}

/// Sets the scheduling policy and parameters of thread `tid` (0: the calling thread) to `attributes`,
/// which [`scheduling`] has returned.
pub(crate) fn set_scheduling(tid: i32, attributes: &libc::sched_attr) -> io::Result<()> {
    let mut attributes = *attributes;
    attributes.size = u32::try_from(size_of::<libc::sched_attr>()).unwrap_or(0);
    // SAFETY: the kernel reads as many bytes of `attributes` as its field `size` says, which is its
    // length; it outlives the call.
    let rc = unsafe { libc::syscall(libc::SYS_sched_setattr, tid, ptr::from_ref(&attributes), 0) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the NUMA node that the calling thread allocates memory from; `None`: the node it runs on.
// syscalls: set_mempolicy
pub(crate) fn prefer_node(node: Option<u32>) -> io::Result<()> {
    let mask: Vec<c_ulong> = match node {
        Some(node) if node > MAX_NODE => return Err(io::ErrorKind::InvalidInput.into()),
        Some(node) => to_mask(&CpuSet::from_iter([node])),
        None => Vec::new(),
    };
    let mode = match node {
        Some(_) => libc::MPOL_PREFERRED,
        None => libc::MPOL_DEFAULT,
    };
    // The kernel reads one bit less than this argument says.
    let bits = size_of_val(mask.as_slice()) * 8 + 1;
    let mask_ptr = match node {
        Some(_) => mask.as_ptr(),
        None => ptr::null(),
    };
    // SAFETY: the pointer and the length describe `mask`, which outlives the call and is only read;
    // for the default policy the pointer is null, as the call requires.
    let rc = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask_ptr, bits) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The shortest mask that holds the highest CPU, of at least one word.
fn to_mask(cpus: &CpuSet) -> Vec<c_ulong> {
    let highest = cpus.last().unwrap_or(0);
    let mut mask = vec![0; index(highest) + 1];
    for cpu in cpus.iter() {
        if let Some(word) = mask.get_mut(index(cpu)) {
            *word |= 1 << (cpu % BITS);
        }
    }
    mask
}

fn from_mask(mask: &[c_ulong]) -> CpuSet {
    let bits = |word: c_ulong| (0..BITS).filter(move |bit| word >> bit & 1 == 1);
    let words = (0u32..).map(|at| at * BITS).zip(mask);
    words
        .flat_map(|(base, word)| bits(*word).map(move |bit| base + bit))
        .collect()
}

fn index(cpu: u32) -> usize {
    usize::try_from(cpu / BITS).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_hold_cpus_above_1023() {
        for list in ["0", "63-64", "0,1023-1025,4095", "65535"] {
            let cpus: CpuSet = list.parse().unwrap();
            assert_eq!(from_mask(&to_mask(&cpus)), cpus);
        }
        assert_eq!(to_mask(&CpuSet::default()).len(), 1);
    }
}
