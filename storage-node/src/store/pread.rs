//! The store as one would write it first: every request is done, with blocking calls, when it is submitted.
//!
//! Knows no queues and no rings. The reference for tests and simulations; a worker never uses it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

use super::{
    Completion, FILES_MAX, FileId, Request, STORE_REQUESTS_MAX, Store, StoreError, StoreFile, StoreOp,
    is_unsupported,
};

/// Bytes of zeroes written at a time where the file system cannot zero a range.
static ZEROES: [u8; 65536] = [0; 65536];

/// See the module.
#[derive(Debug, Default)]
pub struct PreadStore {
    files: Vec<StoreFile>,
    done: VecDeque<Completion>,
}

impl PreadStore {
    /// A store without files.
    pub fn new() -> PreadStore {
        PreadStore::default()
    }

    /// Adds a file.
    pub fn attach(&mut self, file: StoreFile) -> FileId {
        assert!(self.files.len() < FILES_MAX, "a worker has at most {FILES_MAX} volumes");
        self.files.push(file);
        FileId((self.files.len() - 1) as u16)
    }

    fn perform(file: &StoreFile, request: &mut Request) -> Result<(), StoreError> {
        let result = match request.op {
            StoreOp::Read => read(file, request),
            StoreOp::Write => write(file, request),
            StoreOp::Flush => return file.file.sync_data().map_err(|e| request.failed(0, errno(&e))),
            StoreOp::Discard => discard(file, request),
            StoreOp::WriteZeroes => write_zeroes(file, request),
        };
        if file.write_through && request.op != StoreOp::Read && result.is_ok() {
            return file.file.sync_data().map_err(|e| request.failed(0, errno(&e)));
        }
        result
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

fn read(file: &StoreFile, request: &mut Request) -> Result<(), StoreError> {
    let mut buffer = request.buffer.take().expect("a read has a buffer");
    let (mut done, mut result) = (0usize, Ok(()));
    while done < buffer.bytes().len() {
        match file.file.read_at(&mut buffer.bytes_mut()[done..], request.offset + done as u64) {
            Ok(0) => {
                result = Err(request.short(done as u64));
                break;
            }
            Ok(count) => done += count,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => {
                result = Err(request.failed(done as u64, errno(&e)));
                break;
            }
        }
    }
    request.buffer = Some(buffer);
    result
}

fn write(file: &StoreFile, request: &Request) -> Result<(), StoreError> {
    let bytes = request.buffer.as_ref().expect("a write has a buffer").bytes();
    file.file.write_all_at(bytes, request.offset).map_err(|e| request.failed(0, errno(&e)))
}

fn discard(file: &StoreFile, request: &Request) -> Result<(), StoreError> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&*file.file, mode, request.offset, request.len).map_err(|e| match e.raw_os_error() {
        errno if is_unsupported(errno) => StoreError::Unsupported { op: request.op },
        errno => request.failed(0, errno),
    })
}

fn write_zeroes(file: &StoreFile, request: &Request) -> Result<(), StoreError> {
    for mode in [FallocateFlags::ZERO_RANGE, FallocateFlags::PUNCH_HOLE] {
        match fallocate(&*file.file, mode | FallocateFlags::KEEP_SIZE, request.offset, request.len) {
            Ok(()) => return Ok(()),
            Err(e) if is_unsupported(e.raw_os_error()) => {}
            Err(e) => return Err(request.failed(0, e.raw_os_error())),
        }
    }
    let mut done = 0;
    while done < request.len {
        let count = (request.len - done).min(ZEROES.len() as u64);
        let written = file.file.write_all_at(&ZEROES[..count as usize], request.offset + done);
        written.map_err(|e| request.failed(done, errno(&e)))?;
        done += count;
    }
    Ok(())
}

impl Store for PreadStore {
    fn room(&self) -> usize {
        STORE_REQUESTS_MAX - self.done.len()
    }

    fn submit(&mut self, mut request: Request) -> Result<(), Request> {
        if self.room() == 0 {
            return Err(request);
        }
        let result = Self::perform(&self.files[usize::from(request.file.0)], &mut request);
        self.done.push_back(request.completed(result));
        Ok(())
    }

    fn push(&mut self) {}

    fn complete(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }
}
