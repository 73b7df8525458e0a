//! The accelerator of a guest. `/dev/kvm` can exist on a machine where an ordinary kernel does not
//! boot under KVM, so only a trial boot shows whether KVM can be used.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Result, bail};

use crate::paths;
use crate::qemu_version::version;

/// The accelerator that a caller asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accel {
    /// QEMU's software emulation.
    Tcg,
    /// Hardware virtualization.
    Kvm,
    /// KVM if the guest image boots under it, otherwise TCG.
    #[default]
    Auto,
}

impl Accel {
    /// Returns [`Accel::Kvm`] or [`Accel::Tcg`]. Calls `kvm_boots`, which boots a guest, only if no
    /// earlier result is stored for this boot of the host and this version of QEMU.
    pub(crate) fn resolve_with(self, kvm_boots: fn() -> bool) -> Result<Self> {
        if self != Self::Auto {
            return Ok(self);
        }
        if !Path::new("/dev/kvm").exists() {
            return Ok(Self::Tcg);
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let key = format!("{} {}", boot.trim(), version()?);
        let file = paths::cache_dir().join("accel");
        let known = fs::read_to_string(&file).unwrap_or_default();
        if let Some((accel, of)) = known.split_once(' ')
            && of == key
        {
            return accel.parse();
        }
        let accel = if kvm_boots() { Self::Kvm } else { Self::Tcg };
        // A failed write is harmless: the next process repeats the trial.
        _ = fs::write(&file, format!("{accel} {key}"));
        Ok(accel)
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
            Self::Auto => "auto",
        })
    }
}

impl FromStr for Accel {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "tcg" => Self::Tcg,
            "kvm" => Self::Kvm,
            "auto" => Self::Auto,
            other => bail!("there is no accelerator '{other}': use tcg, kvm or auto"),
        })
    }
}
