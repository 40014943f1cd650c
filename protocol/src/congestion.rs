//! The congestion window of a session, in bytes: grows while delay stays near its minimum, backs off when it stays above.
//!
//! Knows delays, bytes and losses; does not know frames. The rules are those of `docs/PROTOCOL.md`, "Congestion and credit".

use crate::time::{Instant, Nanos};

/// Never below this while loss is below [`HEAVY_LOSS`]: on a busy host delay is often the scheduler, not a queue.
pub(crate) const WINDOW_FLOOR_BYTES: u64 = 256 << 10;
/// Never above this: what the peer's receive ring is sized for.
pub(crate) const WINDOW_BYTES_MAX: u64 = 4 << 20;
/// A loss rate of 1. Fine enough that a rate far below 1 % still decays by single frames.
const RATE_ONE: u64 = 1 << 32;
/// Loss rate above which loss is taken for congestion even without delay: 2 %.
const HEAVY_LOSS: u64 = RATE_ONE / 50;
/// Frames over which the loss rate is smoothed.
///
/// At 1 % random loss the estimate then strays by 0.22 % (a standard deviation: sqrt(p / (2 * memory))), far from the 2 % of [`HEAVY_LOSS`];
/// over 256 frames it strays by 0.44 % and crosses it every few thousand frames.
const LOSS_MEMORY: u64 = 1024;
/// Window in frames under heavy loss.
const WINDOW_FRAMES_MIN: u64 = 4;
/// Delay that is not a queue's.
const DELAY_SLACK_MIN: Nanos = Nanos::from_micros(30);
/// Frame times of standing queue that are allowed.
const DELAY_SLACK_FRAMES: u64 = 8;
/// RTTs that the delay must stay above its target before the window shrinks.
const PATIENCE_RTTS: u64 = 3;

/// The window of one direction of one session.
#[derive(Clone, Debug)]
pub(crate) struct Congestion {
    window: u64,
    slow_start: bool,
    frame_bytes_max: u64,
    /// Losses per frame in units of 1/[`RATE_ONE`], smoothed over about [`LOSS_MEMORY`] frames.
    loss_rate: u64,
    above_since: Option<Instant>,
    backed_off_at: Option<Instant>,
}

impl Congestion {
    /// A window for frames of at most `frame_bytes_max`.
    pub(crate) fn new(frame_bytes_max: usize) -> Congestion {
        Congestion {
            window: WINDOW_FLOOR_BYTES,
            slow_start: true,
            frame_bytes_max: frame_bytes_max as u64,
            loss_rate: 0,
            above_since: None,
            backed_off_at: None,
        }
    }

    /// Bytes that may be in flight.
    pub(crate) fn window_bytes(&self) -> u64 {
        self.window.max(self.floor())
    }

    fn floor(&self) -> u64 {
        if self.loss_rate > HEAVY_LOSS {
            WINDOW_FRAMES_MIN * self.frame_bytes_max
        } else {
            WINDOW_FLOOR_BYTES
        }
    }

    /// Frames were acked: `bytes` of them in `frames`, with `delay` the smallest of this turn's samples; `limited` if the window held
    /// something back.
    pub(crate) fn on_acked(&mut self, now: Instant, acked: Acked, rtt_min: Nanos, srtt: Nanos) {
        self.loss_rate -= self.loss_rate * u64::from(acked.frames).min(LOSS_MEMORY / 4) / LOSS_MEMORY;
        self.window = self.window_bytes();
        let frame_time = Nanos(srtt.0 * self.frame_bytes_max / self.window.max(1));
        let target = rtt_min + DELAY_SLACK_MIN.max(frame_time.times(DELAY_SLACK_FRAMES));
        if acked.delay <= target {
            self.above_since = None;
            if acked.limited {
                let step = if self.slow_start {
                    acked.bytes
                } else {
                    acked.bytes * 2 * self.frame_bytes_max / self.window
                };
                self.window = (self.window + step).min(WINDOW_BYTES_MAX);
            }
            return;
        }
        let since = *self.above_since.get_or_insert(now);
        if now.since(since) >= srtt.times(PATIENCE_RTTS) && self.may_back_off(now, srtt) {
            self.slow_start = false;
            let scaled = self.window * target.0 / acked.delay.0.max(1);
            self.shrink_to(now, scaled.max(self.window / 2));
        }
    }

    /// Frames were found lost.
    pub(crate) fn on_lost(&mut self, now: Instant, frames: u32, srtt: Nanos) {
        self.loss_rate =
            (self.loss_rate + RATE_ONE / LOSS_MEMORY * u64::from(frames).min(LOSS_MEMORY)).min(RATE_ONE);
        if !self.may_back_off(now, srtt) {
            return;
        }
        self.slow_start = false;
        let delayed = self.above_since.is_some();
        let heavy = self.loss_rate > HEAVY_LOSS;
        self.shrink_to(now, if delayed || heavy { self.window / 2 } else { self.window * 9 / 10 });
    }

    fn may_back_off(&self, now: Instant, srtt: Nanos) -> bool {
        self.backed_off_at.is_none_or(|at| now.since(at) >= srtt)
    }

    fn shrink_to(&mut self, now: Instant, window: u64) {
        self.window = window.clamp(self.floor(), WINDOW_BYTES_MAX);
        self.backed_off_at = Some(now);
    }
}

/// What an ack says about the path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acked {
    /// Bytes newly acked.
    pub bytes: u64,
    /// Frames newly acked.
    pub frames: u32,
    /// Smallest round trip among them.
    pub delay: Nanos,
    /// True if the window was the limit when they were sent.
    pub limited: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acked(delay_us: u64) -> Acked {
        Acked { bytes: 64 << 10, frames: 8, delay: Nanos::from_micros(delay_us), limited: true }
    }

    const RTT: Nanos = Nanos::from_micros(100);

    /// P-50
    #[test]
    fn window_grows_while_delay_stays_at_its_minimum() {
        let mut c = Congestion::new(9000);
        for turn in 0..100 {
            c.on_acked(Instant(turn * 100_000), acked(100), RTT, RTT);
        }
        assert_eq!(c.window_bytes(), WINDOW_BYTES_MAX);
    }

    /// P-51
    #[test]
    fn window_shrinks_only_when_delay_stays_high_for_three_round_trips() {
        let mut c = Congestion::new(9000);
        for turn in 0..20 {
            c.on_acked(Instant(turn * 100_000), acked(100), RTT, RTT);
        }
        let grown = c.window_bytes();
        c.on_acked(Instant(2_000_000), acked(1000), RTT, RTT);
        c.on_acked(Instant(2_200_000), acked(1000), RTT, RTT);
        assert_eq!(c.window_bytes(), grown);
        c.on_acked(Instant(2_400_000), acked(1000), RTT, RTT);
        assert_eq!(c.window_bytes(), grown / 2);
    }

    /// P-51
    #[test]
    fn light_loss_costs_a_tenth_and_never_more_than_the_floor() {
        let mut c = Congestion::new(9000);
        for turn in 0..100 {
            c.on_acked(Instant(turn * 100_000), acked(100), RTT, RTT);
        }
        c.on_lost(Instant(10_000_000), 1, RTT);
        assert_eq!(c.window_bytes(), WINDOW_BYTES_MAX * 9 / 10);
        for turn in 0..1000u64 {
            let now = Instant(20_000_000 + turn * 1_000_000);
            for _ in 0..16 {
                c.on_acked(now, Acked { limited: false, ..acked(100) }, RTT, RTT);
            }
            c.on_lost(now, 1, RTT);
        }
        assert_eq!(c.window_bytes(), WINDOW_FLOOR_BYTES);
    }

    /// P-51: a loss a thousand frames is light, however few frames an ack names.
    #[test]
    fn a_low_loss_rate_stays_low() {
        let mut c = Congestion::new(9000);
        for frame in 0..200_000u64 {
            let now = Instant(frame * 1_000);
            c.on_acked(now, Acked { frames: 1, limited: false, ..acked(100) }, RTT, RTT);
            if frame % 1_000 == 0 {
                c.on_lost(now, 1, RTT);
            }
        }
        assert!(c.loss_rate < HEAVY_LOSS / 10, "{} of {RATE_ONE}", c.loss_rate);
        assert_eq!(c.window_bytes(), WINDOW_FLOOR_BYTES);
    }

    /// P-51
    #[test]
    fn heavy_loss_goes_below_the_floor_but_never_to_a_stop() {
        let mut c = Congestion::new(9000);
        for turn in 0..100u64 {
            c.on_lost(Instant(turn * 1_000_000), 10, RTT);
        }
        assert_eq!(c.window_bytes(), WINDOW_FRAMES_MIN * 9000);
    }
}
