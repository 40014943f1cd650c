//! The log of pages that we write, which a front-end keeps while it moves its guest elsewhere (vhost-user, "Migration"): one bit for each
//! 4 KiB of guest memory, in memory that it shares with us.
//!
//! Every slice of guest memory carries its region's [`DirtyLog`], and vm-memory marks what is written through a slice; so whoever writes guest memory
//! through `guest_memory` or a virtqueue marks it, and there is no other way. Does not know rings or requests. The log comes by SET_LOG_BASE from
//! the vhost crate, and is switched by `device`.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use vhost_user_backend::bitmap::{AtomicBitmapMmap, BitmapReplace, MemRegionBitmap, MmapLogReg};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::guest_memory::Regions;
use crate::memory_guard::Guard;

/// Bytes of guest memory that one bit stands for (VHOST_LOG_PAGE).
const PAGE_BYTES: usize = 4096;

/// The log of one region, or of a part of it that begins `offset` bytes on.
#[derive(Clone, Debug, Default)]
pub struct DirtyLog {
    region: Arc<Region>,
    offset: usize,
}

#[derive(Debug, Default)]
struct Region {
    /// The front-end wants to know (VHOST_F_LOG_ALL).
    on: AtomicBool,
    /// Where its bits are, once SET_LOG_BASE said so.
    bits: RwLock<Option<Bits>>,
}

/// A region's bits.
#[derive(Debug)]
pub struct Bits {
    // Goes before the mapping that it guards: a front-end may make the log's file shorter at any time.
    _guard: Guard,
    log: Arc<MmapLogReg>,
    /// The region's first page, and how many it has.
    first: usize,
    count: usize,
}

impl MemRegionBitmap for Bits {
    /// An error if the log is too small for the region.
    fn new<R: GuestMemoryRegion>(region: &R, log: Arc<MmapLogReg>) -> io::Result<Bits> {
        // Its whole use is the check that every page of the region has its bit: only the crate knows how long the log is.
        AtomicBitmapMmap::new(region, Arc::clone(&log))?;
        let first = region.start_addr().0 as usize / PAGE_BYTES;
        let last = (region.start_addr().0 + (region.len() - 1)) as usize / PAGE_BYTES;
        let start = std::ptr::from_ref(&log[first / 8]) as usize;
        let guard = Guard::new(std::iter::once((start, last / 8 - first / 8 + 1)));
        Ok(Bits { _guard: guard, log, first, count: last - first + 1 })
    }
}

impl Bits {
    fn pages(&self, offset: usize, len: usize) -> std::ops::Range<usize> {
        let end = offset.saturating_add(len).div_ceil(PAGE_BYTES).min(self.count);
        self.first + offset / PAGE_BYTES..self.first + end
    }

    fn mark(&self, offset: usize, len: usize) {
        for page in self.pages(offset, len) {
            // Who sees the bit sees what was written.
            self.log[page / 8].fetch_or(1 << (page % 8), Ordering::Release);
        }
    }

    fn is_marked(&self, offset: usize) -> bool {
        self.pages(offset, 1).all(|page| self.log[page / 8].load(Ordering::Relaxed) >> (page % 8) & 1 == 1)
    }
}

impl DirtyLog {
    /// Whether what is written is marked from now on.
    pub fn switch(&self, on: bool) {
        self.region.on.store(on, Ordering::Release);
    }

    /// True if what is written is marked.
    pub fn is_on(&self) -> bool {
        self.region.on.load(Ordering::Acquire)
    }

    fn with_bits<T>(&self, look: impl FnOnce(&Bits) -> T) -> Option<T> {
        self.region.bits.read().expect("no holder of this lock panics").as_ref().map(look)
    }
}

/// Lets the regions of a new memory table be logged where those of the old one were: a guest may be given other memory while it moves.
pub fn go_on(old: &Regions, new: &Regions) {
    let on = old.iter().any(|region| region.bitmap().is_on());
    let log = old.iter().find_map(|region| region.bitmap().with_bits(|bits| Arc::clone(&bits.log)));
    for region in new.iter() {
        region.bitmap().switch(on);
        let Some(log) = &log else { continue };
        match Bits::new(region, Arc::clone(log)) {
            Ok(bits) => region.bitmap().replace(bits),
            // The front-end sends a larger log for more memory, before or after it.
            Err(error) => log::debug!("the log of dirty pages has no room for a new region: {error}"),
        }
    }
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.is_on() && len > 0 {
            self.with_bits(|bits| bits.mark(self.offset.saturating_add(offset), len));
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.with_bits(|bits| bits.is_marked(self.offset.saturating_add(offset))).unwrap_or(false)
    }

    fn slice_at(&self, offset: usize) -> DirtyLog {
        DirtyLog { region: Arc::clone(&self.region), offset: self.offset.saturating_add(offset) }
    }
}

impl BitmapReplace for DirtyLog {
    type InnerBitmap = Bits;

    fn replace(&self, bits: Bits) {
        *self.region.bits.write().expect("no holder of this lock panics") = Some(bits);
    }
}

impl BitmapSlice for DirtyLog {}

impl WithBitmapSlice<'_> for DirtyLog {
    type S = DirtyLog;
}

impl NewBitmap for DirtyLog {
    fn with_len(_bytes: usize) -> DirtyLog {
        DirtyLog::default()
    }
}
