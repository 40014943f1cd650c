//! Bytes on the wire: offsets, sizes and total parsers. Any bytes in; a typed value or a named reject out.
//!
//! Knows the layout of `docs/PROTOCOL.md` and nothing of sessions: a frame that parses may still be nobody's. Checksums are not checked
//! here but in `cirro-seal`, which sees the payload.

pub mod body;
pub mod ethernet;
pub mod guarded;
pub mod header;
pub mod long;
pub mod message;

mod frame;

pub use frame::{Frame, Payload, pad_to_8};
pub use header::{Header, Mode};
pub use message::{Kind, Message};

/// Why bytes are no frame of ours. Counted by reason, never logged per frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Reject {
    /// Fewer bytes than the headers and the tag need.
    #[error("truncated")]
    Truncated,
    /// Another EtherType.
    #[error("not our EtherType")]
    EtherType,
    /// A version we do not speak.
    #[error("unknown version")]
    Version,
    /// A sealing mode that we do not know.
    #[error("unknown mode")]
    Mode,
    /// A LONG frame where a short one was asked for, or the reverse.
    #[error("wrong form")]
    Form,
    /// A message kind, operation or status that we do not know.
    #[error("unknown kind, operation or status")]
    Kind,
    /// A payload that reaches past the end of the frame.
    #[error("payload past the end")]
    PayloadLength,
    /// The messages do not end exactly where trailer and tag begin.
    #[error("messages do not end at the trailer")]
    Trailer,
    /// More messages or payloads than a frame may carry.
    #[error("too many messages")]
    TooMany,
    /// A field that is outside its limits.
    #[error("field out of range")]
    Field,
    /// Padding or reserved bytes that are not zero.
    #[error("padding is not zero")]
    Padding,
}

/// Takes little-endian fields off the front of a slice; `None` past the end.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}
