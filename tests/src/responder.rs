//! A guest without a kernel: the driver's side of a card in a thread of this
//! process, which answers ARP and ping. It costs milliseconds where a guest
//! under QEMU costs seconds.

use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use virtionet_guest::frame::Frame;
use virtionet_guest::header::NetHeader;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};

const PAUSE: Duration = Duration::from_millis(1);
const ARP: [u8; 2] = [0x08, 0x06];
const IPV4: [u8; 2] = [0x08, 0x00];

/// A card that answers for one address until it is dropped.
#[derive(Debug)]
pub struct EchoResponder {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<TestFrontend>>>,
}

/// Who the station is on its network.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
}

impl Identity {
    /// The station with this IPv4 address; its MAC is made from it.
    ///
    /// # Errors
    /// When the text is no IPv4 address.
    pub fn at(v4: &str) -> Result<Self> {
        let v4: Ipv4Addr = v4
            .parse()
            .with_context(|| format!("'{v4}' is no IPv4 address"))?;
        let [a, b, c, d] = v4.octets();
        Ok(Self {
            mac: [0x52, 0x54, a, b, c, d],
            v4,
        })
    }
}

impl EchoResponder {
    /// Connects to the back-end that listens on `path`.
    ///
    /// # Errors
    /// When the back-end does not take the card.
    pub fn connect(path: &Path, config: &TestFrontendConfig, who: Identity) -> Result<Self> {
        Self::run(TestFrontend::connect(path, config)?, who)
    }

    /// Over a socket that is connected to the back-end.
    ///
    /// # Errors
    /// When the back-end does not take the card.
    pub fn over(socket: UnixStream, config: &TestFrontendConfig, who: Identity) -> Result<Self> {
        Self::run(TestFrontend::from_socket(socket, config)?, who)
    }

    fn run(mut frontend: TestFrontend, who: Identity) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("station".into())
            .spawn(move || {
                while !told.load(Ordering::Relaxed) {
                    if answer_all(&mut frontend, who)? == 0 {
                        thread::sleep(PAUSE);
                    }
                }
                Ok(frontend)
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Ends the answering and gives the card back, still connected.
    ///
    /// # Errors
    /// When the back-end broke a ring meanwhile.
    pub fn stop(mut self) -> Result<TestFrontend> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the station has no thread")?;
        thread
            .join()
            .map_err(|_| anyhow!("the station's thread ended by a panic"))?
    }
}

impl Drop for EchoResponder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What went wrong shows in the test that waits for its answers.
            _ = thread.join();
        }
    }
}

/// Answers what is there on every pair, on the same pair; how many frames came.
fn answer_all(frontend: &mut TestFrontend, who: Identity) -> Result<usize> {
    let mut count = 0;
    for pair in &mut frontend.pairs {
        let frames = pair.rx.receive_frames()?;
        count += frames.len();
        for bytes in frames.iter().filter_map(|f| answer(&f.bytes, who)) {
            pair.tx.send(&Frame {
                header: NetHeader::default(),
                bytes,
            })?;
        }
        pair.tx.reclaim()?;
    }
    Ok(count)
}

/// The answer to an ARP request (RFC 826) or an ICMP echo request (RFC 792) for `who`.
fn answer(frame: &[u8], who: Identity) -> Option<Vec<u8>> {
    let kind: [u8; 2] = frame.get(12..14)?.try_into().ok()?;
    let mut out = frame.to_vec();
    out.get_mut(0..6)?.copy_from_slice(frame.get(6..12)?);
    out.get_mut(6..12)?.copy_from_slice(&who.mac);
    match kind {
        ARP => answer_arp(frame, &mut out, who)?,
        IPV4 => answer_echo(frame, &mut out, who)?,
        _ => return None,
    }
    Some(out)
}

fn answer_arp(frame: &[u8], out: &mut [u8], who: Identity) -> Option<()> {
    let ours = who.v4.octets();
    if frame.get(20..22)? != [0, 1] || frame.get(38..42)? != ours {
        return None;
    }
    out.get_mut(20..22)?.copy_from_slice(&[0, 2]);
    out.get_mut(22..28)?.copy_from_slice(&who.mac);
    out.get_mut(28..32)?.copy_from_slice(&ours);
    out.get_mut(32..42)?.copy_from_slice(frame.get(22..32)?);
    Some(())
}

fn answer_echo(frame: &[u8], out: &mut [u8], who: Identity) -> Option<()> {
    let header = usize::from(frame.get(14)? & 0xf) * 4;
    let icmp = 14 + header;
    let for_us = frame.get(30..34)? == who.v4.octets();
    if !for_us || frame.get(23)? != &1 || frame.get(icmp)? != &8 {
        return None;
    }
    // Swapped addresses leave the IP header's checksum as it is.
    out.get_mut(26..30)?.copy_from_slice(frame.get(30..34)?);
    out.get_mut(30..34)?.copy_from_slice(frame.get(26..30)?);
    *out.get_mut(icmp)? = 0;
    // A type of 0 instead of 8 makes the sum smaller by 0x0800 (RFC 1624).
    let sum = u16::from_be_bytes(frame.get(icmp + 2..icmp + 4)?.try_into().ok()?);
    let (sum, carry) = sum.overflowing_add(0x0800);
    let sum = sum.wrapping_add(u16::from(carry));
    out.get_mut(icmp + 2..icmp + 4)?
        .copy_from_slice(&sum.to_be_bytes());
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Identity = Identity {
        mac: [2, 0, 0, 0, 0, 2],
        v4: Ipv4Addr::new(10, 0, 0, 2),
    };
    const PEER: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn arp(operation: u8, target: [u8; 4]) -> Vec<u8> {
        let mut frame = [&[0xff; 6][..], &PEER, &ARP].concat();
        frame.extend([0, 1, 8, 0, 6, 4, 0, operation]);
        frame.extend(PEER);
        frame.extend([10, 0, 0, 1]);
        frame.extend([0; 6]);
        frame.extend(target);
        frame
    }

    fn echo(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut icmp = [&[kind, 0, 0, 0, 1, 2, 3, 4], payload].concat();
        let sum = !sum(&icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut frame = [&ME.mac[..], &PEER, &IPV4].concat();
        frame.extend([
            0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        frame.extend(icmp);
        frame
    }

    /// The one's complement sum of RFC 1071.
    fn sum(bytes: &[u8]) -> u16 {
        let mut sum: u32 = bytes
            .chunks(2)
            .map(|p| u32::from(p[0]) << 8 | u32::from(*p.get(1).unwrap_or(&0)))
            .sum();
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        u16::try_from(sum).unwrap()
    }

    #[test]
    fn an_arp_request_for_us_is_answered() {
        let reply = answer(&arp(1, [10, 0, 0, 2]), ME).unwrap();
        assert_eq!(reply[..12], [PEER, ME.mac].concat());
        assert_eq!(reply[20..22], [0, 2]);
        assert_eq!(reply[22..28], ME.mac);
        assert_eq!(reply[28..32], [10, 0, 0, 2]);
        assert_eq!(reply[32..38], PEER);
        assert_eq!(reply[38..42], [10, 0, 0, 1]);
    }

    #[test]
    fn an_echo_reply_has_a_right_checksum_for_any_payload() {
        for n in 0..=255_u8 {
            let request = echo(8, &[n, n.wrapping_mul(7), 0xff, n]);
            let reply = answer(&request, ME).unwrap();
            assert_eq!(reply[34], 0);
            assert_eq!(sum(&reply[34..]), 0xffff, "payload {n}");
            assert_eq!(reply[26..34], [10, 0, 0, 2, 10, 0, 0, 1]);
        }
    }

    #[test]
    fn other_frames_are_not_answered() {
        for frame in [
            arp(2, [10, 0, 0, 2]),
            arp(1, [10, 0, 0, 3]),
            echo(0, &[]),
            echo(8, &[])[..30].to_vec(),
            vec![0; 60],
            Vec::new(),
        ] {
            assert_eq!(answer(&frame, ME), None);
        }
    }
}
