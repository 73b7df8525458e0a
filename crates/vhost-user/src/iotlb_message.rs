//! The messages about translations of I/O virtual addresses: `struct vhost_iotlb_msg`, 32 bytes.
//!
//! ```text
//! iova: u64   size: u64   user_addr: u64   permission: u8   type: u8   6 bytes without a meaning
//! ```

use virtionet_virtqueue::memory::{Access, IovaRange, Miss, Translation};

use crate::error::RequestError;

/// The size of the payload in bytes.
pub(crate) const IOTLB_MESSAGE_SIZE: usize = 32;

// VHOST_IOTLB_MISS, VHOST_IOTLB_UPDATE and VHOST_IOTLB_INVALIDATE.
const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

/// VHOST_USER_BACKEND_IOTLB_MSG: the number of the back-end's request.
const BACKEND_IOTLB_MSG: u32 = 1;
/// The flags of a request: the version of the protocol.
const FLAGS: u32 = 1;

/// What the front-end says of translations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IotlbMessage {
    /// A translation that may be used from now on.
    Update(Translation),
    /// Addresses whose translations may not be used any more.
    Invalidate(IovaRange),
}

impl IotlbMessage {
    pub(crate) fn decode(bytes: [u8; IOTLB_MESSAGE_SIZE]) -> Result<Self, RequestError> {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        let (iova, size, user_addr) = (word(0), word(8), word(16));
        match bytes[25] {
            UPDATE => {
                let permission = bytes[24];
                let access = Access::from_number(permission);
                Ok(Self::Update(Translation {
                    range: IovaRange::new(iova, size)
                        .ok_or(RequestError::TranslationRange { iova, size })?,
                    user_addr,
                    access: access.ok_or(RequestError::TranslationPermission(permission))?,
                }))
            }
            INVALIDATE => Ok(Self::Invalidate(to_end_if_too_long(iova, size))),
            other => Err(RequestError::IotlbType(other)),
        }
    }
}

/// The range that is to be invalidated. QEMU gives all addresses the size 2^64, which is 0 in 64
/// bits. Too much may be invalidated, but never too little.
fn to_end_if_too_long(first: u64, size: u64) -> IovaRange {
    if size == 0 {
        return IovaRange::ALL;
    }
    IovaRange::new(first, size).unwrap_or_else(|| IovaRange::to_end(first))
}

/// The request that asks the front-end for the translation of an address.
pub(crate) fn encode_miss(miss: Miss) -> Vec<u8> {
    let size = u32::try_from(IOTLB_MESSAGE_SIZE).unwrap_or(0);
    let mut bytes = [BACKEND_IOTLB_MSG, FLAGS, size]
        .map(u32::to_ne_bytes)
        .concat();
    bytes.extend([miss.iova, 0, 0].map(u64::to_ne_bytes).concat());
    bytes.extend([miss.access.to_number(), MISS, 0, 0, 0, 0, 0, 0]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(words: [u64; 3], permission: u8, kind: u8) -> [u8; IOTLB_MESSAGE_SIZE] {
        let mut bytes = [0xee; IOTLB_MESSAGE_SIZE];
        bytes[..24].copy_from_slice(&words.map(u64::to_ne_bytes).concat());
        bytes[24..26].copy_from_slice(&[permission, kind]);
        bytes
    }

    #[test]
    fn update_is_decoded_with_its_values() {
        let got = IotlbMessage::decode(message([0x1000, 0x2000, 0x7000], 3, 2)).unwrap();
        let range = IovaRange::new(0x1000, 0x2000).unwrap();
        let want = Translation {
            range,
            user_addr: 0x7000,
            access: Access::ReadWrite,
        };
        assert_eq!(got, IotlbMessage::Update(want));
    }

    #[test]
    fn message_with_an_impossible_value_is_refused() {
        for (bytes, want) in [
            (message([0, 0, 0], 3, 2), "iotlb-range-invalid"),
            (message([u64::MAX, 2, 0], 3, 2), "iotlb-range-invalid"),
            (message([2, u64::MAX, 0], 3, 2), "iotlb-range-invalid"),
            (message([0, 1, 0], 0, 2), "iotlb-permission-invalid"),
            (message([0, 1, 0], 4, 2), "iotlb-permission-invalid"),
            (message([0, 1, 0], 3, 1), "iotlb-type-invalid"),
            (message([0, 1, 0], 3, 4), "iotlb-type-invalid"),
            (message([0, 1, 0], 3, 0), "iotlb-type-invalid"),
        ] {
            assert_eq!(IotlbMessage::decode(bytes).unwrap_err().code(), want);
        }
    }

    #[test]
    fn invalidation_never_covers_less_than_was_asked_for() {
        for (first, size, low, high) in [
            (0x1000, 0x1000, 0x1000, 0x1fff),
            (0, 0, 0, u64::MAX),
            (0x1000, 0, 0, u64::MAX),
            (0x1000, u64::MAX, 0x1000, u64::MAX),
            (u64::MAX, 9, u64::MAX, u64::MAX),
        ] {
            let got = IotlbMessage::decode(message([first, size, 0], 0, 3)).unwrap();
            let IotlbMessage::Invalidate(range) = got else {
                panic!("{got:?}");
            };
            assert!(range.contains(low) && range.contains(high), "{range:?}");
            assert!(low == 0 || !range.contains(low - 1), "{range:?}");
        }
    }

    #[test]
    fn miss_is_a_request_of_the_back_end() {
        let miss = Miss {
            iova: 0x1122_3000,
            access: Access::Write,
        };
        let bytes = encode_miss(miss);
        assert_eq!(bytes.len(), 12 + IOTLB_MESSAGE_SIZE);
        assert_eq!(bytes[..12], [1u32, 1, 32].map(u32::to_ne_bytes).concat());
        assert_eq!(bytes[12..20], 0x1122_3000u64.to_ne_bytes());
        assert_eq!(bytes[36..38], [2, 1]);
    }
}
