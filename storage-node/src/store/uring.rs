//! The store that serves: io_uring for everything that may wait, one plain call for what is cached, and none for volumes that are memory.
//!
//! Knows files by number and requests by token. A read or write whose pages are cached is done at once with preadv2/pwritev2 and
//! `RWF_NOWAIT`, because a ring costs more than such a call (see docs/PERFORMANCE.md); all else goes through the ring, and so no call
//! made here waits for a device. Called by `server` (set-up) and `node` (as a [`Store`]).
#![allow(
    unsafe_code,
    reason = "entries of the submission queue name memory and files that must outlive the request"
)]

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, squeue, types};
use log::warn;
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};

use super::{
    Cached, Completion, FILES_MAX, FileId, Request, STORE_REQUESTS_MAX, Store, StoreError, StoreFile,
    StoreOp, TRIES_MAX, is_unsupported,
};
use crate::memory::Block;

/// Bytes of zeroes written at a time where the file system cannot zero a range.
const ZEROES_BYTES: usize = 1 << 20;

/// What the kernel is doing for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Moving the buffer's bytes.
    Transfer,
    /// fdatasync: of a flush, or after a discard or zeroing of a write-through volume.
    Sync,
    /// fallocate: punch a hole for a discard.
    Discard,
    /// fallocate: zero a range.
    ZeroRange,
    /// fallocate: punch a hole, because the file system cannot zero a range.
    ZeroHole,
    /// Write zeroes, because it cannot punch holes either.
    ZeroData,
}

/// A request in the kernel.
#[derive(Debug)]
struct Active {
    request: Request,
    step: Step,
    done: u64,
    tries: u8,
}

/// A file and what was learned of it.
#[derive(Debug)]
struct Attached {
    file: StoreFile,
    reads_inline: bool,
    writes_inline: bool,
    discard_step: Step,
    zero_step: Step,
}

/// See the module.
pub struct UringStore {
    ring: IoUring,
    files: Vec<Attached>,
    active: Vec<Option<Active>>,
    free: Vec<u16>,
    done: VecDeque<Completion>,
    unpushed: bool,
    zeroes: Block,
}

impl UringStore {
    /// A store without files.
    ///
    /// # Errors
    /// What `io_uring_setup` says; the kernel may have io_uring switched off.
    pub fn new() -> io::Result<UringStore> {
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(2 * STORE_REQUESTS_MAX as u32)
            .build(STORE_REQUESTS_MAX as u32)?;
        Ok(UringStore {
            ring,
            files: Vec::new(),
            active: (0..STORE_REQUESTS_MAX).map(|_| None).collect(),
            free: (0..STORE_REQUESTS_MAX as u16).rev().collect(),
            done: VecDeque::with_capacity(STORE_REQUESTS_MAX),
            unpushed: false,
            zeroes: Block::map(ZEROES_BYTES),
        })
    }

    /// Adds a file.
    pub fn attach(&mut self, file: StoreFile) -> FileId {
        assert!(self.files.len() < FILES_MAX, "a worker has at most {FILES_MAX} volumes");
        let cached = file.cached != Cached::No;
        let writes_inline = cached && (file.cached == Cached::Always || !file.write_through);
        // Memory that was given back may not be there when it is wanted again: it is only made zero.
        let (discard_step, zero_step) = match file.memory {
            Some(_) => (Step::ZeroData, Step::ZeroData),
            None => (Step::Discard, Step::ZeroRange),
        };
        self.files.push(Attached { file, reads_inline: cached, writes_inline, discard_step, zero_step });
        FileId((self.files.len() - 1) as u16)
    }

    /// Takes one reading or writing as far as it goes without waiting; the bytes moved.
    fn serve_from_memory(&mut self, request: &mut Request) -> u64 {
        let attached = &mut self.files[usize::from(request.file.0)];
        let file = &*attached.file.file;
        let mut flags = ReadWriteFlags::empty();
        if attached.file.cached != Cached::Always {
            flags |= ReadWriteFlags::NOWAIT;
        }
        let Some(buffer) = request.buffer.as_mut() else { return 0 };
        let reads = request.op == StoreOp::Read;
        let moved = if reads {
            preadv2(file, &mut [IoSliceMut::new(buffer.bytes_mut())], request.offset, flags)
        } else {
            if attached.file.write_through {
                flags |= ReadWriteFlags::DSYNC;
            }
            pwritev2(file, &[IoSlice::new(buffer.bytes())], request.offset, flags)
        };
        match moved {
            Ok(count) => count as u64,
            Err(errno) => {
                // The file system cannot promise not to wait: do not ask again.
                if matches!(errno, Errno::OPNOTSUPP | Errno::INVAL) {
                    *(if reads { &mut attached.reads_inline } else { &mut attached.writes_inline }) = false;
                }
                0
            }
        }
    }

    /// Queues the next kernel request of `index`.
    fn start(&mut self, index: u16) {
        let active = self.active[usize::from(index)].as_mut().expect("the request is active");
        let attached = &self.files[usize::from(active.request.file.0)];
        let entry = entry_for(active, attached, &self.zeroes).user_data(u64::from(index));
        // SAFETY: the buffer and the file that the entry names belong to `active` and `files` until the kernel has answered; block
        // memory is never unmapped, also when the store is dropped before that.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // Each active request has at most one entry, and the queue has STORE_REQUESTS_MAX.
        pushed.expect("the submission queue has an entry for each request");
        self.unpushed = true;
    }

    fn reap(&mut self) {
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            self.answered(entry.user_data() as u16, entry.result());
        }
        if self.unpushed {
            self.push();
        }
    }

    /// The kernel answered: go on with the request, or end it.
    fn answered(&mut self, index: u16, result: i32) {
        let active = self.active[usize::from(index)].as_mut().expect("the kernel answers what it was asked");
        let attached = &mut self.files[usize::from(active.request.file.0)];
        let verdict = advance(active, attached, result, self.zeroes.len() as u64);
        match verdict {
            None => self.start(index),
            Some(result) => {
                let active = self.active[usize::from(index)].take().expect("looked at above");
                self.free.push(index);
                self.done.push_back(active.request.completed(result));
            }
        }
    }
}

/// What the kernel is asked for the step that `active` is at.
fn entry_for(active: &mut Active, attached: &Attached, zeroes: &Block) -> squeue::Entry {
    let fd = types::Fd(attached.file.file.as_raw_fd());
    let dsync = if attached.file.write_through { libc::RWF_DSYNC } else { 0 };
    let Active { request, step, done, .. } = active;
    let offset = request.offset + *done;
    let entry = match step {
        Step::Transfer => {
            let rest =
                &mut request.buffer.as_mut().expect("a transfer has a buffer").bytes_mut()[*done as usize..];
            if request.op == StoreOp::Read {
                opcode::Read::new(fd, rest.as_mut_ptr(), rest.len() as u32).offset(offset).build()
            } else {
                opcode::Write::new(fd, rest.as_ptr(), rest.len() as u32)
                    .offset(offset)
                    .rw_flags(dsync)
                    .build()
            }
        }
        Step::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Step::Discard | Step::ZeroHole => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            opcode::Fallocate::new(fd, request.len).offset(request.offset).mode(mode).build()
        }
        Step::ZeroRange => {
            let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
            opcode::Fallocate::new(fd, request.len).offset(request.offset).mode(mode).build()
        }
        Step::ZeroData => {
            let count = (request.len - *done).min(zeroes.len() as u64);
            opcode::Write::new(fd, zeroes.bytes().as_ptr(), count as u32)
                .offset(offset)
                .rw_flags(dsync)
                .build()
        }
    };
    // A synced write through the page cache may wait for the device already while it is submitted; so may one that was refused before.
    let may_wait = attached.file.write_through && attached.file.cached != Cached::No || active.tries > 0;
    if may_wait { entry.flags(squeue::Flags::ASYNC) } else { entry }
}

/// Takes the kernel's answer into account: `None` when the request goes on with the step it is at now, else how it ended.
fn advance(
    active: &mut Active,
    attached: &mut Attached,
    result: i32,
    zeroes: u64,
) -> Option<Result<(), StoreError>> {
    let request = &active.request;
    if result < 0 {
        let errno = -result;
        if matches!(errno, libc::EINTR | libc::EAGAIN) && active.tries < TRIES_MAX {
            active.tries += 1;
            return None;
        }
        let next = match active.step {
            Step::ZeroRange if is_unsupported(errno) => Step::ZeroHole,
            Step::ZeroHole if is_unsupported(errno) => Step::ZeroData,
            Step::Discard if is_unsupported(errno) => {
                return Some(Err(StoreError::Unsupported { op: request.op }));
            }
            Step::Transfer
            | Step::Sync
            | Step::Discard
            | Step::ZeroRange
            | Step::ZeroHole
            | Step::ZeroData => {
                return Some(Err(request.failed(active.done, errno)));
            }
        };
        attached.zero_step = next;
        active.step = next;
        return None;
    }
    match active.step {
        Step::Sync => Some(Ok(())),
        Step::Transfer | Step::ZeroData => {
            let wanted = if active.step == Step::Transfer {
                request.len
            } else {
                zeroes.min(request.len - active.done)
            };
            if result == 0 && wanted > 0 {
                return Some(Err(request.short(active.done)));
            }
            active.done += result as u64;
            (active.done == request.len).then_some(Ok(()))
        }
        Step::Discard | Step::ZeroRange | Step::ZeroHole => {
            if !attached.file.write_through {
                return Some(Ok(()));
            }
            active.step = Step::Sync;
            None
        }
    }
}

impl Store for UringStore {
    fn room(&self) -> usize {
        self.free.len().min(STORE_REQUESTS_MAX - self.done.len().min(STORE_REQUESTS_MAX))
    }

    fn submit(&mut self, mut request: Request) -> Result<(), Request> {
        if self.room() == 0 {
            return Err(request);
        }
        let attached = &self.files[usize::from(request.file.0)];
        if attached.file.memory.as_ref().is_some_and(|memory| request.serve_in(memory)) {
            self.done.push_back(request.completed(Ok(())));
            return Ok(());
        }
        let (step, inline) = match request.op {
            StoreOp::Read => (Step::Transfer, attached.reads_inline),
            StoreOp::Write => (Step::Transfer, attached.writes_inline),
            StoreOp::Flush => (Step::Sync, false),
            StoreOp::Discard => (attached.discard_step, false),
            StoreOp::WriteZeroes => (attached.zero_step, false),
        };
        let done = if inline { self.serve_from_memory(&mut request) } else { 0 };
        if inline && done == request.len {
            self.done.push_back(request.completed(Ok(())));
            return Ok(());
        }
        let index = self.free.pop().expect("there is room");
        self.active[usize::from(index)] = Some(Active { request, step, done, tries: 0 });
        self.start(index);
        Ok(())
    }

    fn push(&mut self) {
        let work_waits = self.ring.submission().taskrun();
        if !self.unpushed && !work_waits {
            return;
        }
        match self.ring.submit() {
            Ok(_) => {}
            // The kernel is short of memory or of room for answers: they are reaped, and this is called again, in the next turn.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR)) => {}
            Err(e) => warn!("io_uring: submission refused: {e}; it is tried again"),
        }
        self.unpushed = !self.ring.submission().is_empty();
    }

    fn complete(&mut self) -> Option<Completion> {
        if self.done.is_empty() {
            self.reap();
        }
        self.done.pop_front()
    }

    fn wants_push(&self) -> bool {
        self.unpushed
    }
}

impl AsFd for UringStore {
    /// Readable when the kernel has answered something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns this descriptor for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl std::fmt::Debug for UringStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringStore")
            .field("files", &self.files.len())
            .field("in_kernel", &self.in_kernel())
            .finish()
    }
}

impl UringStore {
    /// Requests that the kernel has.
    pub fn in_kernel(&self) -> usize {
        STORE_REQUESTS_MAX - self.free.len()
    }
}
