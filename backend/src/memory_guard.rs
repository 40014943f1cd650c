//! Guest memory whose file became shorter: an access to it must not end the process, which serves other disks too.
//!
//! The kernel answers an access behind the end of a mapped file with SIGBUS. For guest memory, and for nothing else, the page is then replaced by one
//! of zeroes that is ours alone, and the access goes on: a VMM that takes its memory away gets nonsense, and nobody else notices.
//! Does not know guests or addresses of theirs. Called by `guest_memory`.
#![allow(unsafe_code, reason = "a signal handler that reads the fault's address and maps a page over it")]

use std::ptr::without_provenance_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vmm_sys_util::signal::register_signal_handler;

/// Ranges that are guarded at a time: two tables of 32 regions for each of 64 disks.
const RANGES_MAX: usize = 64 * 32 * 2;
/// The smallest page: where memory is mapped in larger ones the kernel refuses to replace a part, and the process ends as it would have.
const PAGE_BYTES: usize = 4096;

static RANGES: [Range; RANGES_MAX] = [const { Range::new() }; RANGES_MAX];

/// Host addresses `start..end`; `end` 0: free, 1: being written.
struct Range {
    start: AtomicUsize,
    end: AtomicUsize,
    pages_replaced: AtomicU64,
}

impl Range {
    const fn new() -> Range {
        Range { start: AtomicUsize::new(0), end: AtomicUsize::new(0), pages_replaced: AtomicU64::new(0) }
    }

    fn take(&self, start: usize, end: usize) -> bool {
        if self.end.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return false;
        }
        self.start.store(start, Ordering::Relaxed);
        self.pages_replaced.store(0, Ordering::Relaxed);
        self.end.store(end, Ordering::Release);
        true
    }

    fn holds(&self, address: usize) -> bool {
        address < self.end.load(Ordering::Acquire) && address >= self.start.load(Ordering::Relaxed)
    }
}

/// Memory that is guarded for as long as this lives.
#[derive(Debug, Default)]
pub struct Guard {
    ranges: Vec<usize>,
}

impl Guard {
    /// Guards host memory, given as first addresses and lengths. What the table has no room for is not guarded, and the log says so.
    pub fn new(memory: impl Iterator<Item = (usize, usize)>) -> Guard {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            if let Err(error) = register_signal_handler(libc::SIGBUS, on_bus_error) {
                log::warn!(
                    "SIGBUS cannot be handled ({error}): a VMM that shrinks its memory file ends this process"
                );
            }
        });
        let mut ranges = Vec::new();
        for (start, len) in memory {
            match RANGES.iter().position(|range| range.take(start, start + len)) {
                Some(at) => ranges.push(at),
                None => log::warn!("more than {RANGES_MAX} regions of guest memory: one is not guarded"),
            }
        }
        Guard { ranges }
    }

    /// Pages that were gone when they were wanted.
    pub fn pages_replaced(&self) -> u64 {
        self.ranges.iter().map(|at| RANGES[*at].pages_replaced.load(Ordering::Relaxed)).sum()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let pages = self.pages_replaced();
        if pages > 0 {
            log::warn!(
                "a front-end made its memory file shorter while it was in use: {pages} pages were replaced by zeroes"
            );
        }
        for at in &self.ranges {
            RANGES[*at].end.store(0, Ordering::Release);
        }
    }
}

/// Only what a signal handler may do: atomics and system calls.
extern "C" fn on_bus_error(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo that lives as long as this call.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS fills in the address.
    let address = unsafe { info.si_addr() } as usize;
    if let Some(range) = RANGES.iter().find(|range| range.holds(address)) {
        let page = without_provenance_mut(address & !(PAGE_BYTES - 1));
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the page lies in a mapping of guest memory that is alive, for its guard is; nobody holds a reference into it, only pointers whose
        // content may change at any time. It is replaced in one step, and unmapped with the rest of its region.
        let mapped = unsafe { mmap_anonymous(page, PAGE_BYTES, access, MapFlags::PRIVATE | MapFlags::FIXED) };
        if mapped.is_ok() {
            range.pages_replaced.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }
    // SAFETY: plain system call. The access is made again, and ends the process as it would have without us.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}
