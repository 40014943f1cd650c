//! A frame being built for sending, as a head and the places where foreign memory is inserted.
//!
//! Knows nothing of how it is sent. Filled by workers, read by links.
#![allow(unsafe_code, reason = "a run of guest memory is named by its address; TxFrame::gather reads it")]

use std::io;
use std::sync::atomic::Ordering;

use crate::{Drops, FrameId};

/// Frames that a link holds between two flushes: a window's worth of 8 KiB frames would be 512, but the kernel takes them in batches, and
/// more than 64 gain nothing (measured figures: `docs/PERFORMANCE.md`).
pub const FRAMES_QUEUED_MAX: usize = 64;
/// Frames of one flush that the kernel may refuse one by one before the rest is refused unasked: an interface that drops some (a full
/// queue, a policer) still takes the others, one that drops all is not asked 64 times.
const REFUSALS_PER_FLUSH_MAX: usize = 8;
/// Batches of full frames that the kernel holds until the interface takes them. What is beyond is refused, which is known at once.
const SEND_BATCHES: usize = 4;
/// What the kernel keeps beside a frame's bytes (sk_buff and skb_shared_info), rounded up.
const FRAME_OVERHEAD_BYTES: usize = 1024;
/// Cuts for which a frame has room from the start: 64 KiB in runs of 1 KiB. More are legal and make it grow once.
const CUTS_EXPECTED: usize = 64;

/// A run of memory that a link reads once: guest pages or a node's buffers.
///
/// Not a slice: a guest may change the bytes at any time, so no reference to them ever exists.
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
    /// The bytes are mapped, may be read, and no `&mut` to them is alive, for as long as the run is in a frame: until [`TxFrame::clear`] or
    /// the frame's end. Every link clears its queued frames before its [`flush`](crate::Link::flush) returns. The bytes may change meanwhile
    /// (a guest may write to them): links copy them and make no reference to them.
    pub const unsafe fn new(start: *const u8, len: usize) -> Run {
        Run { start, len }
    }

    /// Names memory that stays as it is for ever.
    pub const fn of_static(bytes: &'static [u8]) -> Run {
        Run { start: bytes.as_ptr(), len: bytes.len() }
    }

    /// Names borrowed bytes, for a copy that is made before the borrow ends.
    pub(crate) const fn of_borrowed(bytes: &[u8]) -> Run {
        Run { start: bytes.as_ptr(), len: bytes.len() }
    }

    /// The first `len` bytes, and the rest.
    ///
    /// # Panics
    /// If there are fewer.
    pub(crate) fn split_at(self, len: usize) -> (Run, Run) {
        assert!(len <= self.len, "{len} of {} bytes", self.len);
        let rest = Run { start: self.start.wrapping_add(len), len: self.len - len };
        (Run { start: self.start, len }, rest)
    }

    /// Address of the first byte.
    pub const fn start(&self) -> *const u8 {
        self.start
    }

    /// How many bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True if it names no byte.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
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
/// payloads, padding, CRC trailer, tag. Runs of foreign memory are inserted by [`TxFrame::push_cut`].
#[derive(Debug, Default)]
pub struct TxFrame {
    /// See above.
    pub head: Vec<u8>,
    cuts: Vec<Cut>,
    cut_bytes: usize,
    id: FrameId,
}

/// A part of a frame, in order.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part<'a> {
    Head(&'a [u8]),
    Run(Run),
}

impl TxFrame {
    /// An empty frame whose head takes `frame_bytes` without growing.
    pub fn with_capacity(frame_bytes: usize) -> TxFrame {
        TxFrame {
            head: Vec::with_capacity(frame_bytes),
            cuts: Vec::with_capacity(CUTS_EXPECTED),
            ..TxFrame::default()
        }
    }

    /// Inserts `run` before offset `at` of the head, after what was inserted there before. An empty run is left out.
    ///
    /// # Panics
    /// If `at` is smaller than that of the cut before.
    pub fn push_cut(&mut self, at: usize, run: Run) {
        assert!(self.cuts.last().is_none_or(|cut| cut.at <= at), "cuts in order");
        if !run.is_empty() {
            self.cuts.push(Cut { at, run });
            self.cut_bytes += run.len;
        }
    }

    /// What was inserted, in order.
    pub fn cuts(&self) -> &[Cut] {
        &self.cuts
    }

    /// Empties the frame.
    pub fn clear(&mut self) {
        self.head.clear();
        self.cuts.clear();
        self.cut_bytes = 0;
    }

    /// Bytes of the whole frame.
    pub fn len(&self) -> usize {
        self.head.len() + self.cut_bytes
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Who it is to its sender, as said at [`FramePool::commit`].
    pub fn id(&self) -> FrameId {
        self.id
    }

    /// Most parts that [`TxFrame::parts`] can give.
    pub(crate) fn parts_max(&self) -> usize {
        2 * self.cuts.len() + 1
    }

    /// Hands the parts to `put` in the order in which they go on the wire.
    ///
    /// # Panics
    /// If a cut lies behind the end of the head: its sender's fault.
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

    /// Appends the whole frame in one piece to `to`: the one copy of the runs.
    ///
    /// # Panics
    /// If a cut lies behind the end of the head: its sender's fault.
    pub fn gather(&self, to: &mut Vec<u8>) {
        to.reserve(self.len());
        self.parts(|part| match part {
            Part::Head(head) => to.extend_from_slice(head),
            Part::Run(run) => {
                let free = &mut to.spare_capacity_mut()[..run.len];
                // SAFETY: the source is readable by the promise of `Run::new`, for the run is in this frame; the destination was just bounded
                // to `len` bytes; they cannot overlap, for the destination is free room of `to`.
                unsafe { std::ptr::copy_nonoverlapping(run.start, free.as_mut_ptr().cast::<u8>(), run.len) };
                let end = to.len() + run.len;
                // SAFETY: within the capacity, as `free` was; the bytes up to `end` were written by the copy.
                unsafe { to.set_len(end) };
            }
        });
    }
}

/// Bytes that a socket must be allowed to hold so that [`SEND_BATCHES`] fit: the kernel counts a frame by the memory it takes, a power of two,
/// and doubles what it is asked for; so this leaves twice the room.
pub(crate) fn send_buffer_bytes(mtu: usize) -> usize {
    SEND_BATCHES * FRAMES_QUEUED_MAX * (mtu + FRAME_OVERHEAD_BYTES).next_power_of_two()
}

/// What the kernel would not take at the head of a batch.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// How many frames, at least 1, the error is about.
    pub(crate) frames: usize,
    pub(crate) error: io::Error,
}

/// The errors of a socket whose interface went down or away.
pub(crate) fn means_lost(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENETDOWN | libc::ENXIO | libc::ENODEV))
}

/// The frames of a link: a fixed number, used in order between two flushes.
#[derive(Debug)]
pub struct FramePool {
    frames: Vec<TxFrame>,
    queued: usize,
}

impl FramePool {
    /// A pool of [`FRAMES_QUEUED_MAX`] whose heads hold a frame of `frame_bytes` without growing.
    pub fn new(frame_bytes: usize) -> FramePool {
        let frames = (0..FRAMES_QUEUED_MAX).map(|_| TxFrame::with_capacity(frame_bytes)).collect();
        FramePool { frames, queued: 0 }
    }

    /// The next free frame, emptied.
    pub fn next_free(&mut self) -> Option<&mut TxFrame> {
        let frame = self.frames.get_mut(self.queued)?;
        frame.clear();
        Some(frame)
    }

    /// The frame got last is complete.
    ///
    /// # Panics
    /// If there was none: its sender's fault.
    pub fn commit(&mut self, id: FrameId) {
        self.frames[self.queued].id = id;
        self.queued += 1;
    }

    /// The queued frames.
    pub fn queued(&self) -> &[TxFrame] {
        &self.frames[..self.queued]
    }

    /// Hands the queued frames to `send`, which gives how many it took from the front, until all are taken or refused; then forgets them.
    /// Returns whether an error says that the interface is lost: nothing is sent after it.
    pub(crate) fn flush(
        &mut self,
        refused: &mut Vec<FrameId>,
        drops: &Drops,
        mut send: impl FnMut(&[TxFrame]) -> Result<usize, Refusal>,
    ) -> bool {
        let (mut rest, before, mut lost) = (self.queued(), refused.len(), false);
        while !rest.is_empty() {
            if lost || refused.len() - before >= REFUSALS_PER_FLUSH_MAX {
                refused.extend(rest.iter().map(TxFrame::id));
                break;
            }
            match send(rest) {
                Ok(sent) => rest = &rest[sent..],
                Err(refusal) if refusal.error.kind() == io::ErrorKind::Interrupted => {}
                Err(Refusal { frames, error }) => {
                    log::trace!("frame refused: {error}");
                    // A full send buffer stays full for the rest of the batch; anything else may be these frames' alone.
                    let full = error.kind() == io::ErrorKind::WouldBlock;
                    let (gone, others) = rest.split_at(if full { rest.len() } else { frames });
                    refused.extend(gone.iter().map(TxFrame::id));
                    rest = others;
                    lost = means_lost(&error);
                }
            }
        }
        drops.refused.fetch_add((refused.len() - before) as u64, Ordering::Relaxed);
        self.clear();
        lost
    }

    /// Refuses all queued frames: there is nothing to send them on.
    pub(crate) fn refuse(&mut self, refused: &mut Vec<FrameId>, drops: &Drops) {
        refused.extend(self.queued().iter().map(TxFrame::id));
        drops.refused.fetch_add(self.queued as u64, Ordering::Relaxed);
        self.clear();
    }

    /// Forgets the queued frames and every run in them.
    pub fn clear(&mut self) {
        self.frames[..self.queued].iter_mut().for_each(TxFrame::clear);
        self.queued = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_inserted_where_they_were_pushed() {
        let mut frame = TxFrame { head: b"0123456789".to_vec(), ..TxFrame::default() };
        for (at, bytes) in [(4, &b"AAA"[..]), (4, b"BB"), (7, b""), (10, b"AAA")] {
            frame.push_cut(at, Run::of_static(bytes));
        }
        let mut bytes = b"before ".to_vec();
        frame.gather(&mut bytes);
        assert_eq!(bytes, b"before 0123AAABB456789AAA");
        assert_eq!((frame.len(), frame.cuts().len()), (18, 3));
        frame.clear();
        assert!(frame.is_empty() && frame.cuts().is_empty());
    }

    #[test]
    #[should_panic(expected = "cuts in order")]
    fn a_cut_before_the_last_one_is_a_bug() {
        let mut frame = TxFrame { head: b"0123456789".to_vec(), ..TxFrame::default() };
        frame.push_cut(4, Run::of_static(b"a"));
        frame.push_cut(3, Run::of_static(b"b"));
    }

    #[test]
    fn a_pool_has_a_fixed_number_of_frames_and_forgets_their_runs() {
        let mut pool = FramePool::new(100);
        for pn in 0..FRAMES_QUEUED_MAX as u64 {
            let frame = pool.next_free().unwrap();
            frame.head.push(1);
            frame.push_cut(1, Run::of_static(b"data"));
            pool.commit(FrameId { session: 0, pn });
        }
        assert!(pool.next_free().is_none());
        assert_eq!(pool.queued().len(), FRAMES_QUEUED_MAX);
        assert_eq!(pool.queued()[9].id(), FrameId { session: 0, pn: 9 });
        pool.clear();
        assert!(pool.queued().is_empty() && pool.frames.iter().all(TxFrame::is_empty));
        assert!(pool.next_free().unwrap().head.is_empty());
    }
}
