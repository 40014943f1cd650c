//! Which packet numbers arrived, and when an ack for them is due.
//!
//! Knows numbers and arrival times, not what the frames carried. Called by `session`.

use alloc::boxed::Box;

use crate::time::{Instant, Nanos};
use crate::types::WINDOW_FRAMES;
use crate::wire::body::ACK_RANGES_MAX;

/// Frames that ask for an ack before one is sent without waiting longer.
const ACK_EVERY_FRAMES: u32 = 16;
/// How far back an ACK_RANGES answer to ACK_NOW looks: acks may have been lost.
const LOOK_BACK_FRAMES: u64 = 1024;
/// Numbers that the header's bitmap covers below the largest.
const BITMAP_FRAMES: u64 = 64;

const WORDS: usize = WINDOW_FRAMES / 64;
const MASK: u64 = WINDOW_FRAMES as u64 - 1;

/// What the header says of the frames that arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ack {
    /// Low bits of the largest number received, 0 when none was.
    pub pn: u32,
    /// Bit `i`: `pn - 1 - i` was received.
    pub bits: u64,
    /// From the arrival of `pn` until now, in 0.25 µs, saturating.
    pub delay: u16,
}

/// The receive window of a session.
#[derive(Debug)]
pub(crate) struct RecvWindow {
    largest: u64,
    largest_arrival: Instant,
    seen: Box<[u64; WORDS]>,
    waiting: u32,
    ack_at: Option<Instant>,
    ack_delay_max: Nanos,
    /// The smallest number that arrived since the last ack; `u64::MAX` when none did.
    oldest_unreported: u64,
}

impl RecvWindow {
    /// A window into which nothing has come. An ack is held back for `ack_delay_max` at most.
    pub(crate) fn new(ack_delay_max: Nanos) -> RecvWindow {
        RecvWindow {
            largest: 0,
            largest_arrival: Instant(0),
            seen: Box::new([0; WORDS]),
            waiting: 0,
            ack_at: None,
            ack_delay_max,
            oldest_unreported: u64::MAX,
        }
    }

    /// True if `pn` is new; false if it was seen or is too old to tell. Changes nothing.
    pub(crate) fn is_new(&self, pn: u64) -> bool {
        if pn > self.largest {
            return true;
        }
        pn.saturating_add(WINDOW_FRAMES as u64) > self.largest && pn != 0 && !self.bit(pn)
    }

    /// Marks `pn`, which [`RecvWindow::is_new`], as arrived, and decides when its ack is due.
    pub(crate) fn mark(&mut self, now: Instant, arrival: Instant, pn: u64, asks: bool, ack_now: bool) {
        let opens_gap = pn > self.largest.saturating_add(1);
        if pn > self.largest {
            self.advance(pn);
            self.largest_arrival = arrival;
        }
        self.seen[(pn & MASK) as usize / 64] |= 1 << (pn % 64);
        self.oldest_unreported = self.oldest_unreported.min(pn);
        if ack_now {
            self.oldest_unreported =
                self.oldest_unreported.min(self.largest.saturating_sub(LOOK_BACK_FRAMES).max(1));
        }
        if asks || ack_now {
            self.waiting += 1;
            let at_once = ack_now || opens_gap || self.waiting >= ACK_EVERY_FRAMES;
            let due = if at_once { now } else { now + self.ack_delay_max };
            self.ack_at = Some(self.ack_at.map_or(due, |at| at.min(due)));
        }
    }

    /// A duplicate that asks for an ack: its sender has not heard the first one.
    pub(crate) fn ack_again(&mut self, now: Instant) {
        self.oldest_unreported =
            self.oldest_unreported.min(self.largest.saturating_sub(LOOK_BACK_FRAMES).max(1));
        self.ack_at = Some(now);
    }

    /// When an ack must leave, if one must.
    pub(crate) fn ack_at(&self) -> Option<Instant> {
        self.ack_at
    }

    /// True if the bitmap alone cannot say what arrived since the last ack.
    pub(crate) fn needs_ranges(&self) -> bool {
        self.oldest_unreported.saturating_add(BITMAP_FRAMES) < self.largest
    }

    /// The ack for a frame that is about to leave.
    pub(crate) fn ack(&self, now: Instant) -> Ack {
        if self.largest == 0 {
            return Ack::default();
        }
        let delay = (now.since(self.largest_arrival).0 / 250).min(u64::from(u16::MAX)) as u16;
        Ack { pn: self.largest as u32, bits: self.bitmap(), delay }
    }

    /// The frame with the ack has been written: nothing is waiting any more.
    pub(crate) fn ack_written(&mut self) {
        self.waiting = 0;
        self.ack_at = None;
        if !self.needs_ranges() {
            self.oldest_unreported = u64::MAX;
        }
    }

    /// The ranges have been written as well.
    pub(crate) fn ranges_written(&mut self) {
        self.oldest_unreported = u64::MAX;
    }

    /// Calls `put` with the ranges below the bitmap, highest first, at most [`ACK_RANGES_MAX`].
    pub(crate) fn ranges(&self, mut put: impl FnMut(u64, u64)) {
        let lowest = self.oldest_unreported.max(self.largest.saturating_sub(MASK)).max(1);
        let (mut pn, mut count) = (self.largest.saturating_sub(BITMAP_FRAMES + 1), 0);
        while pn >= lowest && count < ACK_RANGES_MAX {
            if !self.bit(pn) {
                pn -= 1;
                continue;
            }
            let last = pn;
            while pn > lowest && self.bit(pn - 1) {
                pn -= 1;
            }
            put(pn, last);
            count += 1;
            pn -= 1;
        }
    }

    fn bit(&self, pn: u64) -> bool {
        self.seen[(pn & MASK) as usize / 64] >> (pn % 64) & 1 == 1
    }

    /// Moves the window up to `pn` and clears what is new in it.
    fn advance(&mut self, pn: u64) {
        if pn - self.largest >= WINDOW_FRAMES as u64 {
            self.seen.fill(0);
        } else {
            for fresh in self.largest + 1..=pn {
                self.seen[(fresh & MASK) as usize / 64] &= !(1 << (fresh % 64));
            }
        }
        self.largest = pn;
    }

    /// The 64 numbers below the largest, nearest in bit 0. Number 0 is never received, so numbers below 1 read as not received.
    fn bitmap(&self) -> u64 {
        let first = self.largest.wrapping_sub(BITMAP_FRAMES);
        let word = |pn: u64| self.seen[(pn & MASK) as usize / 64];
        let shift = first % 64;
        let low = word(first) >> shift;
        let ascending = if shift == 0 { low } else { low | word(first.wrapping_add(64)) << (64 - shift) };
        let bits = ascending.reverse_bits();
        if self.largest > BITMAP_FRAMES { bits } else { bits & ((1 << (self.largest - 1)) - 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn window_with(pns: &[u64]) -> RecvWindow {
        let mut window = RecvWindow::new(Nanos::from_micros(50));
        for &pn in pns {
            assert!(window.is_new(pn));
            window.mark(Instant(0), Instant(0), pn, true, false);
        }
        window
    }

    #[test]
    fn bitmap_names_the_numbers_below_the_largest() {
        assert_eq!(window_with(&[1, 2, 4]).ack(Instant(0)), Ack { pn: 4, bits: 0b110, delay: 0 });
        assert_eq!(window_with(&[1]).ack(Instant(0)).bits, 0);
        let pns: Vec<u64> = (1..=200).filter(|pn| pn % 7 != 0).collect();
        let ack = window_with(&pns).ack(Instant(0));
        for i in 0..64 {
            let pn = u64::from(ack.pn) - 1 - i;
            assert_eq!(ack.bits >> i & 1 == 1, pn % 7 != 0, "pn {pn}");
        }
    }

    /// P-35
    #[test]
    fn a_number_is_new_once_and_never_when_too_old_to_tell() {
        let mut window = window_with(&[5, 9000]);
        assert!(
            !window.is_new(9000) && !window.is_new(5) && !window.is_new(0) && !window.is_new(9000 - 8192)
        );
        assert!(window.is_new(9000 - 8191) && window.is_new(9001));
        window.mark(Instant(0), Instant(0), 20_000, true, false);
        assert!(window.is_new(19_999) && !window.is_new(20_000));
    }

    /// P-36 P-38
    #[test]
    fn an_ack_is_due_at_once_for_a_new_gap_and_later_else() {
        let mut window = RecvWindow::new(Nanos(50_000));
        window.mark(Instant(100), Instant(90), 1, true, false);
        assert_eq!(window.ack_at(), Some(Instant(50_100)));
        window.mark(Instant(200), Instant(190), 3, true, false);
        assert_eq!(window.ack_at(), Some(Instant(200)));
        window.ack_written();
        window.mark(Instant(300), Instant(290), 2, false, false);
        assert_eq!(window.ack_at(), None);
        window.mark(Instant(300), Instant(290), 7, false, false);
        assert_eq!(window.ack_at(), None, "a frame that does not ask never causes an ack");
    }

    /// P-37
    #[test]
    fn sixteen_frames_do_not_wait_for_the_delay() {
        let mut window = RecvWindow::new(Nanos(50_000));
        for pn in 1..=15 {
            window.mark(Instant(10), Instant(10), pn, true, false);
        }
        assert_eq!(window.ack_at(), Some(Instant(50_010)));
        window.mark(Instant(10), Instant(10), 16, true, false);
        assert_eq!(window.ack_at(), Some(Instant(10)));
    }

    /// P-39
    #[test]
    fn ranges_say_what_the_bitmap_cannot() {
        let mut window = window_with(&[1, 2, 3, 7, 8]);
        window.mark(Instant(0), Instant(0), 300, true, false);
        assert!(window.needs_ranges());
        let mut ranges = Vec::new();
        window.ranges(|first, last| ranges.push((first, last)));
        assert_eq!(ranges, [(7, 8), (1, 3)]);
        window.ack_written();
        assert!(window.needs_ranges(), "an ack without the ranges has not said it");
        window.ranges_written();
        assert!(!window.needs_ranges());
    }
}
