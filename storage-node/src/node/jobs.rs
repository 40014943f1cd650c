//! The requests a worker has taken from its sessions and not yet answered.
//!
//! Knows where each came from and what it waits for; what is done with them is `accept` and `finish`. A job outlives its session: what
//! was begun is finished, and its buffer found again.

use std::collections::VecDeque;

use cirro_protocol::op::Op;
use cirro_protocol::time::Instant;
use cirro_protocol::types::Slot;

use crate::buffers::Buffer;

/// Requests of a worker under way: 16 sessions with every slot in use. When all places are taken, events stay in the sessions.
pub(super) const JOBS_MAX: usize = 4096;

/// One request.
#[derive(Debug)]
pub(super) struct Job {
    pub session: u16,
    pub serial: u64,
    pub slot: Slot,
    pub op: Op,
    pub volume: u16,
    /// In bytes.
    pub offset: u64,
    pub len: u64,
    pub buffer: Option<Buffer>,
    /// Number of a change among those of its volume; 0 for reads and flushes.
    pub change: u64,
    pub started: Instant,
}

/// All of them, and the two queues: reads that wait for a buffer, and what waits for room in the store.
#[derive(Debug)]
pub(super) struct Jobs {
    table: Vec<Option<Job>>,
    free: Vec<u16>,
    pub reads: VecDeque<u16>,
    pub ready: VecDeque<u16>,
}

impl Jobs {
    pub(super) fn new() -> Jobs {
        Jobs {
            table: (0..JOBS_MAX).map(|_| None).collect(),
            free: (0..JOBS_MAX as u16).rev().collect(),
            reads: VecDeque::with_capacity(JOBS_MAX),
            ready: VecDeque::with_capacity(JOBS_MAX),
        }
    }

    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == JOBS_MAX
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    pub(super) fn add(&mut self, job: Job) -> u16 {
        let index = self.free.pop().expect("asked has_room before");
        self.table[usize::from(index)] = Some(job);
        index
    }

    pub(super) fn get(&mut self, index: u16) -> &mut Job {
        self.table[usize::from(index)].as_mut().expect("a queued job exists")
    }

    pub(super) fn remove(&mut self, index: u16) -> Job {
        let job = self.table[usize::from(index)].take().expect("a job ends once");
        self.free.push(index);
        job
    }

    /// True if a change of `volume` that was taken before number `before` is still under way.
    pub(super) fn has_older_change(&self, volume: u16, before: u64) -> bool {
        self.table.iter().flatten().any(|job| job.volume == volume && job.change != 0 && job.change < before)
    }
}
