//! Guest memory in loom's model. It exists only in builds with `--cfg loom`, for `tests/loom.rs`.
//!
//! Each word of a virtqueue's areas is represented by a loom atomic, called a cell here, which is
//! found by the word's address. [`GuestArray`](super::GuestArray) accesses the cell instead of the
//! word. The code above it, which includes the virtqueues, is the code that is shipped. loom then
//! tries the orders in which two threads can run, and the old values that each load may still
//! return under the C11 memory model.
//!
//! A cell holds what the driver or the device writes at once: a 16-bit index, a used element, or
//! half of a descriptor. A volatile access of a normal build is a relaxed access here, because the
//! virtqueue needs no order of it.
#![allow(unsafe_code)]
#![allow(
    clippy::panic,
    reason = "only models use this module, and a model fails by a panic"
)]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use ::loom::sync::atomic::AtomicU64 as AtomicU64Model;
use vm_memory::ByteValued;

use super::GuestMemory;

/// The memory ordering to leave out, so that a test can check that a model detects it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DisabledOrdering {
    /// None: the virtqueues run unchanged.
    Nothing,
    /// [`full_fence`](super::full_fence) does nothing.
    Fences,
    /// Acquire loads become relaxed loads.
    Acquire,
    /// Release stores become relaxed stores.
    Release,
}

/// A word of the model.
#[derive(Clone)]
struct ModelCell {
    /// The size in bytes, at most 8.
    bytes: usize,
    value: Rc<AtomicU64Model>,
    /// Stored to before each access, and never loaded. loom tries other orders of two accesses only
    /// if one of them is a store, and it remembers only the last of several loads. Without this
    /// store, a load that is followed by another thread's load and store would never be tried
    /// between or behind those two. A relaxed store that is never loaded orders nothing else.
    turn: Rc<AtomicU64Model>,
}

thread_local! {
    // loom runs all threads of a model on one thread of the operating system.
    static CELLS: RefCell<BTreeMap<usize, ModelCell>> = const { RefCell::new(BTreeMap::new()) };
    static DISABLED: Cell<DisabledOrdering> = const { Cell::new(DisabledOrdering::Nothing) };
}

/// Leaves out `what` in all later models of the calling thread.
pub fn disable_ordering(what: DisabledOrdering) {
    DISABLED.set(what);
}

fn order(order: Ordering) -> Ordering {
    match (order, DISABLED.get()) {
        (Ordering::Acquire, DisabledOrdering::Acquire)
        | (Ordering::Release, DisabledOrdering::Release) => Ordering::Relaxed,
        _ => order,
    }
}

/// Replaces `std::sync::atomic::fence`.
pub(super) fn fence(order: Ordering) {
    if DISABLED.get() != DisabledOrdering::Fences {
        ::loom::sync::atomic::fence(order);
    }
}

impl GuestMemory {
    /// Creates `count` cells of `bytes` bytes each (at most 8) from a front-end address on, all
    /// zero. Call it inside the model, before its threads start.
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

/// Removes all cells, which belong to one run of a model. Call it when the model's threads have
/// ended.
pub fn clear_model() {
    CELLS.with_borrow_mut(BTreeMap::clear);
}

/// A part of a cell, or all of it.
struct ModelWord {
    cell: ModelCell,
    /// The offset in the cell in bytes.
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

    /// Stores the part and keeps the rest of the cell. A cell has one writer at a time, which
    /// therefore loads the last value.
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

/// Replaces `std::ptr::read_volatile`.
///
/// # Safety
/// There is no requirement: the pointer only identifies the cell.
pub(super) unsafe fn read_volatile<T: ByteValued>(ptr: *const T) -> T {
    let word = ModelWord::find(ptr.addr(), size_of::<T>());
    let mut value = T::zeroed();
    let bytes = word.load(Ordering::Relaxed).to_le_bytes();
    value.as_mut_slice().copy_from_slice(&bytes[..word.bytes]);
    value
}

/// Replaces `std::ptr::write_volatile`.
///
/// # Safety
/// There is no requirement: the pointer only identifies the cell.
pub(super) unsafe fn write_volatile<T: ByteValued>(ptr: *mut T, value: T) {
    let word = ModelWord::find(ptr.addr(), size_of::<T>());
    let mut bytes = [0; 8];
    bytes[..word.bytes].copy_from_slice(value.as_slice());
    word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
}

/// Replaces the atomic types of `std::sync` with the methods that are used.
macro_rules! atomic {
    ($($name:ident: $value:ty),*) => {$(
        pub(super) struct $name(ModelWord);

        impl $name {
            /// # Safety
            /// There is no requirement: the pointer only identifies the cell.
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
