//! How long a worker that finds nothing to do looks again before it sleeps.
//!
//! Knows time and what sleeping cost; does not know what is waited for. Used by both daemons' loops, never by a turn.
//!
//! To be woken up costs about 35 µs here, and on the other machine, whose frame is waited for, as much again if it has fallen asleep meanwhile. So the
//! time follows what comes: a sleep that ended soon was not worth it and makes the next look longer, up to [`SPIN_FACTOR_MAX`] times the operator's
//! `--poll-us`; one that lasted brings it back. A worker that has nothing to do for long sleeps after that time and stays asleep.

use cirro_protocol::time::{Instant, Nanos};

/// How many times the configured time a worker may look at most: 100 µs of 20, so that with one request in flight a worker stays awake while the
/// guest's own wake-up lasts (figures: docs/decisions/0008-the-data-path.md).
pub const SPIN_FACTOR_MAX: u64 = 5;

/// The decision between looking again and sleeping.
#[derive(Debug)]
pub struct Spin {
    base: Nanos,
    limit: Nanos,
    moved_at: Instant,
}

impl Spin {
    /// For a worker that looks for at least `base` before it sleeps; with none it never looks twice.
    pub fn new(base: Nanos, now: Instant) -> Spin {
        Spin { base, limit: base, moved_at: now }
    }

    /// Something was done.
    #[inline]
    pub fn moved(&mut self, now: Instant) {
        self.moved_at = now;
    }

    /// Whether to look again. Lets whoever waits for this processor have it first: what a worker waits for may be what that one is to do.
    #[inline]
    pub fn again(&self, now: Instant) -> bool {
        let again = now.since(self.moved_at) < self.limit;
        if again {
            std::thread::yield_now();
        }
        again
    }

    /// It slept from `from` until `now`.
    pub fn slept(&mut self, from: Instant, now: Instant) {
        let most = Nanos(self.base.0 * SPIN_FACTOR_MAX);
        let soon = now.since(from) < most;
        self.limit =
            if soon { Nanos(self.limit.0 * 2).min(most) } else { Nanos(self.limit.0 / 2).max(self.base) };
        self.moved_at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(us: u64) -> Instant {
        Instant(us * 1000)
    }

    fn looks_for_us(spin: &Spin, from: u64) -> u64 {
        (0..1000).find(|us| !spin.again(at(from + us))).unwrap()
    }

    #[test]
    fn short_sleeps_make_it_look_longer_and_a_long_one_shorter() {
        let mut spin = Spin::new(Nanos::from_micros(20), at(0));
        assert_eq!(looks_for_us(&spin, 0), 20);
        spin.slept(at(20), at(60));
        assert_eq!(looks_for_us(&spin, 60), 40);
        for _ in 0..3 {
            spin.slept(at(100), at(199));
        }
        assert_eq!(looks_for_us(&spin, 199), 100);
        spin.slept(at(300), at(400));
        assert_eq!(looks_for_us(&spin, 400), 50);
        for _ in 0..3 {
            spin.slept(at(500), at(5_000));
        }
        assert_eq!(looks_for_us(&spin, 5_000), 20);
        spin.moved(at(5_015));
        assert_eq!(looks_for_us(&spin, 5_015), 20);
    }

    #[test]
    fn without_a_time_it_never_looks_twice() {
        let mut spin = Spin::new(Nanos::ZERO, at(0));
        spin.slept(at(1), at(2));
        assert_eq!(looks_for_us(&spin, 2), 0);
    }
}
