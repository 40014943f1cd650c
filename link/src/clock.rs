//! The clock of the daemons: CLOCK_MONOTONIC as the core's [`Instant`].
//!
//! Knows how a wall-clock time stamp of the kernel becomes one; keeps no state but the last offset.

use cirro_protocol::time::{Instant, Nanos};

use crate::sys;

/// Now, in nanoseconds of CLOCK_MONOTONIC.
#[inline]
pub fn now() -> Instant {
    Instant(sys::clock_ns(libc::CLOCK_MONOTONIC))
}

/// How often the offset between the two clocks is measured anew: a step of the wall clock then spoils this much at most.
const MEASURE_EVERY: Nanos = Nanos::from_millis(100);

/// Turns wall-clock time stamps into [`Instant`]s.
#[derive(Debug, Default)]
pub struct WallClock {
    offset_ns: u64,
    measured_at: Option<Instant>,
}

impl WallClock {
    /// The instant of a kernel time stamp, never later than `now`, and never more than a second before it: a stamp from before a step of the
    /// wall clock is worth nothing.
    pub fn instant(&mut self, now: Instant, seconds: u32, nanoseconds: u32) -> Instant {
        if self.measured_at.is_none_or(|at| now.since(at) >= MEASURE_EVERY) {
            self.offset_ns =
                sys::clock_ns(libc::CLOCK_REALTIME).wrapping_sub(sys::clock_ns(libc::CLOCK_MONOTONIC));
            self.measured_at = Some(now);
        }
        let stamp = u64::from(seconds) * 1_000_000_000 + u64::from(nanoseconds);
        let instant = Instant(stamp.wrapping_sub(self.offset_ns));
        if instant > now || now.since(instant) > Nanos::from_secs(1) { now } else { instant }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_forward() {
        let first = now();
        assert!(now() >= first && first.0 > 0);
    }

    #[test]
    fn a_stamp_of_now_is_now_and_a_foolish_one_too() {
        let mut wall = WallClock::default();
        let at = now();
        let ns = sys::clock_ns(libc::CLOCK_REALTIME);
        let instant = wall.instant(now(), (ns / 1_000_000_000) as u32, (ns % 1_000_000_000) as u32);
        assert!(instant >= Instant(at.0 - 1_000_000) && instant <= now());
        let later = now();
        assert_eq!(wall.instant(later, 12, 0), later);
        assert_eq!(wall.instant(later, u32::MAX, 0), later);
    }
}
