//! The 34-byte header of every frame.
//!
//! Knows the layout; what packet numbers and acks mean is known to `send_window` and `recv_window`.

use alloc::vec::Vec;

use super::{Reader, Reject};
use crate::types::{BLOCK_BYTES, Cid, Steer};

/// Bytes of the frame header.
pub const HEADER_BYTES: usize = 34;
/// Bytes of it that are never encrypted: `vt` to `pn`, what a receiver needs before it knows the key.
pub const CLEAR_BYTES: usize = 16;
/// The protocol version in bits 7..5 of `vt`.
pub const VERSION: u8 = 1;
/// Bit 4 of `vt`: a handshake frame, laid out as [`super::long`] says.
pub const VT_LONG: u8 = 1 << 4;
/// `fflags`: the receiver acks at once.
pub const FLAG_ACK_NOW: u8 = 1 << 0;
/// `fflags`: CRCs of the payloads stand before the tag.
pub const FLAG_CRC_TRAILER: u8 = 1 << 1;

/// Largest packet number: reached by nobody who adds 1 for each frame, and far from where sums wrap.
pub const PN_MAX: u64 = 1 << 62;

/// How a frame is protected: bits 1..0 of `vt`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// CRC32C trailers and a 4-byte CRC32C tag: finds damage and stale sessions, not forgery.
    #[default]
    Crc,
    /// AES-256-GCM with a 16-byte tag.
    Aead,
}

impl Mode {
    /// Bytes of the tag at the end of a frame.
    pub const fn tag_bytes(self) -> usize {
        match self {
            Mode::Crc => 4,
            Mode::Aead => 16,
        }
    }

    /// Bytes of the CRC trailer for a data payload of `plen` bytes: one CRC32C per 4 KiB, or none where the tag covers the payload.
    pub const fn trailer_bytes(self, plen: usize) -> usize {
        match self {
            Mode::Crc => 4 * plen.div_ceil(BLOCK_BYTES),
            Mode::Aead => 0,
        }
    }
}

/// The frame header, in host order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sealing mode.
    pub mode: Mode,
    /// Low two bits of the key epoch (mode AES-256-GCM).
    pub key_phase: u8,
    /// `FLAG_*`.
    pub flags: u8,
    /// Which worker the frame is for.
    pub steer: Steer,
    /// Which session of that worker.
    pub cid: Cid,
    /// Packet number: +1 for every frame of a session, never reused. The first is 1.
    pub pn: u64,
    /// Low bits of the largest packet number received; 0 when none was.
    pub ack_pn: u32,
    /// Bit `i`: `ack_pn - 1 - i` was received.
    pub ack_bits: u64,
    /// From the arrival of `ack_pn` to this sending, in 0.25 µs, saturating.
    pub ack_delay: u16,
    /// Cumulative write credit granted to the peer, in sectors, modulo 2^32.
    pub credit: u32,
}

impl Header {
    /// The form of the frame at hand without reading more: `Some(true)` when it is a LONG frame.
    pub fn is_long(after_ethernet: &[u8]) -> Option<bool> {
        after_ethernet.first().map(|vt| vt & VT_LONG != 0)
    }

    /// Reads the header of a short frame, which starts after the Ethernet header.
    ///
    /// # Errors
    /// [`Reject::Truncated`], [`Reject::Version`], [`Reject::Form`], [`Reject::Mode`], [`Reject::Field`] (unknown flags).
    pub fn parse(after_ethernet: &[u8]) -> Result<Header, Reject> {
        let mut r = Reader(after_ethernet.get(..HEADER_BYTES).ok_or(Reject::Truncated)?);
        let header = Self::read(&mut r).ok_or(Reject::Truncated)?;
        let vt = after_ethernet[0];
        if vt >> 5 != VERSION {
            return Err(Reject::Version);
        }
        if vt & VT_LONG != 0 {
            return Err(Reject::Form);
        }
        if vt & 0b11 > 1 {
            return Err(Reject::Mode);
        }
        if header.flags & !(FLAG_ACK_NOW | FLAG_CRC_TRAILER) != 0 || header.pn == 0 || header.pn > PN_MAX {
            return Err(Reject::Field);
        }
        Ok(header)
    }

    fn read(r: &mut Reader<'_>) -> Option<Header> {
        let vt = r.u8()?;
        Some(Header {
            mode: if vt & 0b11 == 0 { Mode::Crc } else { Mode::Aead },
            key_phase: vt >> 2 & 0b11,
            flags: r.u8()?,
            steer: Steer(u16::from_be_bytes(r.array()?)),
            cid: Cid(r.u32()?),
            pn: r.u64()?,
            ack_pn: r.u32()?,
            ack_bits: r.u64()?,
            ack_delay: r.u16()?,
            credit: r.u32()?,
        })
    }

    /// Appends the 34 bytes.
    pub fn emit(&self, head: &mut Vec<u8>) {
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[0] = VERSION << 5 | (self.key_phase & 0b11) << 2 | u8::from(self.mode == Mode::Aead);
        bytes[1] = self.flags;
        bytes[2..4].copy_from_slice(&self.steer.0.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.cid.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.pn.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.ack_pn.to_le_bytes());
        bytes[20..28].copy_from_slice(&self.ack_bits.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.ack_delay.to_le_bytes());
        bytes[30..34].copy_from_slice(&self.credit.to_le_bytes());
        head.extend_from_slice(&bytes);
    }
}

const _: () = assert!(1 + 1 + 2 + 4 + 8 == CLEAR_BYTES);
const _: () = assert!(1 + 1 + 2 + 4 + 8 + 4 + 8 + 2 + 4 == HEADER_BYTES);
