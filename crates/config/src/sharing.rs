//! What belongs to one device must not be given to two.

use std::collections::HashMap;
use std::path::Path;

use virtionet_uplink::UplinkSpec;

use super::device::Described;
use super::given::{Given, Place};
use super::problem::{Problem, Problems};
use super::{DeviceConfig, Socket};

/// Who has what.
#[derive(Debug, Default)]
pub struct Owners<'a>(HashMap<String, Owner<'a>>);

#[derive(Debug, PartialEq)]
struct Owner<'a> {
    name: String,
    place: &'a Place,
    /// A switch, which has its TAP from each device that names both.
    is_switch: bool,
}

impl<'a> Owners<'a> {
    /// The socket of the control server is taken.
    pub fn add_control(&mut self, path: &Path, given: &'a Given) {
        let name = given.place.key("control");
        let place = &given.place;
        let owner = Owner {
            name,
            place,
            is_switch: false,
        };
        self.0.insert(socket_at(path), owner);
    }

    /// Notes what `device` has, and as problems what others have already.
    pub fn add(&mut self, described: &'a Described, device: &DeviceConfig, found: &mut Problems) {
        let owner = |keys| Owner {
            name: device.name.clone(),
            place: described.place_of(keys),
            is_switch: false,
        };
        let things = [
            Some((format!("name {}", device.name), owner(&["name"]))),
            Some((socket(&device.socket), owner(&["socket-path", "fd"]))),
            tap(&device.uplink, owner(&["tap", "uplink"])),
        ];
        for (thing, owner) in things.into_iter().flatten() {
            match self.0.get(&thing) {
                Some(first) if owner.is_switch && first.name == owner.name => {}
                Some(first) => found.add(conflict(&thing, first, &owner)),
                None => _ = self.0.insert(thing, owner),
            }
        }
    }
}

fn conflict(thing: &str, first: &Owner<'_>, second: &Owner<'_>) -> Problem {
    let also = match first.place {
        Place::File { path, line } => format!(" ({}:{line})", path.display()),
        _ => String::new(),
    };
    let whom = match first.name == second.name {
        true => format!("two devices{also}"),
        false => format!("both {}{also} and {}", first.name, second.name),
    };
    let sentence = format!("{thing} is given to {whom}: give each one of its own");
    match second.place {
        file @ Place::File { .. } => file.problem(format_args!("{sentence}")),
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
fn tap<'a>(uplink: &str, device: Owner<'a>) -> Option<(String, Owner<'a>)> {
    let (tap, owner) = match uplink.parse() {
        Ok(UplinkSpec::Tap(tap)) => (tap, device),
        Ok(UplinkSpec::Switch(switch)) => {
            let owner = Owner {
                name: format!("switch {}", switch.name),
                is_switch: true,
                ..device
            };
            (switch.tap?, owner)
        }
        _ => return None,
    };
    (!tap.name.contains('%')).then(|| (format!("TAP {}", tap.name), owner))
}
