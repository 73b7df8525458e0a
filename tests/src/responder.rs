//! A front-end and driver in a thread of this process, which answers ARP requests and pings in
//! place of a guest. It starts within milliseconds, while a guest under QEMU needs seconds.

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

const POLL_INTERVAL: Duration = Duration::from_millis(1);
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];

/// A driver that answers requests to one address until it is dropped.
#[derive(Debug)]
pub struct EchoResponder {
    should_stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<TestFrontend>>>,
}

/// The addresses of a responder.
#[derive(Clone, Copy, Debug)]
pub struct ResponderAddresses {
    /// The MAC address.
    pub mac: [u8; 6],
    /// The IPv4 address.
    pub v4: Ipv4Addr,
}

impl ResponderAddresses {
    /// Parses an IPv4 address, and derives the MAC address from it.
    ///
    /// # Errors
    /// When the text is not an IPv4 address.
    pub fn from_ipv4(v4: &str) -> Result<Self> {
        let v4: Ipv4Addr = v4
            .parse()
            .with_context(|| format!("'{v4}' is not an IPv4 address"))?;
        let [a, b, c, d] = v4.octets();
        Ok(Self {
            mac: [0x52, 0x54, a, b, c, d],
            v4,
        })
    }
}

impl EchoResponder {
    /// Connects to the back-end that listens on `path`, and starts to answer.
    ///
    /// # Errors
    /// When the connection fails, or the back-end refuses a request of the front-end.
    pub fn connect(
        path: &Path,
        config: &TestFrontendConfig,
        addresses: ResponderAddresses,
    ) -> Result<Self> {
        Self::start(TestFrontend::connect(path, config)?, addresses)
    }

    /// Uses a socket that is connected to the back-end, and starts to answer.
    ///
    /// # Errors
    /// When the back-end refuses a request of the front-end.
    pub fn from_socket(
        socket: UnixStream,
        config: &TestFrontendConfig,
        addresses: ResponderAddresses,
    ) -> Result<Self> {
        Self::start(TestFrontend::from_socket(socket, config)?, addresses)
    }

    fn start(mut frontend: TestFrontend, addresses: ResponderAddresses) -> Result<Self> {
        let should_stop = Arc::new(AtomicBool::new(false));
        let thread_should_stop = Arc::clone(&should_stop);
        let thread = thread::Builder::new()
            .name("responder".into())
            .spawn(move || {
                while !thread_should_stop.load(Ordering::Relaxed) {
                    if answer_all(&mut frontend, addresses)? == 0 {
                        thread::sleep(POLL_INTERVAL);
                    }
                }
                Ok(frontend)
            })?;
        Ok(Self {
            should_stop,
            thread: Some(thread),
        })
    }

    /// Stops answering and returns the front-end, which is still connected.
    ///
    /// # Errors
    /// When the back-end has violated the virtqueue protocol, or the thread has panicked.
    pub fn stop(mut self) -> Result<TestFrontend> {
        self.should_stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the responder has no thread")?;
        thread
            .join()
            .map_err(|_| anyhow!("the thread of the responder panicked"))?
    }
}

impl Drop for EchoResponder {
    fn drop(&mut self) {
        self.should_stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // An error is ignored, because the test that waits for an answer fails then.
            _ = thread.join();
        }
    }
}

/// Answers the received frames of every queue pair on the same pair. Returns the number of received
/// frames.
fn answer_all(frontend: &mut TestFrontend, addresses: ResponderAddresses) -> Result<usize> {
    let mut count = 0;
    for pair in &mut frontend.pairs {
        let frames = pair.rx.receive_frames()?;
        count += frames.len();
        for bytes in frames.iter().filter_map(|f| answer(&f.bytes, addresses)) {
            pair.tx.send(&Frame {
                header: NetHeader::default(),
                bytes,
            })?;
        }
        pair.tx.reclaim()?;
    }
    Ok(count)
}

/// Returns the answer to an ARP request (RFC 826) or an ICMP echo request (RFC 792) for
/// `addresses`.
fn answer(frame: &[u8], addresses: ResponderAddresses) -> Option<Vec<u8>> {
    let ethertype: [u8; 2] = frame.get(12..14)?.try_into().ok()?;
    let mut out = frame.to_vec();
    out.get_mut(0..6)?.copy_from_slice(frame.get(6..12)?);
    out.get_mut(6..12)?.copy_from_slice(&addresses.mac);
    match ethertype {
        ETHERTYPE_ARP => answer_arp(frame, &mut out, addresses)?,
        ETHERTYPE_IPV4 => answer_echo(frame, &mut out, addresses)?,
        _ => return None,
    }
    Some(out)
}

fn answer_arp(frame: &[u8], out: &mut [u8], addresses: ResponderAddresses) -> Option<()> {
    let ours = addresses.v4.octets();
    if frame.get(20..22)? != [0, 1] || frame.get(38..42)? != ours {
        return None;
    }
    out.get_mut(20..22)?.copy_from_slice(&[0, 2]);
    out.get_mut(22..28)?.copy_from_slice(&addresses.mac);
    out.get_mut(28..32)?.copy_from_slice(&ours);
    out.get_mut(32..42)?.copy_from_slice(frame.get(22..32)?);
    Some(())
}

fn answer_echo(frame: &[u8], out: &mut [u8], addresses: ResponderAddresses) -> Option<()> {
    let header = usize::from(frame.get(14)? & 0xf) * 4;
    let icmp = 14 + header;
    let is_for_us = frame.get(30..34)? == addresses.v4.octets();
    if !is_for_us || frame.get(23)? != &1 || frame.get(icmp)? != &8 {
        return None;
    }
    // Swapping the addresses does not change the checksum of the IP header.
    out.get_mut(26..30)?.copy_from_slice(frame.get(30..34)?);
    out.get_mut(30..34)?.copy_from_slice(frame.get(26..30)?);
    *out.get_mut(icmp)? = 0;
    // The type changes from 8 to 0, so the checksum increases by 0x0800 (RFC 1624).
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

    const OURS: ResponderAddresses = ResponderAddresses {
        mac: [2, 0, 0, 0, 0, 2],
        v4: Ipv4Addr::new(10, 0, 0, 2),
    };
    const REQUESTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn arp(operation: u8, target: [u8; 4]) -> Vec<u8> {
        let mut frame = [&[0xff; 6][..], &REQUESTER_MAC, &ETHERTYPE_ARP].concat();
        frame.extend([0, 1, 8, 0, 6, 4, 0, operation]);
        frame.extend(REQUESTER_MAC);
        frame.extend([10, 0, 0, 1]);
        frame.extend([0; 6]);
        frame.extend(target);
        frame
    }

    fn echo(icmp_type: u8, payload: &[u8]) -> Vec<u8> {
        let mut icmp = [&[icmp_type, 0, 0, 0, 1, 2, 3, 4], payload].concat();
        let sum = !sum(&icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut frame = [&OURS.mac[..], &REQUESTER_MAC, &ETHERTYPE_IPV4].concat();
        frame.extend([
            0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        frame.extend(icmp);
        frame
    }

    /// Computes the one's complement sum of RFC 1071.
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
    fn arp_request_for_the_responders_address_is_answered() {
        let reply = answer(&arp(1, [10, 0, 0, 2]), OURS).unwrap();
        assert_eq!(reply[..12], [REQUESTER_MAC, OURS.mac].concat());
        assert_eq!(reply[20..22], [0, 2]);
        assert_eq!(reply[22..28], OURS.mac);
        assert_eq!(reply[28..32], [10, 0, 0, 2]);
        assert_eq!(reply[32..38], REQUESTER_MAC);
        assert_eq!(reply[38..42], [10, 0, 0, 1]);
    }

    #[test]
    fn echo_reply_has_a_correct_checksum_for_any_payload() {
        for n in 0..=255_u8 {
            let request = echo(8, &[n, n.wrapping_mul(7), 0xff, n]);
            let reply = answer(&request, OURS).unwrap();
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
            assert_eq!(answer(&frame, OURS), None);
        }
    }
}
