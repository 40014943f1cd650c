//! What a disk and a worker count, and what a session looks like from its worker.
//!
//! Knows numbers and their names only; how they are told is `report`'s. A worker adds to its own counters without locks; anybody may read them.

use std::collections::BTreeMap;

use cirro_ctl::counter::{ByReason, Counter, OpMeter, WorkerMeter};
use cirro_ctl::report::Ops;
use cirro_protocol::initiator::{LossCause, StateName};
use cirro_protocol::op::{Op, Status};
use cirro_protocol::stats::Stats;
use cirro_protocol::time::Instant;
use cirro_protocol::types::MacAddress;

use crate::pending::Finished;
use crate::request::Reject;
use crate::trouble::OnTrouble;

/// What is counted per disk.
#[derive(Debug, Default)]
pub struct DiskStats {
    read: OpMeter,
    write: OpMeter,
    flush: OpMeter,
    discard: OpMeter,
    write_zeroes: OpMeter,
    /// Time that requests waited for their first slot, ns, all together.
    pub queued_ns: Counter,
    /// GET_ID and empty requests, answered here.
    pub answered_here: Counter,
    /// Rings that a guest broke.
    pub rings_broken: Counter,
    /// Interrupts sent.
    pub interrupts: Counter,
    rejects: [Counter; Reject::ALL.len()],
}

impl DiskStats {
    /// A request ended.
    pub fn finished(&self, finished: &Finished) {
        let meter = match finished.admission.op {
            Op::Write => &self.write,
            Op::Flush => &self.flush,
            Op::Discard => &self.discard,
            Op::WriteZeroes => &self.write_zeroes,
            Op::Read | Op::Open | Op::Release | Op::Stat => &self.read,
        };
        let len = u64::from(finished.admission.len);
        let bytes = if finished.admission.op.length_in_sectors() { len * 512 } else { len };
        self.queued_ns.add(finished.queued.0);
        meter.end(finished.status == 0, bytes, (finished.queued + finished.served).0);
    }

    /// A chain was no request.
    pub fn rejected(&self, reject: Reject) {
        self.rejects[reject.index()].add(1);
    }

    /// Chains that were no request, for this reason.
    pub fn rejects(&self, reject: Reject) -> u64 {
        self.rejects[reject.index()].get()
    }

    /// Chains that were no request, by reason; only reasons that occurred.
    pub fn rejects_by_name(&self) -> BTreeMap<String, u64> {
        let named = Reject::ALL.iter().map(|reject| (reject.to_string(), self.rejects(*reject)));
        named.filter(|(_, count)| *count > 0).collect()
    }

    /// Requests by kind.
    pub fn ops(&self) -> Ops {
        Ops {
            read: self.read.snapshot(),
            write: self.write.snapshot(),
            flush: self.flush.snapshot(),
            discard: self.discard.snapshot(),
            write_zeroes: self.write_zeroes.snapshot(),
        }
    }
}

/// Why a worker dropped a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Drop {
    /// It is no frame of the protocol.
    Malformed,
    /// It is for another worker.
    OtherWorker,
    /// No session of its sender has its cid.
    NoSession,
    /// The tag does not fit: damaged, or of another session.
    Tag,
    /// The data does not fit its checksum.
    Payload,
    /// A handshake frame whose checksum is wrong.
    Handshake,
    /// More handshake frames than a turn looks at.
    HandshakeFlood,
    /// With keys: a frame of this number came before.
    Repeated,
}

const DROP_NAMES: [&str; 8] =
    ["malformed", "other worker", "no session", "tag", "payload", "handshake", "handshake flood", "repeated"];

/// What is counted per worker.
#[derive(Debug)]
pub struct WorkerStats {
    /// Turns, frames, drops.
    pub meter: WorkerMeter<{ DROP_NAMES.len() }>,
    /// Frames that the kernel refused.
    pub frames_refused: Counter,
    /// Pieces sent from a private copy.
    pub private_copies: Counter,
}

impl Default for WorkerStats {
    fn default() -> WorkerStats {
        WorkerStats {
            meter: WorkerMeter::new(DROP_NAMES),
            frames_refused: Counter::new(),
            private_copies: Counter::new(),
        }
    }
}

impl WorkerStats {
    /// A frame was dropped.
    pub fn dropped(&self, drop: Drop) {
        self.dropped_reasons().count(drop as usize);
    }

    /// Frames dropped for this reason.
    pub fn drops(&self, drop: Drop) -> u64 {
        self.dropped_reasons().snapshot().get(DROP_NAMES[drop as usize]).copied().unwrap_or(0)
    }

    fn dropped_reasons(&self) -> &ByReason<{ DROP_NAMES.len() }> {
        &self.meter.dropped
    }
}

/// A disk's session as its worker sees it.
#[derive(Clone, Debug)]
pub struct SessionReport {
    /// How far it is.
    pub state: StateName,
    /// When the volume was last opened, lost or refused.
    pub since: Instant,
    /// What the node said when it refused, if it does.
    pub refusal: Option<Status>,
    /// The node, once it is known.
    pub node: Option<MacAddress>,
    /// The session's counters.
    pub stats: Stats,
    /// Requests of the guest in flight.
    pub requests: usize,
    /// Bytes of changes that were not flushed, of which a copy is kept.
    pub unflushed_bytes: u64,
    /// Rings that are served.
    pub rings: usize,
    /// What happens to requests while the volume is not open.
    pub on_trouble: OnTrouble,
    /// Why the last session was lost.
    pub cause: Option<LossCause>,
    /// Requests fail: it has lasted too long.
    pub failing: bool,
    /// Requests wait until it is known whether changes must be written again, or until they were.
    pub replaying: bool,
    /// The node does not take back what it has lost.
    pub stuck: bool,
}

const _: () = assert!(Drop::Repeated as usize == DROP_NAMES.len() - 1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pending::Admission;
    use cirro_protocol::time::Nanos;

    #[test]
    fn rejects_and_drops_are_told_by_name() {
        let stats = DiskStats::default();
        stats.rejected(Reject::PastEnd);
        stats.rejected(Reject::PastEnd);
        assert_eq!(stats.rejects_by_name(), BTreeMap::from([("past the end of the disk".to_owned(), 2)]));
        let worker = WorkerStats::default();
        worker.dropped(Drop::Payload);
        assert_eq!((worker.drops(Drop::Payload), worker.drops(Drop::Tag)), (1, 0));
    }

    #[test]
    fn a_discard_counts_the_bytes_it_covers() {
        let stats = DiskStats::default();
        let admission = Admission {
            ring: 0,
            head: 0,
            status_at: 0,
            op: Op::Discard,
            offset: 0,
            len: 8,
            flush_after: false,
        };
        stats.finished(&Finished { admission, status: 0, used_bytes: 1, queued: Nanos(5), served: Nanos(7) });
        assert_eq!((stats.ops().discard.bytes, stats.queued_ns.get()), (4096, 5));
        assert_eq!(stats.ops().discard.latency.ns_max, 12);
    }
}
