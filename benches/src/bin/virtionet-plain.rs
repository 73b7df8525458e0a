//! A pair of connected virtio-net ports on the crates vhost-user-backend and virtio-queue, used as
//! their documentation suggests. The benchmarks compare virtionetd with this program; it has no
//! other purpose.
//!
//! A kick wakes the thread of the queue pair. The thread dequeues the available chains, reads each
//! frame into a buffer, writes it to a chain of the other port's receiveq, and marks both chains as
//! used.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MQ;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};
use virtionet_tests::sched;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringRwLock<Memory>;

const QUEUE_SIZE: usize = 1024;
/// Byte range of num_buffers in the virtio-net header (virtio 1.3 §5.1.6).
const NUM_BUFFERS_RANGE: std::ops::Range<usize> = 10..12;
/// The event number of the receiveq within a queue pair.
const RX_EVENT: u16 = 0;

/// Forwards frames between two virtio-net ports, on vhost-user-backend and virtio-queue.
#[derive(Debug, Parser)]
struct Cli {
    /// The CPU that all threads run on
    cpu: usize,
    /// Number of queue pairs of each port, at most 32
    queue_pairs: usize,
    /// The socket of the first port
    first: PathBuf,
    /// The socket of the second port
    second: PathBuf,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    sched::pin(0, cli.cpu)?;
    let table = Arc::new(ReceiveqTable::default());
    let spawn = |number, socket: PathBuf| {
        let table = Arc::clone(&table);
        thread::spawn(move || serve(number, cli.queue_pairs, table, &socket))
    };
    let ports = [spawn(0, cli.first), spawn(1, cli.second)];
    for port in ports {
        port.join().map_err(|_| anyhow!("a port panicked"))??;
    }
    Ok(())
}

/// Serves one front-end on `socket` until the front-end disconnects.
fn serve(
    number: usize,
    queue_pairs: usize,
    table: Arc<ReceiveqTable>,
    socket: &Path,
) -> Result<()> {
    let memory = Memory::new(GuestMemoryMmap::new());
    let port = Arc::new(Port {
        number,
        queue_pairs,
        memory: memory.clone(),
        event_idx: AtomicBool::new(false),
        table,
    });
    let name = format!("port{number}");
    let mut daemon = VhostUserDaemon::new(name, port, memory).map_err(|e| anyhow!("{e}"))?;
    daemon
        .serve(socket)
        .map_err(|e| anyhow!("{e}"))
        .with_context(|| format!("port {number}"))
}

/// The receiveqs that the ports have registered, by port and queue pair.
#[derive(Default)]
struct ReceiveqTable(Mutex<HashMap<(usize, usize), PeerReceiveq>>);

/// A receiveq and the guest memory that contains it.
#[derive(Clone)]
struct PeerReceiveq {
    vring: Vring,
    memory: Memory,
}

impl ReceiveqTable {
    fn set(&self, key: (usize, usize), receiveq: PeerReceiveq) {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.insert(key, receiveq);
    }

    fn get(&self, key: (usize, usize)) -> Option<PeerReceiveq> {
        let map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.get(&key).cloned()
    }
}

struct Port {
    number: usize,
    queue_pairs: usize,
    memory: Memory,
    event_idx: AtomicBool,
    table: Arc<ReceiveqTable>,
}

impl VhostUserBackend for Port {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queue_pairs * 2
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_NET_F_MQ
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        Ok(())
    }

    /// One thread for each queue pair.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queue_pairs)
            .map(|pair| 0b11 << (2 * pair))
            .collect()
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        pair: usize,
    ) -> io::Result<()> {
        let [rx, tx] = vrings else {
            return Err(io::Error::other("a queue pair must have two vrings"));
        };
        let receiveq = PeerReceiveq {
            vring: rx.clone(),
            memory: self.memory.clone(),
        };
        self.table.set((self.number, pair), receiveq);
        if event == RX_EVENT {
            return Ok(());
        }
        match self.table.get((1 - self.number, pair)) {
            Some(receiveq) => self.forward(tx, &receiveq),
            // The other port has not started its vrings yet. A later kick finds these chains.
            None => Ok(()),
        }
    }
}

impl Port {
    /// Forwards the available frames until the transmitq is empty.
    fn forward(&self, tx: &Vring, to: &PeerReceiveq) -> io::Result<()> {
        if !self.event_idx.load(Ordering::Relaxed) {
            return self.forward_burst(tx, to);
        }
        loop {
            tx.disable_notification().map_err(io::Error::other)?;
            self.forward_burst(tx, to)?;
            if !tx.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }

    fn forward_burst(&self, tx: &Vring, to: &PeerReceiveq) -> io::Result<()> {
        let memory = self.memory.memory();
        let chains: Vec<_> = tx
            .get_mut()
            .get_queue_mut()
            .iter(memory.clone())
            .map_err(io::Error::other)?
            .collect();
        let mut frame = Vec::new();
        for chain in chains {
            let head = chain.head_index();
            frame.clear();
            let mut reader = chain.reader(&memory).map_err(io::Error::other)?;
            reader.read_to_end(&mut frame)?;
            deliver(&mut frame, to)?;
            tx.add_used(head, 0).map_err(io::Error::other)?;
        }
        call_if_needed(tx)?;
        call_if_needed(&to.vring)
    }
}

/// Writes a frame to a chain of the receiveq. Without an available chain, the frame is lost.
fn deliver(frame: &mut [u8], to: &PeerReceiveq) -> io::Result<()> {
    if let Some(num_buffers) = frame.get_mut(NUM_BUFFERS_RANGE) {
        num_buffers.copy_from_slice(&1_u16.to_le_bytes());
    }
    let memory = to.memory.memory();
    let chain = to
        .vring
        .get_mut()
        .get_queue_mut()
        .pop_descriptor_chain(memory.clone());
    let Some(chain) = chain else {
        return Ok(());
    };
    let head = chain.head_index();
    let mut writer = chain.writer(&memory).map_err(io::Error::other)?;
    writer.write_all(frame)?;
    let written = u32::try_from(writer.bytes_written()).map_err(io::Error::other)?;
    to.vring.add_used(head, written).map_err(io::Error::other)
}

fn call_if_needed(vring: &Vring) -> io::Result<()> {
    match vring.needs_notification().map_err(io::Error::other)? {
        true => vring.signal_used_queue(),
        false => Ok(()),
    }
}
