//! What belongs to one device must not be given to two.

use std::collections::HashMap;
use std::path::Path;

use super::device::DeviceDescription;
use super::settings::{SettingValue, Origin};
use super::problem::{Problem, Problems};
use super::uplink::UplinkConfig;
use super::{DeviceConfig, Socket};

/// Who has what.
#[derive(Debug, Default)]
pub struct ResourceOwners<'a>(HashMap<String, ResourceOwner<'a>>);

#[derive(Debug, PartialEq)]
struct ResourceOwner<'a> {
    name: String,
    origin: &'a Origin,
    /// A switch, which has its TAP from each device that names both.
    is_switch: bool,
}

impl<'a> ResourceOwners<'a> {
    /// The socket of the control server is taken.
    pub fn add_control(&mut self, path: &Path, given: &'a SettingValue) {
        let name = given.origin.key("control");
        let origin = &given.origin;
        let owner = ResourceOwner {
            name,
            origin,
            is_switch: false,
        };
        self.0.insert(socket_at(path), owner);
    }

    /// Notes what `device` has, and as problems what others have already.
    pub fn add(&mut self, described: &'a DeviceDescription, device: &DeviceConfig, problems: &mut Problems) {
        let owner = |keys| ResourceOwner {
            name: device.name.clone(),
            origin: described.origin_of(keys),
            is_switch: false,
        };
        let resources = [
            Some((format!("name {}", device.name), owner(&["name"]))),
            Some((socket(&device.socket), owner(&["socket-path", "fd"]))),
            tap(&device.uplink, owner(&["tap", "uplink"])),
        ];
        for (thing, owner) in resources.into_iter().flatten() {
            match self.0.get(&thing) {
                Some(first) if owner.is_switch && first.name == owner.name => {}
                Some(first) => problems.add(conflict(&thing, first, &owner)),
                None => _ = self.0.insert(thing, owner),
            }
        }
    }
}

fn conflict(thing: &str, first: &ResourceOwner<'_>, second: &ResourceOwner<'_>) -> Problem {
    let also = match first.origin {
        Origin::File { path, line } => format!(" ({}:{line})", path.display()),
        _ => String::new(),
    };
    let whom = match first.name == second.name {
        true => format!("two devices{also}"),
        false => format!("both {}{also} and {}", first.name, second.name),
    };
    let sentence = format!("{thing} is given to {whom}: give each one of its own");
    match second.origin {
        file @ Origin::File { .. } => file.problem(format_args!("{sentence}")),
        _ => Problem::new(sentence),
    }
}

/// The same text for the same socket.
fn socket(socket: &Socket) -> String {
    match socket {
        Socket::Listen { path, .. } | Socket::Connect { path } => socket_at(path),
        Socket::Inherited(fd) => format!("descriptor {fd}"),
    }
}

fn socket_at(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
    format!("socket {}", absolute.display())
}

/// The TAP of an uplink and whose it is: the device's, or its switch's. None where its name is a
/// pattern (`tap%d`) from which the kernel chooses.
fn tap<'a>(uplink: &UplinkConfig, device: ResourceOwner<'a>) -> Option<(String, ResourceOwner<'a>)> {
    let (tap, owner) = match uplink {
        UplinkConfig::Tap(tap) => (tap, device),
        UplinkConfig::Switch(switch) => {
            let owner = ResourceOwner {
                name: format!("switch {}", switch.name),
                is_switch: true,
                ..device
            };
            (switch.tap.as_ref()?, owner)
        }
        UplinkConfig::Null => return None,
    };
    (!tap.name.contains('%')).then(|| (format!("TAP {}", tap.name), owner))
}
