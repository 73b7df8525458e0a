//! The driver, which is the same for both devices. It writes every descriptor and every entry of
//! the available ring in advance, so that it makes chains available with one store of the available
//! index.

use anyhow::{Context, Result};
use virtionet_guest::driver::{DriverVirtqueueConfig, VirtqueueAddresses};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::split::{
    SplitDescriptor, SplitDriverVirtqueue, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
};

use super::case::ChainShape;

/// Size of the virtqueue.
pub const QUEUE_SIZE: u16 = 256;
/// Bytes of each chain, which has a header and a frame.
pub const CHAIN_BYTES: usize = 12 + 1514;

const HEADER_LEN: u32 = 12;
const FRAME_LEN: u32 = 1514;
/// Bytes from the buffer of one chain to that of the next.
const STRIDE: u64 = 2048;

/// A driver that only makes chains available.
#[derive(Debug)]
pub struct ChainDriver {
    virtqueue: SplitDriverVirtqueue,
    ram: GuestRam,
    next: u16,
}

impl ChainDriver {
    /// Creates a virtqueue with all descriptors and entries.
    ///
    /// # Errors
    /// When the guest memory cannot be created.
    pub fn new(shape: ChainShape, event_idx: bool) -> Result<Self> {
        let ram = GuestRam::new(2 << 20)?;
        let config = DriverVirtqueueConfig {
            size: QUEUE_SIZE,
            event_idx,
            packed: false,
            start: 0,
        };
        let virtqueue = SplitDriverVirtqueue::new(&ram, config)?;
        let driver = Self {
            virtqueue,
            ram,
            next: 0,
        };
        driver.write_chains(shape)?;
        Ok(driver)
    }

    fn write_chains(&self, shape: ChainShape) -> Result<()> {
        let buffers = self.ram.alloc(STRIDE * u64::from(QUEUE_SIZE), 4096)?;
        let chains = match shape {
            ChainShape::Direct => QUEUE_SIZE / 2,
            ChainShape::Single | ChainShape::Indirect => QUEUE_SIZE,
        };
        for n in 0..chains {
            let buffer = buffers + STRIDE * u64::from(n);
            match shape {
                ChainShape::Single => {
                    let descriptor = SplitDescriptor::new(buffer, HEADER_LEN + FRAME_LEN, 0, 0);
                    self.virtqueue.set_descriptor(n, descriptor);
                }
                ChainShape::Direct => {
                    for (i, descriptor) in header_and_frame(buffer, 2 * n).into_iter().enumerate() {
                        self.virtqueue
                            .set_descriptor(2 * n + u16::try_from(i)?, descriptor);
                    }
                }
                ChainShape::Indirect => {
                    let table = self.ram.alloc_area(32, 64)?;
                    for (i, descriptor) in header_and_frame(buffer, 0).into_iter().enumerate() {
                        descriptor.store(&table, 16 * i);
                    }
                    let descriptor =
                        SplitDescriptor::new(table.addr(), 32, VRING_DESC_F_INDIRECT, 0);
                    self.virtqueue.set_descriptor(n, descriptor);
                }
            }
        }
        for entry in 0..QUEUE_SIZE {
            let head = match shape {
                ChainShape::Direct => entry % chains * 2,
                ChainShape::Single | ChainShape::Indirect => entry,
            };
            self.virtqueue.set_avail_entry(entry, head);
        }
        Ok(())
    }

    /// Makes `count` more chains available.
    #[inline(always)]
    pub fn offer(&mut self, count: u16) {
        self.next = self.next.wrapping_add(count);
        self.virtqueue.set_avail_index(self.next);
    }

    /// Returns the used index and the last used element.
    #[must_use]
    pub fn used(&self) -> (u16, (u32, u32)) {
        let index = self.virtqueue.used_index();
        (index, self.virtqueue.used_element(index.wrapping_sub(1)))
    }

    /// The guest memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The guest addresses of the parts of the virtqueue.
    #[must_use]
    pub fn addresses(&self) -> VirtqueueAddresses {
        self.virtqueue.addresses()
    }

    /// Converts a guest address to an address of the front-end.
    ///
    /// # Errors
    /// When the address is not in guest memory.
    pub fn user_addr(&self, addr: u64) -> Result<u64> {
        self.ram
            .user_addr(addr)
            .with_context(|| format!("guest address {addr:#x} is not in guest memory"))
    }
}

/// Returns the descriptors of a header and a frame at guest address `buffer`. `first` is the index
/// of the header's descriptor in its table.
fn header_and_frame(buffer: u64, first: u16) -> [SplitDescriptor; 2] {
    [
        SplitDescriptor::new(buffer, HEADER_LEN, VRING_DESC_F_NEXT, first + 1),
        SplitDescriptor::new(buffer + u64::from(HEADER_LEN), FRAME_LEN, 0, 0),
    ]
}
