//! irqbalance's list of banned interrupts.
//!
//! irqbalance moves all interrupts that are not on this list. It listens on a unix socket in its
//! run folder and accepts commands from root only, whose identity the kernel confirms. A connection
//! carries one command. The answer to `setup` contains, among other things, the banned interrupts;
//! `settings ban irqs N N ...` replaces the list, including the interrupts of irqbalance's command
//! line, so [`BanList`] reads the list first and keeps the interrupts that others banned.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use virtionet_base::unix_socket;

use crate::procfs::ProcFs;

/// The folder of irqbalance's sockets.
pub(super) const RUN_DIR: &str = "/run/irqbalance";
/// A pattern of the paths of its sockets.
pub const IRQBALANCE_SOCKETS: &str = "/run/irqbalance/*.sock";
/// How long irqbalance may take to answer.
const TIMEOUT: Duration = Duration::from_secs(1);
/// The longest command that irqbalance accepts, in bytes.
const MAX_COMMAND_LEN: usize = 499;
/// The largest part of an answer that is read, in bytes.
const MAX_ANSWER_LEN: u64 = 1 << 20;

/// The interrupts that this process has added to irqbalance's list.
#[derive(Debug)]
pub(super) struct BanList {
    folder: PathBuf,
    ours: BTreeSet<u32>,
}

impl BanList {
    /// An empty list for the irqbalance whose sockets are in `folder`.
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.into(),
            ours: BTreeSet::new(),
        }
    }

    /// The interrupts that this process has banned.
    pub(super) fn ours(&self) -> BTreeSet<u32> {
        self.ours.clone()
    }

    /// Continues with those that another process has banned.
    pub(super) fn inherit(&mut self, banned: BTreeSet<u32>) {
        self.ours.extend(banned);
    }

    /// Makes `wanted` the interrupts that this process has banned. True when irqbalance has
    /// accepted them.
    pub(super) fn set(&mut self, wanted: &BTreeSet<u32>) -> bool {
        if *wanted == self.ours {
            return !wanted.is_empty();
        }
        self.send(wanted).is_ok()
    }

    fn send(&mut self, wanted: &BTreeSet<u32>) -> io::Result<()> {
        let socket = socket_in(&self.folder).ok_or(io::ErrorKind::NotFound)?;
        let banned = banned(&query(&socket, "setup")?).ok_or(io::ErrorKind::InvalidData)?;
        let others: BTreeSet<u32> = &banned - &self.ours;
        let all: Vec<String> = (&others | wanted).iter().map(u32::to_string).collect();
        let list = match all.is_empty() {
            true => "NONE".into(),
            false => all.join(" "),
        };
        query(&socket, &format!("settings ban irqs {list}"))?;
        self.ours = wanted - &others;
        Ok(())
    }
}

fn socket_in(folder: &Path) -> Option<PathBuf> {
    let sockets = fs::read_dir(folder).ok()?.flatten();
    let mut sockets = sockets.map(|entry| entry.path());
    sockets.find(|path| {
        path.extension()
            .is_some_and(|extension| extension == "sock")
    })
}

/// The answer to `command`; empty for a command that changes a setting.
fn query(socket: &Path, command: &str) -> io::Result<String> {
    if command.len() > MAX_COMMAND_LEN {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut stream = unix_socket::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(command.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER_LEN).read_to_string(&mut answer)?;
    Ok(answer)
}

/// The banned interrupts in an answer `SLEEP 10 IRQ 41 LOAD 0 DIFF 0 CLASS 0 ... BANNED 0`.
fn banned(setup: &str) -> Option<BTreeSet<u32>> {
    let words: Vec<&str> = setup.split_whitespace().collect();
    if words.first() != Some(&"SLEEP") {
        return None;
    }
    words
        .windows(2)
        .filter(|pair| pair[0] == "IRQ")
        .map(|pair| pair[1].parse().ok())
        .collect()
}

/// How to configure irqbalance so that it does not move `irqs`, as one sentence; `None` where it
/// does not run, or `irqs` is empty. `proc` is the mount point of procfs.
#[must_use]
pub fn irqbalance_hint(proc: &Path, irqs: &[u32]) -> Option<String> {
    if irqs.is_empty() || !ProcFs::new(proc).has_process("irqbalance") {
        return None;
    }
    let bans: Vec<String> = irqs.iter().map(|irq| format!("--banirq={irq}")).collect();
    Some(format!(
        "irqbalance runs and will move these interrupts again: add IRQBALANCE_ARGS=\"{}\" to /etc/default/irqbalance (/etc/sysconfig/irqbalance on Red Hat systems) and restart it",
        bans.join(" ")
    ))
}

#[cfg(test)]
mod tests {
    use super::super::testing::FakeHost;
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::sync::{Arc, Mutex};

    /// A fake irqbalance that implements the two commands; it runs until the test process ends.
    fn irqbalance(folder: &Path, banned: &[u32]) -> Arc<Mutex<Vec<u32>>> {
        fs::create_dir_all(folder).unwrap();
        let list = Arc::new(Mutex::new(banned.to_vec()));
        let listener = UnixListener::bind(folder.join("irqbalance812.sock")).unwrap();
        let shared = Arc::clone(&list);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut buffer = [0; 500];
                let length = stream.read(&mut buffer).unwrap();
                let command = std::str::from_utf8(&buffer[..length]).unwrap();
                let mut list = shared.lock().unwrap();
                if command == "setup" {
                    let mut answer = "SLEEP 10 ".to_owned();
                    for irq in &*list {
                        answer += &format!("IRQ {irq} LOAD 0 DIFF 0 CLASS 4 ");
                    }
                    answer += "BANNED 00000000";
                    stream.write_all(answer.as_bytes()).unwrap();
                } else if let Some(irqs) = command.strip_prefix("settings ban irqs ") {
                    *list = irqs.split(' ').filter_map(|irq| irq.parse().ok()).collect();
                }
            }
        });
        list
    }

    #[test]
    fn bans_are_added_to_those_of_others_and_removed_again() {
        let host = FakeHost::new("irqbalance-bans", "0");
        let folder = host.path().join("run");
        let list = irqbalance(&folder, &[7, 42]);
        let banned = || list.lock().unwrap().clone();
        let mut bans = BanList::new(&folder);
        for (wanted, expected, accepted) in [
            (&[41, 42][..], &[7, 41, 42][..], true),
            (&[41, 43], &[7, 41, 42, 43], true),
            (&[], &[7, 42], true),
        ] {
            let wanted = wanted.iter().copied().collect();
            assert_eq!(bans.set(&wanted), accepted);
            assert_eq!(banned(), expected, "{wanted:?}");
        }
        assert!(
            !bans.set(&BTreeSet::new()),
            "an unchanged list is not sent again"
        );
        // More interrupts than fit into one command.
        assert!(!bans.set(&(1000..1200).collect()));
        assert_eq!(banned(), [7, 42]);
        *list.lock().unwrap() = Vec::new();
        assert!(bans.set(&[41].into()));
        assert!(bans.set(&BTreeSet::new()));
        assert!(banned().is_empty());
    }

    /// Uses the irqbalance of this machine, if one runs: an interrupt is banned and removed again.
    #[test]
    fn real_irqbalance_accepts_and_removes_a_ban() {
        let Some(socket) = socket_in(Path::new(RUN_DIR)) else {
            eprintln!("skipped: no irqbalance runs here");
            return;
        };
        let now = || banned(&query(&socket, "setup").unwrap()).unwrap();
        let before = now();
        let exists = |irq: &u32| Path::new(&format!("/proc/irq/{irq}")).exists();
        let free = |irq: &u32| exists(irq) && !before.contains(irq);
        let irq = (1..1000).find(free).unwrap();
        let mut bans = BanList::new(Path::new(RUN_DIR));
        assert!(bans.set(&[irq].into()));
        assert!(now().contains(&irq) && now().is_superset(&before));
        assert!(bans.set(&BTreeSet::new()));
        assert_eq!(now(), before);
    }

    #[test]
    fn without_irqbalance_nothing_is_banned() {
        let host = FakeHost::new("irqbalance-none", "0");
        let mut bans = BanList::new(&host.path().join("run"));
        assert!(!bans.set(&[41].into()));
    }

    #[test]
    fn answer_is_parsed_completely_or_not_at_all() {
        let none = BTreeSet::new();
        for (answer, irqs) in [
            ("SLEEP 10 BANNED 0", Some(none.clone())),
            (
                "SLEEP 10 IRQ 41 LOAD 9 DIFF 0 CLASS 4 IRQ 7 LOAD 0 DIFF 0 CLASS 0 BANNED 3",
                Some([7, 41].into()),
            ),
            ("SLEEP 10 IRQ x LOAD 9", None),
            ("", None),
            ("HTTP/1.1 400", None),
        ] {
            assert_eq!(banned(answer), irqs, "{answer}");
        }
    }

    #[test]
    fn hint_names_each_interrupt_while_irqbalance_runs() {
        let host = FakeHost::new("irqbalance", "0");
        let proc = host.roots().proc;
        host.put("proc/7/comm", "bash");
        host.put("proc/version/comm", "irqbalance");
        assert_eq!(irqbalance_hint(&proc, &[41]), None);
        host.put("proc/812/comm", "irqbalance");
        assert_eq!(irqbalance_hint(&proc, &[]), None);
        let hint = irqbalance_hint(&proc, &[41, 42]).unwrap();
        assert!(
            hint.contains("IRQBALANCE_ARGS=\"--banirq=41 --banirq=42\""),
            "{hint}"
        );
    }
}
