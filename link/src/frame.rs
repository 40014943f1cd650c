//! A frame being built for sending, as a head and the places where foreign memory is inserted.
//!
//! Knows nothing of how it is sent. Filled by workers, read by links.
#![allow(unsafe_code, reason = "Run::new states what its caller promises; Run::bytes relies on it")]

use crate::FrameId;

/// Frames that a link holds between two flushes: a window's worth of 8 KiB frames would be 512, but the kernel takes them in batches, and
/// more than 64 gain nothing (measured figures: `docs/PERFORMANCE.md`).
pub(crate) const FRAMES_PER_FLUSH_MAX: usize = 64;

/// A run of memory that a link reads once: guest pages or a node's buffers.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    start: *const u8,
    len: usize,
}

// SAFETY: a Run is an address and a length; who reads it relies on the promise of `Run::new`, which does not depend on the thread.
unsafe impl Send for Run {}

impl Run {
    /// Names `len` bytes at `start`.
    ///
    /// # Safety
    /// The bytes are mapped and may be read until the next [`crate::Link::flush`] of the link that gets the run has returned. They may change
    /// meanwhile (a guest may write to them): the link copies them and makes no reference to them.
    pub unsafe fn new(start: *const u8, len: usize) -> Run {
        Run { start, len }
    }

    /// Address of the first byte.
    pub fn start(&self) -> *const u8 {
        self.start
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it names no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a copy of the bytes to `to`.
    pub(crate) fn copy_to(&self, to: &mut Vec<u8>) {
        to.reserve(self.len);
        let end = to.len();
        // SAFETY: `end` is within the capacity just reserved, so the pointer stays inside the allocation.
        let free = unsafe { to.as_mut_ptr().add(end) };
        // SAFETY: the source is readable by the promise of `Run::new`; the destination has `len` free bytes; they cannot overlap, for the
        // destination is owned by `to`.
        unsafe { std::ptr::copy_nonoverlapping(self.start, free, self.len) };
        // SAFETY: the `len` bytes up to the new length were written by the copy.
        unsafe { to.set_len(end + self.len) };
    }
}

/// Where a run is inserted: before the byte of the head at `at`.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Offset in the head.
    pub at: usize,
    /// What is inserted.
    pub run: Run,
}

/// A frame being built. `head` holds in order every byte that is not a volume's data: Ethernet header, frame header, message headers, control
/// payloads, padding, CRC trailer, tag. Runs of foreign memory are inserted by [`TxFrame::push_run`].
#[derive(Debug, Default)]
pub struct TxFrame {
    /// See above.
    pub head: Vec<u8>,
    cuts: Vec<Cut>,
    id: FrameId,
}

/// A part of a frame, in order.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part<'a> {
    Head(&'a [u8]),
    Run(Run),
}

impl TxFrame {
    /// Inserts `run` before offset `at` of the head, after what was inserted there before. Offsets never decrease.
    pub fn push_cut(&mut self, at: usize, run: Run) {
        assert!(self.cuts.last().is_none_or(|cut| cut.at <= at), "cuts in order");
        self.cuts.push(Cut { at, run });
    }

    /// The same under another name.
    pub fn push_run(&mut self, at: usize, run: Run) {
        self.push_cut(at, run);
    }

    /// Empties the frame.
    pub fn clear(&mut self) {
        self.head.clear();
        self.cuts.clear();
    }

    /// Bytes of the whole frame.
    pub fn len(&self) -> usize {
        self.head.len() + self.cuts.iter().map(|cut| cut.run.len()).sum::<usize>()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same as `len` under another name.
    pub fn frame_bytes(&self) -> usize {
        self.len()
    }

    /// Who it is to its sender.
    pub(crate) fn id(&self) -> FrameId {
        self.id
    }

    /// Hands the parts to `put` in the order in which they go on the wire.
    pub(crate) fn parts<'a>(&'a self, mut put: impl FnMut(Part<'a>)) {
        let mut done = 0;
        for cut in &self.cuts {
            if cut.at > done {
                put(Part::Head(&self.head[done..cut.at]));
                done = cut.at;
            }
            put(Part::Run(cut.run));
        }
        if done < self.head.len() {
            put(Part::Head(&self.head[done..]));
        }
    }

    /// The whole frame in one piece.
    pub(crate) fn gather(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.frame_bytes());
        self.parts(|part| match part {
            Part::Head(head) => bytes.extend_from_slice(head),
            Part::Run(run) => run.copy_to(&mut bytes),
        });
        bytes
    }
}

/// The frames of a link: a fixed number, used in order between two flushes.
#[derive(Debug)]
pub struct FramePool {
    frames: Vec<TxFrame>,
    queued: usize,
}

impl FramePool {
    /// A pool whose heads hold a frame of `frame_bytes` without growing.
    pub fn new(frame_bytes: usize) -> FramePool {
        let frame = || TxFrame {
            head: Vec::with_capacity(frame_bytes),
            cuts: Vec::with_capacity(64),
            id: FrameId::default(),
        };
        FramePool { frames: (0..FRAMES_PER_FLUSH_MAX).map(|_| frame()).collect(), queued: 0 }
    }

    /// The next free frame, emptied.
    pub fn next_free(&mut self) -> Option<&mut TxFrame> {
        let frame = self.frames.get_mut(self.queued)?;
        frame.clear();
        Some(frame)
    }

    /// The frame got last is complete.
    pub fn commit(&mut self, id: FrameId) {
        self.frames[self.queued].id = id;
        self.queued += 1;
    }

    /// The queued frames.
    pub fn queued(&self) -> &[TxFrame] {
        &self.frames[..self.queued]
    }

    /// Forgets the queued frames.
    pub fn clear(&mut self) {
        self.queued = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_inserted_where_they_were_pushed() {
        let (a, b) = (*b"AAA", *b"BB");
        let mut frame = TxFrame { head: b"0123456789".to_vec(), ..TxFrame::default() };
        for (at, bytes) in [(4, &a[..]), (4, &b[..]), (10, &a[..])] {
            // SAFETY: the arrays outlive the frame.
            frame.push_run(at, unsafe { Run::new(bytes.as_ptr(), bytes.len()) });
        }
        assert_eq!(frame.gather(), b"0123AAABB456789AAA");
        assert_eq!(frame.frame_bytes(), 18);
    }

    #[test]
    fn a_pool_has_a_fixed_number_of_frames() {
        let mut pool = FramePool::new(100);
        for pn in 0..FRAMES_PER_FLUSH_MAX as u64 {
            pool.next_free().unwrap().head.push(1);
            pool.commit(FrameId { session: 0, pn });
        }
        assert!(pool.next_free().is_none());
        assert_eq!(pool.queued().len(), FRAMES_PER_FLUSH_MAX);
        pool.clear();
        assert!(pool.next_free().unwrap().head.is_empty());
    }
}
