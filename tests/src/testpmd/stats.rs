//! The counters of testpmd, parsed from its output.

use anyhow::{Context, Result};

/// The counters of one port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// The number of received frames.
    pub rx_packets: u64,
    /// The number of frames that were lost because the receive queue was full.
    pub rx_missed: u64,
    /// The number of received frames with errors.
    pub rx_errors: u64,
    /// The number of failed attempts to allocate a packet buffer.
    pub rx_nombuf: u64,
    /// The number of received bytes.
    pub rx_bytes: u64,
    /// The number of transmitted frames.
    pub tx_packets: u64,
    /// The number of frames that could not be transmitted.
    pub tx_errors: u64,
    /// The number of transmitted bytes.
    pub tx_bytes: u64,
    /// Received frames per second, since the previous reply.
    pub rx_pps: u64,
    /// Transmitted frames per second, since the previous reply.
    pub tx_pps: u64,
}

/// The forwarding counters of all ports together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForwardStats {
    /// The number of received frames.
    pub rx_packets: u64,
    /// The number of transmitted frames.
    pub tx_packets: u64,
    /// The number of frames that were dropped because a transmit queue had no free space.
    pub tx_dropped: u64,
    /// The cycles of the time-stamp counter during bursts that contained frames.
    pub busy_cycles: u64,
    /// The frequency of the time-stamp counter in MHz, or `None` until a burst has contained
    /// frames.
    pub clock_mhz: Option<u64>,
}

impl ForwardStats {
    /// Returns the difference between these counters and the earlier counters `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            rx_packets: self.rx_packets.saturating_sub(before.rx_packets),
            tx_packets: self.tx_packets.saturating_sub(before.tx_packets),
            tx_dropped: self.tx_dropped.saturating_sub(before.tx_dropped),
            busy_cycles: self.busy_cycles.saturating_sub(before.busy_cycles),
            clock_mhz: self.clock_mhz,
        }
    }
}

/// Parses the reply to `show port stats all`.
pub(super) fn parse_ports(text: &str) -> Result<Vec<PortStats>> {
    text.split("NIC statistics for port")
        .skip(1)
        .map(|part| {
            parse_port(part)
                .with_context(|| format!("a counter of this port is missing or invalid: {part}"))
        })
        .collect()
}

fn parse_port(text: &str) -> Option<PortStats> {
    Some(PortStats {
        rx_packets: number(text, "RX-packets:")?,
        rx_missed: number(text, "RX-missed:")?,
        rx_errors: number(text, "RX-errors:")?,
        rx_nombuf: number(text, "RX-nombuf:")?,
        rx_bytes: number(text, "RX-bytes:")?,
        tx_packets: number(text, "TX-packets:")?,
        tx_errors: number(text, "TX-errors:")?,
        tx_bytes: number(text, "TX-bytes:")?,
        rx_pps: number(text, "Rx-pps:")?,
        tx_pps: number(text, "Tx-pps:")?,
    })
}

/// Parses the reply to `show fwd stats all`.
pub(super) fn parse_forwarded(text: &str) -> Result<ForwardStats> {
    let all = text.split_once("for all ports").map(|(_, rest)| rest);
    all.and_then(parse_sums)
        .with_context(|| format!("the reply has no accumulated forward statistics: {text}"))
}

fn parse_sums(text: &str) -> Option<ForwardStats> {
    Some(ForwardStats {
        rx_packets: number(text, "RX-packets:")?,
        tx_packets: number(text, "TX-packets:")?,
        tx_dropped: number(text, "TX-dropped:")?,
        // testpmd prints this line only after a burst has contained frames.
        busy_cycles: number(text, "total cycles=").unwrap_or(0),
        clock_mhz: text
            .split_once("total cycles=")
            .and_then(|(_, rest)| number(rest, ") at ")),
    })
}

/// Returns the number after the first occurrence of `key`.
fn number(text: &str, key: &str) -> Option<u64> {
    let (_, rest) = text.split_once(key)?;
    let rest = rest.trim_start();
    let end = rest
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(rest.len());
    rest[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORTS: &str = "
  ######################## NIC statistics for port 0  ########################
  RX-packets: 1443360    RX-missed: 7          RX-bytes:  92375040
  RX-errors: 1
  RX-nombuf:  2         
  TX-packets: 1443616    TX-errors: 3          TX-bytes:  92391424

  Throughput (since last show)
  Rx-pps:       977067          Rx-bps:    500258512
  Tx-pps:       977163          Tx-bps:    500307664
  ############################################################################
";
    const ALL: &str = "
  ---------------------- Forward statistics for port 0  ----------------------
  RX-packets: 1              RX-dropped: 0             RX-total: 1

  +++++++++++++++ Accumulated forward statistics for all ports+++++++++++++++
  RX-packets: 8756832        RX-dropped: 0             RX-total: 8756832
  TX-packets: 8757344        TX-dropped: 5             TX-total: 8757344
  ++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++

  CPU cycles/packet=607.88 (total cycles=5323090622 / total io packets=8756832) at 2600 MHz Clock
";

    #[test]
    fn counters_of_every_port_are_parsed() {
        let two = PORTS.repeat(2).replacen("977067", "5", 1);
        let ports = parse_ports(&two).unwrap();
        let first = ports[0];
        assert_eq!(
            (ports.len(), first.rx_pps, ports[1].rx_pps),
            (2, 5, 977_067)
        );
        assert_eq!((first.rx_packets, first.tx_packets), (1_443_360, 1_443_616));
        assert_eq!((first.rx_missed, first.rx_errors), (7, 1));
        assert_eq!((first.rx_nombuf, first.tx_errors), (2, 3));
        assert_eq!((first.rx_bytes, first.tx_bytes), (92_375_040, 92_391_424));
        assert_eq!(first.tx_pps, 977_163);
    }

    #[test]
    fn sums_of_all_ports_are_parsed_instead_of_the_first_port() {
        let all = parse_forwarded(ALL).unwrap();
        assert_eq!((all.rx_packets, all.tx_packets), (8_756_832, 8_757_344));
        assert_eq!((all.tx_dropped, all.busy_cycles), (5, 5_323_090_622));
        assert_eq!(all.clock_mhz, Some(2600));
        let idle = parse_forwarded(ALL.split("CPU cycles").next().unwrap()).unwrap();
        assert_eq!((idle.busy_cycles, idle.clock_mhz), (0, None));
    }

    #[test]
    fn missing_counter_is_an_error() {
        assert!(parse_ports(&PORTS.replace("RX-missed", "RX-other")).is_err());
        assert!(parse_forwarded("nothing of that").is_err());
    }
}
