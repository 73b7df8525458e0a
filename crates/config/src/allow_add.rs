//! What devices may use that are added while the daemon runs.

use std::path::{Path, PathBuf};

use virtionet_base::Pattern;
use virtionet_base::key_value::{split_at_commas, split_item};

use crate::keys::Key;
use crate::problem::{Problem, ProblemCode};
use crate::settings::{SettingValue, Settings};
use crate::types::{AllowAdd, DeviceConfig, Socket};
use crate::uplink::{TapConfig, UplinkConfig};

/// The value of `--allow-add`; `None` where it is not set.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn allow_add(process: &Settings) -> Result<Option<AllowAdd>, Problem> {
    process.get(Key::ALLOW_ADD).map(parse).transpose()
}

fn parse(value: &SettingValue) -> Result<AllowAdd, Problem> {
    let text = value.text();
    let invalid = |item: &str, why: &str| {
        value.origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{}: {item:?} {why}",
                value.origin.set(Key::ALLOW_ADD, &text)
            ),
        )
    };
    let unknown = |item: &str| {
        let why =
            "is not known: write socket=PATTERN, tap=PATTERN, bridge=PATTERN or switch=PATTERN";
        invalid(item, why)
    };
    let mut allowed = AllowAdd::default();
    for item in split_at_commas(&text) {
        let (kind, pattern) = split_item(&item, &[]).map_err(|_| unknown(&item))?;
        let patterns = match kind {
            "socket" if folder_of_pattern(pattern).is_none() => {
                let why = "is no path in one folder: write an absolute path in which only the name of the file has *, ? or [";
                return Err(invalid(&item, why));
            }
            "socket" => &mut allowed.sockets,
            "tap" => &mut allowed.taps,
            "bridge" => &mut allowed.bridges,
            "switch" => &mut allowed.switches,
            _ => return Err(unknown(&item)),
        };
        patterns.push(pattern.parse().map_err(|_| {
            let why = "has no valid pattern: write * for any characters, ? for one and [abc] for one of these";
            invalid(&item, why)
        })?);
    }
    Ok(allowed)
}

/// The folder of the files whose paths match `pattern`; `None` where there may be several.
fn folder_of_pattern(pattern: &str) -> Option<PathBuf> {
    let folder = Path::new(pattern).parent()?;
    let is_plain = !folder.to_str()?.contains(['*', '?', '[']);
    (folder.is_absolute() && is_plain).then(|| folder.to_owned())
}

impl AllowAdd {
    /// The folders in which the sockets may be.
    #[must_use]
    pub fn socket_folders(&self) -> Vec<PathBuf> {
        let folders = self.sockets.iter().map(ToString::to_string);
        folders
            .filter_map(|pattern| folder_of_pattern(&pattern))
            .collect()
    }

    /// Checks that `device` uses nothing else.
    ///
    /// # Errors
    /// The first thing that is not allowed.
    pub(crate) fn check(&self, device: &DeviceConfig) -> Result<(), Problem> {
        let not_allowed = |what: &str, value: &str| {
            let key = Key::ALLOW_ADD.flag();
            Problem::new(
                ProblemCode::NotAllowed,
                format!(
                    "{}: {what} {value} is not allowed to devices that are added at run time: start virtionetd with {key} {what}=PATTERN for it, or name another one",
                    device.name
                ),
            )
        };
        let socket = match &device.socket {
            Socket::Listen { path, .. } | Socket::Connect { path } => path,
            Socket::Inherited(fd) => return Err(not_allowed("descriptor", &fd.to_string())),
        };
        for path in [Some(socket), device.qmp.as_ref()].into_iter().flatten() {
            if !self
                .sockets
                .iter()
                .any(|pattern| pattern.matches_path(path))
            {
                return Err(not_allowed("socket", &path.display().to_string()));
            }
        }
        let check = |what: &str, allowed: &[Pattern], name: &str| match allowed
            .iter()
            .any(|pattern| pattern.matches_name(name))
        {
            true => Ok(()),
            false => Err(not_allowed(what, name)),
        };
        let check_tap = |tap: &TapConfig| {
            check("tap", &self.taps, &tap.name)?;
            let bridge = tap.bridge.as_deref();
            bridge.map_or(Ok(()), |bridge| check("bridge", &self.bridges, bridge))
        };
        match &device.uplink {
            UplinkConfig::Tap(tap) => check_tap(tap),
            UplinkConfig::Switch(switch) => {
                check("switch", &self.switches, &switch.name)?;
                switch.tap.as_ref().map_or(Ok(()), check_tap)
            }
            UplinkConfig::Null => Ok(()),
        }
    }
}
