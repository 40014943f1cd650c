//! What touches payload to protect it: CRC32C of data, and the tags of frames in mode 0.
//!
//! Knows where in a frame the bytes lie that a sum covers; does not know sessions or links. Called by both daemons' workers, around the
//! core, which never sees payload. The layout is `docs/PROTOCOL.md`, "Frame".
#![forbid(unsafe_code)]

use cirro_protocol::types::{BLOCK_BYTES, ETHERNET_BYTES};
use cirro_protocol::wire::{Frame, Mode};
use crc_fast::{CrcAlgorithm, Digest};

/// CRC32C (RFC 3720 section 12.1, polynomial 0x1EDC6F41 reflected) of `bytes`.
#[inline]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// CRC32C of bytes that come in parts.
#[derive(Clone, Debug)]
pub struct Crc32c(Digest);

impl Crc32c {
    /// The sum of nothing yet.
    pub fn new() -> Crc32c {
        Crc32c(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    /// Takes the next bytes in.
    #[inline]
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The sum of all that came.
    #[inline]
    pub fn finish(&self) -> u32 {
        self.0.finalize() as u32
    }
}

impl Default for Crc32c {
    fn default() -> Self {
        Self::new()
    }
}

/// What ties a frame to its session: one number chosen by each end, in the direction of the frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nonces {
    /// The sender's.
    pub sender: u64,
    /// The receiver's.
    pub receiver: u64,
}

impl From<(u64, u64)> for Nonces {
    fn from((sender, receiver): (u64, u64)) -> Nonces {
        Nonces { sender, receiver }
    }
}

/// What does not fit. The frame counts as not received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// The tag: damage outside the payloads, or a frame of another session.
    #[error("the tag does not fit")]
    Tag,
    /// A payload's CRC: damage to data.
    #[error("the CRC of payload {index} does not fit")]
    Payload {
        /// Which payload of the frame, from 0.
        index: usize,
    },
    /// The frame is sealed in a mode that is not handled here.
    #[error("another sealing mode")]
    Mode,
}

/// Appends the tag of mode 0 to a frame whose `head` holds everything but data payloads, the CRC trailer at its end: CRC32C over the nonces
/// and everything after the Ethernet header.
pub fn seal_crc(nonces: Nonces, head: &mut Vec<u8>) {
    let mut tag = tag_start(nonces);
    tag.update(&head[ETHERNET_BYTES..]);
    head.extend_from_slice(&tag.finish().to_le_bytes());
}

/// Checks the tag and every payload CRC of a received frame of mode 0.
///
/// # Errors
/// [`Mismatch`]: nothing of the frame may be used.
pub fn open_crc(nonces: Nonces, frame: &Frame<'_>) -> Result<(), Mismatch> {
    if frame.header.mode != Mode::Crc {
        return Err(Mismatch::Mode);
    }
    let bytes = frame.bytes();
    let tag_at = bytes.len() - Mode::Crc.tag_bytes();
    let (mut tag, mut done) = (tag_start(nonces), ETHERNET_BYTES);
    for payload in frame.messages().filter(|p| p.message.carries_data() && !p.range.is_empty()) {
        tag.update(&bytes[done..payload.range.start]);
        done = payload.range.end;
    }
    tag.update(&bytes[done..tag_at]);
    if tag.finish().to_le_bytes() != bytes[tag_at..] {
        return Err(Mismatch::Tag);
    }
    let (crcs, _) = bytes[frame.trailer_start()..tag_at].as_chunks::<4>();
    let mut crcs = crcs.iter();
    for (index, payload) in frame.messages().filter(|p| p.message.carries_data()).enumerate() {
        let mut blocks = bytes[payload.range].chunks(BLOCK_BYTES);
        if !blocks.all(|block| crcs.next() == Some(&crc32c(block).to_le_bytes())) {
            return Err(Mismatch::Payload { index });
        }
    }
    Ok(())
}

/// Appends the tag of a LONG frame: as a frame without payload, with both nonces 0.
pub fn seal_long(head: &mut Vec<u8>) {
    seal_crc(Nonces::default(), head);
}

/// Checks the tag of a LONG frame.
///
/// # Errors
/// [`Mismatch::Tag`].
pub fn open_long(frame: &[u8]) -> Result<(), Mismatch> {
    let (body, tag) = frame.split_last_chunk::<4>().ok_or(Mismatch::Tag)?;
    let body = body.get(ETHERNET_BYTES..).ok_or(Mismatch::Tag)?;
    let mut sum = tag_start(Nonces::default());
    sum.update(body);
    if sum.finish().to_le_bytes() == *tag { Ok(()) } else { Err(Mismatch::Tag) }
}

fn tag_start(nonces: Nonces) -> Crc32c {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&nonces.sender.to_le_bytes());
    bytes[8..].copy_from_slice(&nonces.receiver.to_le_bytes());
    let mut tag = Crc32c::new();
    tag.update(&bytes);
    tag
}

#[cfg(test)]
mod tests {
    use super::*;
    use cirro_protocol::types::{MacAddress, Slot, Steer};
    use cirro_protocol::wire::ethernet::Ethernet;
    use cirro_protocol::wire::long::{Body, LongFrame, Redirect};
    use cirro_protocol::wire::{Header, Kind, Message};

    const NONCES: Nonces = Nonces { sender: 0x1122_3344_5566_7788, receiver: 0x99aa_bbcc_ddee_ff00 };

    /// A frame with one RDATA of 5000 bytes (two CRCs) and a PING.
    fn sealed() -> Vec<u8> {
        let data: Vec<u8> = (0..5000u32).map(|i| (i * 7) as u8).collect();
        let mut head = Vec::new();
        Ethernet { destination: MacAddress([1; 6]), source: MacAddress([2; 6]), ethertype: 0x88b5 }
            .emit(&mut head);
        Header { pn: 7, ..Header::default() }.emit(&mut head);
        Message { slot: Slot(3), plen: 5000, mlen: 5000, ..Message::bare(Kind::ReadData) }.emit(&mut head);
        let at = head.len();
        Message::bare(Kind::Ping).emit(&mut head);
        head.extend_from_slice(&crc32c(&data[..4096]).to_le_bytes());
        head.extend_from_slice(&crc32c(&data[4096..]).to_le_bytes());
        seal_crc(NONCES, &mut head);
        head.splice(at..at, data);
        head
    }

    #[test]
    fn sums_are_those_of_rfc_3720() {
        // RFC 3720 appendix B.4: 32 bytes of zeroes, of ones, incrementing, decrementing.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let up: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&up), 0x46dd_794e);
        let down: Vec<u8> = (0..32).rev().collect();
        assert_eq!(crc32c(&down), 0x113f_db5c);
        let mut parts = Crc32c::new();
        parts.update(&up[..5]);
        parts.update(&up[5..]);
        assert_eq!(parts.finish(), 0x46dd_794e);
    }

    #[test]
    fn every_flipped_bit_after_the_ethernet_header_is_found() {
        let frame = sealed();
        open_crc(NONCES, &Frame::parse(&frame).unwrap()).unwrap();
        for bit in (ETHERNET_BYTES * 8..frame.len() * 8).step_by(3) {
            let mut bad = frame.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let accepted = Frame::parse(&bad).is_ok_and(|frame| open_crc(NONCES, &frame).is_ok());
            assert!(!accepted, "bit {bit}");
        }
    }

    #[test]
    fn damaged_data_is_told_from_a_foreign_session() {
        let mut frame = sealed();
        let other = Nonces { receiver: NONCES.receiver + 1, ..NONCES };
        assert_eq!(open_crc(other, &Frame::parse(&frame).unwrap()), Err(Mismatch::Tag));
        let reflected = Nonces { sender: NONCES.receiver, receiver: NONCES.sender };
        assert_eq!(open_crc(reflected, &Frame::parse(&frame).unwrap()), Err(Mismatch::Tag));
        frame[64 + 4999] ^= 1;
        assert_eq!(open_crc(NONCES, &Frame::parse(&frame).unwrap()), Err(Mismatch::Payload { index: 0 }));
    }

    #[test]
    fn a_long_frame_is_sealed_and_opened() {
        let body = Body::Redirect(Redirect { session_epoch: 1, initiator_nonce: 2, steer: Steer::new(1, 2) });
        let mut frame = Vec::new();
        LongFrame::new(MacAddress([1; 6]), MacAddress([2; 6]), Steer(0), body).emit(&mut frame);
        seal_long(&mut frame);
        open_long(&frame).unwrap();
        assert_eq!(LongFrame::parse(&frame).unwrap().body, body);
        frame[60] ^= 1;
        assert_eq!(open_long(&frame), Err(Mismatch::Tag));
        assert_eq!(open_long(&[0; 3]), Err(Mismatch::Tag));
    }
}
