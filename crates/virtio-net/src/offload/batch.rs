//! Frames in private memory that are emitted together.

use arrayvec::ArrayVec;
use virtionet_virtqueue::memory::GuestSlice;

use crate::header::VnetHeader;
use crate::uplink::{MAX_BURST, TxFrame};

/// Up to [`MAX_BURST`] frames that wait to be emitted.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The bytes of the frames, one after the other.
    bytes: Vec<u8>,
    lens: ArrayVec<usize, MAX_BURST>,
    /// The virtio-net header of every frame.
    header: VnetHeader,
}

impl Batch {
    /// Removes all frames and resets the header.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.lens.clear();
        self.header = VnetHeader::default();
    }

    /// Sets the header of all further frames.
    pub(super) fn set_header(&mut self, header: VnetHeader) {
        self.header = header;
    }

    /// Appends a frame that consists of `parts`; returns its bytes, so that fields can be written.
    pub(super) fn add(
        &mut self,
        parts: &[&[u8]],
        emit: &mut impl FnMut(&[TxFrame<'_>]),
    ) -> &mut [u8] {
        if self.lens.is_full() {
            self.flush(emit);
        }
        let start = self.bytes.len();
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
        self.lens.push(self.bytes.len() - start);
        &mut self.bytes[start..]
    }

    /// Emits all waiting frames.
    pub(super) fn flush(&mut self, emit: &mut impl FnMut(&[TxFrame<'_>])) {
        if !self.lens.is_empty() {
            self.emit_pending(emit);
        }
        self.bytes.clear();
        self.lens.clear();
    }

    fn emit_pending(&mut self, emit: &mut impl FnMut(&[TxFrame<'_>])) {
        let mut payloads: ArrayVec<GuestSlice<'_>, MAX_BURST> = ArrayVec::new();
        let mut rest = self.bytes.as_mut_slice();
        for len in &self.lens {
            let (bytes, behind) = rest.split_at_mut(*len);
            payloads.push(GuestSlice::from_private(bytes));
            rest = behind;
        }
        let frames: ArrayVec<TxFrame<'_>, MAX_BURST> = payloads
            .iter()
            .map(|payload| TxFrame {
                header: self.header,
                payload: std::slice::from_ref(payload),
                len: payload.len(),
            })
            .collect();
        emit(&frames);
    }
}

/// Emits one frame without copying it.
pub(super) fn emit_single(
    bytes: &mut [u8],
    header: VnetHeader,
    emit: &mut impl FnMut(&[TxFrame<'_>]),
) {
    let len = bytes.len();
    let payload = [GuestSlice::from_private(bytes)];
    emit(&[TxFrame {
        header,
        payload: &payload,
        len,
    }]);
}
