//! The 16-byte header of a message, and the 32 bytes that a REQ adds.
//!
//! Knows what each kind carries; whether it makes sense now is the state machines' to say.

use alloc::vec::Vec;

use super::{Reader, Reject};
use crate::op::{Op, Status};
use crate::types::Slot;

/// Bytes of a message header.
pub const MESSAGE_BYTES: usize = 16;
/// Bytes that a REQ adds to it.
pub const REQUEST_BYTES: usize = 32;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A request; a write's carries its first piece.
    Request = 1,
    /// A further piece of a write.
    WriteData = 2,
    /// The final answer of a request that gives no data back.
    Response = 3,
    /// A piece of a read's data; all of them together are the final answer.
    ReadData = 4,
    /// Acks that the bitmap of the header cannot say.
    AckRanges = 5,
    /// Asks for an ack.
    Ping = 6,
    /// Asks for an ack by a frame of a size of interest.
    Probe = 7,
    /// The target tells what happened to the volume.
    Event = 8,
    /// The sender forgets the session.
    Close = 9,
    /// Nothing: makes a frame long enough.
    Pad = 10,
}

impl Kind {
    /// The kind with this code.
    pub const fn from_code(code: u8) -> Option<Kind> {
        Some(match code {
            1 => Kind::Request,
            2 => Kind::WriteData,
            3 => Kind::Response,
            4 => Kind::ReadData,
            5 => Kind::AckRanges,
            6 => Kind::Ping,
            7 => Kind::Probe,
            8 => Kind::Event,
            9 => Kind::Close,
            10 => Kind::Pad,
            _ => return None,
        })
    }

    /// True if a frame with such a message asks for an ack.
    pub const fn asks_for_ack(self) -> bool {
        !matches!(self, Kind::AckRanges | Kind::Pad | Kind::Close)
    }
}

/// What a REQ adds to the message header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestBody {
    /// Where on the volume, in bytes.
    pub offset: u64,
    /// The epoch under which the sender holds the volume.
    pub vol_epoch: u64,
    /// The handle that OPEN gave; 0 for OPEN itself.
    pub vol_handle: u32,
    /// Version of the network map; 0 for now.
    pub map_version: u32,
    /// How long the guest is thought to wait, in ms; 0: not known. A hint.
    pub timeout_hint_ms: u32,
    /// Free for tracing; echoed nowhere.
    pub trace_id: u32,
}

/// A message header and, for a REQ, its body. The payload stays in the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it is.
    pub kind: Kind,
    /// The slot it belongs to; 0 for messages without one.
    pub slot: Slot,
    /// The slot's sequence number.
    pub sseq: u16,
    /// Offset of the payload in the request's data.
    pub frag_off: u32,
    /// Bytes of payload.
    pub plen: u16,
    /// Operation (REQ, WDATA) or status (RESP, RDATA) or a kind's own code.
    pub code: u8,
    /// Total data bytes of the request or response; sectors for discard and write-zeroes. 24 bits.
    pub mlen: u32,
    /// Reserved, 0.
    pub flags: u8,
    /// The body of a REQ.
    pub request: Option<RequestBody>,
}

impl Message {
    /// A message without slot or payload.
    pub const fn bare(kind: Kind) -> Message {
        Message {
            kind,
            slot: Slot(0),
            sseq: 0,
            frag_off: 0,
            plen: 0,
            code: 0,
            mlen: 0,
            flags: 0,
            request: None,
        }
    }

    /// Bytes of the header and, for a REQ, its body.
    pub const fn header_bytes(&self) -> usize {
        if matches!(self.kind, Kind::Request) { MESSAGE_BYTES + REQUEST_BYTES } else { MESSAGE_BYTES }
    }

    /// True if the payload is a volume's data: it has CRCs in the trailer and is not under the tag of mode 0.
    pub const fn carries_data(&self) -> bool {
        let is_write = matches!(self.kind, Kind::Request) && self.code == Op::Write as u8;
        is_write || matches!(self.kind, Kind::WriteData | Kind::ReadData)
    }

    /// The operation of a REQ or WDATA.
    pub const fn op(&self) -> Option<Op> {
        Op::from_code(self.code)
    }

    /// The status of a RESP or RDATA.
    pub const fn status(&self) -> Option<Status> {
        Status::from_code(self.code)
    }

    /// Reads one message header (and body) off the front.
    ///
    /// # Errors
    /// [`Reject::Truncated`], [`Reject::Kind`] (kind, operation or status unknown).
    pub fn parse(bytes: &[u8]) -> Result<Message, Reject> {
        let mut message = Self::read(&mut Reader(bytes)).ok_or(Reject::Truncated)?;
        let [kind, code] = [bytes[10], bytes[11]];
        message.kind = Kind::from_code(kind).ok_or(Reject::Kind)?;
        let known = match message.kind {
            Kind::Request => Op::from_code(code).is_some(),
            Kind::WriteData => code == Op::Write as u8,
            Kind::Response => Status::from_code(code).is_some(),
            Kind::ReadData => code == Status::Ok as u8,
            Kind::Probe => code <= 1,
            Kind::AckRanges | Kind::Ping | Kind::Event | Kind::Close | Kind::Pad => true,
        };
        if !known {
            return Err(Reject::Kind);
        }
        if message.kind == Kind::Request {
            let body = bytes.get(MESSAGE_BYTES..).ok_or(Reject::Truncated)?;
            message.request = Some(RequestBody::read(&mut Reader(body)).ok_or(Reject::Truncated)?);
        }
        Ok(message)
    }

    fn read(r: &mut Reader<'_>) -> Option<Message> {
        let mut message = Message::bare(Kind::Pad);
        message.slot = Slot(r.u16()?);
        message.sseq = r.u16()?;
        message.frag_off = r.u32()?;
        message.plen = r.u16()?;
        let _kind = r.u8()?;
        message.code = r.u8()?;
        let last = r.u32()?;
        message.mlen = last & 0x00ff_ffff;
        message.flags = (last >> 24) as u8;
        Some(message)
    }

    /// Appends the header and, for a REQ, its body.
    pub fn emit(&self, head: &mut Vec<u8>) {
        let mut bytes = [0u8; MESSAGE_BYTES];
        bytes[0..2].copy_from_slice(&self.slot.0.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.sseq.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.frag_off.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.plen.to_le_bytes());
        bytes[10] = self.kind as u8;
        bytes[11] = self.code;
        bytes[12..16].copy_from_slice(&(self.mlen & 0x00ff_ffff | u32::from(self.flags) << 24).to_le_bytes());
        head.extend_from_slice(&bytes);
        if let Some(body) = &self.request {
            body.emit(head);
        }
    }
}

impl RequestBody {
    fn read(r: &mut Reader<'_>) -> Option<RequestBody> {
        Some(RequestBody {
            offset: r.u64()?,
            vol_epoch: r.u64()?,
            vol_handle: r.u32()?,
            map_version: r.u32()?,
            timeout_hint_ms: r.u32()?,
            trace_id: r.u32()?,
        })
    }

    fn emit(&self, head: &mut Vec<u8>) {
        let mut bytes = [0u8; REQUEST_BYTES];
        bytes[0..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.vol_epoch.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.vol_handle.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.map_version.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.timeout_hint_ms.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.trace_id.to_le_bytes());
        head.extend_from_slice(&bytes);
    }
}

const _: () = assert!(2 + 2 + 4 + 2 + 1 + 1 + 3 + 1 == MESSAGE_BYTES);
const _: () = assert!(8 + 8 + 4 + 4 + 4 + 4 == REQUEST_BYTES);
const _: () = assert!(
    (14 + super::header::HEADER_BYTES + MESSAGE_BYTES).is_multiple_of(64),
    "the first payload is aligned"
);
