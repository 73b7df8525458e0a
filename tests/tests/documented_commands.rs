//! Every command of README.md and of the pages of `docs` runs as it stands there.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use virtionet_tests::paths::{require_root, root, virtionetctl, virtionetd};

/// Begins every script.
const PREAMBLE: &str = include_str!("documented_commands.sh");

/// The first words of commands that other tests run, and which those are.
const ELSEWHERE: [(&str, &str); 9] = [
    ("ci/", "`ci/test` and `ci/fresh` themselves"),
    ("cargo ", "the stages of ci/test"),
    ("GUEST=", "the stage e2e"),
    ("SOAK_SEED=", "the stages e2e and soak"),
    ("RUSTC_BOOTSTRAP=", "a crash, of which there is none"),
    ("virsh ", "tests/libvirt.rs"),
    (
        "virtionetd --config /etc/virtionetd.toml --take-over",
        "tests/upgrade.rs",
    ),
    ("virtionetctl upgrade", "tests/upgrade.rs"),
    ("systemctl reload ", "tests/systemd_upgrade.rs"),
];

/// What a page takes for granted, or a reader must adapt: page, text, and what is run instead.
const ADAPTED: [(&str, &str, &str); 7] = [
    ("", "target/release/virtionetd", "virtionetd"),
    ("", "-accel kvm -cpu host", "-accel tcg -cpu max"),
    ("", "file=guest.qcow2", "file=guest.qcow2,format=raw"),
    ("without-root.md", "user alice", "user nobody"),
    ("libvirt.md", "-g kvm", "-g root"),
    (
        "configuration.md",
        "socket-group = \"kvm\"",
        "socket-group = \"root\"",
    ),
    ("configuration.md", "list:0-3", "list:0-1"),
];

/// Commands that a page has described before, in another block or in words: the page, a word of the
/// blocks that need them, and the command.
const BEFORE: [(&str, &str, &str); 8] = [
    ("configuration.md", "br0", "ip link add br0 up type bridge"),
    ("launching.md", "qemu-system-x86_64", DAEMON),
    ("libvirt.md", "br0", "ip link add br0 up type bridge"),
    ("libvirt.md", "br0", "install -d /run/virtionetd/guests/web"),
    ("monitoring.md", "curl", DAEMON),
    ("switch.md", "br0", "ip link add br0 up type bridge"),
    (
        "without-root.md",
        "master br0",
        "ip link add br0 up type bridge",
    ),
    ("without-root.md", "virtionetd", WITHOUT_ROOT),
];
const WITHOUT_ROOT: &str = "ip tuntap add dev tap0 mode tap user nobody multi_queue vnet_hdr
ip link set tap0 up
AS_USER='setpriv --reuid nobody --clear-groups'";
const DAEMON: &str =
    "virtionetd --socket-path /run/vnet0.sock --queues 4 --tap tap0 --control /run/vnet0.ctl";

/// A block of a page between lines of three backquotes.
struct Block {
    page: String,
    line: usize,
    language: String,
    text: String,
}

fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(root().join("docs")).unwrap();
    let mut pages: Vec<_> = docs.map(|entry| entry.unwrap().path()).collect();
    pages.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    pages.extend(["README.md", "CONTRIBUTING.md"].map(|name| root().join(name)));
    pages.sort();
    pages
}

fn blocks() -> Vec<Block> {
    let mut blocks = Vec::new();
    for path in pages() {
        let page = path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut open: Option<Block> = None;
        for (n, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            match (line.trim_start().strip_prefix("```"), open.as_mut()) {
                (Some(_), Some(_)) => blocks.extend(open.take()),
                (Some(language), None) => {
                    open = Some(Block {
                        page: page.clone(),
                        line: n + 1,
                        language: language.to_owned(),
                        text: String::new(),
                    });
                }
                (None, Some(block)) => block.text += &format!("{}\n", line.trim_start()),
                (None, None) => {}
            }
        }
        assert!(open.is_none(), "a block of {page} has no end");
    }
    blocks
}

/// The commands of a block that this test is to run.
fn script(block: &Block) -> Option<String> {
    let joined = block.text.replace("\\\n", " ");
    let is_elsewhere = |line: &str| ELSEWHERE.iter().any(|(start, _)| line.starts_with(start));
    let lines: Vec<&str> = joined.lines().filter(|line| !is_elsewhere(line)).collect();
    if lines
        .iter()
        .all(|line| line.is_empty() || line.starts_with('#'))
    {
        return None;
    }
    let is_needed =
        |(page, word, _): &&(&str, &str, &str)| *page == block.page && block.text.contains(word);
    let before = BEFORE.iter().filter(is_needed);
    let before: String = before
        .map(|(_, _, command)| format!("{command}\n"))
        .collect();
    let mut commands = lines.join("\n");
    for (page, from, to) in ADAPTED {
        if page.is_empty() || page == block.page {
            commands = commands.replace(from, to);
        }
    }
    Some(before + &commands)
}

fn assert_runs(block: &Block, commands: &str) {
    let output = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "--mount-proc",
            "--pid",
            "--fork",
            "--kill-child",
            "timeout",
            "60",
        ])
        .args(["bash", "-c", &format!("{PREAMBLE}\n{commands}")])
        .env("VIRTIONETD", virtionetd().unwrap())
        .env("VIRTIONETCTL", virtionetctl().unwrap())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}:{}: {}\n{commands}\n{stderr}",
        block.page,
        block.line,
        output.status
    );
}

/// Arguments alone belong to the command that starts the guest of `launching.md`.
fn is_arguments(block: &Block) -> bool {
    block.text.starts_with('-')
}

fn is_drawing(block: &Block) -> bool {
    block.text.starts_with(['┌', '│'])
}

#[test]
fn documented_commands_run() {
    require_root().unwrap();
    let mut count = 0;
    for block in blocks() {
        if block.language.is_empty()
            && !is_arguments(&block)
            && !is_drawing(&block)
            && let Some(commands) = script(&block)
        {
            assert_runs(&block, &commands);
            count += 1;
        }
    }
    assert!(count >= 15, "only {count} blocks have commands");
}

#[test]
fn documented_guest_arguments_start_a_guest() {
    require_root().unwrap();
    for mut block in blocks() {
        if block.page == "README.md" && is_arguments(&block) {
            block.text = format!("{DAEMON}\nqemu-system-x86_64 -accel tcg {}", block.text);
            let commands = script(&block).unwrap();
            assert_runs(&block, &commands);
        }
    }
}

#[test]
fn documented_configuration_files_are_valid() {
    for block in blocks() {
        if block.language == "toml" {
            let text = block.text.replace("EOF", "");
            let check = format!("cat >net.toml <<'EOF'\n{text}EOF\nvirtionetctl check net.toml");
            let check = Block {
                text: check,
                ..block
            };
            let commands = script(&check).unwrap();
            assert_runs(&check, &commands);
        }
    }
}
