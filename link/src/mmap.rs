//! Memory that the kernel shares with us, mapped from a file descriptor or of our own, unmapped when dropped. The kernel writes to it while we
//! look: it is never a reference.
//!
//! Knows addresses and bounds; does not know what a packet ring is.
#![allow(unsafe_code, reason = "a mapping is reached by pointers; each access is bounded here")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::frame::Run;

/// A mapping.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping is owned by this value alone and may be used from any one thread.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `bytes` of `fd` from `offset` on, shared, for reading and writing.
    pub(crate) fn new(fd: BorrowedFd<'_>, bytes: usize, offset: libc::off_t) -> io::Result<Mapping> {
        Mapping::map(fd.as_raw_fd(), bytes, offset, libc::MAP_SHARED)
    }

    /// New memory, all zeroes.
    pub(crate) fn anonymous(bytes: usize) -> io::Result<Mapping> {
        Mapping::map(-1, bytes, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
    }

    fn map(fd: i32, bytes: usize, offset: libc::off_t, kind: i32) -> io::Result<Mapping> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind | libc::MAP_POPULATE, fd, offset) };
        if start == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Mapping { start: start.cast(), bytes })
        }
    }

    /// Its address and length, for telling the kernel.
    pub(crate) fn place(&self) -> (u64, u64) {
        (self.start as u64, self.bytes as u64)
    }

    /// The word at `offset`, as the kernel shares it: its release of a slot is ordered before what this load sees.
    #[inline]
    pub(crate) fn load_acquire(&self, offset: usize) -> u32 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// Stores the word at `offset`; what we read of the slot before is ordered before it.
    #[inline]
    pub(crate) fn store_release(&self, offset: usize, value: u32) {
        self.word(offset).store(value, Ordering::Release);
    }

    #[inline]
    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.bytes, "word at {offset} of {}", self.bytes);
        // SAFETY: in bounds and aligned, as just checked.
        let at = unsafe { self.start.add(offset) };
        // SAFETY: `at` is valid for as long as `self`, and every access of ours to such a word is atomic.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }

    /// A copy of the `N` bytes at `offset`, which the kernel does not write to now.
    #[inline]
    pub(crate) fn read<const N: usize>(&self, offset: usize) -> [u8; N] {
        assert!(offset + N <= self.bytes, "{N} bytes at {offset} of {}", self.bytes);
        // SAFETY: in bounds, as just checked.
        let at = unsafe { self.start.add(offset) };
        // SAFETY: readable and, as bytes, of any value; unaligned reads are meant.
        unsafe { at.cast::<[u8; N]>().read_unaligned() }
    }

    /// Writes `bytes` at `offset`, where the kernel neither reads nor writes now.
    #[inline]
    pub(crate) fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.write_run(offset, Run::of_borrowed(bytes));
    }

    /// The same with bytes that may change meanwhile.
    #[inline]
    pub(crate) fn write_run(&mut self, offset: usize, run: Run) {
        let len = run.len();
        assert!(
            offset <= self.bytes && len <= self.bytes - offset,
            "{len} bytes at {offset} of {}",
            self.bytes
        );
        // SAFETY: in bounds, as just checked.
        let at = unsafe { self.start.add(offset) };
        // SAFETY: the source is readable by the promise of `Run::new`; the destination is in bounds, and no slice of it lives, for `self` is
        // borrowed mutably; runs lie outside of the mapping, of which nobody else has the address.
        unsafe { std::ptr::copy_nonoverlapping(run.start(), at, len) };
    }

    /// The `len` bytes at `offset` while the slot they are in is ours: the kernel does not write to a slot before it was given back.
    #[inline]
    pub(crate) fn owned_bytes(&self, offset: usize, len: usize) -> &[u8] {
        assert!(
            offset <= self.bytes && len <= self.bytes - offset,
            "{len} bytes at {offset} of {}",
            self.bytes
        );
        // SAFETY: in bounds, as just checked.
        let at = unsafe { self.start.add(offset) };
        // SAFETY: mapped for as long as `self`; nobody writes while the slot is ours, and it is given back only through `&mut` of the ring
        // that owns this mapping, when no such slice can live.
        unsafe { std::slice::from_raw_parts(at, len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped; no slice of it outlives the borrow it was given for.
        let result = unsafe { libc::munmap(self.start.cast(), self.bytes) };
        debug_assert!(result == 0, "munmap: {}", io::Error::last_os_error());
    }
}
