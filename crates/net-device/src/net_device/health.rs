//! What is wrong with a device: checks, four times a second while a front-end is connected, and
//! reports of the thread that serves it. Each becomes a condition, which is among the device's
//! warnings for as long as it lasts.

use std::sync::atomic::Ordering;

use virtionet_vhost_user::SessionError;
use virtionet_virtio_net::uplink::UplinkChange;

use super::NetDevice;
use crate::conditions::ConditionKind;

impl NetDevice {
    /// Checks everything that can go wrong while a front-end is connected.
    pub(super) fn check_conditions(&self) {
        self.check_frontend();
        self.check_addresses();
        if self.frontend.lock().memory.is_lost() {
            self.conditions.set(
                &self.name,
                ConditionKind::MemoryLost,
                "pages of the guest's memory have vanished, because its file shrank or its file system is full; stop the guest, make space and start it again",
            );
        }
        self.refresh_uplink();
        self.check_address_conflict();
        if self.conditions.has(ConditionKind::Mtu) && self.is_uplink_up() {
            self.apply_mtu();
        }
    }

    /// There is no connection to the front-end's socket, for this reason.
    pub fn report_unconnected(&self, reason: &str) {
        self.conditions
            .set(&self.name, ConditionKind::Unconnected, reason);
    }

    /// There is a connection.
    pub fn report_connected(&self) {
        self.conditions.clear(
            &self.name,
            ConditionKind::Unconnected,
            "connected to the front-end",
        );
    }

    /// A session ended because the guest's memory is not shared.
    pub fn report_memory_not_shared(&self, error: &SessionError) {
        let kind = ConditionKind::MemoryNotShared;
        self.conditions.set(&self.name, kind, &error.to_string());
    }

    /// A session ended with an error.
    pub fn report_session_error(&self, error: &SessionError) {
        if let Some(suppressed) = self.session_errors.allow() {
            tracing::error!(suppressed, "{}: {error}", self.name);
        }
    }

    /// Notes whether the uplink can carry frames, and lets it open its queues again after its
    /// interface was deleted.
    fn refresh_uplink(&self) {
        let change = match self.uplink.refresh() {
            Ok(change) => change,
            Err(error) => {
                let text = error.to_string();
                return self
                    .conditions
                    .set(&self.name, ConditionKind::Uplink, &text);
            }
        };
        let (kind, name) = (self.uplink.kind(), self.uplink.name());
        let was_up = self.is_uplink_up();
        let end = match change {
            UplinkChange::Unchanged => format!("uplink {kind}:{name} can carry frames again"),
            UplinkChange::Reopened => {
                format!("uplink {kind}:{name} is there again, and its queues were opened again")
            }
        };
        self.conditions
            .clear(&self.name, ConditionKind::Uplink, &end);
        if change == UplinkChange::Reopened {
            if was_up && let Some(suppressed) = self.reopened_uplinks.allow() {
                tracing::warn!(
                    suppressed,
                    "{}: uplink {kind}:{name} was deleted; it is there again, and its queues were opened again",
                    self.name
                );
            }
            self.apply_mtu();
            self.wake_all();
        }
    }

    /// Notes whether another device of the switch uses the same MAC address.
    fn check_address_conflict(&self) {
        let kind = ConditionKind::AddressConflict;
        match self.uplink.address_conflict() {
            Some(conflict) => self.conditions.set(&self.name, kind, &conflict.to_string()),
            None => self.conditions.clear(
                &self.name,
                kind,
                "no MAC address moved between this device and another one of its switch for a minute",
            ),
        }
    }

    /// Notes whether the front-end's process is stopped: its monitor and its guest are, too.
    fn check_frontend(&self) {
        let pid = self.frontend.lock().pid;
        let kind = ConditionKind::FrontendStopped;
        match pid {
            Some(pid) if is_process_stopped(pid) => {
                let text = format!(
                    "the front-end (process {pid}) is stopped by a signal; continue it with `kill -CONT {pid}`"
                );
                self.conditions.set(&self.name, kind, &text);
            }
            _ => self
                .conditions
                .clear(&self.name, kind, "the front-end runs again"),
        }
    }

    /// Notes that the guest uses addresses outside of its memory. As a rule that is memory which
    /// was plugged in without `share=on`, so that the front-end does not share it.
    fn check_addresses(&self) {
        let count = self
            .pairs()
            .flat_map(|served| [served.pair.rx().stats(), served.pair.tx().stats()])
            .map(|stats| stats.address_invalid.get())
            .sum();
        let before = self.invalid_addresses.swap(count, Ordering::Relaxed);
        if count > before {
            self.conditions.set(
                &self.name,
                ConditionKind::AddressesInvalid,
                "the guest uses addresses that are not in the memory shared with virtionetd, and these chains are dropped (address_invalid); if memory was plugged in, plug it in with share=on",
            );
        }
    }

    /// Sets the uplink to the MTU that the front-end set, if it did.
    pub(super) fn apply_mtu(&self) {
        let Some(mtu) = self.frontend.lock().mtu else {
            return;
        };
        match self.uplink.set_mtu(mtu) {
            Ok(()) => self.conditions.clear(
                &self.name,
                ConditionKind::Mtu,
                "the uplink takes the guest's MTU now",
            ),
            Err(error) => {
                let text = format!("the guest's MTU is {mtu}, but {error}");
                self.conditions.set(&self.name, ConditionKind::Mtu, &text);
            }
        }
    }
}

/// Whether process `pid` is stopped by a signal or a debugger (proc(5), the state in `stat`).
fn is_process_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the name, which is in parentheses and may contain any character.
    let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    state.is_some_and(|state| state.starts_with(['T', 't']))
}

#[cfg(test)]
mod tests;
