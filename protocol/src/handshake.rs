//! What both ends agree on when a session begins, and the pace at which an initiator asks.
//!
//! Knows sizes and times; the frames themselves are `wire::long`, who sends them is `initiator` and the node.

use crate::pieces::{is_legal, mtu_needed, next_lower, piece_bytes_for_mtu};
use crate::time::{Instant, Nanos};

/// First interval between two tries, its growth and its limits: `docs/PROTOCOL.md`, "Epochs and reconnect".
const RETRY_FIRST: Nanos = Nanos::from_millis(5);
const RETRY_BUSY_MAX: Nanos = Nanos::from_millis(20);
const RETRY_IDLE_MAX: Nanos = Nanos::from_millis(250);

/// Piece size and largest frame (after the Ethernet header) of a session between links of these MTUs, when the initiator wants pieces of at
/// most `piece_bytes_max`. Both ends reckon alike.
pub fn agree(mtu_a: usize, mtu_b: usize, piece_bytes_max: u32) -> (u32, usize) {
    let mtu = mtu_a.min(mtu_b);
    let widest = piece_bytes_for_mtu(mtu);
    if piece_bytes_max >= widest {
        return (widest, mtu);
    }
    let capped = if is_legal(piece_bytes_max) { Some(piece_bytes_max) } else { next_lower(piece_bytes_max) };
    let piece = capped.unwrap_or(1_368);
    (piece, mtu_needed(piece).min(mtu))
}

/// When to ask again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retry {
    interval: Nanos,
    next_at: Instant,
    tries: u32,
    since: Instant,
}

impl Retry {
    /// The first try is due at `at`.
    pub(crate) fn starting(at: Instant) -> Retry {
        Retry { interval: RETRY_FIRST, next_at: at, tries: 0, since: at }
    }

    pub(crate) fn next_at(&self) -> Instant {
        self.next_at
    }

    pub(crate) fn tries(&self) -> u32 {
        self.tries
    }

    /// How long tries have been made.
    pub(crate) fn lasting(&self, now: Instant) -> Nanos {
        now.since(self.since)
    }

    /// A hint came: the next try is due now.
    pub(crate) fn hurry(&mut self, now: Instant) {
        self.next_at = self.next_at.min(now);
    }

    /// A try was made now; the next waits one and a half times as long, at most 20 ms when somebody waits for us.
    pub(crate) fn tried(&mut self, now: Instant, busy: bool) {
        let longest = if busy { RETRY_BUSY_MAX } else { RETRY_IDLE_MAX };
        self.tries += 1;
        self.next_at = now + self.interval.min(longest);
        self.interval = Nanos(self.interval.0 * 3 / 2).min(longest.max(RETRY_FIRST));
    }
}

/// A small generator for numbers that must differ, not for secrets: SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_agree_on_the_narrower_link() {
        assert_eq!(agree(9000, 1500, u32::MAX), (1368, 1500));
        assert_eq!(agree(9000, 9000, u32::MAX), (8192, 9000));
        assert_eq!(agree(9000, 9000, 8192), (8192, 9000));
        // Below the widest piece the frame is as large as one request with one piece: 98 + Q + Q/1024.
        assert_eq!(agree(9000, 9000, 4096), (4096, 98 + 4096 + 4));
        assert_eq!(agree(65535, 65535, 40_000), (32_768, 98 + 32_768 + 32));
        assert_eq!(agree(9000, 9000, 8), (1368, 98 + 1368 + 4));
    }

    #[test]
    fn tries_slow_down_to_the_limit_of_how_busy_we_are() {
        let mut retry = Retry::starting(Instant(0));
        let mut now = Instant(0);
        for _ in 0..20 {
            retry.tried(now, true);
            now = retry.next_at();
        }
        let before = now;
        retry.tried(now, true);
        assert_eq!(retry.next_at().since(before), RETRY_BUSY_MAX);
        for _ in 0..20 {
            now = retry.next_at();
            retry.tried(now, false);
        }
        assert_eq!(retry.next_at().since(now), RETRY_IDLE_MAX);
    }
}
