//! Checks that no resource (name, socket, TAP) is given to two devices.

use std::collections::HashMap;
use std::path::Path;

use crate::device::DeviceDescription;
use crate::keys::Key;
use crate::problem::{Problem, ProblemCode, Problems};
use crate::settings::{Origin, SettingValue};
use crate::types::{Config, DeviceConfig, Socket};
use crate::uplink::UplinkConfig;

/// Adds a problem for each resource of `device` that something of `config` has already.
pub(crate) fn check_owners(config: &Config, device: &DeviceConfig, problems: &mut Problems) {
    let origin = Origin::Request;
    let mut owners = ResourceOwners::default();
    let owner = |name: &str| ResourceOwner {
        name: name.to_owned(),
        origin: &origin,
        is_switch: false,
    };
    let mut before = Problems::default();
    let devices = config
        .devices
        .iter()
        .map(|device| resources_of(device, owner(&device.name)));
    let control = config.control.iter().chain(&config.control_read_only);
    let paths = control.map(|control| &control.path).chain(&config.handover);
    let sockets = paths.map(|path| (path_resource(path), owner("virtionetd itself")));
    for (resource, owner) in devices.flatten().chain(sockets) {
        owners.insert(resource, owner, &mut before);
    }
    for (resource, owner) in resources_of(device, owner(&device.name)) {
        owners.insert(resource, owner, problems);
    }
}

/// The resources of a device, with `owner` as their owner.
fn resources_of<'a>(
    device: &DeviceConfig,
    owner: ResourceOwner<'a>,
) -> Vec<(String, ResourceOwner<'a>)> {
    let copy = || ResourceOwner {
        name: owner.name.clone(),
        ..owner
    };
    let mut resources = vec![
        (format!("name {}", device.name), copy()),
        (socket_resource(&device.socket), copy()),
    ];
    resources.extend(tap_resource(&device.uplink, copy()));
    resources
}

/// The owner of each resource.
#[derive(Debug, Default)]
pub(crate) struct ResourceOwners<'a>(HashMap<String, ResourceOwner<'a>>);

#[derive(Debug, PartialEq)]
struct ResourceOwner<'a> {
    name: String,
    origin: &'a Origin,
    /// Whether the owner is a switch: several devices may name the TAP of one switch.
    is_switch: bool,
}

impl<'a> ResourceOwners<'a> {
    /// Adds a socket of the process, the value of `key`. Adds a problem if it has another owner
    /// already.
    pub(crate) fn add_process_socket(
        &mut self,
        key: Key,
        path: &Path,
        value: &'a SettingValue,
        problems: &mut Problems,
    ) {
        let owner = ResourceOwner {
            name: value.origin.key(key),
            origin: &value.origin,
            is_switch: false,
        };
        self.insert(path_resource(path), owner, problems);
    }

    /// Adds the resources of `device`. Adds a problem for each resource that has another owner
    /// already.
    pub(crate) fn add(
        &mut self,
        description: &'a DeviceDescription,
        device: &DeviceConfig,
        problems: &mut Problems,
    ) {
        let owner = |keys| ResourceOwner {
            name: device.name.clone(),
            origin: description.origin_of(keys),
            is_switch: false,
        };
        let resources = [
            Some((format!("name {}", device.name), owner(&[Key::NAME]))),
            Some((
                socket_resource(&device.socket),
                owner(&[Key::SOCKET_PATH, Key::FD]),
            )),
            tap_resource(&device.uplink, owner(&[Key::TAP, Key::UPLINK])),
        ];
        for (resource, owner) in resources.into_iter().flatten() {
            self.insert(resource, owner, problems);
        }
    }

    fn insert(&mut self, resource: String, owner: ResourceOwner<'a>, problems: &mut Problems) {
        match self.0.get(&resource) {
            Some(first) if owner.is_switch && first.name == owner.name => {}
            Some(first) => problems.add(conflict(&resource, first, &owner)),
            None => _ = self.0.insert(resource, owner),
        }
    }
}

fn conflict(resource: &str, first: &ResourceOwner<'_>, second: &ResourceOwner<'_>) -> Problem {
    let also = match first.origin {
        Origin::File { path, line } => format!(" ({}:{line})", path.display()),
        _ => String::new(),
    };
    let owners = match first.name == second.name {
        true => format!("two devices{also}"),
        false => format!("both {}{also} and {}", first.name, second.name),
    };
    let message = format!("{resource} is given to {owners}: give each one of its own");
    let code = ProblemCode::ResourceShared;
    match second.origin {
        file @ Origin::File { .. } => file.problem(code, format_args!("{message}")),
        _ => Problem::new(code, message),
    }
}

/// A text that identifies a socket.
fn socket_resource(socket: &Socket) -> String {
    match socket {
        Socket::Listen { path, .. } | Socket::Connect { path } => path_resource(path),
        Socket::Inherited(fd) => format!("descriptor {fd}"),
    }
}

fn path_resource(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
    format!("socket {}", absolute.display())
}

/// A text that identifies the TAP of an uplink, and the owner, which is the device or its switch.
/// `None` where the uplink has no TAP, or where its name is a pattern (`tap%d`) from which the
/// kernel makes a new name each time.
fn tap_resource<'a>(
    uplink: &UplinkConfig,
    device: ResourceOwner<'a>,
) -> Option<(String, ResourceOwner<'a>)> {
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
