//! The number of open files that the configured devices can need, which is compared with the limit
//! of this process before anything is opened.
//!
//! A limit that is too low would otherwise show only when a guest asks for its last queue pairs,
//! and another device of the process could lose its session then.
//!
//! Threads are not checked. RLIMIT_NPROC counts all processes of the user and does not hold for
//! root, so a comparison would refuse what works and accept what fails; a thread that cannot start
//! ends its own session only.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtionet_config::uplink::UplinkConfig;
use virtionet_config::{Config, DeviceConfig, QueuePairCount};
use virtionet_control::server::MAX_CONNECTIONS;
use virtionet_virtqueue::memory::MAX_REGIONS;

use crate::run_error::RunError;

/// Of each queue pair: the worker's epoll and its wake-up eventfd, and the kick, call and err
/// descriptors of two vrings.
const PER_PAIR: u64 = 2 + 2 * 3;
/// Of each queue pair on a TAP: its queue.
const PER_TAP_QUEUE: u64 = 1;
/// Of each TAP: the netlink socket through which it is configured.
const PER_TAP: u64 = 1;
/// Of each device: the listening socket, its copy for the next daemon, the connection, the monitor's
/// socket of `--qmp`, the file of crash records, the eventfd that stops its thread, the channel for
/// requests to the front-end and the event of translations, and, during a migration, the dirty log and
/// its eventfd.
const PER_DEVICE: u64 = 10;
/// The memory regions of one SET_MEM_TABLE at most. More come only with hot-plugged memory.
const MEMORY_TABLE_REGIONS: usize = 8;
/// The control server: sockets, event loop, and a few clients.
const CONTROL: u64 = 20;
/// The other clients of the control server.
#[allow(clippy::as_conversions)]
const CONTROL_CLIENTS: u64 = MAX_CONNECTIONS as u64;
/// The process: standard streams, signals, the eventfd of the end, files of /proc and /sys that are
/// open for a moment, and spare ones.
const PROCESS: u64 = 64;

/// The number of descriptors that a configuration needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DescriptorNeed {
    /// With the configured queue pairs, and memory that is not hot-plugged. Devices without a
    /// number of queue pairs (`--queues auto`) count with one.
    minimum: u64,
    /// With as many queue pairs and memory regions as front-ends may ask for.
    maximum: u64,
}

/// Raises the soft limit of open files to the hard one, and checks that the devices of `config` can
/// work within it.
///
/// # Errors
/// When the limit is too low for the configured queue pairs.
// syscalls: prlimit64
pub fn prepare(config: &Config) -> Result<DescriptorLimit, RunError> {
    let limit = DescriptorLimit(raise_limit());
    limit.check(config)?;
    Ok(limit)
}

/// The limit of open files; `None` where there is none.
#[derive(Debug, Clone, Copy)]
pub struct DescriptorLimit(Option<u64>);

impl DescriptorLimit {
    /// Checks that the devices of `config` can work within it.
    ///
    /// # Errors
    /// When it is too low for the configured queue pairs.
    pub fn check(self, config: &Config) -> Result<(), RunError> {
        self.0
            .map_or(Ok(()), |limit| check(DescriptorNeed::of(config), limit))
    }
}

/// Raises the soft limit to the hard one. Returns the soft limit that holds now; `None` where there
/// is none.
fn raise_limit() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return limit.current;
    }
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let describe = |limit: Option<u64>| limit.map_or("none".into(), |limit| limit.to_string());
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => {
            tracing::debug!(
                "the limit of open files was raised from {} to {}",
                describe(limit.current),
                describe(limit.maximum)
            );
            limit.maximum
        }
        Err(error) => {
            tracing::debug!("the limit of open files cannot be raised: {error}");
            limit.current
        }
    }
}

fn check(need: DescriptorNeed, limit: u64) -> Result<(), RunError> {
    if need.minimum > limit {
        return Err(RunError::TooFewDescriptors {
            needed: need.minimum,
            limit,
        });
    }
    if need.maximum > limit {
        tracing::warn!(
            "the devices can need up to {} open files, and the limit is {limit}; raise it (ulimit -n, or LimitNOFILE= of the service) or lower --queues, or a front-end that asks for all queue pairs and memory regions is refused",
            need.maximum
        );
    }
    Ok(())
}

impl DescriptorNeed {
    fn of(config: &Config) -> Self {
        let has_control = config.control.is_some() || config.control_read_only.is_some();
        let (control, clients) = match has_control {
            true => (CONTROL, CONTROL_CLIENTS),
            false => (0, 0),
        };
        let mut need = Self {
            minimum: PROCESS + control,
            maximum: PROCESS + control + clients,
        };
        for device in &config.devices {
            let least = match device.queues {
                QueuePairCount::Auto => 1,
                QueuePairCount::AtMost(pairs) => pairs,
            };
            need.minimum += device_need(device, least, MEMORY_TABLE_REGIONS);
            need.maximum += device_need(device, device.queues.max(), MAX_REGIONS);
        }
        need
    }
}

/// The descriptors of `device` with this many queue pairs and memory regions. A new memory table
/// comes before the regions of the old one are closed.
fn device_need(device: &DeviceConfig, pairs: u16, memory_regions: usize) -> u64 {
    let (per_pair, uplink) = match &device.uplink {
        UplinkConfig::Tap(_) => (PER_PAIR + PER_TAP_QUEUE, PER_TAP),
        // Several devices may name the TAP of one switch; that counts it more than once.
        UplinkConfig::Switch(switch) => {
            let tap = switch.tap.as_ref().map_or(0, |_| PER_TAP + PER_TAP_QUEUE);
            (PER_PAIR, tap)
        }
        UplinkConfig::Null => (PER_PAIR, 0),
    };
    let foreign = u64::try_from(memory_regions + MEMORY_TABLE_REGIONS).unwrap_or(u64::MAX);
    PER_DEVICE + u64::from(pairs) * per_pair + uplink + foreign
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::config;

    #[test]
    fn need_grows_with_pairs_devices_and_the_control_socket() {
        for (line, minimum, maximum) in [
            ("--socket-path /s --uplink null --queues 1", 98, 599),
            ("--socket-path /s --uplink null --queues 4", 122, 623),
            ("--socket-path /s --tap t0 --queues 4", 127, 628),
            ("--socket-path /s --tap t0 --queues 128", 1243, 1744),
            // Without a number the front-end decides.
            ("--socket-path /s --tap t0", 100, 1744),
            ("--socket-path /s --tap t0 --control /c", 120, 2020),
            (
                "--queues 4 --device socket-path=/a,uplink=switch:s,,tap=t0 --device socket-path=/b,uplink=switch:s",
                182,
                1184,
            ),
        ] {
            let expected = DescriptorNeed { minimum, maximum };
            assert_eq!(DescriptorNeed::of(&config(line)), expected, "{line}");
        }
    }

    #[test]
    fn only_a_limit_below_the_minimum_is_refused() {
        let need = DescriptorNeed {
            minimum: 1236,
            maximum: 1737,
        };
        let error = check(need, 1235).unwrap_err();
        assert_eq!(error.code(), "open-files-limit");
        assert_eq!(
            error.to_string(),
            "the configured queue pairs need 1236 open files, and the limit is 1235; raise it (ulimit -n, or LimitNOFILE= of the service) or lower --queues"
        );
        assert!(check(need, 1236).is_ok());
        assert!(check(need, 1737).is_ok());
    }

    #[test]
    fn soft_limit_becomes_the_hard_one() {
        let before = getrlimit(Resource::Nofile);
        let lowered = Rlimit {
            current: before.maximum.map(|hard| hard / 2).or(Some(4096)),
            maximum: before.maximum,
        };
        setrlimit(Resource::Nofile, lowered).unwrap();
        assert_eq!(raise_limit(), before.maximum);
        assert_eq!(getrlimit(Resource::Nofile).current, before.maximum);
    }
}
