//! Guest memory as loom models it: only in builds with `--cfg loom`, for `tests/loom.rs`.
//!
//! There every word of a ring's areas is a cell of loom's, found by its address, and what
//! [`GuestArray`](super::GuestArray) does to the word it does to the cell. All above that, the rings
//! themselves, is the code that is shipped. loom then tries the orders in which two threads can run,
//! and the old values that each load may still see under the memory model of C11.
//!
//! A cell is what one side writes at once: a 16-bit index, a used element, half of a descriptor. What
//! is volatile in a normal build is relaxed here: no order is promised by it, nor is one needed.
#![allow(unsafe_code)]
#![allow(clippy::panic, reason = "only models come here, which fail by a panic")]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use ::loom::sync::atomic::AtomicU64 as AtomicU64Model;
use vm_memory::ByteValued;

use super::GuestMemory;

/// What a ring can be robbed of, to see that a model notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DisabledOrdering {
    /// Nothing.
    Nothing,
    /// [`full_fence`](super::full_fence) does nothing.
    Fences,
    /// What is to be loaded with acquire is loaded relaxed.
    Acquire,
    /// What is to be stored with release is stored relaxed.
    Release,
}

/// A cell of so many bytes.
#[derive(Clone)]
struct ModelCell {
    bytes: usize,
    value: Rc<AtomicU64Model>,
    /// Stored to before each access, and never loaded. loom tries other orders of two accesses only
    /// where one is a store, and of several loads it remembers but the last: a load that another
    /// thread's load and store follow would never be tried between or behind those two. A relaxed
    /// store that nobody loads orders nothing else.
    turn: Rc<AtomicU64Model>,
}

thread_local! {
    // All threads of a model run on one thread of the system.
    static CELLS: RefCell<BTreeMap<usize, ModelCell>> = const { RefCell::new(BTreeMap::new()) };
    static WITHOUT: Cell<DisabledOrdering> = const { Cell::new(DisabledOrdering::Nothing) };
}

/// From now on, in models of the calling thread.
pub fn disable_ordering(what: DisabledOrdering) {
    WITHOUT.set(what);
}

fn order(order: Ordering) -> Ordering {
    match (order, WITHOUT.get()) {
        (Ordering::Acquire, DisabledOrdering::Acquire)
        | (Ordering::Release, DisabledOrdering::Release) => Ordering::Relaxed,
        _ => order,
    }
}

/// In place of the one of `std::sync`.
pub(super) fn fence(order: Ordering) {
    if WITHOUT.get() != DisabledOrdering::Fences {
        ::loom::sync::atomic::fence(order);
    }
}

impl GuestMemory {
    /// Makes `count` cells of `bytes` bytes each (8 at most) at a front-end address, all zero. To be
    /// called in the model, before its threads begin.
    pub fn create_model_cells(&self, user_addr: u64, bytes: usize, count: usize) {
        let region = self.regions.iter().find_map(|r| {
            let offset = r.offset(r.spec.user_addr, user_addr, super::to_u64(bytes * count))?;
            Some(r.host().addr() + offset)
        });
        let Some(start) = region else {
            panic!("no guest memory at {user_addr:#x}")
        };
        CELLS.with_borrow_mut(|cells| {
            for at in (start..).step_by(bytes).take(count) {
                let cell = ModelCell {
                    bytes,
                    value: Rc::default(),
                    turn: Rc::default(),
                };
                cells.insert(at, cell);
            }
        });
    }
}

/// Forgets all cells: they belong to one run of a model. To be called when its threads have ended.
pub fn clear_model() {
    CELLS.with_borrow_mut(BTreeMap::clear);
}

/// A word in a cell.
struct ModelWord {
    cell: ModelCell,
    /// Where in the cell it begins.
    at: usize,
    bytes: usize,
}

impl ModelWord {
    fn find(addr: usize, bytes: usize) -> Self {
        let found = CELLS.with_borrow(|cells| {
            let (start, cell) = cells.range(..=addr).next_back()?;
            let at = addr - start;
            (at + bytes <= cell.bytes).then(|| (at, cell.clone()))
        });
        match found {
            Some((at, cell)) => Self { cell, at, bytes },
            None => panic!("{bytes} bytes at {addr:#x} are in no cell of the model"),
        }
    }

    fn load(&self, order: Ordering) -> u64 {
        self.cell.turn.store(0, Ordering::Relaxed);
        let whole = self.cell.value.load(order).to_le_bytes();
        let mut part = [0; 8];
        part[..self.bytes].copy_from_slice(&whole[self.at..self.at + self.bytes]);
        u64::from_le_bytes(part)
    }

    /// A cell has one writer at a time, which sees what was stored last.
    fn store(&self, value: u64, order: Ordering) {
        self.cell.turn.store(0, Ordering::Relaxed);
        let mut whole = match self.bytes == self.cell.bytes {
            true => [0; 8],
            false => self.cell.value.load(Ordering::Relaxed).to_le_bytes(),
        };
        let part = &value.to_le_bytes()[..self.bytes];
        whole[self.at..self.at + self.bytes].copy_from_slice(part);
        self.cell.value.store(u64::from_le_bytes(whole), order);
    }
}

/// In place of the one of `std::ptr`.
///
/// # Safety
/// None is needed: the pointer only says which cell.
pub(super) unsafe fn read_volatile<T: ByteValued>(ptr: *const T) -> T {
    let word = ModelWord::find(ptr.addr(), size_of::<T>());
    let mut value = T::zeroed();
    let bytes = word.load(Ordering::Relaxed).to_le_bytes();
    value.as_mut_slice().copy_from_slice(&bytes[..word.bytes]);
    value
}

/// In place of the one of `std::ptr`.
///
/// # Safety
/// None is needed: the pointer only says which cell.
pub(super) unsafe fn write_volatile<T: ByteValued>(ptr: *mut T, value: T) {
    let word = ModelWord::find(ptr.addr(), size_of::<T>());
    let mut bytes = [0; 8];
    bytes[..word.bytes].copy_from_slice(value.as_slice());
    word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
}

/// In place of the atomic types of `std::sync`, as far as they are used.
macro_rules! atomic {
    ($($name:ident: $value:ty),*) => {$(
        pub(super) struct $name(ModelWord);

        impl $name {
            /// # Safety
            /// None is needed: the pointer only says which cell.
            pub(super) unsafe fn from_ptr(ptr: *mut $value) -> Self {
                Self(ModelWord::find(ptr.addr(), size_of::<$value>()))
            }

            pub(super) fn load(&self, order: Ordering) -> $value {
                <$value>::try_from(self.0.load(self::order(order))).unwrap_or_default()
            }

            pub(super) fn store(&self, value: $value, order: Ordering) {
                self.0.store(value.into(), self::order(order));
            }
        }
    )*};
}

atomic!(AtomicU16: u16, AtomicU64: u64);
