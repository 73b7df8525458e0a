//! Which accelerator a guest runs under. `/dev/kvm` may be there and yet not
//! run an ordinary kernel, so that only a boot tells.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::paths::{self, RunDir};
use crate::qemu::{Machine, version};

/// A trial boot that takes longer than this is a failure: KVM needs about 1 s.
const TRIAL: Duration = Duration::from_secs(20);

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
    /// [`Accel::Kvm`] or [`Accel::Tcg`]: `Auto` boots the image once to see,
    /// and remembers the answer in `ci/cache` until the host reboots.
    ///
    /// # Errors
    /// When QEMU cannot be asked for its version.
    pub fn resolve(self) -> Result<Self> {
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
        // Not being able to remember costs only the next trial.
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
            other => bail!("there is no accelerator '{other}': say tcg, kvm or auto"),
        })
    }
}

fn kvm_boots() -> bool {
    let trial = || -> Result<()> {
        let dir = RunDir::new()?;
        let machine = Machine::new().accel(Accel::Kvm).start(&dir, "trial")?;
        machine.guest().wait_boot(TRIAL)
    };
    trial().is_ok()
}
