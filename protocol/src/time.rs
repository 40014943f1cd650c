//! Points and spans of time, in nanoseconds, as arguments: the core has no clock.
//!
//! Does not know what the epoch is: a daemon passes `CLOCK_MONOTONIC`, a test passes what it likes.

use core::ops::{Add, AddAssign, Sub};

/// A span of time in nanoseconds. Arithmetic saturates: a span is a measurement or a limit, never a counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nanos(pub u64);

impl Nanos {
    /// No time at all.
    pub const ZERO: Nanos = Nanos(0);

    /// A span of `us` microseconds.
    pub const fn from_micros(us: u64) -> Nanos {
        Nanos(us * 1_000)
    }

    /// A span of `ms` milliseconds.
    pub const fn from_millis(ms: u64) -> Nanos {
        Nanos(ms * 1_000_000)
    }

    /// A span of `s` seconds.
    pub const fn from_secs(s: u64) -> Nanos {
        Nanos(s * 1_000_000_000)
    }

    /// Whole microseconds in the span.
    pub const fn as_micros(self) -> u64 {
        self.0 / 1_000
    }

    /// The span `factor` times over.
    pub const fn times(self, factor: u64) -> Nanos {
        Nanos(self.0.saturating_mul(factor))
    }

    /// The span divided by `divisor`, which is not zero.
    pub const fn div(self, divisor: u64) -> Nanos {
        Nanos(self.0 / divisor)
    }
}

impl Add for Nanos {
    type Output = Nanos;
    fn add(self, other: Nanos) -> Nanos {
        Nanos(self.0.saturating_add(other.0))
    }
}

impl Sub for Nanos {
    type Output = Nanos;
    fn sub(self, other: Nanos) -> Nanos {
        Nanos(self.0.saturating_sub(other.0))
    }
}

impl From<Nanos> for core::time::Duration {
    fn from(span: Nanos) -> Self {
        core::time::Duration::from_nanos(span.0)
    }
}

/// A point in time: nanoseconds since an epoch that the caller keeps for the life of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

impl Instant {
    /// How long ago `earlier` was; zero if it lies ahead.
    pub const fn since(self, earlier: Instant) -> Nanos {
        Nanos(self.0.saturating_sub(earlier.0))
    }
}

/// The first of some times. Asked of every timer in every turn, so it is a loop over numbers: an iterator's chain costs ten times as much.
#[inline]
pub fn earliest<const N: usize>(times: [Option<Instant>; N]) -> Option<Instant> {
    let mut first = None;
    for time in times {
        if let Some(time) = time
            && first.is_none_or(|first| time < first)
        {
            first = Some(time);
        }
    }
    first
}

impl Add<Nanos> for Instant {
    type Output = Instant;
    fn add(self, span: Nanos) -> Instant {
        Instant(self.0.saturating_add(span.0))
    }
}

impl AddAssign<Nanos> for Instant {
    fn add_assign(&mut self, span: Nanos) {
        *self = *self + span;
    }
}
