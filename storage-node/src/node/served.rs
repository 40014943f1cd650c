//! A volume as its worker serves it: its file in the store, its owner, its locks and the opens that wait.
//!
//! Knows no session but by number. Used by `accept`, `finish` and `opening`.

use std::collections::VecDeque;

use cirro_ctl::counter::OpMeter;
use cirro_protocol::op::Op;
use cirro_protocol::time::Instant;
use cirro_protocol::types::Slot;
use cirro_protocol::wire::body::OpenRequest;

use super::jobs::JOBS_MAX;
use crate::owner::OwnerRecord;
use crate::range_lock::RangeLock;
use crate::store::FileId;
use crate::volume::Volume;

/// Changes of one volume in flight and waiting: as many as a worker has requests.
pub const VOLUME_CHANGES_MAX: usize = JOBS_MAX;

/// What is asked about a volume's ownership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Open(OpenRequest),
    Release,
}

/// How far an OPEN or RELEASE is.
///
/// ```text
/// Waiting --(nothing to record)--> Draining --(older changes have ended)--> answered
///    '--(a new record)--> Keeping --(durable)--> Draining
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Another one is before it.
    Waiting,
    /// The keeper has the new record.
    Keeping,
    /// Changes with smaller numbers must end first.
    Draining { before: u64 },
}

/// An OPEN or RELEASE that is not answered yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opening {
    pub session: u16,
    pub serial: u64,
    pub slot: Slot,
    pub asked: Asked,
    pub stage: Stage,
    pub since: Instant,
}

/// See the module.
pub(super) struct Served {
    pub volume: Volume,
    pub file: FileId,
    pub owner: OwnerRecord,
    pub changes: RangeLock,
    /// Number of the next change.
    pub next_change: u64,
    /// One at a time, in order of arrival; at most one of each session.
    pub openings: VecDeque<Opening>,
    pub next_handle: u32,
    /// Set by the first fdatasync that fails: nothing that was written before can be promised any more.
    pub flush_failed: Option<i32>,
    /// An fdatasync is under way. The kernel tells a failure to one of those that run together, so they run one after another.
    pub flushing: bool,
    /// Flushes that wait for it, by number of their job.
    pub flushes: VecDeque<u16>,
    pub since: Instant,
    pub meters: Meters,
}

/// Requests by kind.
#[derive(Debug, Default)]
pub(super) struct Meters {
    pub read: OpMeter,
    pub write: OpMeter,
    pub flush: OpMeter,
    pub discard: OpMeter,
    pub write_zeroes: OpMeter,
}

impl Meters {
    pub(super) fn of(&self, op: Op) -> Option<&OpMeter> {
        match op {
            Op::Read => Some(&self.read),
            Op::Write => Some(&self.write),
            Op::Flush => Some(&self.flush),
            Op::Discard => Some(&self.discard),
            Op::WriteZeroes => Some(&self.write_zeroes),
            Op::Open | Op::Release | Op::Stat => None,
        }
    }
}

impl Served {
    pub(super) fn new(now: Instant, volume: Volume, file: FileId, owner: OwnerRecord) -> Served {
        Served {
            volume,
            file,
            owner,
            changes: RangeLock::new(VOLUME_CHANGES_MAX),
            next_change: 1,
            openings: VecDeque::new(),
            next_handle: 1,
            flush_failed: None,
            flushing: false,
            flushes: VecDeque::new(),
            since: now,
            meters: Meters::default(),
        }
    }
}
