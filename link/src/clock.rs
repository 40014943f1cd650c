//! The clock of the daemons: CLOCK_MONOTONIC as the core's [`Instant`], and the wall clock for what leaves the machine.
//!
//! Knows how a wall-clock time stamp of the kernel becomes an [`Instant`], also while somebody sets the wall clock.

use cirro_protocol::time::{Instant, Nanos};

use crate::sys;

/// Now, in nanoseconds of CLOCK_MONOTONIC.
#[inline]
pub fn now() -> Instant {
    Instant(sys::clock_ns(libc::CLOCK_MONOTONIC))
}

/// Now by the wall clock, in nanoseconds since 1970. It can jump: for files that people read, nothing else.
pub fn wall_ns() -> u64 {
    sys::clock_ns(libc::CLOCK_REALTIME)
}

/// How old the measured distance of the two clocks may be: drift and slewing within it are below 10 µs.
const MEASURE_EVERY: Nanos = Nanos::from_millis(10);
/// Stamps of two processors may differ by a little; a stamp that lies further back than this means that the wall clock was set.
const DISORDER_MAX: Nanos = Nanos::from_millis(1);

/// The two clocks, so that tests can set them.
pub(crate) trait Clocks {
    fn monotonic_ns(&self) -> u64;
    fn wall_ns(&self) -> u64;
}

/// The kernel's.
#[derive(Debug, Default)]
pub(crate) struct KernelClocks;

impl Clocks for KernelClocks {
    fn monotonic_ns(&self) -> u64 {
        sys::clock_ns(libc::CLOCK_MONOTONIC)
    }

    fn wall_ns(&self) -> u64 {
        sys::clock_ns(libc::CLOCK_REALTIME)
    }
}

/// Turns wall-clock stamps of frames, in the order in which the frames came, into [`Instant`]s that never go back and never lie ahead of now.
///
/// A wall clock that is set while frames wait in a ring spoils the stamps of those alone, and only within these bounds.
#[derive(Debug, Default)]
pub(crate) struct Stamps<C> {
    clocks: C,
    /// Wall clock minus monotonic clock, modulo 2^64.
    offset_ns: u64,
    measured_at: Option<Instant>,
    /// The clock when it was last looked at; looked at again only for a stamp that seems later.
    now: Instant,
    last: Instant,
}

impl<C: Clocks> Stamps<C> {
    /// The instant of a frame's stamp.
    #[inline]
    pub(crate) fn instant(&mut self, seconds: u32, nanoseconds: u32) -> Instant {
        let stamp_ns = u64::from(seconds) * 1_000_000_000 + u64::from(nanoseconds);
        let mut at = Instant(stamp_ns.wrapping_sub(self.offset_ns));
        if at > self.now {
            self.now = Instant(self.clocks.monotonic_ns());
            let old = self.measured_at.is_none_or(|measured| self.now.since(measured) >= MEASURE_EVERY);
            if old || at > self.now {
                at = self.measure(stamp_ns);
            }
        } else if self.last.since(at) > DISORDER_MAX {
            at = self.measure(stamp_ns);
        }
        self.last = at.min(self.now).max(self.last);
        self.last
    }

    /// Measures the distance of the clocks by the tightest of three readings, and applies it.
    #[cold]
    fn measure(&mut self, stamp_ns: u64) -> Instant {
        let reading = || {
            let before = self.clocks.monotonic_ns();
            let wall = self.clocks.wall_ns();
            let after = self.clocks.monotonic_ns();
            (after - before, wall.wrapping_sub(before + (after - before) / 2), after)
        };
        let (_, offset_ns, after) = [reading(), reading(), reading()].into_iter().min().unwrap_or_default();
        self.offset_ns = offset_ns;
        self.now = self.now.max(Instant(after));
        self.measured_at = Some(self.now);
        Instant(stamp_ns.wrapping_sub(offset_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn now_runs_at_the_pace_of_the_standard_library() {
        let (ours, theirs) = (now(), std::time::Instant::now());
        std::thread::sleep(std::time::Duration::from_millis(20));
        let (ours, theirs) = (now().since(ours).0, theirs.elapsed().as_nanos() as u64);
        assert!(ours >= 20_000_000 && ours.abs_diff(theirs) < 5_000_000, "{ours} against {theirs}");
        let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        assert!(wall_ns().abs_diff(wall.as_nanos() as u64) < 1_000_000_000);
    }

    /// Both clocks advance by one step of the test; the wall clock can be set.
    #[derive(Debug, Default)]
    struct Fake {
        monotonic: Cell<u64>,
        wall: Cell<u64>,
    }

    impl Clocks for Fake {
        fn monotonic_ns(&self) -> u64 {
            self.monotonic.get()
        }
        fn wall_ns(&self) -> u64 {
            self.wall.get()
        }
    }

    const MS: u64 = 1_000_000;
    const SECOND: u64 = 1000 * MS;

    fn stamps() -> Stamps<Fake> {
        let clocks = Fake { monotonic: Cell::new(100 * SECOND), wall: Cell::new(1_700_000_000 * SECOND) };
        Stamps { clocks, offset_ns: 0, measured_at: None, now: Instant(0), last: Instant(0) }
    }

    impl Stamps<Fake> {
        fn pass(&self, ns: u64) {
            self.clocks.monotonic.set(self.clocks.monotonic.get() + ns);
            self.clocks.wall.set(self.clocks.wall.get() + ns);
        }

        fn stamp(&self) -> (u32, u32) {
            ((self.clocks.wall.get() / SECOND) as u32, (self.clocks.wall.get() % SECOND) as u32)
        }

        fn of(&mut self, (seconds, nanoseconds): (u32, u32)) -> u64 {
            self.instant(seconds, nanoseconds).0
        }
    }

    #[test]
    fn a_frame_that_waited_keeps_the_time_at_which_it_came() {
        let mut stamps = stamps();
        for round in 0..50 {
            let came = stamps.clocks.monotonic.get();
            let stamp = stamps.stamp();
            stamps.pass(7 * MS + round * 13_001);
            assert_eq!(stamps.of(stamp), came);
        }
    }

    #[test]
    fn a_wall_clock_set_back_while_nothing_came_does_no_harm() {
        for (idle, back) in [(10 * SECOND, 5 * SECOND), (SECOND, 3600 * SECOND), (20 * MS, 30 * MS)] {
            let mut stamps = stamps();
            let stamp = stamps.stamp();
            stamps.of(stamp);
            stamps.pass(idle);
            stamps.clocks.wall.set(stamps.clocks.wall.get() - back);
            let (came, stamp) = (stamps.clocks.monotonic.get(), stamps.stamp());
            stamps.pass(5_000);
            assert_eq!(stamps.of(stamp), came, "idle {idle}, set back by {back}");
        }
    }

    #[test]
    fn a_wall_clock_set_forward_between_two_frames_does_no_harm() {
        let mut stamps = stamps();
        let stamp = stamps.stamp();
        stamps.of(stamp);
        stamps.pass(MS);
        stamps.clocks.wall.set(stamps.clocks.wall.get() + 3600 * SECOND);
        let (came, stamp) = (stamps.clocks.monotonic.get(), stamps.stamp());
        stamps.pass(5_000);
        assert_eq!(stamps.of(stamp), came);
    }

    #[test]
    fn whatever_the_stamps_are_instants_never_go_back_nor_lie_ahead() {
        let mut stamps = stamps();
        let mut last = 0;
        for round in 0u64..10_000 {
            stamps.pass(round * 7919 % (3 * MS));
            let mixed = round.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            if mixed >> 60 == 0 {
                stamps.clocks.wall.set(1_600_000_000 * SECOND + mixed % (100_000_000 * SECOND));
            }
            let stamp = if mixed >> 58 == 0 { (mixed as u32, 999_999_999) } else { stamps.stamp() };
            let at = stamps.of(stamp);
            assert!(at >= last && at <= stamps.clocks.monotonic.get(), "round {round}");
            last = at;
        }
    }
}
