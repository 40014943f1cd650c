//! Where the bytes of volumes are: the trait between the node and files, and what travels across it.
//!
//! Does not know volumes' names, sessions or epochs; bounds and alignment were checked before. Called by `node`.
//! [`uring::UringStore`] serves; [`pread::PreadStore`] is the reference that tests compare with.

pub mod pread;
pub mod uring;

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use crate::buffers::Buffer;
use crate::memory::VolumeMemory;

/// Requests that a store has taken and not yet given back.
pub const STORE_REQUESTS_MAX: usize = 512;
/// Files of one store: the volumes of a worker.
pub const FILES_MAX: usize = 1024;
/// How often a request that the kernel answered with EINTR or EAGAIN is tried again before that counts as its result.
const TRIES_MAX: u8 = 16;

/// A file of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId(pub u16);

/// An open file and how it is to be used.
#[derive(Clone, Debug)]
pub struct StoreFile {
    /// The one open file description of the volume: locked, and kept alive by every request in the kernel.
    pub file: Arc<File>,
    /// What a read or a write of data that is in memory costs.
    pub cached: Cached,
    /// An answered change is stable.
    pub write_through: bool,
    /// The file's bytes, if it is memory of ours: they are copied without a call.
    pub memory: Option<Arc<Mutex<VolumeMemory>>>,
}

/// Whether a request can be answered from memory without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cached {
    /// Never: the file is open for direct I/O.
    No,
    /// When its pages are cached; the kernel is asked not to wait otherwise.
    Pages,
    /// Always: the file lives in memory (tmpfs).
    Always,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreOp {
    /// Fill the buffer from the file.
    Read,
    /// Put the buffer into the file.
    Write,
    /// Make every completed change stable (fdatasync).
    Flush,
    /// The bytes are not needed any more.
    Discard,
    /// The bytes read as zero from now on.
    WriteZeroes,
}

/// One request. The store owns it, and its buffer, until it is completed.
#[derive(Debug)]
pub struct Request {
    /// On which file.
    pub file: FileId,
    /// What to do.
    pub op: StoreOp,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes; the buffer's length for reads and writes.
    pub len: u64,
    /// The data of reads and writes.
    pub buffer: Option<Buffer>,
    /// Given back with the completion.
    pub token: u32,
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// The request's token.
    pub token: u32,
    /// What was asked for.
    pub op: StoreOp,
    /// How it ended.
    pub result: Result<(), StoreError>,
    /// The request's buffer.
    pub buffer: Option<Buffer>,
}

/// Why a request was not done. A transfer is whole or an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The kernel refused or the device failed.
    #[error("{op:?} of {len} bytes at {offset}: errno {errno} after {done} bytes")]
    Failed {
        /// What was asked for.
        op: StoreOp,
        /// Where it began.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes done before.
        done: u64,
        /// The error number.
        errno: i32,
    },
    /// The file ended, or took no more, before the request did.
    #[error("{op:?} of {len} bytes at {offset}: only {done} bytes")]
    Short {
        /// What was asked for.
        op: StoreOp,
        /// Where it began.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes done.
        done: u64,
    },
    /// The file system or device has no such operation.
    #[error("{op:?} is not supported by the file system or device")]
    Unsupported {
        /// What was asked for.
        op: StoreOp,
    },
}

/// The seam to the disk. In a turn: `submit` while there is room, `push` once, `complete` until there is nothing.
pub trait Store {
    /// Requests that [`Store::submit`] will take now.
    fn room(&self) -> usize;
    /// Takes a request, or gives it back when there is no room.
    ///
    /// # Errors
    /// The request itself.
    fn submit(&mut self, request: Request) -> Result<(), Request>;
    /// Hands what was submitted to the kernel: at most one call.
    fn push(&mut self);
    /// The next finished request; never waits.
    fn complete(&mut self) -> Option<Completion>;
    /// True if something waits for the next [`Store::push`], which must then come soon: what the kernel had no room for, or the next step
    /// of a request.
    fn wants_push(&self) -> bool {
        false
    }
}

impl Request {
    fn failed(&self, done: u64, errno: i32) -> StoreError {
        StoreError::Failed { op: self.op, offset: self.offset, len: self.len, done, errno }
    }

    fn short(&self, done: u64) -> StoreError {
        StoreError::Short { op: self.op, offset: self.offset, len: self.len, done }
    }

    /// Does the request in memory if it is one of copying, or a flush, which has nothing to do there. False: it is another.
    fn serve_in(&mut self, memory: &Mutex<VolumeMemory>) -> bool {
        // A panic amid a copy leaves bytes, as a failing disk would.
        let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
        match (self.op, &mut self.buffer) {
            (StoreOp::Read, Some(buffer)) => memory.read(self.offset, buffer.bytes_mut()),
            (StoreOp::Write, Some(buffer)) => memory.write(self.offset, buffer.bytes()),
            (StoreOp::Flush, _) => {}
            (StoreOp::Discard | StoreOp::WriteZeroes | StoreOp::Read | StoreOp::Write, _) => return false,
        }
        true
    }

    fn completed(self, result: Result<(), StoreError>) -> Completion {
        Completion { token: self.token, op: self.op, result, buffer: self.buffer }
    }
}

/// Error numbers that say "not here" of `fallocate`.
fn is_unsupported(errno: i32) -> bool {
    matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
}
