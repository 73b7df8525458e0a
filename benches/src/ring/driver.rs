//! The driver's side, the same for both devices: every descriptor and every entry of the available
//! ring is written once, so that offering chains is one store of the available index.

use anyhow::{Context, Result};
use virtionet_guest::driver::{DriverVirtqueueConfig, VirtqueueAddresses};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::split::{
    SplitDescriptor, SplitDriverVirtqueue, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
};

use super::case::Shape;

/// Descriptors of the ring.
pub const SIZE: u16 = 256;
/// Bytes of each chain: a header and a frame.
pub const CHAIN_BYTES: usize = 12 + 1514;

const HEADER: u32 = 12;
const FRAME: u32 = 1514;
/// From one chain's buffer to the next.
const STRIDE: u64 = 2048;

/// A driver that has nothing to do but to offer.
#[derive(Debug)]
pub struct ChainDriver {
    ring: SplitDriverVirtqueue,
    ram: GuestRam,
    next: u16,
}

impl ChainDriver {
    /// A ring whose entries are all written.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn new(shape: Shape, event_idx: bool) -> Result<Self> {
        let ram = GuestRam::new(2 << 20)?;
        let config = DriverVirtqueueConfig {
            size: SIZE,
            event_idx,
            packed: false,
            start: 0,
        };
        let ring = SplitDriverVirtqueue::new(&ram, config)?;
        let driver = Self { ring, ram, next: 0 };
        driver.write(shape)?;
        Ok(driver)
    }

    fn write(&self, shape: Shape) -> Result<()> {
        let buffers = self.ram.alloc(STRIDE * u64::from(SIZE), 4096)?;
        let heads = match shape {
            Shape::Direct => SIZE / 2,
            Shape::Single | Shape::Indirect => SIZE,
        };
        for n in 0..heads {
            let at = buffers + STRIDE * u64::from(n);
            match shape {
                Shape::Single => {
                    let whole = SplitDescriptor::new(at, HEADER + FRAME, 0, 0);
                    self.ring.set_descriptor(n, whole);
                }
                Shape::Direct => {
                    for (i, part) in two(at, 2 * n).into_iter().enumerate() {
                        self.ring.set_descriptor(2 * n + u16::try_from(i)?, part);
                    }
                }
                Shape::Indirect => {
                    let table = self.ram.alloc_area(32, 64)?;
                    for (i, part) in two(at, 0).into_iter().enumerate() {
                        part.store(&table, 16 * i);
                    }
                    let outer = SplitDescriptor::new(table.addr(), 32, VRING_DESC_F_INDIRECT, 0);
                    self.ring.set_descriptor(n, outer);
                }
            }
        }
        for entry in 0..SIZE {
            let head = match shape {
                Shape::Direct => entry % heads * 2,
                Shape::Single | Shape::Indirect => entry,
            };
            self.ring.set_avail_entry(entry, head);
        }
        Ok(())
    }

    /// Makes `count` more chains available.
    #[inline(always)]
    pub fn offer(&mut self, count: u16) {
        self.next = self.next.wrapping_add(count);
        self.ring.set_avail_index(self.next);
    }

    /// The used index and its last element, as the driver sees them.
    #[must_use]
    pub fn used(&self) -> (u16, (u32, u32)) {
        let index = self.ring.used_index();
        (index, self.ring.used_element(index.wrapping_sub(1)))
    }

    /// The guest's memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Where the ring's parts lie, as the guest's addresses.
    #[must_use]
    pub fn addresses(&self) -> VirtqueueAddresses {
        self.ring.addresses()
    }

    /// The front-end's address of a guest's address.
    ///
    /// # Errors
    /// When it is not in guest memory.
    pub fn user_addr(&self, addr: u64) -> Result<u64> {
        self.ram
            .user_addr(addr)
            .with_context(|| format!("guest address {addr:#x} is not in guest memory"))
    }
}

/// Header and frame; the header's descriptor has index `first` in its table.
fn two(at: u64, first: u16) -> [SplitDescriptor; 2] {
    [
        SplitDescriptor::new(at, HEADER, VRING_DESC_F_NEXT, first + 1),
        SplitDescriptor::new(at + u64::from(HEADER), FRAME, 0, 0),
    ]
}
