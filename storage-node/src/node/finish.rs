//! Leaf 5 of a turn: what the store has done is answered, and what waited for it goes on.
//!
//! Knows how an error of the store reads on the wire.

use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::Instant;
use log::{error, warn};

use super::Node;
use super::jobs::Job;
use super::session::SlotBuffer;
use crate::buffers::{Buffer, occupied_bytes};
use crate::store::{Completion, Store, StoreError};

impl<S: Store> Node<S> {
    /// Answers everything that is done.
    pub(super) fn finish(&mut self, now: Instant) {
        while let Some(completion) = self.store.complete() {
            let job = self.jobs.remove(completion.token as u16);
            let status = self.judge(&job, &completion);
            let served = &mut self.volumes[usize::from(job.volume)];
            if let Some(meter) = served.meters.of(job.op) {
                meter.end(status == Status::Ok, job.len, now.since(job.started).0);
            }
            if job.change != 0 {
                self.startable.clear();
                served.changes.release(job.offset, &mut self.startable);
                self.jobs.ready.extend(self.startable.iter().map(|id| *id as u16));
            }
            if job.op == Op::Flush {
                let next = served.flushes.pop_front();
                served.flushing = next.is_some();
                self.jobs.ready.extend(next);
            }
            self.answer(&job, status, completion.buffer);
            if job.change != 0 {
                self.advance_openings(now, job.volume);
            }
        }
    }

    fn answer(&mut self, job: &Job, status: Status, buffer: Option<Buffer>) {
        let session = self.sessions.get_active(job.session, job.serial);
        let is_read = job.op == Op::Read;
        match (session, buffer) {
            (Some(session), buffer) => {
                match buffer {
                    Some(buffer) if is_read && status == Status::Ok => {
                        session.buffers[job.slot.index()] = SlotBuffer::Read(buffer);
                    }
                    Some(buffer) if is_read => {
                        session.read_bytes -= occupied_bytes(buffer.bytes().len());
                        self.read_pool.give_back(buffer);
                        self.buffers_came_back = true;
                    }
                    Some(buffer) => self.write_pool.give_back(buffer),
                    None => {}
                }
                session.target.complete(job.slot, status);
            }
            (None, Some(buffer)) if is_read => {
                self.read_pool.give_back(buffer);
                self.buffers_came_back = true;
            }
            (None, Some(buffer)) => self.write_pool.give_back(buffer),
            (None, None) => {}
        }
    }

    /// The status of a completion. A flush that failed is remembered: what the kernel dropped then, no later fdatasync reports again.
    fn judge(&mut self, job: &Job, completion: &Completion) -> Status {
        let served = &mut self.volumes[usize::from(job.volume)];
        let Err(failure) = &completion.result else {
            // A flush that was taken before the one that failed promises what is lost.
            let promises = job.op == Op::Flush && served.flush_failed.is_some();
            return if promises { Status::Io } else { Status::Ok };
        };
        let name = served.volume.name;
        let errno = match failure {
            StoreError::Unsupported { .. } => return Status::Unsupported,
            StoreError::Short { .. } => libc::EIO,
            StoreError::Failed { errno, .. } => *errno,
        };
        if job.op == Op::Flush {
            if served.flush_failed.is_none() {
                error!(
                    "volume {name}: {failure}; written data may be lost, every later flush fails: check the disk, then restart"
                );
            }
            served.flush_failed.get_or_insert(errno);
            return Status::Io;
        }
        warn!("volume {name}: {failure}");
        if matches!(errno, libc::ENOSPC | libc::EDQUOT) { Status::NoSpace } else { Status::Io }
    }
}
