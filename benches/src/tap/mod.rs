//! What a frame costs between a guest's ring and a TAP, against bare system calls on the same queue
//! of the same TAP: how much of a frame's time is ours.
//!
//! Everything is in one thread and one network namespace: the guest (crate `virtionet-guest`), the
//! device's queue, the real TAP. Only the device's part is timed, one call a burst; the driver's
//! part is not. The bare side moves the same frames through buffers of the same number and size, so
//! that both find the caches alike. A sample is the median of its bursts: a burst in which another
//! program had the CPU says nothing of ours.

mod receive;
mod send;
mod testbed;

use anyhow::Result;
use virtionet_guest::frame::{Checksum, Frame, FrameSpec, Transport};

use self::receive::{Call, Receive};
use self::send::Send;
use self::testbed::TapTestbed;
use crate::harness::{pin_to_last_cpu, run_in_netns};
use crate::outcome::{Better, GroupResult, Row};
use crate::sampling::{Effort, PairedSamples};

/// The least ratio that is good enough.
const BOUND: f64 = 0.9;
/// Bytes of Ethernet, IPv4 and TCP headers.
const TCP: usize = 14 + 20 + 20;
/// Bytes of Ethernet, IPv4 and UDP headers.
const UDP: usize = 14 + 20 + 8;

/// A size of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    /// 64 bytes.
    Small,
    /// 1514 bytes: a full one of Ethernet.
    Full,
    /// 65,000 bytes of TCP, to be cut into segments of 1448.
    Segments,
}

impl Size {
    const ALL: [Self; 3] = [Self::Small, Self::Full, Self::Segments];

    fn name(self) -> &'static str {
        match self {
            Self::Small => "64 B",
            Self::Full => "1514 B",
            Self::Segments => "65,000 B GSO",
        }
    }

    fn frame(self) -> Result<Frame> {
        let tcp = FrameSpec::v4(Transport::Tcp);
        let frame = match self {
            Self::Small => FrameSpec::v4(Transport::Udp).build(&[1; 64 - UDP]),
            Self::Full => tcp.build(&[1; 1514 - TCP]),
            Self::Segments => {
                let spec = FrameSpec {
                    checksum: Checksum::Partial,
                    gso_size: Some(1448),
                    ..tcp
                };
                spec.build(&[1; 65_000 - TCP])
            }
        };
        Ok(frame?)
    }

    /// Frames a sample: a few milliseconds of them, so that a pair of samples is soon taken.
    fn frames(self) -> usize {
        match self {
            Self::Small | Self::Full => 2048,
            Self::Segments => 512,
        }
    }
}

/// Measures every size, both ways.
///
/// # Errors
/// When this process is not root, or a frame is lost.
pub fn run(effort: Effort) -> Result<GroupResult> {
    run_in_netns(|| {
        pin_to_last_cpu()?;
        let mut outcome = GroupResult::default();
        for size in Size::ALL {
            outcome.rows.push(sending(size, effort)?);
        }
        for size in Size::ALL {
            let row = receiving(size, Call::Readv, effort)?;
            outcome.rows.push(row.bound(BOUND));
        }
        // Out of reach where a frame may have several buffers; it shows what that costs.
        for size in [Size::Small, Size::Full] {
            outcome.rows.push(receiving(size, Call::Read, effort)?);
        }
        Ok(outcome)
    })
}

fn sending(size: Size, effort: Effort) -> Result<Row> {
    let testbed = TapTestbed::alone()?;
    let mut ours = Send::ours(&testbed, &size.frame()?)?;
    let mut bare = Send::bare(&testbed, &size.frame()?)?;
    let frames = size.frames();
    let pairs = PairedSamples::measure_in_turns(
        effort.choose(101, 11),
        || ours.measure(frames),
        || bare.measure(frames),
    )?;
    let case = format!("guest to TAP, {}", size.name());
    let row = pairs.row(&case, "ns/frame", Better::Lower, "bare writev");
    Ok(row.bound(BOUND))
}

fn receiving(size: Size, call: Call, effort: Effort) -> Result<Row> {
    let testbed = TapTestbed::with_source()?;
    let mut ours = Receive::ours(&testbed, &size.frame()?)?;
    let mut bare = Receive::bare(&testbed, &size.frame()?, call)?;
    let frames = size.frames() / 2;
    let pairs = PairedSamples::measure_in_turns(
        effort.choose(101, 11),
        || ours.measure(frames),
        || bare.measure(frames),
    )?;
    let case = format!("TAP to guest, {}", size.name());
    Ok(pairs.row(&case, "ns/frame", Better::Lower, call.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_the_sizes_that_the_cases_name() {
        let lens = Size::ALL.map(|size| size.frame().unwrap().bytes.len());
        assert_eq!(lens, [64, 1514, 65_000]);
        let header = Size::Segments.frame().unwrap().header;
        assert_eq!((header.gso_type, header.gso_size), (1, 1448));
    }
}
