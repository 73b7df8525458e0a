//! Memory for indirect descriptor tables.

use crate::memory::{Area, GuestRam, RamError, wide};

/// One table for each chain that can be in flight, made when first used and kept for the next use.
#[derive(Debug)]
pub(crate) struct Tables {
    kept: Box<[Option<Area>]>,
    ram: GuestRam,
}

impl Tables {
    /// Room for `chains` tables, none of them made.
    pub(crate) fn new(ram: &GuestRam, chains: u16) -> Self {
        Self {
            kept: (0..chains).map(|_| None).collect(),
            ram: ram.clone(),
        }
    }

    /// The table of chain `owner` (below the number of chains), of at least `bytes` bytes.
    pub(crate) fn table(&mut self, owner: u16, bytes: usize) -> Result<&Area, RamError> {
        let kept = &mut self.kept[usize::from(owner)];
        if let Some(old) = kept.take_if(|old| old.len() < bytes) {
            self.ram.free(old.addr(), wide(old.len()));
        }
        match kept {
            Some(table) => Ok(table),
            None => {
                let room = bytes.next_power_of_two();
                Ok(kept.insert(self.ram.alloc_area(wide(room), 16)?))
            }
        }
    }
}
