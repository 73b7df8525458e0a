use std::collections::BTreeMap;
use std::fs::File;
use std::thread;

use super::*;
use message_io::Position;

fn null() -> SharedFd {
    Arc::new(File::open("/dev/null").unwrap().into())
}

fn offer() -> Offer<SharedFd> {
    Offer {
        program: "1.2.3".into(),
        devices: vec![DeviceOffer {
            name: "net0".into(),
            source: SourceImage::Listener(ListenerImage {
                socket: null(),
                file: Some((1, 2)),
            }),
            uplink: "null null".into(),
            crash_records: Some(null()),
            requested: None,
            is_link_down: false,
        }],
        taps: BTreeMap::new(),
        switch_seeds: BTreeMap::from([("lan".into(), u64::MAX)]),
        control: None,
        control_read_only: None,
        removed: Vec::new(),
        handover: ListenerImage {
            socket: null(),
            file: None,
        },
    }
}

fn state() -> HandoverState<SharedFd> {
    HandoverState {
        devices: vec![DeviceImage {
            session: None,
            counters: BTreeMap::new(),
        }],
        taps: BTreeMap::new(),
        switches: Vec::new(),
        affinity: Default::default(),
    }
}

/// What the old daemon does with a successor that connects.
fn old(stream: UnixStream) -> Result<(), HandoverError> {
    let (side, _program) = OldSide::accept(stream)?;
    side.offer(offer())?;
    side.send_state(state())?;
    side.commit()?.wait_until_served();
    Ok(())
}

/// Runs the old side while `new` does what a successor does.
fn with_successor(new: impl FnOnce(UnixStream)) -> Result<(), HandoverError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let old = thread::spawn(move || old(ours));
    new(theirs);
    old.join().unwrap()
}

#[test]
fn successor_owns_all_after_the_commit() {
    with_successor(|stream| {
        let (side, received) = NewSide::hello(stream, "1.2.4").unwrap();
        assert_eq!(received.switch_seeds, offer().switch_seeds);
        assert_eq!(received.devices[0].name, "net0");
        assert_eq!(side.ready().unwrap().devices.len(), 1);
        side.prepared().unwrap().serving();
    })
    .unwrap();
}

#[test]
fn old_daemon_waits_until_the_new_one_serves_or_is_gone() {
    for serves in [true, false] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let old = thread::spawn(move || old(ours));
        let (side, _) = NewSide::hello(theirs, "").unwrap();
        side.ready().unwrap();
        let taken_over = side.prepared().unwrap();
        thread::sleep(Duration::from_millis(50));
        assert!(!old.is_finished());
        match serves {
            true => taken_over.serving(),
            false => drop(taken_over),
        }
        old.join().unwrap().unwrap();
    }
}

#[test]
fn old_daemon_learns_at_every_step_that_its_successor_is_gone_or_refuses() {
    let closed = |result: Result<(), HandoverError>| {
        let text = result.unwrap_err().to_string();
        assert!(text.contains("the other process"), "{text}");
    };
    closed(with_successor(drop));
    closed(with_successor(|stream| {
        drop(NewSide::hello(stream, "").unwrap());
    }));
    closed(with_successor(|stream| {
        let (side, _) = NewSide::hello(stream, "").unwrap();
        side.ready().unwrap();
    }));
    let refused = with_successor(|stream| {
        let (side, _) = NewSide::hello(stream, "").unwrap();
        side.refuse("it has other devices");
    });
    let text = refused.unwrap_err().to_string();
    assert_eq!(text, "the other process refuses: it has other devices");
}

#[test]
fn successor_of_another_format_is_refused_with_both_formats() {
    let refused = with_successor(|stream| {
        let hello = FromNew::Hello {
            format: 7,
            program: "9".into(),
        };
        send(&stream, &hello, &OutgoingDescriptors::default()).unwrap();
        let (answer, _): (FromOld<Position>, _) = receive(&stream).unwrap();
        assert!(matches!(answer, FromOld::Refused { .. }), "{answer:?}");
    });
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("format 7, and this one in 1"), "{text}");
}

#[test]
fn new_daemon_that_the_old_one_does_not_serve_owns_nothing() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let new = thread::spawn(move || {
        let (side, _) = NewSide::hello(theirs, "").unwrap();
        side.ready().unwrap();
        side.prepared().unwrap_err()
    });
    let (side, _) = OldSide::accept(ours).unwrap();
    side.offer(offer()).unwrap();
    side.send_state(state()).unwrap();
    drop(side);
    let text = new.join().unwrap().to_string();
    assert_eq!(text, "the other process has closed the connection");
}

/// What a daemon of version 0.1 sends, with positions in the place of descriptors.
const SAMPLE: &str = include_str!("../samples/format-1.json");

#[test]
fn sample_of_this_format_is_read_and_written_without_a_loss() {
    let messages: Vec<FromOld<Position>> = serde_json::from_str(SAMPLE).unwrap();
    let written = serde_json::to_value(&messages).unwrap();
    let sample: serde_json::Value = serde_json::from_str(SAMPLE).unwrap();
    assert_eq!(written, sample);
    let [
        FromOld::Offer(offer),
        FromOld::State(state),
        FromOld::Commit,
    ] = &messages[..]
    else {
        panic!("{messages:?}");
    };
    assert_eq!(offer.devices.len(), state.devices.len());
    let (_, session) = state.devices[0].session.as_ref().unwrap();
    assert!(session.vrings.iter().any(|vring| vring.base.is_some()));
    assert!(!session.regions.is_empty());
    assert!(!state.switches.is_empty() && !state.taps.is_empty());
}
