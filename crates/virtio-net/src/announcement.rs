//! The frame that announces a guest's address after a migration.

/// The EtherType of RARP (RFC 903).
const ETH_P_RARP: u16 = 0x8035;
/// The operation "request reverse" (RFC 903).
const RARP_REQUEST_REVERSE: u16 = 3;
/// The hardware type Ethernet (RFC 826).
const ARPHRD_ETHER: u16 = 1;
const ETH_P_IP: u16 = 0x0800;
/// The length of the frame, which zeros fill: the shortest on a wire, with room for its checksum.
const FRAME_LEN: usize = 64;

/// A broadcast from `mac` that asks for nothing that anybody answers. Switches learn from its source
/// address where the guest is. QEMU sends the same for its own network devices.
pub(crate) fn announcement(mac: [u8; 6]) -> [u8; FRAME_LEN] {
    let broadcast = [0xff; 6];
    let no_ip = [0; 4];
    let fields: [&[u8]; 11] = [
        &broadcast,
        &mac,
        &ETH_P_RARP.to_be_bytes(),
        &ARPHRD_ETHER.to_be_bytes(),
        &ETH_P_IP.to_be_bytes(),
        // The lengths of both kinds of addresses.
        &[6, 4],
        &RARP_REQUEST_REVERSE.to_be_bytes(),
        &mac,
        &no_ip,
        &mac,
        &no_ip,
    ];
    let mut frame = [0; FRAME_LEN];
    for (to, from) in frame.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcement_is_a_broadcast_rarp_request_from_the_guest() {
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        let frame = announcement(mac);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac);
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(frame[22..28], mac);
        assert_eq!(frame[28..32], [0; 4]);
        assert_eq!(frame[32..38], mac);
        assert_eq!(frame[38..], [0; 26]);
    }
}
