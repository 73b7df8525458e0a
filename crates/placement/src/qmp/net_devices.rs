//! Asking QEMU for properties of the guest's network device that vhost-user does not transfer.
//!
//! Among several network devices, the one on a socket is found through its netdev: `info network`
//! (text for people, but of the same form since QEMU 2.1) names the netdev's chardev, and
//! `query-chardev` names the chardev's socket.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::{QmpError, QmpSession};

/// The folders of QEMU's object tree for devices with an id and for those without.
const DEVICES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// A virtio-net device on QEMU's PCI bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuNetDevice {
    /// The id of its netdev.
    pub netdev: String,
    /// Its MSI-X vectors; 0 for none.
    pub vectors: u32,
    /// Whether it offers its driver several queue pairs (`mq=on`).
    pub mq: bool,
}

/// The network device on `socket`, from QEMU's monitor at `monitor`. `None` where it has no network
/// device, or where it has several and none is known to be on the socket. Takes at most `timeout`.
///
/// # Errors
///
/// [`QmpError`] when QEMU cannot be asked.
pub fn query_net_device(
    monitor: &Path,
    socket: &Path,
    timeout: Duration,
) -> Result<Option<QemuNetDevice>, QmpError> {
    let mut session = QmpSession::open(monitor, timeout)?;
    session.read_greeting()?;
    session.execute("qmp_capabilities")?;
    let mut net_devices = Vec::new();
    for folder in DEVICES {
        for path in net_device_paths(&mut session, folder)? {
            net_devices.extend(net_device(&mut session, &path)?);
        }
    }
    if net_devices.len() < 2 {
        return Ok(net_devices.pop());
    }
    let chardevs = session.execute("query-chardev")?;
    let network = json!({ "command-line": "info network" });
    let network = session.execute_with("human-monitor-command", &network)?;
    let netdev = netdev_on(network.as_str().unwrap_or_default(), &chardevs, socket);
    Ok(net_devices
        .into_iter()
        .find(|net_device| Some(&net_device.netdev) == netdev.as_ref()))
}

fn net_device_paths(session: &mut QmpSession<'_>, folder: &str) -> Result<Vec<String>, QmpError> {
    let list = session.execute_with("qom-list", &json!({ "path": folder }))?;
    let is_net_device = |entry: &&Value| {
        let kind = entry["type"].as_str().unwrap_or_default();
        kind.starts_with("child<virtio-net-pci")
    };
    Ok(list
        .as_array()
        .into_iter()
        .flatten()
        .filter(is_net_device)
        .filter_map(|entry| Some(format!("{folder}/{}", entry["name"].as_str()?)))
        .collect())
}

/// `None` for a network device whose properties have unexpected types.
fn net_device(session: &mut QmpSession<'_>, path: &str) -> Result<Option<QemuNetDevice>, QmpError> {
    let mut get = |property: &str| {
        session.execute_with("qom-get", &json!({ "path": path, "property": property }))
    };
    let (netdev, vectors, mq) = (get("netdev")?, get("vectors")?, get("mq")?);
    let net_device = || {
        Some(QemuNetDevice {
            netdev: netdev.as_str()?.to_owned(),
            vectors: u32::try_from(vectors.as_u64()?).ok()?,
            mq: mq.as_bool()?,
        })
    };
    Ok(net_device())
}

/// The netdev whose chardev is on `socket`, from the lines ` \ NETDEV: ...,vhost-userN to CHARDEV`.
fn netdev_on(network: &str, chardevs: &Value, socket: &Path) -> Option<String> {
    let socket = socket.to_str()?;
    let is_on_socket = |label: &str| {
        chardevs.as_array().into_iter().flatten().any(|chardev| {
            let file = chardev["filename"].as_str().unwrap_or_default();
            let path = file
                .split_once("unix:")
                .map(|(_, rest)| rest.split(',').next());
            chardev["label"] == label && path == Some(Some(socket))
        })
    };
    network.lines().find_map(|line| {
        let (netdev, rest) = line.trim().strip_prefix("\\ ")?.split_once(": ")?;
        let (_, label) = rest.split_once(",vhost-user")?.1.split_once(" to ")?;
        is_on_socket(label).then(|| netdev.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeQmp, GREETING, TempDir};

    const TIMEOUT: Duration = Duration::from_secs(5);

    fn answer(command: &str, value: &Value) -> String {
        format!("{}\r\n", json!({ "return": value, "id": command }))
    }

    fn listing(names: &[&str]) -> String {
        let mut all = vec![json!({ "name": "type", "type": "string" })];
        all.extend(
            names
                .iter()
                .map(|name| json!({ "name": name, "type": "child<virtio-net-pci>" })),
        );
        answer("qom-list", &json!(all))
    }

    fn properties(netdev: &str, vectors: u32, mq: bool) -> Vec<String> {
        [json!(netdev), json!(vectors), json!(mq)]
            .iter()
            .map(|value| answer("qom-get", value))
            .collect()
    }

    #[test]
    fn single_network_device_is_returned_for_any_socket() {
        let dir = TempDir::new("net_devices-one");
        let mut script = vec![GREETING.into(), answer("qmp_capabilities", &json!({}))];
        script.push(listing(&["net0"]));
        script.extend(properties("n0", 3, true));
        script.push(listing(&[]));
        let server = FakeQmp::start(&dir, script);
        let net_device =
            query_net_device(&server.path, Path::new("/run/any.sock"), TIMEOUT).unwrap();
        let expected = QemuNetDevice {
            netdev: "n0".into(),
            vectors: 3,
            mq: true,
        };
        assert_eq!(net_device, Some(expected));
        let requests = server.requests();
        assert_eq!(requests[1]["arguments"]["path"], "/machine/peripheral");
        assert_eq!(requests[3]["arguments"]["property"], "vectors");
    }

    #[test]
    fn of_several_network_devices_the_one_on_the_socket_is_returned() {
        for (socket, netdev) in [
            ("/run/a.sock", Some("na")),
            ("/run/b.sock", Some("nb")),
            ("/run/c.sock", None),
        ] {
            let dir = TempDir::new(&format!("net_devices-{}", netdev.unwrap_or("none")));
            let mut script = vec![GREETING.into(), answer("qmp_capabilities", &json!({}))];
            script.push(listing(&["net_device"]));
            script.extend(properties("nb", 8, true));
            script.push(listing(&["device[0]"]));
            script.extend(properties("na", 3, false));
            script.push(answer(
                "query-chardev",
                &json!([
                    { "label": "ca", "filename": "unix:/run/a.sock", "frontend-open": true },
                    { "label": "cb", "filename": "disconnected:unix:/run/b.sock,server=on" },
                ]),
            ));
            let network = "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci\r\n \\ na: index=0,type=vhost-user,vhost-user0 to ca\r\ncard: index=0,type=nic\r\n \\ nb: index=0,type=vhost-user,vhost-user0 to cb\r\n";
            script.push(answer("human-monitor-command", &json!(network)));
            let server = FakeQmp::start(&dir, script);
            let net_device = query_net_device(&server.path, Path::new(socket), TIMEOUT).unwrap();
            assert_eq!(
                net_device.map(|net_device| net_device.netdev).as_deref(),
                netdev
            );
        }
    }

    #[test]
    fn missing_monitor_is_an_error() {
        let error =
            query_net_device(Path::new("/nonexistent"), Path::new("/s"), TIMEOUT).unwrap_err();
        assert_eq!(error.code(), "qmp-unreachable", "{error}");
    }
}
