//! Memory of buffers: blocks of pages that can be cut in two and joined again.
//!
//! Knows nothing of volumes or requests. Called by `buffers` and the stores.
//! Besides the uring store the one file of this crate that may be unsafe: joining two neighbours has no safe form.
#![allow(unsafe_code, reason = "two neighbouring blocks of one mapping become one again")]

use std::ops::Range;
use std::ptr::NonNull;

use cirro_link::Run;

/// Bytes of a memory page, and what every block is aligned to.
pub(crate) const PAGE_BYTES: usize = 4096;

/// A block of page-aligned memory with one owner.
///
/// The memory is mapped for the life of the process and never given back: a request that the kernel still has after its store was
/// dropped can then never write into memory that became somebody else's. While the kernel writes into a block, the request owns it;
/// so whoever holds a `Block` is alone with its bytes.
#[derive(Debug)]
pub(crate) struct Block {
    arena: NonNull<u8>,
    start: usize,
    len: usize,
}

// SAFETY: a block is the only owner of its bytes, and memory is not tied to a thread.
unsafe impl Send for Block {}

impl Block {
    /// Maps `bytes` (rounded up to pages) of zeroed memory that is touched only when it is used.
    pub(crate) fn map(bytes: usize) -> Block {
        let len = bytes.next_multiple_of(PAGE_BYTES);
        let memory: &'static mut [u8] = Box::leak(vec![0u8; len + PAGE_BYTES].into_boxed_slice());
        let skip = memory.as_ptr().align_offset(PAGE_BYTES);
        Block { arena: NonNull::from(&mut memory[skip..skip + len]).cast(), start: 0, len }
    }

    /// Bytes of the block.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// True of no block.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the block starts in the memory that was mapped in one piece.
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `start` lies inside the arena.
        let first = unsafe { self.arena.as_ptr().add(self.start) };
        // SAFETY: `start..start + len` is inside the arena, initialised (zeroed when mapped), lives for ever, and this block is its
        // only owner: nobody writes while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(first, self.len) }
    }

    /// The bytes, to be changed.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `start` lies inside the arena.
        let first = unsafe { self.arena.as_ptr().add(self.start) };
        // SAFETY: as in `bytes`; `&mut self` makes the slice the only way to them.
        unsafe { std::slice::from_raw_parts_mut(first, self.len) }
    }

    /// The bytes in `range`, for a link to read when it sends.
    pub(crate) fn run(&self, range: Range<usize>) -> Run {
        let bytes = &self.bytes()[range];
        // SAFETY: the bytes are inside a mapping that lives as long as the process, so they can be read whenever the link flushes. Whoever
        // owns the block then may have changed them: the frame's checksum tells, and nothing else depends on them.
        unsafe { Run::new(bytes.as_ptr(), bytes.len()) }
    }

    /// Cuts the block in two at `at`.
    pub(crate) fn split(self, at: usize) -> (Block, Block) {
        assert!(at <= self.len, "split inside the block");
        let tail = Block { arena: self.arena, start: self.start + at, len: self.len - at };
        (Block { arena: self.arena, start: self.start, len: at }, tail)
    }

    /// Makes one block of two neighbours, `self` first.
    pub(crate) fn join(self, next: Block) -> Block {
        assert!(self.arena == next.arena && self.start + self.len == next.start, "blocks are neighbours");
        Block { arena: self.arena, start: self.start, len: self.len + next.len }
    }
}
