//! A ring that we and the kernel share, one filling and the other taking (Linux Documentation/networking/af_xdp.rst). Two kinds are ours to fill
//! (buffers to receive into, frames to send), two to take from (frames that came, buffers that were sent).
//!
//! Knows entries of `N` bytes and two counters that run on without end; does not know what an entry says. Used by one `Port`.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{Ordering, fence};

use crate::mmap::Mapping;

/// Where in a mapping the parts of a ring lie: struct xdp_ring_offset.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offsets {
    pub(super) producer: usize,
    pub(super) consumer: usize,
    pub(super) entries: usize,
    pub(super) flags: usize,
}

#[derive(Debug)]
struct Ring<const N: usize> {
    mapping: Mapping,
    offsets: Offsets,
    entries: u32,
}

impl<const N: usize> Ring<N> {
    fn new(fd: BorrowedFd<'_>, page: libc::off_t, offsets: Offsets, entries: u32) -> io::Result<Ring<N>> {
        assert!(entries.is_power_of_two(), "{entries} entries");
        let mapping = Mapping::new(fd, offsets.entries + entries as usize * N, page)?;
        Ok(Ring { mapping, offsets, entries })
    }

    fn place(&self, position: u32) -> usize {
        self.offsets.entries + (position & (self.entries - 1)) as usize * N
    }
}

/// A ring that we fill.
#[derive(Debug)]
pub(super) struct Producer<const N: usize> {
    ring: Ring<N>,
    /// Where the next entry goes, and where the kernel was when it was last looked for.
    next: u32,
    taken: u32,
}

impl<const N: usize> Producer<N> {
    /// Maps the ring of `entries` that lies at `page` of a socket.
    pub(super) fn new(
        fd: BorrowedFd<'_>,
        page: libc::off_t,
        offsets: Offsets,
        entries: u32,
    ) -> io::Result<Producer<N>> {
        Ok(Producer { ring: Ring::new(fd, page, offsets, entries)?, next: 0, taken: 0 })
    }

    /// True if there is room for `entries` more.
    #[inline]
    pub(super) fn has_room(&mut self, entries: u32) -> bool {
        if self.ring.entries - self.next.wrapping_sub(self.taken) < entries {
            self.taken = self.ring.mapping.load_acquire(self.ring.offsets.consumer);
        }
        self.ring.entries - self.next.wrapping_sub(self.taken) >= entries
    }

    /// Adds an entry, for which there is room. The kernel sees it after [`Producer::publish`].
    #[inline]
    pub(super) fn put(&mut self, entry: &[u8; N]) {
        let at = self.ring.place(self.next);
        self.ring.mapping.write(at, entry);
        self.next = self.next.wrapping_add(1);
    }

    #[inline]
    pub(super) fn publish(&self) {
        self.ring.mapping.store_release(self.ring.offsets.producer, self.next);
    }

    /// Where the next entry goes.
    pub(super) fn position(&self) -> u32 {
        self.next
    }

    /// How many entries the kernel has not taken yet.
    #[inline]
    pub(super) fn waiting(&self) -> u32 {
        self.next.wrapping_sub(self.ring.mapping.load_acquire(self.ring.offsets.consumer))
    }

    /// True if the kernel wants to be woken for what was published. The fence keeps the question after the publication: the kernel does it the
    /// other way round, so one of us sees the other.
    #[inline]
    pub(super) fn needs_wakeup(&self) -> bool {
        fence(Ordering::SeqCst);
        self.ring.mapping.load_acquire(self.ring.offsets.flags) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// A ring that the kernel fills.
#[derive(Debug)]
pub(super) struct Consumer<const N: usize> {
    ring: Ring<N>,
    /// Which entry is next, and up to which they were there when that was last looked for.
    next: u32,
    filled: u32,
}

impl<const N: usize> Consumer<N> {
    /// Maps the ring of `entries` that lies at `page` of a socket.
    pub(super) fn new(
        fd: BorrowedFd<'_>,
        page: libc::off_t,
        offsets: Offsets,
        entries: u32,
    ) -> io::Result<Consumer<N>> {
        Ok(Consumer { ring: Ring::new(fd, page, offsets, entries)?, next: 0, filled: 0 })
    }

    /// Takes the next entry out.
    #[inline]
    pub(super) fn take(&mut self) -> Option<[u8; N]> {
        if self.next == self.filled {
            self.filled = self.ring.mapping.load_acquire(self.ring.offsets.producer);
            if self.next == self.filled {
                return None;
            }
        }
        let entry = self.ring.mapping.read(self.ring.place(self.next));
        self.next = self.next.wrapping_add(1);
        self.ring.mapping.store_release(self.ring.offsets.consumer, self.next);
        Some(entry)
    }
}
