//! A short frame taken apart: its header, its messages and where their payloads lie.
//!
//! Knows the parsing rule (messages end where CRC trailer and tag begin exactly); does not know whether a checksum is right.

use core::ops::Range;

use super::{Header, Kind, Message, Reject};
use crate::types::{ETHERNET_BYTES, MESSAGES_MAX, PAYLOADS_MAX};
use crate::wire::header::HEADER_BYTES;

/// Zero bytes after a payload of `plen`.
pub const fn pad_to_8(plen: usize) -> usize {
    plen.next_multiple_of(8) - plen
}

/// A short frame whose layout has been checked once; reading its messages cannot fail any more.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    bytes: &'a [u8],
    /// The frame header.
    pub header: Header,
    trailer_start: usize,
    asks_for_ack: bool,
}

/// A message and where its payload lies in the frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    /// The message.
    pub message: Message,
    /// Its payload, as a range of the whole frame (Ethernet header included).
    pub range: Range<usize>,
}

impl<'a> Frame<'a> {
    /// Takes a whole frame apart, Ethernet header included; one of mode AES-256-GCM decrypted before.
    ///
    /// # Errors
    /// A [`Reject`] that names what is wrong; nothing of the frame may be used then.
    pub fn parse(bytes: &'a [u8]) -> Result<Frame<'a>, Reject> {
        let header = Header::parse(bytes.get(ETHERNET_BYTES..).ok_or(Reject::Truncated)?)?;
        let tag_bytes = header.mode.tag_bytes();
        let (mut at, mut trailer_bytes, mut messages, mut payloads) =
            (ETHERNET_BYTES + HEADER_BYTES, 0, 0, 0);
        let mut asks_for_ack = false;
        loop {
            let remaining = bytes.len() - at;
            let end = trailer_bytes + tag_bytes;
            if remaining == end {
                break;
            }
            if remaining < end {
                return Err(Reject::Trailer);
            }
            let message = Message::parse(&bytes[at..])?;
            let start = at + message.header_bytes();
            let plen = usize::from(message.plen);
            let next = start + plen + pad_to_8(plen);
            let padding = bytes.get(start + plen..next).ok_or(Reject::PayloadLength)?;
            if padding.iter().any(|byte| *byte != 0) {
                return Err(Reject::Padding);
            }
            if message.carries_data() {
                trailer_bytes += header.mode.trailer_bytes(plen);
                payloads += 1;
            }
            messages += 1;
            if messages > MESSAGES_MAX || payloads > PAYLOADS_MAX {
                return Err(Reject::TooMany);
            }
            asks_for_ack |= message.kind.asks_for_ack();
            at = next;
        }
        if messages == 0 {
            return Err(Reject::Truncated);
        }
        Ok(Frame { bytes, header, trailer_start: at, asks_for_ack })
    }

    /// The whole frame.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// True if a message in it asks for an ack.
    pub fn asks_for_ack(&self) -> bool {
        self.asks_for_ack
    }

    /// Where the messages end and the CRC trailer (if any) and the tag begin.
    pub fn trailer_start(&self) -> usize {
        self.trailer_start
    }

    /// The messages in order.
    pub fn messages(&self) -> Messages<'a> {
        Messages { bytes: &self.bytes[..self.trailer_start], at: ETHERNET_BYTES + HEADER_BYTES }
    }

    /// The bytes at `range`, which came from [`Frame::messages`].
    pub fn payload(&self, range: Range<usize>) -> &'a [u8] {
        &self.bytes[range]
    }
}

/// Iterates over the messages of a [`Frame`].
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Iterator for Messages<'_> {
    type Item = Payload;

    fn next(&mut self) -> Option<Payload> {
        let message = Message::parse(self.bytes.get(self.at..)?).ok()?;
        let start = self.at + message.header_bytes();
        let plen = usize::from(message.plen);
        self.at = start + plen + pad_to_8(plen);
        Some(Payload { range: start..start + plen, message })
    }
}

impl Frame<'_> {
    /// True if the frame carries nothing but padding and acks.
    pub fn is_bare_ack(&self) -> bool {
        self.messages().all(|m| matches!(m.message.kind, Kind::Pad | Kind::AckRanges))
    }
}
