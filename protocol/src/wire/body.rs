//! Control payloads: what OPEN, STAT, EVENT, CLOSE, PROBE and ACK_RANGES carry.
//!
//! Laid out in `docs/PROTOCOL.md`; each has a fixed size but ACK_RANGES.

use alloc::vec::Vec;

use super::{Reader, Reject};
use crate::types::SERIAL_BYTES;

/// What OPEN asks for. 16 bytes: u8 access, u8 flags, 6 zero, u64 take-over epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenRequest {
    /// Read only, or reads and writes.
    pub access: Access,
    /// Take the volume from its holder, which had this epoch.
    pub take_over: Option<u64>,
}

/// What an attachment may do with a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Reads only; not counted as an owner.
    ReadOnly,
    /// Reads and writes, as the one owner.
    ReadWrite,
}

/// What the answers to OPEN and STAT, and EVENT, carry. 56 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Size in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// The volume's epoch. In an answer of Busy: the holder's.
    pub vol_epoch: u64,
    /// Names the open volume in later requests of this session.
    pub vol_handle: u32,
    /// Logical block size in bytes, a power of two from 512 to 4096.
    pub block_bytes: u32,
    /// `VOLUME_*` bits.
    pub flags: u32,
    /// Largest data of one request that the node takes.
    pub request_bytes_max: u32,
    /// The serial number, padded with NUL.
    pub serial: [u8; SERIAL_BYTES],
}

/// The volume cannot be written.
pub const VOLUME_READ_ONLY: u32 = 1 << 0;
/// DISCARD is supported.
pub const VOLUME_DISCARD: u32 = 1 << 1;
/// WRITE_ZEROES is supported.
pub const VOLUME_WRITE_ZEROES: u32 = 1 << 2;
/// An answered write is stable without a flush.
pub const VOLUME_WRITE_THROUGH: u32 = 1 << 3;

/// Bytes of [`OpenRequest`].
pub const OPEN_BYTES: usize = 16;
/// Bytes of [`VolumeInfo`].
pub const VOLUME_INFO_BYTES: usize = 56;
/// Bytes of one range in ACK_RANGES: u64 first, u64 last, both inclusive.
pub const ACK_RANGE_BYTES: usize = 16;
/// Most ranges in one ACK_RANGES.
pub const ACK_RANGES_MAX: usize = 32;

const OPEN_TAKE_OVER: u8 = 1;

impl OpenRequest {
    /// Reads the payload of OPEN.
    ///
    /// # Errors
    /// [`Reject::Field`] for another size or an unknown access, flag or reserved byte.
    pub fn parse(payload: &[u8]) -> Result<OpenRequest, Reject> {
        let bytes: &[u8; OPEN_BYTES] = payload.try_into().map_err(|_| Reject::Field)?;
        let [access, flags, r0, r1, r2, r3, r4, r5, epoch @ ..] = *bytes;
        let access = match access {
            0 => Access::ReadOnly,
            1 => Access::ReadWrite,
            _ => return Err(Reject::Field),
        };
        if flags & !OPEN_TAKE_OVER != 0 || [r0, r1, r2, r3, r4, r5] != [0; 6] {
            return Err(Reject::Field);
        }
        let take_over = (flags & OPEN_TAKE_OVER != 0).then_some(u64::from_le_bytes(epoch));
        Ok(OpenRequest { access, take_over })
    }

    /// Appends the payload.
    pub fn emit(&self, head: &mut Vec<u8>) {
        let flags = if self.take_over.is_some() { OPEN_TAKE_OVER } else { 0 };
        head.extend_from_slice(&[u8::from(self.access == Access::ReadWrite), flags, 0, 0, 0, 0, 0, 0]);
        head.extend_from_slice(&self.take_over.unwrap_or(0).to_le_bytes());
    }
}

impl VolumeInfo {
    /// Reads the payload of an answer to OPEN or STAT, or of an EVENT.
    ///
    /// # Errors
    /// [`Reject::Field`] for another size, or a block or request size that no volume has.
    pub fn parse(payload: &[u8]) -> Result<VolumeInfo, Reject> {
        if payload.len() != VOLUME_INFO_BYTES {
            return Err(Reject::Field);
        }
        let info = Self::read(&mut Reader(payload)).ok_or(Reject::Field)?;
        let block_fits = info.block_bytes.is_power_of_two() && (512..=4096).contains(&info.block_bytes);
        let sizes_fit = info.capacity_sectors <= u64::MAX / 512 && info.request_bytes_max >= 4096;
        if block_fits && sizes_fit { Ok(info) } else { Err(Reject::Field) }
    }

    fn read(r: &mut Reader<'_>) -> Option<VolumeInfo> {
        let info = VolumeInfo {
            capacity_sectors: r.u64()?,
            vol_epoch: r.u64()?,
            vol_handle: r.u32()?,
            block_bytes: r.u32()?,
            flags: r.u32()?,
            request_bytes_max: r.u32()?,
            serial: r.array()?,
        };
        r.bytes(4)?;
        Some(info)
    }

    /// Appends the payload.
    pub fn emit(&self, head: &mut Vec<u8>) {
        head.extend_from_slice(&self.capacity_sectors.to_le_bytes());
        head.extend_from_slice(&self.vol_epoch.to_le_bytes());
        head.extend_from_slice(&self.vol_handle.to_le_bytes());
        head.extend_from_slice(&self.block_bytes.to_le_bytes());
        head.extend_from_slice(&self.flags.to_le_bytes());
        head.extend_from_slice(&self.request_bytes_max.to_le_bytes());
        head.extend_from_slice(&self.serial);
        head.extend_from_slice(&[0; 4]);
    }
}

/// Why a sender forgets a session: `code` of CLOSE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CloseReason {
    /// The process ends or the disk was detached.
    Done = 0,
    /// A newer session of the same attachment took over.
    Superseded = 1,
    /// The peer broke the protocol.
    Protocol = 2,
    /// The right to use the volume was taken away.
    Revoked = 3,
    /// The sender restarts and will be back soon.
    Restart = 4,
    /// Full pieces do not come through; smaller frames do.
    NarrowPath = 5,
}

impl CloseReason {
    /// The reason with this code; an unknown one reads as [`CloseReason::Done`], for all of them end the session alike.
    pub const fn from_code(code: u8) -> CloseReason {
        match code {
            1 => CloseReason::Superseded,
            2 => CloseReason::Protocol,
            3 => CloseReason::Revoked,
            4 => CloseReason::Restart,
            5 => CloseReason::NarrowPath,
            _ => CloseReason::Done,
        }
    }
}

/// The ranges of an ACK_RANGES payload, `first..=last`, highest first.
///
/// # Errors
/// [`Reject::Field`] when the size is no multiple of a range, there are too many, or one is reversed.
pub fn parse_ack_ranges(payload: &[u8]) -> Result<impl Iterator<Item = (u64, u64)> + '_, Reject> {
    let (ranges, rest) = payload.as_chunks::<ACK_RANGE_BYTES>();
    let read = |bytes: &[u8; ACK_RANGE_BYTES]| {
        let [a0, a1, a2, a3, a4, a5, a6, a7, last @ ..] = *bytes;
        (u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]), u64::from_le_bytes(last))
    };
    if !rest.is_empty()
        || ranges.len() > ACK_RANGES_MAX
        || ranges.iter().map(read).any(|(a, b)| a > b || a == 0)
    {
        return Err(Reject::Field);
    }
    Ok(ranges.iter().map(read))
}

const _: () = assert!(8 + 8 + 4 + 4 + 4 + 4 + SERIAL_BYTES + 4 == VOLUME_INFO_BYTES);
