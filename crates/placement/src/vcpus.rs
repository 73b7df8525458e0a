//! The vCPU threads of a front-end.

use std::fmt;

use serde::Serialize;

use crate::cpuset::CpuSet;

/// One vCPU and the host thread that runs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Vcpu {
    /// The index in the front-end (QEMU's `cpu-index`).
    pub index: u32,
    /// The host thread id.
    pub tid: i32,
    /// The CPUs that the thread may run on; `None` where they cannot be read.
    pub cpus: Option<CpuSet>,
}

/// How the vCPU threads were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VcpuSource {
    /// By the names of the front-end's threads.
    ThreadNames,
    /// By its name, one thread that runs every vCPU (QEMU's single-threaded TCG). The number of
    /// vCPUs is not known, so the thread is listed as vCPU 0.
    SingleThread,
    /// By QEMU's answer to `query-cpus-fast`.
    Qmp,
    /// They were not found.
    Nowhere,
}

/// The vCPU threads of a front-end that could be found.
///
/// It displays as one line for the log. Equal maps lead to equal decisions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VcpuMap {
    /// The vCPUs, sorted by index.
    pub vcpus: Vec<Vcpu>,
    /// How they were found.
    pub source: VcpuSource,
    /// Errors of the search, each with what to do about it.
    pub notes: Vec<String>,
}

impl VcpuMap {
    /// Whether there are several vCPUs and all may run on the same several CPUs. Such a guest was
    /// confined as a whole, and none of its vCPUs is pinned.
    pub(crate) fn is_floating_together(&self) -> bool {
        let Some((
            Vcpu {
                cpus: Some(first), ..
            },
            others,
        )) = self.vcpus.split_first()
        else {
            return false;
        };
        !others.is_empty()
            && first.len() > 1
            && others.iter().all(|vcpu| vcpu.cpus.as_ref() == Some(first))
    }

    /// All errors of the search in one text.
    pub(crate) fn failures(&self) -> String {
        self.notes.join("; ")
    }
}

impl fmt::Display for VcpuMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.source {
            VcpuSource::ThreadNames => "found by thread names",
            VcpuSource::SingleThread => "found by thread names, one thread for all of them",
            VcpuSource::Qmp => "found over QMP",
            VcpuSource::Nowhere => return write!(f, "vCPU threads not found: {}", self.failures()),
        };
        write!(f, "vCPU threads {how}:")?;
        for (at, Vcpu { index, tid, cpus }) in self.vcpus.iter().enumerate() {
            let cpus = cpus
                .as_ref()
                .map_or_else(|| "unknown CPUs".into(), CpuSet::describe);
            write!(
                f,
                "{} vCPU {index} = thread {tid} on {cpus}",
                if at == 0 { "" } else { "," }
            )?;
        }
        if !self.notes.is_empty() {
            write!(f, "; {}", self.failures())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(cpus: &[Option<&str>]) -> VcpuMap {
        let vcpu = |(index, cpus): (u32, &Option<&str>)| Vcpu {
            index,
            tid: 100,
            cpus: cpus.map(|cpus| cpus.parse().unwrap()),
        };
        let vcpus = (0..).zip(cpus).map(vcpu).collect();
        VcpuMap {
            vcpus,
            source: VcpuSource::ThreadNames,
            notes: vec![],
        }
    }

    #[test]
    fn vcpus_float_together_only_where_all_share_several_cpus() {
        for (cpus, together) in [
            (&[Some("0-3"), Some("0-3")][..], true),
            (&[Some("0-3"), Some("0-1")], false),
            (&[Some("0-3"), None], false),
            (&[Some("0"), Some("0")], false),
            (&[Some("0-3")], false),
            (&[], false),
        ] {
            assert_eq!(map(cpus).is_floating_together(), together, "{cpus:?}");
        }
    }

    #[test]
    fn map_displays_as_one_line() {
        let mut map = map(&[Some("0"), None]);
        assert_eq!(
            map.to_string(),
            "vCPU threads found by thread names: vCPU 0 = thread 100 on CPU 0, vCPU 1 = thread 100 on unknown CPUs"
        );
        map.source = VcpuSource::Nowhere;
        map.notes = vec!["first failed".into(), "second failed".into()];
        assert_eq!(
            map.to_string(),
            "vCPU threads not found: first failed; second failed"
        );
    }
}
