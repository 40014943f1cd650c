//! A frame on its way out: bytes of our own, and cuts where foreign memory is inserted.
//!
//! Knows nothing of what the bytes mean. Workers fill frames; links read them. Unsafe is here and not elsewhere because a [`Run`] names
//! memory of which the compiler knows nothing: a guest's pages, a node's buffers.
#![allow(unsafe_code, reason = "a run of guest memory is named by its address, and read through it")]

use cirro_protocol::time::Instant;

/// Frames that a link queues between two flushes. 32 requests of two pieces; larger batches gain nothing (LAB: sends in batches of 32
/// reach 1.2 M frames of 4.2 KiB a second).
pub const FRAMES_QUEUED_MAX: usize = 64;
/// Cuts in one frame. A frame of 64 KiB made of 512-byte pieces of guest memory has 128; twice that leaves room for odd ones. A payload that
/// is scattered more finely is copied by its owner first.
pub const CUTS_MAX: usize = 256;

/// A run of memory that the link reads once.
///
/// Not a slice: a guest may change the bytes at any time, so no reference to them ever exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    ptr: *const u8,
    len: usize,
}

// SAFETY: a run is an address and a length. Whoever makes one promises that the memory is readable (see `Run::new`), whichever thread reads it.
unsafe impl Send for Run {}

impl Run {
    /// The `len` bytes at `ptr`.
    ///
    /// # Safety
    /// The memory is readable, and no exclusive Rust reference to it is alive, for as long as the run is in a frame: until [`TxFrame::clear`],
    /// which every link calls on a queued frame before its [`flush`](crate::Link::flush) returns, or until the frame is dropped. Other
    /// parties (a guest) may change the bytes meanwhile.
    pub const unsafe fn new(ptr: *const u8, len: usize) -> Run {
        Run { ptr, len }
    }

    /// Where it starts.
    pub const fn as_ptr(&self) -> *const u8 {
        self.ptr
    }

    /// How many bytes it has.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True if it has no bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A run and where it is inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The offset in the head before which the run comes.
    pub at: usize,
    /// The memory.
    pub run: Run,
}

/// A frame being built for sending. `head` holds every byte that is not a volume's data, in order: Ethernet header, frame header, message
/// headers, control payloads, padding, CRC trailer, tag. The cuts say where foreign memory is inserted.
#[derive(Debug, Default)]
pub struct TxFrame {
    /// The bytes of our own; capacity for a whole frame is reserved.
    pub head: Vec<u8>,
    cuts: Vec<Cut>,
    cut_bytes: usize,
}

impl TxFrame {
    /// An empty frame with room for `frame_bytes_max` of head and [`CUTS_MAX`] cuts.
    pub fn with_capacity(frame_bytes_max: usize) -> TxFrame {
        TxFrame {
            head: Vec::with_capacity(frame_bytes_max),
            cuts: Vec::with_capacity(CUTS_MAX),
            cut_bytes: 0,
        }
    }

    /// Forgets all bytes and cuts, keeps the room.
    pub fn clear(&mut self) {
        self.head.clear();
        self.cuts.clear();
        self.cut_bytes = 0;
    }

    /// Inserts `run` before the head's byte `at`. Cuts come in order; several at the same place keep theirs. An empty run is left out.
    ///
    /// # Panics
    /// If `at` lies before an earlier cut, or there are [`CUTS_MAX`] already (ask [`TxFrame::cuts_free`] first).
    pub fn push_cut(&mut self, at: usize, run: Run) {
        assert!(self.cuts.last().is_none_or(|last| last.at <= at), "cuts come in order");
        assert!(self.cuts.len() < CUTS_MAX, "a frame has at most {CUTS_MAX} cuts");
        if !run.is_empty() {
            self.cuts.push(Cut { at, run });
            self.cut_bytes += run.len();
        }
    }

    /// How many more cuts fit.
    pub fn cuts_free(&self) -> usize {
        CUTS_MAX - self.cuts.len()
    }

    /// The cuts in order.
    pub fn cuts(&self) -> &[Cut] {
        &self.cuts
    }

    /// Bytes of the whole frame, head and runs.
    pub fn len(&self) -> usize {
        self.head.len() + self.cut_bytes
    }

    /// True if there are no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The frame as it goes on the wire, in pieces: `own` for each part of the head, `foreign` for each run.
    ///
    /// # Panics
    /// If a cut lies behind the end of the head.
    pub(crate) fn walk<'a, P>(
        &'a self,
        own: impl Fn(&'a [u8]) -> P,
        foreign: impl Fn(Run) -> P,
        mut each: impl FnMut(P),
    ) {
        let mut at = 0;
        for cut in &self.cuts {
            if cut.at > at {
                each(own(&self.head[at..cut.at]));
                at = cut.at;
            }
            each(foreign(cut.run));
        }
        if at < self.head.len() {
            each(own(&self.head[at..]));
        }
    }

    /// Appends the frame as it goes on the wire to `out`, which makes the one copy of the runs.
    ///
    /// # Panics
    /// As the kernel would refuse it: if a cut lies behind the end of the head.
    pub fn gather(&self, out: &mut Vec<u8>) {
        out.reserve(self.len());
        let mut at = 0;
        for cut in &self.cuts {
            out.extend_from_slice(&self.head[at..cut.at]);
            at = cut.at;
            let spare = &mut out.spare_capacity_mut()[..cut.run.len];
            // SAFETY: `Run::new` promises `len` readable bytes for as long as the run is in a frame, which is this one; `spare` was just
            // bounded to `len` bytes and is our own memory, so the two do not overlap.
            unsafe {
                std::ptr::copy_nonoverlapping(cut.run.ptr, spare.as_mut_ptr().cast::<u8>(), cut.run.len)
            };
            let filled = out.len() + cut.run.len;
            // SAFETY: the bytes up to `filled` are within the capacity (`spare` was) and were written by the copy above.
            unsafe { out.set_len(filled) };
        }
        out.extend_from_slice(&self.head[at..]);
    }
}

/// A received frame, Ethernet header included, lent until the next [`receive`](crate::Link::receive).
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// The whole frame.
    pub bytes: &'a [u8],
    /// When it arrived at this machine, as the kernel stamped it, on the scale of [`crate::clock::now`].
    pub arrival: Instant,
}

/// What [`flush`](crate::Link::flush) reports of a frame that the kernel refused. The link does not look into it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FrameId {
    /// The worker's index of the session.
    pub session: u32,
    /// The packet number; 0 for a frame without one.
    pub pn: u64,
}
