//! What the daemon counts, and the shapes in which it is told.
//!
//! Knows numbers only. A worker adds to its own counters without locks; anybody may read them, each value by itself, at any time.

use std::sync::atomic::{AtomicU64, Ordering};

use cirro_protocol::op::Op;
use cirro_protocol::time::Nanos;
use serde::Serialize;

use crate::pending::Finished;
use crate::request::Reject;

/// A counter with one writer and any number of readers.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. Only the one writer calls it, so that a plain load and store do.
    pub fn add(&self, count: u64) {
        self.0.store(self.get().wrapping_add(count), Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Raises the value to `at_least`.
    pub fn raise(&self, at_least: u64) {
        if at_least > self.get() {
            self.0.store(at_least, Ordering::Relaxed);
        }
    }
}

/// Buckets of [`Latency`]: powers of two of a microsecond, the last for all above 2^25 µs (33 s).
pub const LATENCY_BUCKETS: usize = 26;

/// How long things took: a count per power of two of a microsecond.
#[derive(Debug, Default)]
pub struct Latency {
    buckets: [Counter; LATENCY_BUCKETS],
    total_ns: Counter,
    worst_ns: Counter,
}

impl Latency {
    fn add(&self, span: Nanos) {
        let power = (u64::BITS - span.as_micros().leading_zeros()) as usize;
        self.buckets[power.min(LATENCY_BUCKETS - 1)].add(1);
        self.total_ns.add(span.0);
        self.worst_ns.raise(span.0);
    }

    fn report(&self) -> LatencyReport {
        let below_us = self.buckets.iter().map(Counter::get).collect::<Vec<_>>();
        let count = below_us.iter().sum::<u64>();
        let mean_ns = self.total_ns.get().checked_div(count).unwrap_or(0);
        LatencyReport { mean_ns, worst_ns: self.worst_ns.get(), below_power_of_two_us: below_us }
    }
}

/// The operations that are counted apart.
#[derive(Debug, Default)]
pub struct OpStats {
    done: Counter,
    failed: Counter,
    bytes: Counter,
    queued: Latency,
    served: Latency,
}

impl OpStats {
    fn report(&self, op: &'static str) -> OpReport {
        OpReport {
            op,
            done: self.done.get(),
            failed: self.failed.get(),
            bytes: self.bytes.get(),
            queued: self.queued.report(),
            served: self.served.report(),
        }
    }
}

/// What is counted per disk.
#[derive(Debug, Default)]
pub struct DiskStats {
    ops: [OpStats; 5],
    /// GET_ID and empty requests, answered here.
    pub answered_here: Counter,
    /// Rings that a guest broke.
    pub rings_broken: Counter,
    /// Interrupts sent.
    pub interrupts: Counter,
    rejects: [Counter; Reject::ALL.len()],
}

const OP_NAMES: [&str; 5] = ["read", "write", "flush", "discard", "write-zeroes"];

impl DiskStats {
    /// A request ended.
    pub fn finished(&self, finished: &Finished) {
        let ops = match finished.admission.op {
            Op::Write => &self.ops[1],
            Op::Flush => &self.ops[2],
            Op::Discard => &self.ops[3],
            Op::WriteZeroes => &self.ops[4],
            Op::Read | Op::Open | Op::Release | Op::Stat => &self.ops[0],
        };
        let len = u64::from(finished.admission.len);
        ops.done.add(1);
        ops.failed.add(u64::from(finished.status != 0));
        ops.bytes.add(if finished.admission.op.length_in_sectors() { len * 512 } else { len });
        ops.queued.add(finished.queued);
        ops.served.add(finished.served);
    }

    /// A chain was no request.
    pub fn rejected(&self, reject: Reject) {
        self.rejects[reject.index()].add(1);
    }

    /// Chains that were no request, for this reason.
    pub fn rejects(&self, reject: Reject) -> u64 {
        self.rejects[reject.index()].get()
    }

    /// All of it, as it is now.
    pub fn report(&self) -> DiskReport {
        let named = |reject: &Reject| (reject.to_string(), self.rejects(*reject));
        DiskReport {
            ops: self.ops.iter().zip(OP_NAMES).map(|(ops, name)| ops.report(name)).collect(),
            answered_here: self.answered_here.get(),
            rings_broken: self.rings_broken.get(),
            interrupts: self.interrupts.get(),
            rejects: Reject::ALL.iter().map(named).filter(|(_, count)| *count > 0).collect(),
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
    /// No session has its cid.
    NoSession,
    /// It comes from another machine than the session's peer.
    OtherSource,
    /// The tag does not fit: damaged, or of another session.
    Tag,
    /// The data does not fit its checksum.
    Payload,
    /// A handshake frame whose checksum is wrong.
    Handshake,
    /// More handshake frames than a turn looks at.
    HandshakeFlood,
}

const DROP_NAMES: [&str; 8] = [
    "malformed",
    "other worker",
    "no session",
    "other source",
    "tag",
    "payload",
    "handshake",
    "handshake flood",
];

/// What is counted per worker.
#[derive(Debug, Default)]
pub struct WorkerStats {
    /// Passes over everything.
    pub turns: Counter,
    /// Times the worker slept.
    pub sleeps: Counter,
    /// Frames taken from the link.
    pub frames_in: Counter,
    /// Frames given to the link.
    pub frames_out: Counter,
    /// Frames that the kernel refused.
    pub frames_refused: Counter,
    /// Pieces sent from a private copy.
    pub private_copies: Counter,
    drops: [Counter; DROP_NAMES.len()],
}

impl WorkerStats {
    /// A frame was dropped.
    pub fn dropped(&self, drop: Drop) {
        self.drops[drop as usize].add(1);
    }

    /// Frames dropped for this reason.
    pub fn drops(&self, drop: Drop) -> u64 {
        self.drops[drop as usize].get()
    }

    /// All of it, as it is now.
    pub fn report(&self) -> WorkerReport {
        WorkerReport {
            turns: self.turns.get(),
            sleeps: self.sleeps.get(),
            frames_in: self.frames_in.get(),
            frames_out: self.frames_out.get(),
            frames_refused: self.frames_refused.get(),
            private_copies: self.private_copies.get(),
            drops: DROP_NAMES.iter().zip(&self.drops).map(|(name, count)| (*name, count.get())).collect(),
        }
    }
}

/// Latencies as they are told.
#[derive(Clone, Debug, Serialize)]
pub struct LatencyReport {
    /// Mean in ns.
    pub mean_ns: u64,
    /// The longest in ns.
    pub worst_ns: u64,
    /// Entry `i`: how many took at least 2^(i-1) and less than 2^i µs.
    pub below_power_of_two_us: Vec<u64>,
}

/// One operation as it is told.
#[derive(Clone, Debug, Serialize)]
pub struct OpReport {
    /// Its name.
    pub op: &'static str,
    /// Requests that ended.
    pub done: u64,
    /// Of them, with an error.
    pub failed: u64,
    /// Bytes they were about.
    pub bytes: u64,
    /// From the ring to the first slot.
    pub queued: LatencyReport,
    /// From the first slot to the end.
    pub served: LatencyReport,
}

/// A disk's counters as they are told.
#[derive(Clone, Debug, Serialize)]
pub struct DiskReport {
    /// By operation.
    pub ops: Vec<OpReport>,
    /// GET_ID and empty requests.
    pub answered_here: u64,
    /// Rings that a guest broke.
    pub rings_broken: u64,
    /// Interrupts sent.
    pub interrupts: u64,
    /// Chains that were no request, by reason.
    pub rejects: Vec<(String, u64)>,
}

/// A worker's counters as they are told.
#[derive(Clone, Debug, Serialize)]
pub struct WorkerReport {
    /// Passes over everything.
    pub turns: u64,
    /// Times the worker slept.
    pub sleeps: u64,
    /// Frames taken from the link.
    pub frames_in: u64,
    /// Frames given to the link.
    pub frames_out: u64,
    /// Frames that the kernel refused.
    pub frames_refused: u64,
    /// Pieces sent from a private copy.
    pub private_copies: u64,
    /// Frames dropped, by reason.
    pub drops: Vec<(&'static str, u64)>,
}

/// A session as its worker sees it.
#[derive(Clone, Debug, Serialize)]
pub struct SessionReport {
    /// The state in words.
    pub state: String,
    /// Requests of the guest in flight.
    pub requests: usize,
    /// Rings that are served.
    pub rings: usize,
    /// The session's own counters in words.
    pub session: String,
}

const _: () = assert!(Drop::HandshakeFlood as usize == DROP_NAMES.len() - 1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_powers_of_two_of_a_microsecond() {
        let latency = Latency::default();
        for ns in [0, 999, 1_000, 1_999, 2_000, 1_000_000, u64::MAX / 2] {
            latency.add(Nanos(ns));
        }
        let report = latency.report();
        let mut expected = [0; LATENCY_BUCKETS];
        // 0 and 999 ns: below 1 µs; 1000 and 1999: 1 µs; 2000: 2 to 4 µs; 1 ms = 1000 µs: 512 to 1024.
        (expected[0], expected[1], expected[2], expected[10], expected[25]) = (2, 2, 1, 1, 1);
        assert_eq!(report.below_power_of_two_us, expected);
        assert_eq!(report.worst_ns, u64::MAX / 2);
    }

    #[test]
    fn rejects_are_told_by_name() {
        let stats = DiskStats::default();
        stats.rejected(Reject::PastEnd);
        stats.rejected(Reject::PastEnd);
        assert_eq!(stats.report().rejects, [("past the end of the disk".to_owned(), 2)]);
    }
}
