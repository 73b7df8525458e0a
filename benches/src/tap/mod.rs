//! Measures the cost of a frame between a guest's virtqueue and a TAP, against bare system calls on
//! the same queue of the same TAP. The difference is the cost of virtionetd.
//!
//! Everything is in one thread and one network namespace: the guest (crate `virtionet-guest`), the
//! device's queue, and a real TAP. Only the device's part is timed, with one call for each burst.
//! The bare side uses buffers of the same number and size for the same frames, so that both sides
//! use the caches in the same way. A sample is the median of its bursts, because a burst during
//! which another program uses the CPU does not show the cost of virtionetd.

mod receive;
mod send;
pub(crate) mod testbed;

use anyhow::Result;
use virtionet_guest::frame::{Checksum, Frame, FrameSpec, Transport};

use self::receive::{ReadCall, Receiver};
use self::send::Sender;
use self::testbed::TapTestbed;
use crate::harness::{pin_to_last_cpu, run_in_netns};
use crate::outcome::{Better, GroupResult, Row};
use crate::sampling::{Effort, PairedSamples};

/// The lowest acceptable ratio.
const BOUND: f64 = 0.9;
/// Bytes of Ethernet, IPv4 and TCP headers.
const TCP_HEADERS_LEN: usize = 14 + 20 + 20;
/// Bytes of Ethernet, IPv4 and UDP headers.
const UDP_HEADERS_LEN: usize = 14 + 20 + 8;

/// The size of the frames of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FrameSize {
    /// 64 bytes.
    Small,
    /// 1514 bytes, which is the largest Ethernet frame with an MTU of 1500.
    Full,
    /// 65,000 bytes of TCP with GSO, to be cut into segments of 1448 bytes.
    Segments,
}

impl FrameSize {
    const ALL: [Self; 3] = [Self::Small, Self::Full, Self::Segments];

    fn name(self) -> &'static str {
        match self {
            Self::Small => "64 B",
            Self::Full => "1514 B",
            Self::Segments => "65,000 B GSO",
        }
    }

    fn build_frame(self) -> Result<Frame> {
        let tcp = FrameSpec::v4(Transport::Tcp);
        let frame = match self {
            Self::Small => FrameSpec::v4(Transport::Udp).build(&[1; 64 - UDP_HEADERS_LEN]),
            Self::Full => tcp.build(&[1; 1514 - TCP_HEADERS_LEN]),
            Self::Segments => {
                let spec = FrameSpec {
                    checksum: Checksum::Partial,
                    gso_size: Some(1448),
                    ..tcp
                };
                spec.build(&[1; 65_000 - TCP_HEADERS_LEN])
            }
        };
        Ok(frame?)
    }

    /// Returns the number of frames of a sample. A sample takes a few milliseconds, so that the
    /// conditions are the same for both samples of a pair.
    fn frames_per_sample(self) -> usize {
        match self {
            Self::Small | Self::Full => 2048,
            Self::Segments => 512,
        }
    }
}

/// Measures every size in both directions.
///
/// # Errors
/// When this process is not root, or a frame is lost.
pub fn run(effort: Effort) -> Result<GroupResult> {
    run_in_netns(|| {
        pin_to_last_cpu()?;
        let mut outcome = GroupResult::default();
        for size in FrameSize::ALL {
            outcome.rows.push(measure_sending(size, effort)?);
        }
        for size in FrameSize::ALL {
            let row = measure_receiving(size, ReadCall::Readv, effort)?;
            outcome.rows.push(row.with_bound(BOUND));
        }
        // `read` requires that each frame fits one buffer, which a device cannot assume. These
        // cases show the cost of that and have no bound.
        for size in [FrameSize::Small, FrameSize::Full] {
            outcome
                .rows
                .push(measure_receiving(size, ReadCall::Read, effort)?);
        }
        Ok(outcome)
    })
}

fn measure_sending(size: FrameSize, effort: Effort) -> Result<Row> {
    let testbed = TapTestbed::without_source()?;
    let mut ours = Sender::ours(&testbed, &size.build_frame()?)?;
    let mut bare = Sender::bare(&testbed, &size.build_frame()?)?;
    let frames = size.frames_per_sample();
    let samples = PairedSamples::measure_in_turns(
        effort.choose(101, 11),
        || ours.measure(frames),
        || bare.measure(frames),
    )?;
    let case = format!("guest to TAP, {}", size.name());
    let row = samples.row(&case, "ns/frame", Better::Lower, "bare writev");
    Ok(row.with_bound(BOUND))
}

fn measure_receiving(size: FrameSize, call: ReadCall, effort: Effort) -> Result<Row> {
    let testbed = TapTestbed::with_source()?;
    let mut ours = Receiver::ours(&testbed, &size.build_frame()?)?;
    let mut bare = Receiver::bare(&testbed, &size.build_frame()?, call)?;
    let frames = size.frames_per_sample() / 2;
    let samples = PairedSamples::measure_in_turns(
        effort.choose(101, 11),
        || ours.measure(frames),
        || bare.measure(frames),
    )?;
    let case = format!("TAP to guest, {}", size.name());
    Ok(samples.row(&case, "ns/frame", Better::Lower, call.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_the_sizes_that_the_cases_name() {
        let lens = FrameSize::ALL.map(|size| size.build_frame().unwrap().bytes.len());
        assert_eq!(lens, [64, 1514, 65_000]);
        let header = FrameSize::Segments.build_frame().unwrap().header;
        assert_eq!((header.gso_type, header.gso_size), (1, 1448));
    }
}
