//! The user and the groups as which the process runs, from their names.

use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use std::ffi::CString;

use virtionet_config::IdentityConfig;
use virtionet_sandbox::Identity;

/// Why there is no such identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The user is not known.
    #[error("user {0} does not exist; create it or name another")]
    NoUser(String),
    /// The group is not known.
    #[error("group {0} does not exist; create it or name another")]
    NoGroup(String),
    /// A user that has a number only has no group.
    #[error("user {0} has no entry in the user database, so its group is not known; add --group")]
    GroupNeeded(u32),
    /// The kernel does not change the user.
    #[error(
        "the user cannot be changed to {uid} ({source}); start virtionetd as root, or leave --user out"
    )]
    Refused {
        /// The number of the user.
        uid: u32,
        /// The kernel's error.
        source: std::io::Error,
    },
}

impl IdentityError {
    /// A stable name of the error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoUser(_) => "user-unknown",
            Self::NoGroup(_) | Self::GroupNeeded(_) => "group-unknown",
            Self::Refused { .. } => "user-not-changed",
        }
    }
}

/// The identity that `config` names; `None` if the process keeps the one that it has. The
/// supplementary groups are those of the user.
///
/// # Errors
/// When the user or the group does not exist.
pub fn resolve(config: &IdentityConfig) -> Result<Option<Identity>, IdentityError> {
    let Some(name) = &config.user else {
        return Ok(None);
    };
    let number = name.parse().ok();
    let user = match number {
        Some(uid) => User::from_uid(Uid::from_raw(uid)),
        None => User::from_name(name),
    };
    let user = user.ok().flatten();
    let uid = user.as_ref().map(|user| user.uid.as_raw()).or(number);
    let uid = uid.ok_or_else(|| IdentityError::NoUser(name.clone()))?;
    let gid = match (&config.group, &user) {
        (Some(group), _) => find_group(group)?,
        (None, Some(user)) => user.gid.as_raw(),
        (None, None) => return Err(IdentityError::GroupNeeded(uid)),
    };
    let groups = user.map_or_else(Vec::new, |user| supplementary_groups(&user.name, gid));
    Ok(Some(Identity { uid, gid, groups }))
}

fn find_group(name: &str) -> Result<u32, IdentityError> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        _ => Err(IdentityError::NoGroup(name.to_owned())),
    }
}

fn supplementary_groups(user: &str, gid: u32) -> Vec<u32> {
    let groups = CString::new(user)
        .ok()
        .and_then(|user| getgrouplist(&user, Gid::from_raw(gid)).ok());
    groups
        .unwrap_or_default()
        .into_iter()
        .map(Gid::as_raw)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(user: Option<&str>, group: Option<&str>) -> IdentityConfig {
        IdentityConfig {
            user: user.map(str::to_owned),
            group: group.map(str::to_owned),
        }
    }

    #[test]
    fn users_and_groups_are_found_by_name_and_by_number() {
        assert_eq!(resolve(&named(None, None)).unwrap(), None);
        let root = resolve(&named(Some("root"), None)).unwrap().unwrap();
        assert_eq!((root.uid, root.gid), (0, 0));
        assert_eq!(resolve(&named(Some("0"), None)).unwrap(), Some(root));
        let other = resolve(&named(Some("4000001"), Some("12"))).unwrap();
        let expected = Identity {
            uid: 4_000_001,
            gid: 12,
            groups: Vec::new(),
        };
        assert_eq!(other, Some(expected));
    }

    #[test]
    fn unknown_names_are_errors_that_say_what_to_do() {
        for (user, group, error) in [
            (
                "no-such-user",
                None,
                "user no-such-user does not exist; create it or name another",
            ),
            (
                "root",
                Some("no-such-group"),
                "group no-such-group does not exist; create it or name another",
            ),
            (
                "4000001",
                None,
                "user 4000001 has no entry in the user database, so its group is not known; add --group",
            ),
        ] {
            let refused = resolve(&named(Some(user), group)).unwrap_err();
            assert_eq!(refused.to_string(), error);
        }
    }
}
