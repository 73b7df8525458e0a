//! Guest memory for indirect descriptor tables.

use crate::memory::{Area, GuestRam, RamError, to_u64};

/// One table for each chain that can be in flight. A table is allocated at its first use and then
/// used again for later chains.
#[derive(Debug)]
pub(crate) struct IndirectTables {
    tables: Box<[Option<Area>]>,
    ram: GuestRam,
}

impl IndirectTables {
    /// Tables for `chains` chains, none of them allocated.
    pub(crate) fn new(ram: &GuestRam, chains: u16) -> Self {
        Self {
            tables: (0..chains).map(|_| None).collect(),
            ram: ram.clone(),
        }
    }

    /// The table of the chain `owner`, which must be below the number of chains, with at least
    /// `bytes` bytes.
    ///
    /// # Errors
    /// When guest memory has not enough free memory.
    pub(crate) fn table(&mut self, owner: u16, bytes: usize) -> Result<&Area, RamError> {
        let slot = &mut self.tables[usize::from(owner)];
        if let Some(old) = slot.take_if(|old| old.len() < bytes) {
            self.ram.free(old.addr(), to_u64(old.len()));
        }
        match slot {
            Some(table) => Ok(table),
            None => {
                let capacity = bytes.next_power_of_two();
                Ok(slot.insert(self.ram.alloc_area(to_u64(capacity), 16)?))
            }
        }
    }
}
