//! The command lines and files of a plan, and the plan as JSON with them.

use serde::Serialize;

use super::guest_plan::GuestPlan;
use super::{daemon, libvirt, qemu};

/// The command lines, word by word, and the files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Commands {
    /// QEMU's command line.
    pub qemu: Vec<String>,
    /// virtionetd's beside it.
    pub virtionetd: Vec<String>,
    /// The domain for libvirt.
    pub libvirt: String,
    /// virtionetd's command line beside that.
    pub virtionetd_client: Vec<String>,
    /// virtionetd's configuration file, for the first of the two.
    pub config: String,
}

impl GuestPlan {
    /// The command lines for it.
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

    /// All of it as JSON, with a line's end.
    #[must_use]
    pub fn json(&self) -> String {
        #[derive(Serialize)]
        struct PlanDocument<'a> {
            #[serde(flatten)]
            plan: &'a GuestPlan,
            commands: Commands,
        }
        let whole = PlanDocument {
            plan: self,
            commands: self.commands(),
        };
        // Plain numbers and text, checked to be UTF-8: there is nothing that JSON cannot hold.
        let json = serde_json::to_string_pretty(&whole);
        json.map(|json| json + "\n").unwrap_or_default()
    }
}
