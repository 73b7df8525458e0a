//! Which control socket a command uses.

use std::path::PathBuf;

/// The environment variable that names the control socket.
const VARIABLE: &str = "VIRTIONETD_CONTROL";
/// The path of the control socket where neither a flag nor the environment names one.
const DEFAULT: &str = "/run/virtionetd.ctl";

/// The control socket that `flag` names, else the environment, else the default one.
pub(crate) fn path(flag: Option<PathBuf>) -> PathBuf {
    flag.or_else(|| std::env::var_os(VARIABLE).map(PathBuf::from))
        .unwrap_or_else(|| DEFAULT.into())
}
