//! Which accelerator a guest runs under. `/dev/kvm` may exist and yet not run an ordinary kernel, so
//! that only a trial boot shows whether KVM can be used.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Result, bail};

use crate::paths;
use crate::qemu_version::version;

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accel {
    /// QEMU's software emulation.
    Tcg,
    /// Hardware virtualization.
    Kvm,
    /// KVM where the guest image boots under it, else TCG.
    #[default]
    Auto,
}

impl Accel {
    /// [`Accel::Kvm`] or [`Accel::Tcg`]; `kvm_boots` tries a guest where the result is not known yet.
    pub(crate) fn resolve_with(self, kvm_boots: fn() -> bool) -> Result<Self> {
        if self != Self::Auto {
            return Ok(self);
        }
        if !Path::new("/dev/kvm").exists() {
            return Ok(Self::Tcg);
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let key = format!("{} {}", boot.trim(), version()?);
        let file = paths::cache().join("accel");
        let known = fs::read_to_string(&file).unwrap_or_default();
        if let Some((accel, of)) = known.split_once(' ')
            && of == key
        {
            return accel.parse();
        }
        let accel = if kvm_boots() { Self::Kvm } else { Self::Tcg };
        // If this cannot be written, only another trial is needed the next time.
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
