//! Tests of the whole crate, from the flags to the texts.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command as Process;

use clap::{CommandFactory, Parser};
use quick_xml::Reader;
use quick_xml::events::Event;

use super::*;
use virtionet_config::cli;
use virtionet_config::{Command, Config, Socket};

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    plan: PlanArgs,
}

fn args(line: &str) -> PlanArgs {
    let words = ["plan"].into_iter().chain(line.split_whitespace());
    Line::try_parse_from(words).unwrap().plan
}

/// A host with these CPUs and an unknown topology.
fn host(cpus: &str) -> TargetHost {
    TargetHost {
        cpus: cpus.parse().unwrap(),
        topology: Topology::default(),
    }
}

fn planned(line: &str) -> GuestPlan {
    plan(&args(line), &host("0-7")).unwrap_or_else(|error| panic!("{line}: {error}"))
}

/// A directory of one test, which is removed at the end of the test.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vnet-plan-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Command lines, and below each the code and the text of its error on a host with CPUs 0-7.
const REFUSED: &str = r#"
--vcpus 0
    queues-impossible a guest has at least one vCPU: give the number of its vCPUs
--vcpus 5000
    vcpus-too-many --vcpus 5000 is more than QEMU can run: write 1 to 4096
--vcpus 4 --name a,b
    guest-name-invalid --name "a,b" cannot be used: write a letter and up to 31 letters, digits, '.', '_' or '-'
--vcpus 4 --name 4ever
    guest-name-invalid --name "4ever" cannot be used: write a letter and up to 31 letters, digits, '.', '_' or '-'
--vcpus 4 --memory 4X
    memory-invalid --memory 4X is no size: write MiB, or a number with M, G or T, such as 4G
--vcpus 4 --memory 0
    memory-invalid --memory 0 is no size: write MiB, or a number with M, G or T, such as 4G
--vcpus 4 --memory G
    memory-invalid --memory G is no size: write MiB, or a number with M, G or T, such as 4G
--vcpus 4 --memory 99999999999999999999T
    memory-invalid --memory 99999999999999999999T is no size: write MiB, or a number with M, G or T, such as 4G
--vcpus 4 --memory +4G
    memory-invalid --memory +4G is no size: write MiB, or a number with M, G or T, such as 4G
--vcpus 4 --rx-queue-size 300
    ring-size-invalid --rx-queue-size 300 is no size that QEMU takes: write 256, 512 or 1024
--vcpus 4 --tx-queue-size 2048
    ring-size-invalid --tx-queue-size 2048 is no size that QEMU takes: write 256, 512 or 1024
--vcpus 4 --socket-dir run
    socket-dir-invalid --socket-dir run cannot be used: write an absolute path of printable characters
--vcpus 4 --cpus 6-9
    cpus-not-allowed --cpus 6-9 names CPUs 8-9, but virtionetd may run on CPUs 0-7 only: choose among those, or say with --host-cpus what the host has
--vcpus 4 --cpus x
    cpu-list-invalid "x" in the CPU list "x" is not a CPU or a range: write a list such as 0-3,8
--vcpus 4 --cpus=
    cpus-empty --cpus names no CPU: write a list such as 2-5, auto or none
--vcpus 4 --nics 0
    net-device-count-invalid a guest cannot have 0 network devices: ask for 1 to 28, for which its PCI root bus has slots
--vcpus 4 --nics 29
    net-device-count-invalid a guest cannot have 29 network devices: ask for 1 to 28, for which its PCI root bus has slots
--vcpus 4 --nic queues
    nic-item-invalid --nic queues: "queues" is not KEY=VALUE: write a value behind =, and a comma inside a value twice
--vcpus 4 --nic queues=
    nic-item-invalid --nic queues=: "queues=" is not KEY=VALUE: write a value behind =, and a comma inside a value twice
--vcpus 4 --nic pairs=4
    nic-key-unknown --nic pairs=4: the key "pairs" is not known: use name, queues, throughput, mac, tap, bridge and uplink
--vcpus 4 --nic queues=2,queues=3
    nic-key-repeated --nic queues=2,queues=3: queues is given twice: keep one of them
--vcpus 4 --nic queues=two
    nic-queues-invalid --nic queues=two: queues=two is no number of queue pairs: write 1 to 128
--vcpus 4 --nic queues=0
    queues-impossible network device net0 asks for queues=0: write 1 to 128, which is what vhost-user can address
--vcpus 4 --nic throughput=full
    throughput-unknown --nic throughput=full: throughput "full" is not known: write high, medium or low
--vcpus 4 --nic queues=2,throughput=low
    nic-keys-conflict --nic queues=2,throughput=low: queues=2 and throughput=low are both given: keep one of them
--vcpus 4 --nic name=a/b
    nic-name-invalid --nic name=a/b: name=a/b cannot be used: write a letter and up to 31 letters, digits, '.', '_' or '-'
--vcpus 4 --nic mac=52:54:00:12:34
    nic-mac-invalid --nic mac=52:54:00:12:34: mac=52:54:00:12:34 is no address of a network device: write one such as 52:54:00:12:34:56
--vcpus 4 --nic mac=01:00:5e:00:00:01
    nic-mac-invalid --nic mac=01:00:5e:00:00:01: mac=01:00:5e:00:00:01 is no address of a network device: write one such as 52:54:00:12:34:56
--vcpus 4 --nic tap=t0,uplink=null
    nic-keys-conflict --nic tap=t0,uplink=null: tap=t0 and uplink=null are both given: keep one of them
--vcpus 4 --nic uplink=-x
    value-is-flag virtionetd refuses a value: unexpected argument '-x' found; write values that begin with no dash
--vcpus 4 --nic bridge=b,uplink=null
    nic-bridge-beside-uplink --nic bridge=b,uplink=null: bridge=b and uplink=null are both given: write the bridge into the uplink
--vcpus 4 --nic name=a --nic name=a
    net-device-name-repeated two network devices are called a: give each a name of its own
--vcpus 4 --nic mac=52:54:00:00:00:01 --nic mac=52:54:00:00:00:01
    mac-repeated network devices net0 and net1 both have the address 52:54:00:00:00:01: give each one of its own with mac=
--vcpus 4 --nic tap=t0 --nic tap=t0
    config-invalid TAP t0 is given to both guest-net0 and guest-net1: give each one of its own
--vcpus 4 --placement list:8
    placement-impossible placement list:8 names CPU 8, but this daemon may run on CPUs 0-7 only: choose among those or widen its cpuset
--vcpus 4 --poll busy
    config-invalid --poll busy is not known: write off, adaptive or always
--vcpus 4 --poll-us 7
    config-invalid --poll-us 7 has no effect with --poll off: add --poll adaptive, or leave --poll-us out
--vcpus 4 --image-multiqueue true --flavor-multiqueue false
    queues-impossible the image says hw_vif_multiqueue_enabled=true, the flavor hw:vif_multiqueue_enabled=false: set both alike, or leave one unset
--vcpus 4 --hw_vif_multiqueue_enabled off --hw:vif_multiqueue_enabled on
    queues-impossible the image says hw_vif_multiqueue_enabled=false, the flavor hw:vif_multiqueue_enabled=true: set both alike, or leave one unset
--vcpus 4 --image-multiqueue false --nic queues=2
    queues-impossible network device net0 asks for queues=2, but multiqueue is off by hw_vif_multiqueue_enabled=false (image): leave one of them out
--vcpus 4 --max-queues 0
    queues-impossible max_queues is 0, but a network device has at least one queue pair: give 1 or more, or no limit
--vcpus 4 --msix-budget 8 --other-vectors 5
    queues-impossible the guest needs 9 interrupt vectors (4 for its network devices, 5 for other devices), but has 8: ask for fewer queues or network devices, or raise the budget
"#;

#[test]
fn request_that_cannot_be_planned_is_refused_with_a_code_and_one_sentence() {
    let rows: Vec<&str> = REFUSED.trim().lines().collect();
    for row in rows.chunks(2) {
        let refused = plan(&args(row[0]), &host("0-7"));
        let error = refused.map(|_| ()).unwrap_err();
        let (code, text) = row[1].trim().split_once(' ').unwrap();
        assert_eq!(error.to_string(), text, "{}", row[0]);
        assert_eq!(error.code(), code, "{}", row[0]);
        assert_eq!(error.status(), 2);
    }
    for unwritable in ["/tmp/a\u{fffe}b", "/tmp/a\u{7f}b", "/tmp/a\nb"] {
        let mut args = args("--vcpus 4");
        args.socket_dir = unwritable.into();
        let error = plan(&args, &host("0")).unwrap_err().to_string();
        assert!(
            error.ends_with("write an absolute path of printable characters"),
            "{error}"
        );
    }
    let dir = format!("/{}", "x".repeat(100));
    let error = plan(&args(&format!("--vcpus 4 --socket-dir {dir}")), &host("0")).unwrap_err();
    assert!(error.to_string().contains("at most 107"), "{error}");
}

#[test]
fn clap_accepts_the_description_and_refuses_flags_that_exclude_each_other() {
    Line::command().debug_assert();
    for line in [
        "",
        "--vcpus x",
        "--vcpus 4 --nics 2 --nic name=a",
        "--vcpus 4 --json --print qemu",
        "--vcpus 4 --image-multiqueue maybe",
    ] {
        let words = ["plan"].into_iter().chain(line.split_whitespace());
        assert!(Line::try_parse_from(words).is_err(), "{line}");
    }
}

#[test]
fn policy_decides_the_queue_pairs() {
    for (line, pairs, total) in [
        ("--vcpus 1", vec![1], 6),
        ("--vcpus 4", vec![4], 15),
        ("--vcpus 4 --nova", vec![1], 9),
        ("--vcpus 4 --nova --image-multiqueue yes", vec![4], 15),
        ("--vcpus 4 --flavor-multiqueue 0", vec![1], 9),
        ("--vcpus 4 --max-queues 3", vec![3], 13),
        ("--vcpus 4 --nics 2", vec![4, 4], 25),
        ("--vcpus 4 --other-vectors 0", vec![4], 10),
        ("--vcpus 4 --msix-budget 8", vec![1], 8),
        ("--vcpus 300", vec![49], 200),
        (
            "--vcpus 4 --nic throughput=high --nic throughput=medium --nic throughput=low --nic queues=3",
            vec![4, 2, 1, 3],
            33,
        ),
        ("--vcpus 4 --nics 2 --msix-budget 21", vec![3, 3], 21),
    ] {
        let plan = planned(line);
        let found: Vec<u16> = plan.net_devices.iter().map(|device| device.pairs).collect();
        assert_eq!(found, pairs, "{line}");
        assert_eq!(plan.vectors.total, total, "{line}");
        for device in &plan.net_devices {
            assert_eq!(device.vectors, u32::from(device.pairs) * 2 + 2);
            assert_eq!(device.workers.len(), usize::from(device.pairs));
            let command = device.guest_command.as_deref().unwrap_or(" combined 1");
            assert!(
                command.ends_with(&format!(" combined {}", device.pairs)),
                "{command}"
            );
        }
    }
}

#[test]
fn size_of_the_memory_can_have_a_unit() {
    for (text, mib) in [
        ("512", 512),
        ("512M", 512),
        ("4G", 4096),
        ("2g", 2048),
        ("1T", 1 << 20),
    ] {
        let plan = planned(&format!("--vcpus 1 --memory {text}"));
        assert_eq!(plan.memory_mib, mib, "{text}");
    }
}

#[test]
fn generated_names_and_addresses_are_reproducible() {
    let first = planned("--vcpus 2 --nics 3 --name web");
    assert_eq!(first, planned("--vcpus 2 --nics 3 --name web"));
    let other = planned("--vcpus 2 --nics 3 --name mail");
    let devices = || first.net_devices.iter().chain(&other.net_devices);
    let macs: BTreeSet<&str> = devices().map(|device| device.mac.as_str()).collect();
    assert_eq!(macs.len(), 6, "{macs:?}");
    assert!(macs.iter().all(|mac| mac.starts_with("52:54:00:")));
    let uplinks: Vec<&str> = devices().map(|device| device.uplink.as_str()).collect();
    assert_eq!(uplinks[0], "tap:web-net0");
    assert_eq!(uplinks[5], "tap:mail-net2");
    assert_eq!(
        first.net_devices[1].socket,
        PathBuf::from("/run/virtionetd/guests/web/net1.sock")
    );
    // The name of a TAP has at most 15 bytes.
    let long =
        planned("--vcpus 2 --name a-guest-with-a-name --nic bridge=br0 --nic name=lan,tap=t");
    assert_eq!(long.net_devices[0].uplink, "tap:tap0,bridge=br0");
    assert_eq!(long.net_devices[1].uplink, "tap:t");
}

/// Flags, the CPUs that the vCPUs are pinned to, the CPUs of each worker, and the numbers of CPUs
/// that the workers use when idle and under load, on a host with CPUs 0-7.
const PLACEMENTS: [(&str, &str, &str, u32, u32); 13] = [
    ("--vcpus 4", "0,1,2,3", "0 1 2 3", 0, 4),
    ("--vcpus 4 --cpus 7,3-5", "7,3,4,5", "7 3 4 5", 0, 4),
    ("--vcpus 4 --cpus 2,5", "2,5,2,5", "2 5 2 5", 0, 2),
    (
        "--vcpus 4 --cpus 4-7 --nic queues=2",
        "4,5,6,7",
        "4 6",
        0,
        2,
    ),
    ("--vcpus 2 --cpus none", "", "0-7 0-7", 0, 2),
    ("--vcpus 2 --cpus none --poll always", "", "0 1", 2, 2),
    ("--vcpus 9", "", "0-7 0-7 0-7 0-7 0-7 0-7 0-7 0-7 0-7", 0, 8),
    ("--vcpus 2 --placement list:6-7", "0,1", "6 7", 0, 2),
    ("--vcpus 2 --placement none", "0,1", "0-7 0-7", 0, 2),
    // A worker that polls does not run on the CPUs of vCPUs.
    ("--vcpus 2 --poll always", "0,1", "2 3", 2, 2),
    ("--vcpus 2 --poll adaptive", "0,1", "2 3", 0, 2),
    (
        "--vcpus 8 --poll always --nic queues=2",
        "0,1,2,3,4,5,6,7",
        "0 4",
        0,
        2,
    ),
    (
        "--vcpus 2 --poll always --placement same",
        "0,1",
        "0 1",
        2,
        2,
    ),
];

#[test]
fn workers_have_the_placement_of_the_daemons_planner() {
    for (line, pins, workers, idle, busy) in PLACEMENTS {
        let plan = planned(line);
        let found: Vec<String> = plan.pins.iter().flatten().map(u32::to_string).collect();
        assert_eq!(found.join(","), pins, "{line}");
        assert_eq!(plan.pins.is_none(), pins.is_empty(), "{line}");
        let device = &plan.net_devices[0];
        let cpus = |worker: &WorkerPlan| worker.cpus.iter().copied().collect::<CpuSet>();
        let found: Vec<String> = device.workers.iter().map(|w| cpus(w).to_string()).collect();
        assert_eq!(found.join(" "), workers, "{line}");
        assert_eq!(plan.worker_cpus, WorkerCpus { idle, busy }, "{line}");
        for (pair, worker) in (0..).zip(&device.workers) {
            assert_eq!(worker.pair, pair);
            assert!(
                !worker.vcpus.is_empty() && !worker.why.is_empty(),
                "{worker:?}"
            );
        }
    }
}

#[test]
fn notes_report_cpus_that_are_shared_unused_or_contended() {
    for (line, expected) in [
        ("--vcpus 4 --cpus 2,5", "4 vCPUs share CPUs 2,5"),
        ("--vcpus 2 --cpus 5,5", "2 vCPUs share CPU 5"),
        ("--vcpus 2 --cpus 3-6", "no vCPU is pinned to CPUs 5-6"),
        ("--vcpus 9", "the vCPUs float"),
        (
            "--vcpus 4",
            "the vCPUs take the first CPUs that the host has, 0-3:",
        ),
        (
            "--vcpus 2 --cpus 0-1 --nics 4 --poll always",
            "workers of several network devices poll on CPUs 2-3",
        ),
    ] {
        let notes = planned(line).notes;
        assert!(notes[0].starts_with(expected), "{line}: {notes:?}");
    }
    for line in ["--vcpus 4 --cpus 0-3", "--vcpus 2 --cpus 0-1 --nics 2"] {
        assert_eq!(planned(line).notes, [""; 0], "{line}");
    }
}

/// A host with two NUMA nodes of four CPUs. CPU 1 is isolated and CPU 7 is offline.
fn two_nodes(dir: &Dir) -> TargetHost {
    dir.file("devices/system/cpu/online", "0-6\n");
    dir.file("devices/system/cpu/isolated", "1\n");
    for (node, cpus) in [(0, "0-3\n"), (1, "4-7\n")] {
        dir.file(&format!("devices/system/node/node{node}/cpulist"), cpus);
    }
    dir.file("devices/system/node/online", "0-1\n");
    TargetHost {
        cpus: "0-7".parse().unwrap(),
        topology: Topology::read(&dir.0),
    }
}

#[test]
fn vcpus_and_memory_are_on_one_node_where_it_has_enough_cpus() {
    let dir = Dir::new("nodes");
    let host = two_nodes(&dir);
    for (line, pins, node) in [
        ("--vcpus 3", Some(vec![0, 2, 3]), Some(0)),
        ("--vcpus 4", Some(vec![0, 2, 3, 4]), None),
        ("--vcpus 6", Some(vec![0, 2, 3, 4, 5, 6]), None),
        ("--vcpus 7", None, None),
        ("--vcpus 2 --cpus 5-6", Some(vec![5, 6]), Some(1)),
        ("--vcpus 2 --cpus 3-4", Some(vec![3, 4]), None),
        ("--vcpus 2 --cpus none", None, None),
    ] {
        let plan = plan(&args(line), &host).unwrap();
        assert_eq!((&plan.pins, plan.memory_node), (&pins, node), "{line}");
        let commands = plan.commands();
        let bound = node.map(|node| format!(",host-nodes={node},policy=bind"));
        let memory = commands
            .qemu
            .iter()
            .find(|word| word.starts_with("memory-backend"))
            .unwrap();
        assert_eq!(memory.contains("host-nodes"), node.is_some(), "{memory}");
        assert!(memory.ends_with(&bound.unwrap_or_default()), "{memory}");
        assert_eq!(commands.libvirt.contains("<numatune>"), node.is_some());
    }
}

/// The words that a shell passes to `program`, which the command `text` runs.
fn shell_words(program: &str, text: &str) -> Vec<String> {
    let script = format!("{program}() {{ printf '%s\\0' {program} \"$@\"; }}\n{text}");
    let out = Process::new("bash").args(["-c", &script]).output().unwrap();
    assert!(out.status.success(), "{script}");
    let text = String::from_utf8(out.stdout).unwrap();
    text.split_terminator('\0').map(str::to_owned).collect()
}

/// A directory whose name has the special characters of shells, XML, QEMU and `--device`.
const SPECIAL_DIR: &str = "/tmp/a b,'c'$d&<e>\"f\"=;*\\g";

#[test]
fn command_that_is_pasted_into_a_shell_has_the_planned_words() {
    for nics in 1..=2 {
        let mut args = args(&format!("--vcpus 2 --nics {nics} --packed --poll always"));
        args.socket_dir = SPECIAL_DIR.into();
        let plan = plan(&args, &host("0-7")).unwrap();
        let commands = plan.commands();
        for (part, program, words) in [
            (OutputPart::Qemu, "qemu-system-x86_64", commands.qemu),
            (OutputPart::Virtionetd, "virtionetd", commands.virtionetd),
            (
                OutputPart::VirtionetdClient,
                "virtionetd",
                commands.virtionetd_client,
            ),
        ] {
            assert_eq!(
                shell_words(program, &text::render(&plan, part)),
                words,
                "{part:?}"
            );
        }
    }
    for (word, quoted) in [
        ("", "''"),
        ("queues=4", "queues=4"),
        ("=ls", "'=ls'"),
        ("~", "'~'"),
        ("a b", "'a b'"),
    ] {
        assert_eq!(shell::quote(word), quoted);
    }
}

fn config(words: &[String]) -> Config {
    match cli::parse(words.iter().map(Into::into)) {
        Ok(Command::Serve(config)) => *config,
        other => panic!("{words:?}: {other:?}"),
    }
}

#[test]
fn daemon_parses_its_command_line_and_file_as_planned() {
    let dir = Dir::new("config");
    for line in [
        "--vcpus 4",
        "--vcpus 4 --nics 2 --poll adaptive --poll-us 7 --placement list:0-1,4",
        "--vcpus 4 --nic bridge=br0,throughput=medium --nic uplink=switch:lan,,tap=t9 --placement none",
    ] {
        let mut args = args(line);
        args.socket_dir = SPECIAL_DIR.into();
        let plan = plan(&args, &host("0-7")).unwrap();
        let commands = plan.commands();
        let listens = config(&commands.virtionetd);
        let connects = config(&commands.virtionetd_client);
        assert_eq!(
            listens.control.as_ref().map(|socket| &socket.path),
            Some(&plan.control)
        );
        assert_eq!(listens.devices.len(), plan.net_devices.len());
        for (device, (listening, connecting)) in plan
            .net_devices
            .iter()
            .zip(listens.devices.iter().zip(&connects.devices))
        {
            assert_eq!(
                (&listening.name, &listening.uplink.to_string()),
                (&device.device, &device.uplink)
            );
            assert_eq!(listening.queues.max(), device.pairs);
            let Socket::Listen { path, .. } = &listening.socket else {
                panic!("{listening:?}")
            };
            assert_eq!(path, &device.socket);
            assert_eq!(
                connecting.socket,
                Socket::Connect {
                    path: device.socket.clone()
                }
            );
            assert_eq!(
                (&listening.placement, listening.poll),
                (&connecting.placement, connecting.poll)
            );
        }
        dir.file("virtionetd.toml", &commands.config);
        let file = dir.0.join("virtionetd.toml");
        let words = [
            "virtionetd".into(),
            "--config".into(),
            file.display().to_string(),
        ];
        let from_file = config(&words);
        assert_eq!(from_file.file, Some(file));
        let same = Config {
            file: None,
            ..from_file
        };
        assert_eq!(same, listens, "{}", commands.config);
    }
}

/// Each element of `xml` as `ELEMENT ATTRIBUTE=VALUE ...`.
fn elements(xml: &str) -> Vec<String> {
    let mut reader = Reader::from_str(xml);
    let mut found = Vec::new();
    loop {
        match reader.read_event().unwrap() {
            Event::Start(tag) | Event::Empty(tag) => {
                let mut line = tag.name().as_ref().to_owned();
                for attribute in tag.attributes() {
                    let attribute = attribute.unwrap();
                    let value = quick_xml::escape::unescape(&attribute.value).unwrap();
                    line += &format!(" {}={value}", attribute.key.as_ref());
                }
                found.push(line);
            }
            Event::Eof => return found,
            _ => {}
        }
    }
}

#[test]
fn domain_has_the_values_of_the_plan() {
    let mut args = args("--vcpus 2 --cpus 3,5 --nic queues=2 --nic queues=1,mac=52:54:00:00:00:07");
    args.socket_dir = SPECIAL_DIR.into();
    (args.packed, args.rx_queue_size) = (true, Some(1024));
    let xml = plan(&args, &host("0-7")).unwrap().commands().libvirt;
    let found = elements(&xml);
    for expected in [
        "domain type=kvm",
        "memory unit=MiB",
        "source type=memfd",
        "access mode=shared",
        "vcpupin vcpu=0 cpuset=3",
        "vcpupin vcpu=1 cpuset=5",
        "emulatorpin cpuset=3,5",
        &format!("source type=unix path={SPECIAL_DIR}/guests/guest/net0.sock mode=server"),
        &format!("source type=unix path={SPECIAL_DIR}/guests/guest/net1.sock mode=server"),
        "driver queues=2 rx_queue_size=1024 packed=on",
        "driver rx_queue_size=1024 packed=on",
        "mac address=52:54:00:00:00:07",
    ] {
        assert!(
            found.iter().any(|line| line == expected),
            "{expected} is not in {found:#?}"
        );
    }
    let plain = elements(
        &planned("--vcpus 2 --cpus none --accel tcg")
            .commands()
            .libvirt,
    );
    assert_eq!(plain[0], "domain type=qemu");
    for absent in ["cputune", "cpu mode=host-passthrough", "numatune"] {
        assert!(plain.iter().all(|line| line != absent), "{plain:#?}");
    }
}

#[test]
fn sockets_are_in_directories_that_no_other_guest_can_write_to() {
    let plan = planned("--vcpus 2 --nics 2 --name web");
    assert_eq!(
        plan.control,
        PathBuf::from("/run/virtionetd/control/web.ctl")
    );
    for device in &plan.net_devices {
        assert!(device.socket.starts_with("/run/virtionetd/guests/web"));
    }
    let text = text::render(&plan, OutputPart::All);
    let made: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("install "))
        .collect();
    assert_eq!(
        made,
        [
            "install -d /run/virtionetd/guests/web",
            "install -d -m 700 /run/virtionetd/control",
            "install -d -g kvm -m 2770 /run/virtionetd/guests/web",
            "install -d -m 700 /run/virtionetd/control",
        ]
    );
}

#[test]
fn command_line_of_qemu_has_the_values_of_the_plan() {
    let line = "--vcpus 4 --name web --memory 2G --tx-queue-size 512 --nic queues=3 --nic name=mgmt,throughput=low";
    let plan = planned(line);
    let words = plan.commands().qemu;
    let (lan, mgmt) = (&plan.net_devices[0].mac, &plan.net_devices[1].mac);
    for expected in [
        "guest=web,debug-threads=on",
        "memory-backend-memfd,id=mem,size=2048M,share=on",
        "socket,id=net0-socket,path=/run/virtionetd/guests/web/net0.sock,reconnect-ms=1000",
        "vhost-user,id=net0,chardev=net0-socket,queues=3",
        &format!("virtio-net-pci,netdev=net0,mac={lan},vectors=8,mq=on,tx_queue_size=512"),
        "vhost-user,id=mgmt,chardev=mgmt-socket,queues=1",
        &format!("virtio-net-pci,netdev=mgmt,mac={mgmt},vectors=4,tx_queue_size=512"),
    ] {
        assert!(
            words.iter().any(|word| word == expected),
            "{expected} is not in {words:#?}"
        );
    }
    let pin = text::render(&plan, OutputPart::Pin);
    for (vcpu, cpu) in plan.pins.unwrap().iter().enumerate() {
        assert!(
            pin.contains(&format!("\"CPU {vcpu}/\"*) taskset -pc {cpu} ")),
            "{pin}"
        );
    }
    assert_eq!(
        text::render(&planned("--vcpus 4 --cpus none"), OutputPart::Pin),
        ""
    );
}

#[test]
fn interrupts_reach_more_than_255_vcpus() {
    for (vcpus, accel, needs_x2apic) in
        [(255, "tcg", false), (256, "tcg", true), (300, "kvm", true)]
    {
        let line = format!("--vcpus {vcpus} --accel {accel} --cpus none");
        let commands = planned(&line).commands();
        let qemu = commands.qemu.join(" ");
        assert_eq!(
            qemu.contains(" -device intel-iommu,intremap=on,eim=on"),
            needs_x2apic,
            "{qemu}"
        );
        assert_eq!(
            qemu.contains("kernel-irqchip=split"),
            needs_x2apic,
            "{qemu}"
        );
        assert_eq!(
            qemu.contains("x2apic=on"),
            needs_x2apic && accel == "tcg",
            "{qemu}"
        );
        let found = elements(&commands.libvirt);
        let has = |line: &str| found.iter().any(|found| found == line);
        assert_eq!(has("iommu model=intel"), needs_x2apic, "{found:?}");
        assert_eq!(has("driver intremap=on eim=on"), needs_x2apic, "{found:?}");
        assert_eq!(has("ioapic driver=qemu"), needs_x2apic, "{found:?}");
        assert_eq!(
            has("feature policy=require name=x2apic"),
            needs_x2apic && accel == "tcg"
        );
    }
}

#[test]
fn json_and_text_give_the_same_numbers() {
    let plan = planned("--vcpus 4 --nic queues=3 --nic throughput=low --poll always");
    let json: serde_json::Value = serde_json::from_str(&plan.to_json()).unwrap();
    let text = text::render(&plan, OutputPart::All);
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    for device in json["cards"].as_array().unwrap() {
        let (pairs, vectors) = (number(&device["pairs"]), number(&device["vectors"]));
        let plural = if pairs == 1 { "" } else { "s" };
        let name = device["name"].as_str().unwrap();
        let line = format!(
            "network device {name}: {pairs} queue pair{plural}, {vectors} interrupt vectors;"
        );
        assert!(text.contains(&line), "{line}\n{text}");
        for worker in device["workers"].as_array().unwrap() {
            let line = format!(
                "pair {} -> vCPU {} -> worker {} on CPU {}: ",
                worker["pair"],
                if pairs == 1 {
                    "0-3".into()
                } else {
                    cpu_list(&worker["vcpus"])
                },
                worker["name"].as_str().unwrap(),
                cpu_list(&worker["cpus"]),
            );
            assert!(text.contains(&line), "{line}\n{text}");
        }
    }
    let vectors = &json["vectors"];
    let line = format!(
        "interrupt vectors: {} of {} ({} for network devices, {} for other devices)",
        vectors["total"], vectors["budget"], vectors["cards"], vectors["other"]
    );
    assert!(text.contains(&line), "{line}\n{text}");
    let commands = &json["commands"];
    assert_eq!(commands["libvirt"], plan.commands().libvirt);
    assert!(text.contains(commands["libvirt"].as_str().unwrap()));
    assert_eq!(commands["qemu"][0], "qemu-system-x86_64");
    assert_eq!(commands["virtionetd"][0], "virtionetd");
}

fn cpu_list(list: &serde_json::Value) -> String {
    let numbers = list.as_array().unwrap().iter();
    let set: CpuSet = numbers
        .map(|n| u32::try_from(n.as_u64().unwrap()).unwrap())
        .collect();
    set.to_string()
}

#[test]
fn each_part_can_be_printed_alone() {
    let mut out = Vec::new();
    for (part, start) in [
        ("queues", "guest guest: 2 vCPUs"),
        ("qemu", "qemu-system-x86_64 "),
        ("libvirt", "<domain "),
        ("virtionetd", "virtionetd --control "),
        ("virtionetd-client", "virtionetd --control "),
        ("config", "control = "),
        ("pin", "for task in "),
        ("all", "guest guest: 2 vCPUs"),
    ] {
        out.clear();
        let line = format!("--vcpus 2 --cpus 8-9 --host-cpus 8-15 --print {part}");
        run(&args(&line), &mut out).unwrap();
        let text = std::str::from_utf8(&out).unwrap();
        assert!(
            text.starts_with(start) && text.ends_with('\n'),
            "{part}: {text}"
        );
    }
}
