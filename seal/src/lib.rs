//! What touches payload to protect it: checksums and tags of frames, keys, and the handshakes that agree on them.
//!
//! Knows how a frame is sealed (`docs/PROTOCOL.md`): with CRC32C trailer and tag, or by AES-256-GCM ([`SessionKeys`]); does not know what a
//! session says, guest memory or links. Workers of both ends call it: after the core wrote a frame's head, and before the core sees a
//! received frame. Handshakes with keys: [`Caller`] is the backend's end, [`Answerer`] the node's.
//!
//! The order in which a frame is sealed with CRCs: the core writes the head without the payloads, the worker appends one CRC per 4 KiB of each
//! payload in order ([`append_payload_crcs`], or a [`Crc32c`] of its own where the payload is guest memory), then [`seal_crc`] adds the tag.
#![forbid(unsafe_code)]

mod answerer;
mod caller;
mod crc;
mod guard;
mod identity;
mod marks;
mod primitives;
mod session_keys;

pub use answerer::{Admission, Answerer, Marked, Pending};
pub use caller::{Answer, Caller};
pub use crc::{Crc32c, crc32c};
pub use guard::{Guard, splice};
pub use identity::{Entropy, Identity, new_private, os_entropy, public_of};
pub use session_keys::{Nonce, PHASE_BITS, Secret, SessionKeys, Witness};

use cirro_protocol::types::{BLOCK_BYTES, ETHERNET_BYTES};
use cirro_protocol::wire::{Frame, Mode};

/// Bytes of the tag of mode 0.
pub const TAG_BYTES: usize = 4;
/// Bytes of one CRC in the trailer.
pub const CRC_BYTES: usize = 4;

/// The two random numbers of a session, seen from one direction. They stand in the tag though not in the frame, so that a frame of another
/// session, or one reflected to its sender, does not pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nonces {
    /// The nonce of the end that sends the frame.
    pub sender: u64,
    /// The nonce of the end that receives it.
    pub receiver: u64,
}

impl From<(u64, u64)> for Nonces {
    /// From the pair that the core gives: the sender's, the receiver's.
    fn from((sender, receiver): (u64, u64)) -> Nonces {
        Nonces { sender, receiver }
    }
}

/// Where a received frame differs from what was sealed. The frame is dropped and counted; nothing of it may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// The tag is wrong: damage outside the payloads, or another session's frame.
    #[error("tag mismatch")]
    Tag,
    /// A payload differs from its CRC.
    #[error("payload {index} does not match its CRC")]
    Payload {
        /// Which of the frame's data payloads, from 0.
        index: usize,
    },
    /// The frame is sealed in a mode that is not handled here.
    #[error("another sealing mode")]
    Mode,
    /// The frame is of a key phase that is not near.
    #[error("another key phase")]
    Phase,
    /// The frame is not laid out as it must be.
    #[error("malformed")]
    Layout,
}

/// Appends the CRCs of one payload, one per 4 KiB counted from its start (the last may cover less).
pub fn append_payload_crcs(head: &mut Vec<u8>, payload: &[u8]) {
    for block in payload.chunks(BLOCK_BYTES) {
        head.extend_from_slice(&crc32c(block).to_le_bytes());
    }
}

/// Appends the 4-byte tag to a frame's head: everything of the frame but its data payloads, with the CRC trailer already at its end.
///
/// # Panics
/// If `head` has no whole Ethernet header: the core wrote it, so that would be our own fault.
pub fn seal_crc(nonces: Nonces, head: &mut Vec<u8>) {
    let mut crc = start(nonces);
    crc.update(&head[ETHERNET_BYTES..]);
    head.extend_from_slice(&crc.finish().to_le_bytes());
}

/// Checks the tag and every payload CRC of a short frame whose layout [`Frame::parse`] has checked.
///
/// # Errors
/// [`Mismatch`] says what differs first; the tag is looked at before any payload.
pub fn open_crc(nonces: Nonces, frame: &Frame<'_>) -> Result<(), Mismatch> {
    if frame.header.mode != Mode::Crc {
        return Err(Mismatch::Mode);
    }
    let (bytes, trailer_start) = (frame.bytes(), frame.trailer_start());
    let tag_start = bytes.len().checked_sub(TAG_BYTES).ok_or(Mismatch::Tag)?;
    let trailer = bytes.get(trailer_start..tag_start).ok_or(Mismatch::Tag)?;
    let data = || frame.messages().filter(|part| part.message.carries_data()).map(|part| part.range);

    let mut crc = start(nonces);
    let mut at = ETHERNET_BYTES;
    for range in data() {
        crc.update(&bytes[at..range.start]);
        at = range.end;
    }
    crc.update(&bytes[at..tag_start]);
    if crc.finish().to_le_bytes() != bytes[tag_start..] {
        return Err(Mismatch::Tag);
    }

    let mut expected = trailer.chunks_exact(CRC_BYTES);
    for (index, range) in data().enumerate() {
        for block in frame.payload(range).chunks(BLOCK_BYTES) {
            if expected.next() != Some(&crc32c(block).to_le_bytes()[..]) {
                return Err(Mismatch::Payload { index });
            }
        }
    }
    Ok(())
}

/// Appends the tag of a LONG frame, which belongs to no session: both nonces are 0.
///
/// # Panics
/// As [`seal_crc`].
pub fn seal_long(head: &mut Vec<u8>) {
    seal_crc(Nonces::default(), head);
}

/// Checks the tag of a LONG frame.
///
/// # Errors
/// [`Mismatch::Tag`], also when the frame is too short to have one.
pub fn open_long(frame: &[u8]) -> Result<(), Mismatch> {
    let (covered, tag) = frame.split_last_chunk::<TAG_BYTES>().ok_or(Mismatch::Tag)?;
    let mut crc = start(Nonces::default());
    crc.update(covered.get(ETHERNET_BYTES..).ok_or(Mismatch::Tag)?);
    if crc.finish().to_le_bytes() == *tag { Ok(()) } else { Err(Mismatch::Tag) }
}

fn start(nonces: Nonces) -> Crc32c {
    let mut both = [0; 16];
    both[..8].copy_from_slice(&nonces.sender.to_le_bytes());
    both[8..].copy_from_slice(&nonces.receiver.to_le_bytes());
    let mut crc = Crc32c::new();
    crc.update(&both);
    crc
}
