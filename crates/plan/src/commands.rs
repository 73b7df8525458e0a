//! The command lines and files of a plan, and the JSON of the plan with them.

use serde::Serialize;

use super::guest_plan::GuestPlan;
use super::{daemon, libvirt, qemu};

/// The command lines of a plan as lists of words, and its files as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Commands {
    /// The words of QEMU's command line.
    pub qemu: Vec<String>,
    /// The words of virtionetd's command line where virtionetd listens and QEMU connects.
    pub virtionetd: Vec<String>,
    /// The XML of the domain for libvirt.
    pub libvirt: String,
    /// The words of virtionetd's command line where it connects to the QEMU of that domain.
    pub virtionetd_client: Vec<String>,
    /// virtionetd's configuration file, with the settings of the first of the two command lines.
    pub config: String,
}

impl GuestPlan {
    /// The command lines and files of the plan.
    #[must_use]
    pub fn commands(&self) -> Commands {
        let words = |lines: Vec<Vec<String>>| lines.into_iter().flatten().collect();
        Commands {
            qemu: words(qemu::command(self)),
            virtionetd: words(daemon::command(self, daemon::SocketRole::Listens)),
            libvirt: libvirt::domain(self),
            virtionetd_client: words(daemon::command(self, daemon::SocketRole::Connects)),
            config: daemon::config(self),
        }
    }

    /// The plan and its commands as JSON, with a newline at the end.
    #[must_use]
    pub fn to_json(&self) -> String {
        #[derive(Serialize)]
        struct PlanDocument<'a> {
            #[serde(flatten)]
            plan: &'a GuestPlan,
            commands: Commands,
        }
        let document = PlanDocument {
            plan: self,
            commands: self.commands(),
        };
        // Serialization cannot fail: the plan has only numbers and text, and its paths are checked
        // to be UTF-8.
        let json = serde_json::to_string_pretty(&document);
        json.map(|json| json + "\n").unwrap_or_default()
    }
}
