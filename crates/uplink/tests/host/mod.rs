//! The host of a test: a network and mount namespace for one thread, guest memory, and a raw socket
//! that observes the frames of a TAP independently.
#![allow(unsafe_code, dead_code)]

use std::ffi::c_int;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use virtionet_uplink::tap::{Tap, TapConfig};
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{Received, TxFrame, Uplink, UplinkError, UplinkQueue};
use virtionet_virtqueue::memory::{GuestMemory, GuestSlice, MappedRegion, RegionSpec, SegmentList};

/// An EtherType for local experiments.
pub const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// A user without privileges.
pub const NOBODY: u32 = 65534;
const TIMEOUT: Duration = Duration::from_secs(5);

/// Opens the TAP that `spec` names: `NAME[,bridge=BR]`.
pub fn open_tap(spec: &str) -> Result<Arc<dyn Uplink>, UplinkError> {
    let (name, bridge) = match spec.split_once(",bridge=") {
        Some((name, bridge)) => (name, Some(bridge.to_owned())),
        None => (spec, None),
    };
    let name = name.to_owned();
    Ok(Arc::new(Tap::open(&TapConfig { name, bridge })?))
}

/// Runs `test` on a thread in namespaces of its own, as root.
pub fn in_namespaces(test: impl FnOnce() + Send + 'static) {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("skipped: namespaces and TAPs need root");
        return;
    }
    let outcome = thread::spawn(|| {
        // SAFETY: takes no pointer; the new namespaces are this thread's and its children's.
        let rc = unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        run("mount --make-rprivate /");
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").ok();
        test();
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// Replaces /dev/net by an empty directory, in this thread's namespace.
pub fn hide_tun() {
    run("mount -t tmpfs none /dev/net");
}

/// Makes /dev/net/tun accessible to every user, in this thread's namespace.
pub fn share_tun() {
    hide_tun();
    run("mknod -m 666 /dev/net/tun c 10 200");
}

/// Drops the privileges of this thread only; the C library's functions would drop those of all
/// threads.
pub fn become_nobody() {
    let id = libc::c_long::from(NOBODY);
    // SAFETY: no pointer is read: the list of groups is empty.
    let rcs = unsafe {
        [
            libc::syscall(libc::SYS_setgroups, 0_usize, 0_usize),
            libc::syscall(libc::SYS_setresgid, id, id, id),
            libc::syscall(libc::SYS_setresuid, id, id, id),
        ]
    };
    assert_eq!(rcs, [0; 3]);
}

/// Runs a command in this thread's namespaces; returns its output.
pub fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Repeats `ask` until it returns a value. A child that another thread starts has this process's
/// files open for a moment, including TAPs that were closed.
pub fn eventually<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        match ask() {
            Some(answer) => return answer,
            None => assert!(Instant::now() < deadline, "no value within the time limit"),
        }
        thread::sleep(Duration::from_millis(1));
    }
}

pub fn link(name: &str) -> String {
    run(&format!("ip -d link show {name}"))
}

/// Received and transmitted packets of an interface, as the kernel counts them.
pub fn kernel_packets(name: &str) -> (u64, u64) {
    let table = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix(&format!("{name}:")))
        .unwrap();
    let fields: Vec<u64> = line
        .split_whitespace()
        .map(|field| field.parse().unwrap())
        .collect();
    (fields[1], fields[9])
}

/// The memory of a guest, and the buffers in it.
pub struct Guest {
    memory: Arc<GuestMemory>,
    segments: SegmentList,
    used: u64,
    file: File,
}

impl Guest {
    pub fn new() -> Self {
        let size = 1 << 20;
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(std::env::temp_dir())
            .unwrap();
        file.set_len(size).unwrap();
        let spec = RegionSpec {
            guest_addr: 0,
            size,
            user_addr: 0,
            file_offset: 0,
        };
        let region = MappedRegion::map(spec, file.try_clone().unwrap()).unwrap();
        let memory = Arc::new(GuestMemory::new(vec![Arc::new(region)]).unwrap());
        Self {
            segments: SegmentList::new(Arc::clone(&memory)),
            memory,
            used: 0,
            file,
        }
    }

    /// Adds a buffer of this many bytes, which does not touch the last one.
    pub fn buffer(&mut self, len: usize) -> u64 {
        let at = self.used;
        self.segments.push(at, u32::try_from(len).unwrap()).unwrap();
        self.used += u64::try_from(len).unwrap() + 5;
        at
    }

    /// Adds `bytes` in segments of at most `cut` bytes.
    pub fn put(&mut self, bytes: &[u8], cut: usize) {
        for segment in bytes.chunks(cut) {
            let at = self.buffer(segment.len());
            assert!(self.memory.write(at, segment));
        }
    }

    /// Truncates the file behind the mapping, so that the memory is no longer there.
    pub fn cut_short(&self) {
        self.file.set_len(0).unwrap();
    }

    pub fn slices(&self) -> &[GuestSlice<'_>] {
        self.segments.slices(0, self.segments.len())
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for slice in self.slices() {
            let mut segment = vec![0; slice.len()];
            slice.copy_to(&mut segment);
            all.extend(segment);
        }
        all
    }
}

/// Transmits one frame in segments of `cut` bytes with `header`.
pub fn send(queue: &dyn UplinkQueue, header: VnetHeader, frame: &[u8], cut: usize) -> VringStats {
    let mut guest = Guest::new();
    guest.put(frame, cut);
    let stats = VringStats::default();
    let frame = TxFrame {
        header,
        payload: guest.slices(),
        len: frame.len(),
    };
    queue.transmit(&[frame], &stats);
    stats
}

/// Receives into buffers of these lengths; returns the outcome and the bytes of a frame.
pub fn receive(queue: &dyn UplinkQueue, buffers: &[usize]) -> (Received, Vec<u8>) {
    let mut guest = Guest::new();
    for &len in buffers {
        guest.buffer(len);
    }
    let received = queue.receive(guest.slices(), &mut [0]);
    let mut bytes = guest.bytes();
    if let Received::Frame(len) = received {
        bytes.truncate(len);
    }
    (received, bytes)
}

/// Waits for one frame of at most 2 KiB.
pub fn wait_for_frame(queue: &dyn UplinkQueue) -> Vec<u8> {
    eventually(|| match receive(queue, &[2048]) {
        (Received::Frame(_), bytes) => Some(bytes),
        (Received::Empty, _) => None,
        (received, _) => panic!("{received:?}"),
    })
}

/// Drops all frames that wait in a queue; returns their number.
pub fn drain(queue: &dyn UplinkQueue) -> usize {
    std::iter::from_fn(|| matches!(receive(queue, &[65_600]).0, Received::Frame(_)).then_some(()))
        .count()
}

/// An Ethernet frame of `len` bytes whose payload depends on the offset and on `mark`.
pub fn frame(len: usize, mark: u8) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, mark];
    frame.extend(ETHERTYPE);
    let pattern = (0_u8..251).cycle().map(|byte| byte ^ mark);
    frame.extend(pattern.take(len - 14));
    frame
}

/// A frame with a UDP datagram over IPv4; `from` and `to` are port numbers.
pub fn datagram(from: u16, to: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 8, 0];
    let address = |port: u16| [10, 0, 0, u8::try_from(port & 0xff).unwrap()];
    frame.extend([0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend(address(from));
    frame.extend(address(to));
    frame.extend(from.to_be_bytes());
    frame.extend(to.to_be_bytes());
    frame.extend([0, 12, 0, 0, 1, 2, 3, 4]);
    frame
}

/// A raw socket on one interface.
pub struct PacketSocket(File);

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

impl PacketSocket {
    pub fn on(name: &str) -> Self {
        Self::with_header(name, false)
    }

    /// With `header`, frames are sent with a virtio-net header of 10 bytes in front.
    pub fn with_header(name: &str, header: bool) -> Self {
        let index = link(name).split(':').next().unwrap().parse().unwrap();
        let protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, c_int::from(protocol)) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the descriptor was opened just now and has no other owner.
        let socket = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let address = libc::sockaddr_ll {
            sll_family: u16::try_from(libc::AF_PACKET).unwrap(),
            sll_protocol: protocol,
            sll_ifindex: index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let len = u32::try_from(size_of_val(&address)).unwrap();
        // SAFETY: the address is alive and of the length that is given.
        let rc = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        if header {
            let yes: c_int = 1;
            // SAFETY: the option is one int, which is alive, and its length is given.
            let rc = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_PACKET,
                    libc::PACKET_VNET_HDR,
                    (&raw const yes).cast(),
                    u32::try_from(size_of_val(&yes)).unwrap(),
                )
            };
            assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        }
        Self(socket)
    }

    pub fn send(&self, frame: &[u8]) {
        assert_eq!((&self.0).write(frame).unwrap(), frame.len());
    }

    /// Returns a frame, if one waits.
    pub fn poll(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 70_000];
        match (&self.0).read(&mut buffer) {
            Ok(len) => Some(buffer[..len].to_vec()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => None,
            Err(e) => panic!("{e}"),
        }
    }

    /// Waits for the next frame of [`ETHERTYPE`].
    pub fn next(&self) -> Vec<u8> {
        let mut buffer = vec![0; 70_000];
        eventually(|| match (&self.0).read(&mut buffer) {
            Ok(len) if buffer[12..14] == ETHERTYPE => Some(buffer[..len].to_vec()),
            Ok(_) => None,
            Err(e) if e.kind() == ErrorKind::WouldBlock => None,
            Err(e) => panic!("{e}"),
        })
    }
}

/// A virtio-net header of 10 bytes and 4,000 bytes of TCP over IPv4 with a gso_size of 1,000.
pub fn large_segment() -> Vec<u8> {
    let mut packet = vec![1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0];
    packet.extend([2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 8, 0]);
    packet.extend([0x45, 0, 0x0f, 0xc8, 0, 1, 0x40, 0, 64, 6, 0, 0]);
    packet.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend([
        0, 80, 0, 90, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ]);
    packet.resize(10 + 54 + 4000, 0x55);
    packet
}
