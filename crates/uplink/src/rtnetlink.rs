//! The kernel's table of interfaces over netlink (rtnetlink(7)): an interface's kind, state, MTU
//! and bridge.
//!
//! One message answers each request. The kernel sends it before the request's `write` returns, so
//! no call waits.

use std::fs::File;
use std::io::{self, Read, Write};

use parking_lot::Mutex;

use crate::sys;

const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;

const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;

/// The two high bits of an attribute's type are flags.
const NLA_TYPE_MASK: u16 = 0x3fff;
const IFF_UP: u32 = 1;
/// IFLA_TUN_TYPE of a TAP.
const IFF_TAP: u8 = 2;
/// The number of bytes of `struct nlmsghdr`.
const NLMSGHDR_LEN: usize = 16;
/// The number of bytes of `struct ifinfomsg`.
const IFINFOMSG_LEN: usize = 16;
/// Enough for every reply about one interface.
const REPLY_BUFFER_LEN: usize = 64 * 1024;
/// How many replies to other requests are skipped before the call fails.
const MAX_STALE_REPLIES: usize = 8;

/// An entry of the table: the properties of an interface that an uplink uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Link {
    /// The index, which stays the same when the interface is renamed.
    pub(crate) index: u32,
    /// The present name.
    pub(crate) name: String,
    /// Whether the interface is administratively up.
    pub(crate) is_up: bool,
    /// The MTU in bytes.
    pub(crate) mtu: u32,
    /// The index of the bridge that the interface is a port of.
    pub(crate) master: Option<u32>,
    /// `tun`, `bridge`, ...; empty for hardware.
    pub(crate) kind: String,
    /// Whether the interface is a TAP (and not, for example, a TUN).
    pub(crate) is_tap: bool,
    /// Whether a TAP can have several queues.
    pub(crate) is_multi_queue: bool,
    /// The number of a TAP's queues, attached and detached, of all processes; `None` when the
    /// kernel does not report it.
    pub(crate) queues: Option<u32>,
}

/// A connection to the table of interfaces of the network namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct LinkTable(Mutex<Connection>);

#[derive(Debug)]
struct Connection {
    socket: File,
    sequence: u32,
}

impl LinkTable {
    /// Opens a connection.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self(Mutex::new(Connection {
            socket: sys::netlink_socket()?,
            sequence: 0,
        })))
    }

    /// Returns the interface of this name; `None` when there is none.
    pub(crate) fn find_by_name(&self, name: &str) -> io::Result<Option<Link>> {
        none_if_missing(self.get(0, &encode_string_attribute(IFLA_IFNAME, name)))
    }

    /// Returns the interface of this index; `None` when there is none.
    pub(crate) fn find_by_index(&self, index: u32) -> io::Result<Option<Link>> {
        none_if_missing(self.get(index, &[]))
    }

    /// Brings an interface up.
    pub(crate) fn bring_up(&self, index: u32) -> io::Result<()> {
        self.change(index, IFF_UP, &[])
    }

    /// Sets an interface's MTU.
    pub(crate) fn set_mtu(&self, index: u32, mtu: u32) -> io::Result<()> {
        self.change(index, 0, &encode_attribute(IFLA_MTU, &mtu.to_ne_bytes()))
    }

    /// Makes an interface a port of the bridge of index `master`.
    pub(crate) fn set_master(&self, index: u32, master: u32) -> io::Result<()> {
        self.change(
            index,
            0,
            &encode_attribute(IFLA_MASTER, &master.to_ne_bytes()),
        )
    }

    fn get(&self, index: u32, attributes: &[u8]) -> io::Result<Link> {
        let reply = self.transact(RTM_GETLINK, NLM_F_REQUEST, index, 0, attributes)?;
        parse_link(&reply).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    fn change(&self, index: u32, flags: u32, attributes: &[u8]) -> io::Result<()> {
        let request_flags = NLM_F_REQUEST | NLM_F_ACK;
        self.transact(RTM_NEWLINK, request_flags, index, flags, attributes)?;
        Ok(())
    }

    // syscalls: read write
    fn transact(
        &self,
        kind: u16,
        request_flags: u16,
        index: u32,
        flags: u32,
        attributes: &[u8],
    ) -> io::Result<Vec<u8>> {
        let mut connection = self.0.lock();
        connection.sequence = connection.sequence.wrapping_add(1);
        let sequence = connection.sequence;
        let mut body = encode_ifinfomsg(index, flags);
        body.extend_from_slice(attributes);
        let request = encode_message(kind, request_flags, sequence, &body);
        connection.socket.write_all(&request)?;
        connection.read_reply(sequence)
    }
}

impl Connection {
    /// Reads the body of the reply to request `sequence`.
    fn read_reply(&mut self, sequence: u32) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; REPLY_BUFFER_LEN];
        for _ in 0..MAX_STALE_REPLIES {
            let len = self.socket.read(&mut buffer)?;
            if let Some(reply) = parse_reply(&buffer[..len], sequence) {
                return reply;
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

fn none_if_missing(reply: io::Result<Link>) -> io::Result<Option<Link>> {
    match reply {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

fn encode_message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(NLMSGHDR_LEN + body.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(NLMSGHDR_LEN + body.len());
    message.extend_from_slice(&len.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&sequence.to_ne_bytes());
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(body);
    message
}

/// Encodes `struct ifinfomsg`, with `flags` both as the values and as the mask of those that
/// change.
fn encode_ifinfomsg(index: u32, flags: u32) -> Vec<u8> {
    let mut header = vec![0; 4];
    for word in [index, flags, flags] {
        header.extend_from_slice(&word.to_ne_bytes());
    }
    header
}

fn encode_attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut attribute = Vec::with_capacity(4 + value.len().next_multiple_of(4));
    attribute.extend_from_slice(&len.to_ne_bytes());
    attribute.extend_from_slice(&kind.to_ne_bytes());
    attribute.extend_from_slice(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn encode_string_attribute(kind: u16, text: &str) -> Vec<u8> {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    encode_attribute(kind, &value)
}

/// The reply in a message: its body, or the error that it reports; `None` when the message replies
/// to another request.
fn parse_reply(message: &[u8], sequence: u32) -> Option<io::Result<Vec<u8>>> {
    let len = usize::try_from(read_u32(message, 0)?).ok()?;
    let body = message.get(NLMSGHDR_LEN..len)?;
    if read_u32(message, 8)? != sequence {
        return None;
    }
    if read_u16(message, 4)? != NLMSG_ERROR {
        return Some(Ok(body.to_vec()));
    }
    let errno = i32::from_ne_bytes(*body.first_chunk()?);
    Some(match errno {
        0 => Ok(Vec::new()),
        _ => Err(io::Error::from_raw_os_error(errno.wrapping_neg())),
    })
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: read_u32(body, 4)?,
        is_up: read_u32(body, 8)? & IFF_UP != 0,
        ..Link::default()
    };
    for (kind, value) in parse_attributes(body.get(IFINFOMSG_LEN..)?) {
        match kind {
            IFLA_IFNAME => link.name = parse_string(value),
            IFLA_MTU => link.mtu = read_u32(value, 0)?,
            IFLA_MASTER => link.master = read_u32(value, 0).filter(|&index| index != 0),
            IFLA_LINKINFO => parse_kind(value, &mut link),
            _ => {}
        }
    }
    Some(link)
}

fn parse_kind(info: &[u8], link: &mut Link) {
    for (kind, value) in parse_attributes(info) {
        match kind {
            IFLA_INFO_KIND => link.kind = parse_string(value),
            // The kernel sends the kind before the data, which cannot be read without it.
            IFLA_INFO_DATA if link.kind == "tun" => parse_tun(value, link),
            _ => {}
        }
    }
}

fn parse_tun(data: &[u8], link: &mut Link) {
    for (kind, value) in parse_attributes(data) {
        match kind {
            IFLA_TUN_TYPE => link.is_tap = value.first() == Some(&IFF_TAP),
            IFLA_TUN_MULTI_QUEUE => link.is_multi_queue = value.first() == Some(&1),
            IFLA_TUN_NUM_QUEUES | IFLA_TUN_NUM_DISABLED_QUEUES => {
                let more = read_u32(value, 0).unwrap_or(0);
                link.queues = Some(link.queues.unwrap_or(0).saturating_add(more));
            }
            _ => {}
        }
    }
}

/// The attributes in `bytes`, up to the first that is truncated.
fn parse_attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(read_u16(bytes, 0)?);
        let kind = read_u16(bytes, 2)? & NLA_TYPE_MASK;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

/// The text of a string attribute, without its final zero.
fn parse_string(value: &[u8]) -> String {
    let text = value.split(|&byte| byte == 0).next().unwrap_or(value);
    String::from_utf8_lossy(text).into_owned()
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_interface_is_found_and_others_are_not() {
        let table = LinkTable::open().unwrap();
        let lo = table.find_by_name("lo").unwrap().unwrap();
        assert_eq!((lo.index, lo.name.as_str()), (1, "lo"));
        assert_eq!((lo.kind.as_str(), lo.is_tap), ("", false));
        assert_eq!(table.find_by_index(1).unwrap().unwrap(), lo);
        assert!(lo.mtu >= 1500, "{lo:?}");
        assert_eq!(table.find_by_name("no-such-link").unwrap(), None);
        assert_eq!(table.find_by_index(0x7fff_fff0).unwrap(), None);
    }

    #[test]
    fn truncated_reply_is_not_parsed_as_a_whole_one() {
        let mut body = encode_ifinfomsg(7, IFF_UP);
        body.extend(encode_attribute(IFLA_MTU, &1500_u32.to_ne_bytes()));
        let data = encode_attribute(IFLA_TUN_TYPE, &[IFF_TAP]);
        let mut info = encode_string_attribute(IFLA_INFO_KIND, "tun");
        info.extend(encode_attribute(IFLA_INFO_DATA, &data));
        body.extend(encode_attribute(IFLA_LINKINFO, &info));
        let whole = encode_message(RTM_NEWLINK, 0, 3, &body);
        let link = parse_link(&parse_reply(&whole, 3).unwrap().unwrap()).unwrap();
        assert!(link.is_up && link.is_tap && link.mtu == 1500 && link.index == 7);
        assert!(parse_reply(&whole, 4).is_none());
        for len in 0..whole.len() {
            assert!(parse_reply(&whole[..len], 3).is_none(), "{len}");
        }
        for len in 0..body.len() {
            let full = parse_link(&body[..len]).is_some_and(|cut| cut == link);
            assert!(!full, "{len}");
        }
    }
}
