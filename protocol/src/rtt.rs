//! Round-trip time of a session: smoothed, its variation, and the smallest of the last ten seconds.
//!
//! Formulas of RFC 6298 section 2 (alpha 1/8, beta 1/4) on samples with the peer's ack delay taken off. Knows nothing of frames.

use crate::time::{Instant, Nanos};

/// The minimum is kept over two buckets of this length, so it covers 5 to 10 s.
const BUCKET: Nanos = Nanos::from_secs(5);

/// The estimator. Before the first sample it says [`Rtt::INITIAL`].
#[derive(Clone, Debug)]
pub(crate) struct Rtt {
    smoothed: Nanos,
    variation: Nanos,
    latest: Nanos,
    min_now: Nanos,
    min_before: Nanos,
    bucket_start: Instant,
    sampled: bool,
}

impl Rtt {
    /// What a path is thought to take before the first sample: a busy host's scheduling, not a LAN's wire.
    pub(crate) const INITIAL: Nanos = Nanos::from_millis(1);

    /// An estimator without samples.
    pub(crate) fn new(now: Instant) -> Rtt {
        Rtt {
            smoothed: Self::INITIAL,
            variation: Self::INITIAL.div(2),
            latest: Self::INITIAL,
            min_now: Nanos(u64::MAX),
            min_before: Nanos(u64::MAX),
            bucket_start: now,
            sampled: false,
        }
    }

    /// Takes a sample: `elapsed` from sending to the ack's arrival, of which the peer says it held the ack back for `ack_delay`.
    pub(crate) fn sample(&mut self, now: Instant, elapsed: Nanos, ack_delay: Nanos) {
        let sample = if ack_delay < elapsed { elapsed - ack_delay } else { elapsed };
        if now.since(self.bucket_start) >= BUCKET {
            self.min_before = self.min_now;
            self.min_now = Nanos(u64::MAX);
            self.bucket_start = now;
        }
        self.min_now = self.min_now.min(sample);
        self.latest = sample;
        if self.sampled {
            let error = Nanos(self.smoothed.0.abs_diff(sample.0));
            self.variation = Nanos((self.variation.0 * 3 + error.0) / 4);
            self.smoothed = Nanos((self.smoothed.0 * 7 + sample.0) / 8);
        } else {
            self.sampled = true;
            self.smoothed = sample;
            self.variation = sample.div(2);
        }
    }

    /// Smoothed round-trip time.
    pub(crate) fn smoothed(&self) -> Nanos {
        self.smoothed
    }

    /// The last sample.
    pub(crate) fn latest(&self) -> Nanos {
        self.latest
    }

    /// The smallest sample of the last 5 to 10 s.
    pub(crate) fn min(&self) -> Nanos {
        if self.sampled { self.min_now.min(self.min_before) } else { self.smoothed }
    }

    /// When a frame counts as lost although fewer later ones were acked than reordering allows: max(9/8·rtt, srtt + min/4, 20 µs).
    pub(crate) fn loss_delay(&self) -> Nanos {
        let rtt = self.smoothed.max(self.latest);
        (rtt + rtt.div(8)).max(self.smoothed + self.min().div(4)).max(Nanos::from_micros(20))
    }

    /// The probe timeout before doubling: srtt + max(4·rttvar, 50 µs) + the peer's longest ack delay.
    pub(crate) fn probe_timeout(&self, peer_ack_delay: Nanos) -> Nanos {
        self.smoothed + self.variation.times(4).max(Nanos::from_micros(50)) + peer_ack_delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// P-44
    #[test]
    fn first_sample_sets_both_estimates_as_rfc_6298_says() {
        let mut rtt = Rtt::new(Instant(0));
        rtt.sample(Instant(1), Nanos(120_000), Nanos(20_000));
        assert_eq!((rtt.smoothed(), rtt.variation), (Nanos(100_000), Nanos(50_000)));
        rtt.sample(Instant(2), Nanos(200_000), Nanos(0));
        // rttvar = 3/4·50000 + 1/4·|100000-200000|; srtt = 7/8·100000 + 1/8·200000
        assert_eq!((rtt.smoothed(), rtt.variation), (Nanos(112_500), Nanos(62_500)));
    }

    #[test]
    fn minimum_forgets_what_is_older_than_ten_seconds() {
        let mut rtt = Rtt::new(Instant(0));
        rtt.sample(Instant(0), Nanos(10), Nanos(0));
        rtt.sample(Instant(6_000_000_000), Nanos(50), Nanos(0));
        assert_eq!(rtt.min(), Nanos(10));
        rtt.sample(Instant(12_000_000_000), Nanos(40), Nanos(0));
        assert_eq!(rtt.min(), Nanos(40));
    }

    /// P-44
    #[test]
    fn an_ack_delay_longer_than_the_sample_is_not_believed() {
        let mut rtt = Rtt::new(Instant(0));
        rtt.sample(Instant(0), Nanos(100), Nanos(5_000));
        assert_eq!(rtt.smoothed(), Nanos(100));
    }
}
