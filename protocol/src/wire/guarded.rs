//! LONG frames of mode AES-256-GCM: the outside of a handshake whose inside is a Noise message, and of what leads to it.
//!
//! Knows where the fields lie. What makes and checks them (Noise, marks, cookies) is `cirro-seal`; who may say what is `initiator` and the node.

use alloc::vec::Vec;

use super::ethernet::Ethernet;
use super::header::{HEADER_BYTES, VERSION, VT_LONG};
use super::long::HELLO_BYTES;
use super::{Reader, Reject};
use crate::types::{Cid, ETHERNET_BYTES, Steer};

/// What a Noise payload of a handshake holds: the type of the body inside, its fields, zeroes.
pub const INNER_BYTES: usize = 128;
/// The body: a public key, an encrypted public key, an encrypted [`INNER_BYTES`].
pub const GUARDED_BODY_BYTES: usize = 32 + (32 + 16) + (INNER_BYTES + 16);
/// The answer's Noise message, which has no second public key.
pub const GUARDED_REPLY_BYTES: usize = 32 + INNER_BYTES + 16;
/// Each of the two marks at the end.
pub const MARK_BYTES: usize = 16;
/// Bytes of a whole frame.
pub const GUARDED_FRAME_BYTES: usize = ETHERNET_BYTES + HEADER_BYTES + GUARDED_BODY_BYTES + 2 * MARK_BYTES;
/// Where the first mark begins: it covers what is between the Ethernet header and itself; the second covers the first too.
pub const FIRST_MARK_AT: usize = GUARDED_FRAME_BYTES - 2 * MARK_BYTES;
/// Where the second mark begins.
pub const SECOND_MARK_AT: usize = GUARDED_FRAME_BYTES - MARK_BYTES;

/// The types that are Noise messages, and the one that only this mode has; the others are those of [`super::long::Body`].
pub const CODE_HELLO: u8 = 1;
/// See [`CODE_HELLO`].
pub const CODE_HELLO_REPLY: u8 = 2;
/// See [`CODE_HELLO`].
pub const CODE_COOKIE: u8 = 3;

/// Such a frame but its marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guarded<'a> {
    /// Destination and source.
    pub ethernet: Ethernet,
    /// The type: of a handshake, that of the body inside is another matter.
    pub code: u8,
    /// Which worker it is for.
    pub steer: Steer,
    /// HELLO: where the initiator wants its answer; HELLO_REPLY, COOKIE: the same, for the initiator to know which HELLO it answers; else 0.
    pub cid: Cid,
    /// HELLO: the worker that waits for the answer; else 0.
    pub answer_steer: Steer,
    /// What the type says: a Noise message, a sealed cookie, or the fields of a body; then zeroes.
    pub body: &'a [u8; GUARDED_BODY_BYTES],
}

/// True if a LONG frame, from after its Ethernet header, is of this mode.
pub fn is_guarded(after_ethernet: &[u8]) -> bool {
    after_ethernet.first().is_some_and(|vt| vt & 0b1111 == 1)
}

impl<'a> Guarded<'a> {
    /// Takes a whole frame apart. The marks are not checked here.
    ///
    /// # Errors
    /// A [`Reject`] that names what is wrong.
    pub fn parse(frame: &'a [u8]) -> Result<Guarded<'a>, Reject> {
        let ethernet = Ethernet::parse(frame)?;
        let frame: &[u8; GUARDED_FRAME_BYTES] = frame.try_into().map_err(|_| Reject::Truncated)?;
        let mut r = Reader(&frame[ETHERNET_BYTES..FIRST_MARK_AT]);
        let vt = r.u8().ok_or(Reject::Truncated)?;
        if vt >> 5 != VERSION {
            return Err(Reject::Version);
        }
        if vt & VT_LONG == 0 {
            return Err(Reject::Form);
        }
        if vt & 0b1111 != 1 {
            return Err(Reject::Mode);
        }
        let mut fields = || -> Option<(Guarded<'a>, [u8; 24])> {
            let code = r.u8()?;
            let steer = Steer(u16::from_be_bytes(r.array()?));
            let cid = Cid(r.u32()?);
            let answer_steer = Steer(u16::from_be_bytes(r.array()?));
            let reserved = r.array()?;
            let body = r.0.try_into().ok()?;
            Some((Guarded { ethernet, code, steer, cid, answer_steer, body }, reserved))
        };
        let (guarded, reserved) = fields().ok_or(Reject::Truncated)?;
        if reserved != [0; 24] { Err(Reject::Padding) } else { Ok(guarded) }
    }

    /// True if it answers a HELLO: it names who asked by the cid. All others are questions and hints, for whoever they fit.
    pub fn is_answer(&self) -> bool {
        matches!(self.code, CODE_HELLO_REPLY | CODE_COOKIE)
    }

    /// Appends the frame up to its marks.
    pub fn emit(&self, head: &mut Vec<u8>) {
        self.ethernet.emit(head);
        let start = head.len();
        head.extend_from_slice(&[VERSION << 5 | VT_LONG | 1, self.code]);
        head.extend_from_slice(&self.steer.0.to_be_bytes());
        head.extend_from_slice(&self.cid.0.to_le_bytes());
        head.extend_from_slice(&self.answer_steer.0.to_be_bytes());
        head.resize(start + HEADER_BYTES, 0);
        head.extend_from_slice(self.body);
    }
}

const _: () = assert!(HELLO_BYTES < INNER_BYTES);
const _: () = assert!(GUARDED_REPLY_BYTES <= GUARDED_BODY_BYTES);
const _: () = assert!(super::long::LONG_BODY_BYTES <= GUARDED_BODY_BYTES);
