//! Counters that one worker adds to and everybody may read: no lock, no bus-locked instruction, no allocation.
//!
//! Does not know what is counted nor who reads. Owned by workers, read by the control thread when it makes a [`crate::report`].
//! A counter has **one** writer: adding is a load and a store, which costs the worker as much as a plain integer. A second writer would lose counts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::latency::Latency;
use crate::report;

/// A number that its one writer adds to. Relaxed: readers see every counter right, but not two of them at the same moment.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Zero.
    pub const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    /// Adds `n`; wraps after 2^64. The owning worker only.
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// Sets it: for numbers that are kept elsewhere (a gauge, a kernel's counter). The owning worker only.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The number now. Anybody.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A counter for each of `N` reasons, with the names that reports show. The index is the caller's enum as a number.
#[derive(Debug)]
pub struct ByReason<const N: usize> {
    names: [&'static str; N],
    counters: [Counter; N],
}

impl<const N: usize> ByReason<N> {
    /// All zero, with the name of each.
    pub const fn new(names: [&'static str; N]) -> ByReason<N> {
        ByReason { names, counters: [const { Counter::new() }; N] }
    }

    /// Adds one to the reason `index`, which is less than `N`.
    pub fn count(&self, index: usize) {
        self.counters[index].add(1);
    }

    /// The reasons that occurred.
    pub fn snapshot(&self) -> BTreeMap<String, u64> {
        let counted =
            self.names.iter().zip(&self.counters).map(|(name, counter)| ((*name).to_owned(), counter.get()));
        counted.filter(|&(_, count)| count > 0).collect()
    }
}

/// What a worker counts, whatever it serves. On cache lines of its own: 128 bytes, as x86 fetches lines in pairs.
#[derive(Debug)]
#[repr(align(128))]
pub struct WorkerMeter<const N: usize> {
    /// Frames the link gave us.
    pub frames_in: Counter,
    /// Frames given to the link.
    pub frames_out: Counter,
    /// Bytes of the frames in.
    pub bytes_in: Counter,
    /// Bytes of the frames out.
    pub bytes_out: Counter,
    /// Passes over everything.
    pub turns: Counter,
    /// Times the worker slept and was woken.
    pub wakeups: Counter,
    /// Frames dropped, by reason.
    pub dropped: ByReason<N>,
}

impl<const N: usize> WorkerMeter<N> {
    /// All zero, with the names of the reasons for dropping a frame.
    pub const fn new(reasons: [&'static str; N]) -> WorkerMeter<N> {
        WorkerMeter {
            frames_in: Counter::new(),
            frames_out: Counter::new(),
            bytes_in: Counter::new(),
            bytes_out: Counter::new(),
            turns: Counter::new(),
            wakeups: Counter::new(),
            dropped: ByReason::new(reasons),
        }
    }

    /// The numbers now.
    pub fn snapshot(&self) -> report::WorkerCounters {
        report::WorkerCounters {
            frames_in: self.frames_in.get(),
            frames_out: self.frames_out.get(),
            bytes_in: self.bytes_in.get(),
            bytes_out: self.bytes_out.get(),
            turns: self.turns.get(),
            wakeups: self.wakeups.get(),
            dropped: self.dropped.snapshot(),
        }
    }
}

/// What is counted of one kind of request of a disk or a volume.
#[derive(Debug, Default)]
pub struct OpMeter {
    /// Requests that ended well.
    pub requests: Counter,
    /// Bytes they moved or covered.
    pub bytes: Counter,
    /// Requests that ended with an error.
    pub errors: Counter,
    /// From taking a request to its end, both kinds.
    pub latency: Latency,
}

impl OpMeter {
    /// Counts a request that ended after `ns` nanoseconds.
    pub fn end(&self, is_ok: bool, bytes: u64, ns: u64) {
        if is_ok {
            self.requests.add(1);
            self.bytes.add(bytes);
        } else {
            self.errors.add(1);
        }
        self.latency.record(ns);
    }

    /// The numbers now.
    pub fn snapshot(&self) -> report::OpCounters {
        report::OpCounters {
            requests: self.requests.get(),
            bytes: self.bytes.get(),
            errors: self.errors.get(),
            latency: self.latency.summary(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_on_another_thread_sees_the_whole_count() {
        let meter = WorkerMeter::new(["short", "seal"]);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..10_000 {
                    meter.frames_in.add(1);
                    meter.bytes_in.add(60);
                }
                meter.dropped.count(1);
            });
        });
        let seen = meter.snapshot();
        assert_eq!((seen.frames_in, seen.bytes_in, seen.turns), (10_000, 600_000, 0));
        assert_eq!(seen.dropped.into_iter().collect::<Vec<_>>(), [("seal".to_owned(), 1)]);
    }

    #[test]
    fn failed_requests_move_no_bytes_but_take_their_time() {
        let meter = OpMeter::default();
        meter.end(true, 4096, 80);
        meter.end(false, 4096, 3_000_000_000);
        let seen = meter.snapshot();
        assert_eq!((seen.requests, seen.bytes, seen.errors), (1, 4096, 1));
        assert_eq!((seen.latency.count, seen.latency.ns_max), (2, 3_000_000_000));
    }
}
