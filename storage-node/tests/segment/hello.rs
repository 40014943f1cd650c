//! What a backend says first, for tests that say it by hand.
//!
//! Knows one attachment of one node.

use cirro_protocol::types::{Cid, Steer, Uuid};
use cirro_protocol::wire::long::Hello;

pub(crate) fn hello(volume: &str, session_epoch: u64, nonce: u64) -> Hello {
    Hello {
        volume: volume.parse().unwrap(),
        node: Uuid([0x11; 16]),
        attachment: Uuid([9; 16]),
        session_epoch,
        nonce,
        cid: Cid::new(7, 1),
        steer: Steer::new(1, 0),
        mtu: 9000,
        slots: 16,
        piece_bytes_max: u32::MAX,
    }
}
