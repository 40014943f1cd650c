//! The MAC addresses that stand for UDP endpoints: the core tells peers apart by MAC address, and an IPv4 address with a process number fits
//! into one.
//!
//! Knows this mapping alone. `02` (locally administered), the process number, the four bytes of the IPv4 address: 02:00:c0:00:02:01 is
//! process 0 of 192.0.2.1.

use std::net::{Ipv4Addr, SocketAddrV4};

use cirro_protocol::types::MacAddress;

/// The UDP port of a machine's first process; the others follow.
pub const PORT_FIRST: u16 = 21_110;
/// Processes that share a machine's addresses: what is for all is sent to each of their ports.
pub const PROCESSES_MAX: u16 = 8;

/// The MAC address that stands for a process of a machine.
pub(super) fn mac_of(ip: Ipv4Addr, process: u16) -> MacAddress {
    let [a, b, c, d] = ip.octets();
    MacAddress([0x02, process as u8, a, b, c, d])
}

/// Where frames for a MAC address go; `None` if it stands for no endpoint.
pub(super) fn endpoint_of(mac: MacAddress) -> Option<SocketAddrV4> {
    let MacAddress([kind, process, a, b, c, d]) = mac;
    let known = kind == 0x02 && u16::from(process) < PROCESSES_MAX;
    known.then(|| SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), PORT_FIRST + u16::from(process)))
}

/// The MAC address that stands for who sent a datagram; `None` if none of ours has such a port.
pub(super) fn sender_of(from: SocketAddrV4) -> Option<MacAddress> {
    let process = from.port().checked_sub(PORT_FIRST).filter(|process| *process < PROCESSES_MAX)?;
    Some(mac_of(*from.ip(), process))
}

/// The endpoints of every process that a machine may have.
pub(super) fn all_of(ip: Ipv4Addr) -> impl Iterator<Item = SocketAddrV4> {
    (0..PROCESSES_MAX).map(move |process| SocketAddrV4::new(ip, PORT_FIRST + process))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_and_its_mac_address_name_each_other() {
        let ip = Ipv4Addr::new(192, 0, 2, 1);
        assert_eq!(mac_of(ip, 7).to_string(), "02:07:c0:00:02:01");
        for (process, endpoint) in all_of(ip).enumerate() {
            let mac = mac_of(ip, process as u16);
            assert_eq!((endpoint_of(mac), sender_of(endpoint)), (Some(endpoint), Some(mac)));
        }
    }

    #[test]
    fn what_stands_for_no_endpoint_goes_nowhere() {
        for mac in ["ff:ff:ff:ff:ff:ff", "02:08:c0:00:02:01", "52:00:c0:00:02:01"] {
            assert_eq!(endpoint_of(mac.parse().unwrap()), None, "{mac}");
        }
        for port in [0, PORT_FIRST - 1, PORT_FIRST + PROCESSES_MAX, u16::MAX] {
            assert_eq!(sender_of(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)), None, "{port}");
        }
    }
}
