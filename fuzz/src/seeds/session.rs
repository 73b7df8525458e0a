//! Seeds for `session`: front-ends that start the device, use it, and make mistakes.

use super::Seeds;
use crate::requests::*;
use crate::session::message::Framing;
use crate::session::{Options, Step};

// Bytes of a request in an input.
const NO_REPLY: u8 = 0;
const NEED_REPLY: u8 = 1;
/// The number of descriptors that the request has.
const WANTED_FDS: u8 = 0;
/// The kind of descriptor that the request needs.
const SUITABLE: u8 = 0;
/// The first of the other kinds.
const OTHER_KIND: u8 = 128;

/// The steps of a front-end.
struct Script(Vec<u8>);

impl Script {
    fn new(options: u8) -> Self {
        Self(vec![options])
    }

    /// A front-end that has started all vrings, with buffers in each.
    fn started(options: u8) -> Self {
        let rings = 0..4;
        rings.fold(Self::new(options).step(Step::Start, &[]), |script, ring| {
            script.offer(ring, 16, 1500)
        })
    }

    fn step(mut self, step: Step, operands: &[u8]) -> Self {
        self.0.push(step as u8);
        self.0.extend(operands);
        self
    }

    fn offer(self, ring: u8, count: u8, len: u16) -> Self {
        let [low, high] = len.to_le_bytes();
        self.step(Step::Offer, &[ring, count, low, high, 0])
    }

    fn push(self, count: u8, len: u16) -> Self {
        let [low, high] = len.to_le_bytes();
        self.step(Step::Push, &[count, low, high])
    }

    fn wait(self) -> Self {
        self.step(Step::Wait, &[50])
    }

    /// A request: its code, the byte of flags and framing, its payload, the number of descriptors
    /// and their kinds.
    fn request(self, code: u32, how: u8, payload: &[u8], fds: u8, kinds: &[u8]) -> Self {
        let code = u8::try_from(code).unwrap();
        let bytes = [&[code, how], payload, &[fds], kinds].concat();
        self.step(Step::Request, &bytes)
    }

    /// A request that needs no descriptors and asks for an acknowledgement.
    fn ask(self, code: u32, payload: &[u8]) -> Self {
        self.request(code, NEED_REPLY, payload, WANTED_FDS, &[])
    }

    /// GET_VRING_BASE, whose framing is wrong.
    fn framed(self, framing: Framing) -> Self {
        let how = (113..=127).find(|n| Framing::from_byte(n << 1) == framing);
        self.request(GET_VRING_BASE, how.unwrap() << 1, &[0, 0], WANTED_FDS, &[])
    }
}

/// The seeds.
pub fn session() -> Seeds {
    let mut seeds = working();
    seeds.extend(faulty());
    seeds
        .into_iter()
        .map(|(name, script)| (name, script.0))
        .collect()
}

/// Front-ends and guests that follow the rules.
fn working() -> Vec<(&'static str, Script)> {
    let traffic = |options| Script::started(options).push(8, 60).push(63, 1400).wait();
    vec![
        ("split", traffic(0)),
        ("packed", traffic(Options::PACKED)),
        (
            "stop_and_start",
            Script::started(0)
                .step(Step::StopVring, &[1])
                .step(Step::StartVring, &[1])
                .offer(1, 3, 100)
                .wait(),
        ),
        (
            "reconnect",
            Script::started(Options::PACKED)
                .step(Step::Reconnect, &[])
                .step(Step::Start, &[])
                .offer(1, 63, 100)
                .push(3, 60),
        ),
        (
            "device_requests",
            Script::started(0)
                .ask(NET_SET_MTU, &[1])
                .ask(SEND_RARP, &[0])
                .ask(SET_STATUS, &[0])
                .ask(GET_STATUS, &[])
                .ask(GET_MAX_MEM_SLOTS, &[])
                .ask(SET_STATUS, &[1])
                .ask(RESET_DEVICE, &[])
                .ask(RESET_OWNER, &[]),
        ),
        (
            "memory_slots",
            Script::new(0)
                .step(Step::Start, &[])
                .ask(REM_MEM_REG, &[0])
                .request(ADD_MEM_REG, NEED_REPLY, &[0], WANTED_FDS, &[SUITABLE])
                .ask(REM_MEM_REG, &[1])
                .offer(1, 10, 60),
        ),
        ("iommu", behind_an_iommu()),
        (
            "one_by_one",
            Script::new(0)
                .ask(SET_PROTOCOL_FEATURES, &[0])
                .ask(SET_FEATURES, &[0])
                .request(SET_MEM_TABLE, NEED_REPLY, &[1, 0, 0], WANTED_FDS, &[0, 0])
                .ask(SET_VRING_NUM, &[1, 0])
                .ask(SET_VRING_BASE, &[1, 0])
                .ask(SET_VRING_ADDR, &[1, 0, 0, 0, 0])
                .request(SET_VRING_KICK, NEED_REPLY, &[1], WANTED_FDS, &[SUITABLE])
                .request(SET_VRING_ERR, NEED_REPLY, &[1], WANTED_FDS, &[SUITABLE])
                .ask(SET_VRING_KICK, &[5])
                .ask(SET_VRING_ENABLE, &[1, 0])
                .ask(GET_VRING_BASE, &[1, 0]),
        ),
    ]
}

/// A front-end with an IOMMU that translates, takes a translation back, and gives it again.
fn behind_an_iommu() -> Script {
    let translate = |script: Script| {
        script
            .ask(IOTLB_MSG, &[0, 0, 0, 0, 0])
            .ask(IOTLB_MSG, &[1, 0, 0, 0, 0])
    };
    let script = Script::new(0)
        .ask(SET_PROTOCOL_FEATURES, &[4])
        .request(SET_BACKEND_REQ_FD, NEED_REPLY, &[], WANTED_FDS, &[SUITABLE])
        .ask(SET_FEATURES, &[6])
        .request(SET_MEM_TABLE, NEED_REPLY, &[1, 0, 0], WANTED_FDS, &[0, 0])
        .ask(SET_VRING_NUM, &[1, 0])
        .ask(SET_VRING_BASE, &[1, 0])
        .ask(SET_VRING_ADDR, &[1, 0, 0, 0, 0])
        .request(SET_VRING_KICK, NEED_REPLY, &[1], WANTED_FDS, &[SUITABLE])
        .ask(SET_VRING_ENABLE, &[1, 0])
        .offer(1, 8, 100);
    let script = translate(script).wait().ask(IOTLB_MSG, &[1, 0, 0, 0, 1]);
    translate(script.offer(1, 3, 60))
        .wait()
        .ask(GET_VRING_BASE, &[1, 0])
}

/// Mistakes while vrings run.
fn faulty() -> Vec<(&'static str, Script)> {
    let kick =
        |kind: u8| Script::started(0).request(SET_VRING_KICK, NO_REPLY, &[0], WANTED_FDS, &[kind]);
    let framed = |framing| Script::started(0).framed(framing).step(Step::Start, &[]);
    vec![
        (
            "truncated_memory",
            Script::started(Options::NO_SEALS)
                .push(3, 60)
                .step(Step::Truncate, &[1])
                .push(3, 60)
                .wait()
                .step(Step::Start, &[]),
        ),
        (
            "blocked_calls",
            Script::new(0)
                .step(Step::Start, &[])
                .step(Step::BlockCalls, &[1])
                .offer(1, 5, 60)
                .wait(),
        ),
        (
            "other_memory",
            Script::started(0)
                .request(SET_MEM_TABLE, NEED_REPLY, &[0, 2], WANTED_FDS, &[0])
                .request(
                    SET_MEM_TABLE,
                    NEED_REPLY,
                    &[0, 2],
                    WANTED_FDS,
                    &[OTHER_KIND + 1],
                )
                .offer(1, 10, 60)
                .wait(),
        ),
        (
            "guest_writes",
            Script::started(Options::PACKED)
                .step(Step::Write, &[0, 0x40, 0, 255, 255, 255, 255, 1, 0, 2, 0])
                .step(Step::Kick, &[1])
                .wait(),
        ),
        (
            "flaw",
            Script::started(0)
                .step(Step::Offer, &[1, 3, 60, 0, 1])
                .wait(),
        ),
        ("kick_is_a_pipe", kick(OTHER_KIND + 3)),
        ("kick_is_a_socket", kick(OTHER_KIND + 5)),
        ("kick_is_a_directory", kick(OTHER_KIND + 6)),
        ("kick_is_zero", kick(OTHER_KIND + 7)),
        (
            "too_many_fds",
            Script::started(0).request(SET_VRING_CALL, NO_REPLY, &[0], 200 + 33, &[]),
        ),
        (
            "surplus_fds",
            Script::started(0).request(GET_QUEUE_NUM, NO_REPLY, &[], 202, &[129, 130]),
        ),
        ("unknown_request", Script::started(0).ask(45, &[2, 7, 7])),
        ("wrong_version", framed(Framing::WrongVersion)),
        ("in_two_parts", framed(Framing::InTwoParts)),
        ("shorter", framed(Framing::Shorter)),
        ("incomplete", framed(Framing::Incomplete)),
        ("surplus", framed(Framing::Surplus)),
    ]
}
