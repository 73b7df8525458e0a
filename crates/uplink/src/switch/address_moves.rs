//! Finds MAC addresses that move back and forth between two ports, which is what the switch sees of
//! two devices with the same address. Each gets the frames of the other.
//!
//! Only moves are recorded, so frames of an address that stays at its port cost nothing here.

use arrayvec::ArrayVec;
use parking_lot::Mutex;

use super::mac_addr::MacAddr;

/// An address that moves this often between the same ports within [`WINDOW_SECS`] is in conflict. A
/// guest that migrates and a bond that fails over move theirs once.
const CONFLICT_MOVES: u32 = 3;
const WINDOW_SECS: u32 = 10;
/// How long a conflict is reported after its last move.
const REPORT_SECS: u32 = 60;
/// How many addresses are observed at once.
const MAX_SUSPECTS: usize = 16;

/// The addresses that moved recently.
#[derive(Debug, Default)]
pub(super) struct AddressMoves(Mutex<ArrayVec<Suspect, MAX_SUSPECTS>>);

/// An address and the two ports between which it moved.
#[derive(Debug)]
struct Suspect {
    mac: MacAddr,
    /// The lower number first.
    ports: [u16; 2],
    /// When the moves that `moves` counts began.
    since: u32,
    moves: u32,
    last_move: u32,
    /// When the address was last found to be in conflict.
    conflict_at: Option<u32>,
}

impl AddressMoves {
    /// Records that `mac`, last seen at port `from`, was seen at port `to`.
    pub(super) fn record(&self, mac: MacAddr, from: u16, to: u16, now: u32) {
        // No worker waits for another one. A move more or less does not matter.
        let Some(mut suspects) = self.0.try_lock() else {
            return;
        };
        let ports = [from.min(to), from.max(to)];
        if let Some(known) = suspects
            .iter_mut()
            .find(|known| known.mac == mac && known.ports == ports)
        {
            known.add_move(now);
            return;
        }
        if suspects.is_full() {
            let key = |known: &Suspect| (known.is_in_conflict(now), known.last_move);
            let oldest = (0..suspects.len()).min_by_key(|&n| key(&suspects[n]));
            oldest.map(|n| suspects.swap_remove(n));
        }
        let _ = suspects.try_push(Suspect {
            mac,
            ports,
            since: now,
            moves: 1,
            last_move: now,
            conflict_at: None,
        });
    }

    /// Forgets the moves from and to a port.
    pub(super) fn forget_port(&self, port: u16) {
        self.0.lock().retain(|known| !known.ports.contains(&port));
    }

    /// An address that port `port` has in conflict with another one, and both ports.
    pub(super) fn conflict_of(&self, port: u16, now: u32) -> Option<(MacAddr, [u16; 2])> {
        let suspects = self.0.lock();
        suspects
            .iter()
            .filter(|known| known.ports.contains(&port) && known.is_in_conflict(now))
            .min_by_key(|known| (known.mac.0, known.ports))
            .map(|known| (known.mac, known.ports))
    }
}

impl Suspect {
    fn add_move(&mut self, now: u32) {
        if now.saturating_sub(self.since) > WINDOW_SECS {
            (self.since, self.moves) = (now, 0);
        }
        self.moves = self.moves.saturating_add(1);
        self.last_move = now;
        if self.moves >= CONFLICT_MOVES {
            self.conflict_at = Some(now);
        }
    }

    fn is_in_conflict(&self, now: u32) -> bool {
        self.conflict_at
            .is_some_and(|at| now.saturating_sub(at) <= REPORT_SECS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u32 = 1_000_000;
    const MAC: MacAddr = MacAddr(0x0602);

    #[test]
    fn address_that_moves_back_and_forth_is_in_conflict_at_both_ports() {
        let moves = AddressMoves::default();
        moves.record(MAC, 1, 2, NOW);
        moves.record(MAC, 2, 1, NOW + 5);
        assert_eq!(moves.conflict_of(1, NOW + 5), None);
        moves.record(MAC, 1, 2, NOW + 10);
        for port in [1, 2] {
            assert_eq!(moves.conflict_of(port, NOW + 10), Some((MAC, [1, 2])));
        }
        assert_eq!(moves.conflict_of(3, NOW + 10), None);
        assert!(moves.conflict_of(1, NOW + 70).is_some());
        assert_eq!(moves.conflict_of(1, NOW + 71), None);
    }

    #[test]
    fn rare_moves_and_moves_through_many_ports_are_no_conflict() {
        let moves = AddressMoves::default();
        for n in 0..20 {
            moves.record(MAC, 1, 2, NOW + 6 * n);
            let port = u16::try_from(n).unwrap() + 10;
            moves.record(MacAddr(4), port, port + 1, NOW);
        }
        assert!((0..40).all(|port| moves.conflict_of(port, NOW + 114).is_none()));
    }

    #[test]
    fn flood_of_moves_displaces_no_conflict() {
        let moves = AddressMoves::default();
        for _ in 0..3 {
            moves.record(MAC, 1, 2, NOW);
        }
        for n in 0..1000 {
            moves.record(MacAddr(2 * n + 8), 3, 4, NOW + 1);
        }
        assert!(moves.conflict_of(1, NOW + 1).is_some());
        assert_eq!(moves.0.lock().len(), MAX_SUSPECTS);
    }
}
