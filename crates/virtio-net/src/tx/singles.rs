//! The fast path for frames that lie in one buffer together with their header.

use std::iter::{repeat, repeat_n};

use arrayvec::ArrayVec;
use virtionet_virtqueue::{Direction, FoundSingles};

use super::{CHEAP_BURST_BYTES, TxOutcome, transmit_releasing};
use crate::features::Features;
use crate::header::{MIN_FRAME, VNET_HEADER_LEN, VnetHeader};
use crate::queue::Queue;
use crate::stats::VringStats;
use crate::uplink::{MAX_BURST, TxFrame, UplinkQueue};

/// The bounds of the chains that this path takes. A burst of such frames is always within
/// [`super::BURST_WORK`], so it never has to rewind a chain, and each has an allowed length.
const MIN_CHAIN_LEN: usize = VNET_HEADER_LEN + MIN_FRAME;
const MAX_CHAIN_LEN: u32 = 2048;
const _: () = assert!(2048 * MAX_BURST <= CHEAP_BURST_BYTES);

/// The fewest chains that are worth a burst of their own while other chains wait behind them.
const MIN_BURST: usize = 16;

/// Transmits the frames of the next chains for as long as they are of one buffer. `None`, without any
/// effect, if the next chains need [`super::TxQueue::send_chains`].
#[inline(always)]
pub(super) fn send_singles(queue: &mut Queue, uplink: &dyn UplinkQueue) -> Option<TxOutcome> {
    let Queue {
        virtqueue,
        burst,
        features,
        stats,
        ..
    } = queue;
    if features.header_len() != VNET_HEADER_LEN || burst.memory().is_in_postcopy() {
        return None;
    }
    let lens = repeat_n(MIN_CHAIN_LEN, MAX_BURST);
    let FoundSingles { count, has_other } =
        virtqueue.find_singles(burst, Direction::Readable, lens, MAX_CHAIN_LEN);
    if has_other && count < MIN_BURST {
        return None;
    }
    if count == 0 {
        return Some(TxOutcome::default());
    }
    stats.bursts.add(1);
    let (mut bytes, mut requests) = (0, 0);
    let (ids, singles) = burst.strip_singles::<VNET_HEADER_LEN>(count);
    let all = singles.map(|(header, payload)| {
        let (header, len) = (VnetHeader(header), payload.len());
        requests |= header.request_bits();
        bytes += len;
        TxFrame {
            header,
            payload: std::slice::from_ref(payload),
            len,
        }
    });
    let mut frames: ArrayVec<TxFrame<'_>, MAX_BURST> = ArrayVec::new();
    frames.extend(all.take(MAX_BURST));
    if requests != 0 {
        bytes -= remove_invalid(&mut frames, *features, stats);
    }
    let should_call = transmit_releasing(&frames, uplink, stats, || {
        virtqueue.complete_singles(ids, repeat(0));
        virtqueue.publish()
    });
    Some(TxOutcome {
        chains: count,
        bytes,
        should_call,
    })
}

/// Removes the frames that request offloads they must not request, and counts these faults. Returns
/// the bytes of the removed frames.
#[inline(never)]
fn remove_invalid(
    frames: &mut ArrayVec<TxFrame<'_>, MAX_BURST>,
    features: Features,
    stats: &VringStats,
) -> usize {
    let mut removed = 0;
    frames.retain(|frame| {
        let checked = frame.header.check_requests(frame.len, features);
        if let Err(fault) = checked {
            fault.count(stats);
            removed += frame.len;
        }
        checked.is_ok()
    });
    removed
}
