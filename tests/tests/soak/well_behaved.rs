//! Two devices on a switch of their own, whose driver breaks no rule. It sends numbered frames from
//! one to the other and checks that all of them arrive in order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use virtionet_guest::frame::{Frame, FrameSpec, Transport};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};

use crate::daemon_under_test::{DaemonUnderTest, TIMEOUT, counter};

/// Frames in flight. They always fit the receiveq, so no frame may be lost.
const BURST: u64 = 64;
/// The pause between two bursts, which leaves the CPUs to the actions.
const PAUSE: Duration = Duration::from_millis(2);

/// A thread that drives both devices.
#[derive(Debug)]
pub struct WellBehavedPair {
    should_stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
    sent_before: u64,
}

impl WellBehavedPair {
    /// Connects both devices and starts to send.
    pub fn start(under_test: &DaemonUnderTest) -> Self {
        let config = TestFrontendConfig::new(1, 256, MODERN);
        let connect = |device| TestFrontend::connect(&under_test.socket(device), &config).unwrap();
        let (sender, receiver) = (connect("good0"), connect("good1"));
        let should_stop = Arc::new(AtomicBool::new(false));
        let (stop, progress) = (Arc::clone(&should_stop), Arc::clone(&under_test.progress));
        Self {
            should_stop,
            sent_before: counter(&under_test.device("good0"), 0, "tx", "frames"),
            thread: std::thread::Builder::new()
                .name("well-behaved".into())
                .spawn(move || carry_frames(sender, receiver, &stop, &progress))
                .unwrap(),
        }
    }

    /// Disconnects both devices, and checks their counters.
    pub fn stop(self, under_test: &DaemonUnderTest) {
        self.should_stop.store(true, Ordering::Relaxed);
        let sent = self.thread.join();
        // Its own message is the first one of the output.
        let sent = sent.unwrap();
        for device in ["good0", "good1"] {
            under_test.wait_for(device, "disconnected", |d| d["connected"] == false);
        }
        let (sender, receiver) = (under_test.device("good0"), under_test.device("good1"));
        assert_eq!(counter(&sender, 0, "tx", "frames"), self.sent_before + sent);
        assert_eq!(
            counter(&receiver, 0, "rx", "frames"),
            self.sent_before + sent
        );
    }
}

/// Sends until `should_stop`. Returns the number of frames.
fn carry_frames(
    mut sender: TestFrontend,
    mut receiver: TestFrontend,
    should_stop: &AtomicBool,
    progress: &AtomicU64,
) -> u64 {
    let (mut sent, mut received) = (0, 0);
    while !should_stop.load(Ordering::Relaxed) {
        let frames: Vec<Frame> = (sent..sent + BURST).map(numbered_frame).collect();
        sender.pairs[0].tx.send_all(&frames, TIMEOUT).unwrap();
        sent += BURST;
        while received < sent {
            for frame in receiver.pairs[0].rx.wait_frames(1, TIMEOUT).unwrap() {
                assert_eq!(
                    frame.bytes,
                    numbered_frame(received).bytes,
                    "frame {received}"
                );
                received += 1;
            }
            progress.store(received, Ordering::Relaxed);
        }
        std::thread::sleep(PAUSE);
    }
    sent
}

fn numbered_frame(number: u64) -> Frame {
    let spec = FrameSpec {
        source_mac: [2, 0, 0, 0, 0, 0x10],
        target_mac: [2, 0, 0, 0, 0, 0x11],
        ..FrameSpec::v4(Transport::Udp)
    };
    spec.build(&number.to_be_bytes()).unwrap()
}
