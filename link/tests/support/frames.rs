//! Frames as the tests of every kind of link send and receive them.

use std::time::Duration;

use cirro_link::{FrameId, Link, clock};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{MacAddress, Steer};

pub(crate) const ETHERTYPE: u16 = 0x88b5;
pub(crate) const SHORT: u8 = 1 << 5;
/// Whose frames they are.
pub(crate) const SESSION: u32 = 5;
pub(crate) const LONG: u8 = 1 << 5 | 1 << 4;

/// A frame whose body after the four bytes that the kernel looks at is `body`.
pub(crate) fn put(link: &mut impl Link, to: MacAddress, vt: u8, steer: Steer, body: &[u8], pn: u64) {
    let from = link.address();
    let head = &mut link.frame().expect("room").head;
    head.extend_from_slice(&to.0);
    head.extend_from_slice(&from.0);
    head.extend_from_slice(&ETHERTYPE.to_be_bytes());
    head.extend_from_slice(&[vt, 0]);
    head.extend_from_slice(&steer.0.to_be_bytes());
    head.extend_from_slice(body);
    link.commit(FrameId { session: SESSION, pn });
}

/// Sends what is queued: what was refused.
pub(crate) fn flush(link: &mut impl Link) -> Vec<FrameId> {
    let mut refused = Vec::new();
    link.flush(&mut refused);
    refused
}

/// Sends one frame.
pub(crate) fn send(link: &mut impl Link, to: MacAddress, vt: u8, steer: Steer, body: &[u8]) {
    put(link, to, vt, steer, body, 1);
    assert_eq!(flush(link), []);
}

/// What comes within 30 ms (a veth delivers before the send returns, or a moment later): the bytes after `steer`.
pub(crate) fn drain(link: &mut impl Link) -> Vec<Vec<u8>> {
    let mut bodies = Vec::new();
    let until = clock::now() + Nanos::from_millis(30);
    while clock::now() < until {
        while let Some(frame) = link.receive() {
            bodies.push(frame.bytes[18..].to_vec());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    bodies
}

/// The next frame, whole, and when it came.
pub(crate) fn receive_within(link: &mut impl Link, span: Nanos) -> Option<(Vec<u8>, Instant)> {
    let until = clock::now() + span;
    loop {
        if let Some(frame) = link.receive() {
            return Some((frame.bytes.to_vec(), frame.arrival));
        }
        if clock::now() >= until {
            return None;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}
