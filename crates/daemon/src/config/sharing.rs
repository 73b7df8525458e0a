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
}

impl<'a> Owners<'a> {
    /// The socket of the control server is taken.
    pub fn add_control(&mut self, path: &Path, given: &'a Given) {
        let name = given.place.key("control");
        let place = &given.place;
        self.0.insert(socket_at(path), Owner { name, place });
    }

    /// Notes what `device` has, and as problems what others have already.
    pub fn add(&mut self, described: &'a Described, device: &DeviceConfig, found: &mut Problems) {
        let things = [
            Some((format!("name {}", device.name), ["name"].as_slice())),
            Some((socket(&device.socket), &["socket-path", "fd"])),
            tap(&device.uplink).map(|tap| (tap, ["tap", "uplink"].as_slice())),
        ];
        for (thing, keys) in things.into_iter().flatten() {
            let owner = Owner {
                name: match thing.starts_with("TAP") {
                    true => owner_of_tap(device),
                    false => device.name.clone(),
                },
                place: described.place_of(keys),
            };
            // A switch has its TAP from each device that names both.
            if let Some(first) = self.0.get(&thing) {
                if first.name != owner.name || !owner.name.starts_with("switch ") {
                    found.add(conflict(&thing, first, &owner));
                }
            } else {
                self.0.insert(thing, owner);
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
    let sentence = format_args!("{thing} is given to {whom}: give each one of its own");
    match second.place {
        file @ Place::File { .. } => file.problem(sentence),
        _ => Problem::new(sentence.to_string()),
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

/// The TAP of an uplink, unless its name is a pattern (`tap%d`) from which the kernel chooses.
fn tap(uplink: &str) -> Option<String> {
    let tap = match uplink.parse() {
        Ok(UplinkSpec::Tap(tap)) => tap,
        Ok(UplinkSpec::Switch(switch)) => switch.tap?,
        _ => return None,
    };
    (!tap.name.contains('%')).then(|| format!("TAP {}", tap.name))
}

fn owner_of_tap(device: &DeviceConfig) -> String {
    match device.uplink.parse() {
        Ok(UplinkSpec::Switch(switch)) => format!("switch {}", switch.name),
        _ => device.name.clone(),
    }
}
