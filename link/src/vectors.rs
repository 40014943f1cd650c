//! Frames as the pieces that sendmmsg(2) gathers.
//!
//! Knows where a frame's bytes lie; does not know where they go. Kept from call to call so that sending allocates nothing.

use crate::frame::{FRAMES_QUEUED_MAX, Part, TxFrame};

/// Pieces of which the kernel gathers one message (UIO_MAXIOV). A frame in more of them is gathered here first.
pub(crate) const PARTS_MAX: usize = 1024;

/// The pieces of some frames, one after another.
pub(crate) struct Vectors {
    vectors: Vec<libc::iovec>,
    /// Frames in more than [`PARTS_MAX`] parts, each in one piece: a guest that scatters its data so is legal and pays a copy.
    gathered: Vec<Vec<u8>>,
}

impl Vectors {
    pub(crate) fn new() -> Vectors {
        Vectors { vectors: Vec::with_capacity(32 * FRAMES_QUEUED_MAX), gathered: Vec::new() }
    }

    pub(crate) fn clear(&mut self) {
        self.vectors.clear();
        self.gathered.clear();
    }

    /// Adds a frame without its first `skip` bytes, which lie in its head before any cut. Returns how many pieces that made.
    pub(crate) fn push(&mut self, frame: &TxFrame, skip: usize) -> usize {
        let first = self.vectors.len();
        if frame.parts_max() > PARTS_MAX {
            let mut whole = Vec::new();
            frame.gather(&mut whole);
            self.vectors.push(vector(&whole[skip..]));
            // Moving the Vec does not move what it points to.
            self.gathered.push(whole);
        } else {
            let mut skip = skip;
            frame.parts(|part| {
                self.vectors.push(match part {
                    Part::Head(head) => vector(&head[std::mem::take(&mut skip)..]),
                    Part::Run(run) => {
                        libc::iovec { iov_base: run.start().cast_mut().cast(), iov_len: run.len() }
                    }
                });
            });
        }
        self.vectors.len() - first
    }

    /// Names to each of `messages`, whose counts are set, its pieces: they follow one another.
    pub(crate) fn hand_out(&mut self, messages: &mut [libc::mmsghdr]) {
        let mut rest = self.vectors.as_mut_slice();
        for message in messages {
            let (own, others) = rest.split_at_mut(message.msg_hdr.msg_iovlen);
            message.msg_hdr.msg_iov = own.as_mut_ptr();
            rest = others;
        }
    }
}

fn vector(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}
