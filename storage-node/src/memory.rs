//! Memory of buffers: blocks of pages that can be cut in two and joined again. And memory that is a volume.
//!
//! Knows nothing of names or requests. Called by `buffers`, `volume` and the stores.
//! Besides the uring store the one file of this crate that may be unsafe: joining two neighbours and mapping have no safe form.
#![allow(
    unsafe_code,
    reason = "two neighbouring blocks of one mapping become one again; a memory file is mapped"
)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
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

/// The bytes of a volume that is in memory: a memory file, mapped. What is copied in one call is never torn by another, for each needs `&mut`
/// or nobody writes.
#[derive(Debug)]
pub struct VolumeMemory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl Send for VolumeMemory {}

impl VolumeMemory {
    /// Makes a memory file of `bytes` whose every page is there, and maps it: later no access can fail for want of memory. The file cannot be
    /// made shorter by anybody.
    ///
    /// # Errors
    /// The kernel has not so much memory, or not so much that it would give without taking it from others.
    pub fn new(name: &str, bytes: u64) -> io::Result<(File, VolumeMemory)> {
        use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
        let len = usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if bytes > available_bytes()? {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        file.set_len(bytes)?;
        fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok((file, VolumeMemory { start, len }))
    }

    /// Copies what lies at `offset` into `into`.
    ///
    /// # Panics
    /// It is outside: requests are checked before.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: `at` has checked that so many bytes are in the mapping; a buffer of ours does not overlap it.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Panics
    /// As [`VolumeMemory::read`].
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: as in `read`; `&mut self` makes this the only access.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    fn at(&self, offset: u64, len: usize) -> *mut u8 {
        let start = usize::try_from(offset).expect("within the memory");
        let fits = start.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(fits, "{len} bytes at {offset} of {}", self.len);
        // SAFETY: inside the mapping, or one past its end when nothing is meant.
        unsafe { self.start.as_ptr().add(start) }
    }
}

impl Drop for VolumeMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and nothing of it was handed out.
        let unmapped = unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert_eq!(unmapped, 0, "a mapping can be given back");
    }
}

/// What the kernel could give without swapping (`MemAvailable` of proc_meminfo(5)).
fn available_bytes() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
    kib.and_then(|kib| kib.checked_mul(1024)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
