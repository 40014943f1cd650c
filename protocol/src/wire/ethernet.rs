//! The Ethernet header in front of every frame: IEEE 802.3 clause 3, no VLAN tag (the interface adds it).
//!
//! Knows nothing of what follows.

use alloc::vec::Vec;

use super::Reject;
use crate::types::{ETHERNET_BYTES, MacAddress};

/// Destination, source and EtherType.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ethernet {
    /// Where the frame goes.
    pub destination: MacAddress,
    /// Where it comes from.
    pub source: MacAddress,
    /// The EtherType, in host order.
    pub ethertype: u16,
}

impl Ethernet {
    /// Reads the first 14 bytes of a frame.
    ///
    /// # Errors
    /// [`Reject::Truncated`] when there are fewer.
    pub fn parse(frame: &[u8]) -> Result<Ethernet, Reject> {
        let header = frame.first_chunk::<ETHERNET_BYTES>().ok_or(Reject::Truncated)?;
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = *header;
        Ok(Ethernet {
            destination: MacAddress([d0, d1, d2, d3, d4, d5]),
            source: MacAddress([s0, s1, s2, s3, s4, s5]),
            ethertype: u16::from_be_bytes([t0, t1]),
        })
    }

    /// Appends the 14 bytes.
    pub fn emit(&self, head: &mut Vec<u8>) {
        head.extend_from_slice(&self.destination.0);
        head.extend_from_slice(&self.source.0);
        head.extend_from_slice(&self.ethertype.to_be_bytes());
    }
}
