//! Path, mode and group of the sockets that virtionetd creates or connects to.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::keys::Key;
use crate::problem::{Problem, ProblemCode};
use crate::settings::{SettingValue, Settings};

/// The length of the longest path of a unix socket, in bytes (unix(7): 108 with the terminating
/// zero).
const MAX_SOCKET_PATH: usize = 107;

/// Checks the path of a socket, which is the value of `key`.
///
/// # Errors
/// When the path is empty, or longer than the address of a unix socket can be.
pub(crate) fn check_path(key: Key, value: &SettingValue) -> Result<PathBuf, Problem> {
    let path = value.path();
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(value.origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{} is empty: write a path, or leave it out",
                value.origin.key(key)
            ),
        ));
    }
    if bytes.len() > MAX_SOCKET_PATH {
        return Err(value.origin.problem(ProblemCode::ValueInvalid, format_args!(
            "{} is {} bytes long: the path of a unix socket has at most {MAX_SOCKET_PATH}, choose \
             a shorter one",
            value.origin.set(key, path.display()),
            bytes.len()
        )));
    }
    Ok(path.into())
}

/// The mode of a socket, the value of `key`. Where it is not set, it depends on whether the socket
/// has a group, the value of `group_key`.
///
/// # Errors
/// When the value is no mode.
pub(crate) fn socket_mode(settings: &Settings, key: Key, group_key: Key) -> Result<u32, Problem> {
    let Some(value) = settings.get(key) else {
        return Ok(match settings.get(group_key) {
            Some(_) => 0o660,
            None => 0o600,
        });
    };
    match u32::from_str_radix(&value.text(), 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(value.origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{} is not a file mode: write it in octal, 0 to 777, such as 660",
                value.origin.set(key, value.text())
            ),
        )),
    }
}

/// The group of a socket, the value of `key`; `None` where it is not set.
///
/// # Errors
/// When the value is empty.
pub(crate) fn socket_group(settings: &Settings, key: Key) -> Result<Option<String>, Problem> {
    let Some(value) = settings.get(key) else {
        return Ok(None);
    };
    if value.value.is_empty() {
        return Err(value.origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{} is empty: write a group's name or number",
                value.origin.key(key)
            ),
        ));
    }
    Ok(Some(value.text().into()))
}
