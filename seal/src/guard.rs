//! How the frames of a session at hand are opened, whichever mode it has.
//!
//! Knows both modes and nothing of who calls: the workers of both ends do, for each frame they take.

use cirro_protocol::PayloadRef;
use cirro_protocol::wire::{Frame, Header};

use crate::session_keys::SessionKeys;
use crate::{Mismatch, Nonces, open_crc};

/// What protects a session.
#[derive(Debug)]
pub enum Guard {
    /// Checksums.
    Crc,
    /// Keys.
    Aead(Box<SessionKeys>),
}

impl Guard {
    /// Checks a whole frame and takes it apart: where it lies, or (with keys) decrypted into `plain`.
    ///
    /// # Errors
    /// [`Mismatch`] says what is wrong; nothing of the frame may be used then.
    pub fn open<'a>(
        &mut self,
        nonces: Nonces,
        header: &Header,
        bytes: &'a [u8],
        plain: &'a mut Vec<u8>,
    ) -> Result<Frame<'a>, Mismatch> {
        match self {
            Guard::Crc => {
                let frame = Frame::parse(bytes).map_err(|_| Mismatch::Layout)?;
                open_crc(nonces, &frame).map(|()| frame)
            }
            Guard::Aead(keys) => keys.open(header, bytes, plain),
        }
    }
}

/// Puts a frame's data into its place: `head` is what the core wrote, `payloads` names the data, `fill` appends that of one. The whole frame
/// but its tag is appended to `frame`. False, as soon as `fill` says that data is not there.
pub fn splice(
    head: &[u8],
    payloads: &[PayloadRef],
    frame: &mut Vec<u8>,
    mut fill: impl FnMut(&PayloadRef, &mut Vec<u8>) -> bool,
) -> bool {
    let mut from = 0;
    for payload in payloads {
        frame.extend_from_slice(&head[from..payload.at]);
        from = payload.at;
        if !fill(payload, frame) {
            return false;
        }
    }
    frame.extend_from_slice(&head[from..]);
    true
}
