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

/// Who lets others run and comes back after so long had a rival with much to do, not a guest that takes its answers.
const RIVAL_TIME: Nanos = Nanos::from_micros(500);
/// How long a worker with such a rival does not look again but sleeps at once, twice as long each time that the rival is still there: a sleeper that
/// is woken goes before a rival that has had its time, one that lets it run comes after it, milliseconds later.
const CROWDED_TIME_MIN: Nanos = Nanos::from_millis(20);
const CROWDED_TIME_MAX: Nanos = Nanos::from_secs(1);

/// The decision between looking again and sleeping.
#[derive(Debug)]
pub struct Spin {
    base: Nanos,
    limit: Nanos,
    moved_at: Instant,
    /// When it let others run last, if nothing was done since.
    yielded_at: Option<Instant>,
    crowded_until: Instant,
    crowded_time: Nanos,
}

impl Spin {
    /// For a worker that looks for at least `base` before it sleeps; with none it never looks twice.
    pub fn new(base: Nanos, now: Instant) -> Spin {
        let (yielded_at, crowded_until, crowded_time) = (None, Instant(0), CROWDED_TIME_MIN);
        Spin { base, limit: base, moved_at: now, yielded_at, crowded_until, crowded_time }
    }

    /// Something was done.
    #[inline]
    pub fn moved(&mut self, now: Instant) {
        self.notice_rivals(now);
        self.moved_at = now;
    }

    /// Whether to look again. Lets whoever waits for this processor have it first: what a worker waits for may be what that one is to do.
    #[inline]
    pub fn again(&mut self, now: Instant) -> bool {
        self.notice_rivals(now);
        let again = now.since(self.moved_at) < self.limit && now >= self.crowded_until;
        if again {
            self.yielded_at = Some(now);
            std::thread::yield_now();
        }
        again
    }

    #[inline]
    fn notice_rivals(&mut self, now: Instant) {
        if self.yielded_at.take().is_some_and(|at| now.since(at) >= RIVAL_TIME) {
            let gone_meanwhile = now.since(self.crowded_until) > self.crowded_time;
            let longer = self.crowded_time.times(2).min(CROWDED_TIME_MAX);
            self.crowded_time = if gone_meanwhile { CROWDED_TIME_MIN } else { longer };
            self.crowded_until = now + self.crowded_time;
        }
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
        // As a clock is when a process starts: long after its beginning.
        Instant((60_000_000 + us) * 1000)
    }

    fn looks_for_us(spin: &mut Spin, from: u64) -> u64 {
        (0..1000).find(|us| !spin.again(at(from + us))).unwrap()
    }

    #[test]
    fn short_sleeps_make_it_look_longer_and_a_long_one_shorter() {
        let mut spin = Spin::new(Nanos::from_micros(20), at(0));
        assert_eq!(looks_for_us(&mut spin, 0), 20);
        spin.slept(at(20), at(60));
        assert_eq!(looks_for_us(&mut spin, 60), 40);
        for _ in 0..3 {
            spin.slept(at(100), at(199));
        }
        assert_eq!(looks_for_us(&mut spin, 199), 100);
        spin.slept(at(300), at(400));
        assert_eq!(looks_for_us(&mut spin, 400), 50);
        for _ in 0..3 {
            spin.slept(at(500), at(5_000));
        }
        assert_eq!(looks_for_us(&mut spin, 5_000), 20);
        spin.moved(at(5_015));
        assert_eq!(looks_for_us(&mut spin, 5_015), 20);
    }

    #[test]
    fn with_a_rival_that_keeps_the_processor_it_sleeps_at_once_for_a_while() {
        let mut spin = Spin::new(Nanos::from_micros(20), at(0));
        assert!(spin.again(at(5)));
        // A guest took its answers.
        spin.moved(at(400));
        assert!(spin.again(at(401)));
        // Somebody else had the processor.
        spin.moved(at(3_401));
        assert!(!spin.again(at(3_402)), "it would only wait for the other again");
        spin.moved(at(23_000));
        assert!(!spin.again(at(23_001)));
        spin.moved(at(23_410));
        assert!(spin.again(at(23_411)));
        // It is still there, and then for long not.
        spin.moved(at(24_411));
        spin.moved(at(64_400));
        assert!(!spin.again(at(64_401)));
        spin.moved(at(64_420));
        assert!(spin.again(at(64_421)));
        spin.moved(at(64_422));
        spin.moved(at(900_000));
        assert!(spin.again(at(900_001)));
        spin.moved(at(903_001));
        spin.moved(at(923_010));
        assert!(spin.again(at(923_011)));
    }

    #[test]
    fn without_a_time_it_never_looks_twice() {
        let mut spin = Spin::new(Nanos::ZERO, at(0));
        spin.slept(at(1), at(2));
        assert_eq!(looks_for_us(&mut spin, 2), 0);
    }
}
