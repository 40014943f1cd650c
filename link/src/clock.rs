//! The clock of a daemon: `CLOCK_MONOTONIC` in nanoseconds.
//!
//! Only daemons' outermost loops and the layers of a link read it; everything else takes `now` as an argument.

use cirro_protocol::time::Instant;

use crate::sys;

/// Now.
pub fn now() -> Instant {
    Instant(sys::clock_ns(sys::ClockId::Monotonic))
}

/// Now by the wall clock, in nanoseconds since 1970. It can jump; good for log lines and file stamps alone.
pub fn wall_ns() -> u64 {
    sys::clock_ns(sys::ClockId::Realtime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn now_runs_at_the_pace_of_the_standard_library() {
        let (ours, theirs) = (now(), std::time::Instant::now());
        std::thread::sleep(std::time::Duration::from_millis(20));
        let (ours, theirs) = (now().since(ours).0, theirs.elapsed().as_nanos() as u64);
        assert!(ours >= 20_000_000 && ours.abs_diff(theirs) < 5_000_000, "{ours} against {theirs}");
    }

    #[test]
    fn the_wall_clock_is_that_of_the_standard_library() {
        let theirs =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
        assert!(wall_ns().abs_diff(theirs) < 1_000_000_000);
    }
}
