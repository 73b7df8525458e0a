//! Memory for indirect descriptor tables.

use crate::memory::{Area, GuestRam, RamError, to_u64};

/// One table for each chain that can be in flight, made when first used and kept for the next use.
#[derive(Debug)]
pub(crate) struct Tables {
    tables: Box<[Option<Area>]>,
    ram: GuestRam,
}

impl Tables {
    /// Room for `chains` tables, none of them made.
    pub(crate) fn new(ram: &GuestRam, chains: u16) -> Self {
        Self {
            tables: (0..chains).map(|_| None).collect(),
            ram: ram.clone(),
        }
    }

    /// The table of chain `owner` (below the number of chains), of at least `bytes` bytes.
    pub(crate) fn table(&mut self, owner: u16, bytes: usize) -> Result<&Area, RamError> {
        let tables = &mut self.tables[usize::from(owner)];
        if let Some(old) = tables.take_if(|old| old.len() < bytes) {
            self.ram.free(old.addr(), to_u64(old.len()));
        }
        match tables {
            Some(table) => Ok(table),
            None => {
                let room = bytes.next_power_of_two();
                Ok(tables.insert(self.ram.alloc_area(to_u64(room), 16)?))
            }
        }
    }
}
