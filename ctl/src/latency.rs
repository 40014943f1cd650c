//! A histogram of latencies that one worker writes and everybody may read: a fixed array of counters, no lock, no allocation.
//!
//! Does not know what is timed. Part of [`crate::counter::OpMeter`], or used alone.
//! Why not the `hdrhistogram` crate: its histogram is written through `&mut` and read by a lock or a merge through a channel; ours is shared as it is, in
//! 9 KiB, and recording is a shift, a mask and two stores. The layout is the same idea: 32 linear steps in every power of two, so a
//! value is known to 1 part in 32 (3.1 %), and the maximum exactly.

use crate::counter::Counter;
use crate::report::LatencySummary;

/// Steps in a power of two: 2^5.
const STEP_BITS: u32 = 5;
const STEPS: usize = 1 << STEP_BITS;
/// Everything from 2^40 ns (18 minutes) on is in the last bucket.
const VALUE_BITS: u32 = 40;
/// The values below 32 each have a bucket; so has each of 32 steps in the powers 2^5 to 2^39.
const BUCKETS: usize = STEPS + (VALUE_BITS - STEP_BITS) as usize * STEPS;

const _: () = assert!(BUCKETS == 1152);

/// Latencies in nanoseconds, counted by size. One writer.
#[derive(Debug)]
pub struct Latency {
    buckets: [Counter; BUCKETS],
    ns_sum: Counter,
    ns_max: Counter,
}

impl Default for Latency {
    fn default() -> Latency {
        Latency {
            buckets: [const { Counter::new() }; BUCKETS],
            ns_sum: Counter::new(),
            ns_max: Counter::new(),
        }
    }
}

impl Latency {
    /// Counts one. The owning worker only.
    pub fn record(&self, ns: u64) {
        self.buckets[bucket_of(ns)].add(1);
        self.ns_sum.add(ns);
        if ns > self.ns_max.get() {
            self.ns_max.set(ns);
        }
    }

    /// The distribution now. Anybody; what is recorded meanwhile may be in it or not. Costs nothing where nothing was recorded: a worker
    /// makes five of every volume, five times a second.
    pub fn summary(&self) -> LatencySummary {
        let ns_sum = self.ns_sum.get();
        if ns_sum == 0 && self.buckets[0].get() == 0 {
            return LatencySummary::default();
        }
        let mut counts = [0; BUCKETS];
        counts.iter_mut().zip(&self.buckets).for_each(|(count, bucket)| *count = bucket.get());
        let count: u64 = counts.iter().sum();
        let ns_max = self.ns_max.get();
        // The maximum may lag behind the buckets by a record that is being made: then a quantile is at most it.
        let [ns_p50, ns_p99, ns_p99_9] =
            upper_quantiles(&counts, count, [50_000, 99_000, 99_900]).map(|ns| ns.min(ns_max));
        LatencySummary {
            count,
            ns_mean: ns_sum.checked_div(count).unwrap_or(0),
            ns_p50,
            ns_p99,
            ns_p99_9,
            ns_max,
        }
    }
}

/// The bucket of a value.
fn bucket_of(ns: u64) -> usize {
    let Some(shift) = ns.checked_ilog2().and_then(|bits| bits.checked_sub(STEP_BITS)) else {
        return ns as usize;
    };
    let step = (ns >> shift) as usize - STEPS;
    ((shift as usize + 1) * STEPS + step).min(BUCKETS - 1)
}

/// The largest value of a bucket that is not the last.
fn value_max(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let shift = bucket / STEPS - 1;
    let step = (bucket % STEPS + STEPS) as u64;
    ((step + 1) << shift) - 1
}

/// For each share, from small to large: the smallest bucket limit that at least so many of the values do not exceed; 0 without values.
fn upper_quantiles<const N: usize>(counts: &[u64; BUCKETS], count: u64, per_100_000: [u64; N]) -> [u64; N] {
    let ranks = per_100_000.map(|share| (u128::from(count) * u128::from(share)).div_ceil(100_000) as u64);
    let (mut found, mut next, mut below) = ([0; N], 0, 0);
    for (bucket, &n) in counts.iter().enumerate().filter(|&(_, &n)| n > 0) {
        below += n;
        while next < N && below >= ranks[next] {
            found[next] = if bucket == BUCKETS - 1 { u64::MAX } else { value_max(bucket) };
            next += 1;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_values_everything_is_zero() {
        assert_eq!(Latency::default().summary(), LatencySummary::default());
    }

    #[test]
    fn values_of_zero_are_values() {
        let latency = Latency::default();
        latency.record(0);
        latency.record(0);
        assert_eq!(latency.summary(), LatencySummary { count: 2, ..LatencySummary::default() });
    }

    #[test]
    fn quantiles_are_the_sorted_values_within_one_part_in_32() {
        let latency = Latency::default();
        // 1..=1000 microseconds: by arithmetic the p-quantile is 1000·p µs.
        for us in 1..=1000u64 {
            latency.record(us * 1000);
        }
        let seen = latency.summary();
        let within = |seen: u64, exact: u64| seen >= exact && seen <= exact + exact / 32;
        assert_eq!(seen.count, 1000);
        assert_eq!(seen.ns_mean, 500_500);
        assert!(within(seen.ns_p50, 500_000), "{seen:?}");
        assert!(within(seen.ns_p99, 990_000), "{seen:?}");
        assert!(within(seen.ns_p99_9, 999_000), "{seen:?}");
        assert_eq!(seen.ns_max, 1_000_000);
    }

    #[test]
    fn buckets_cover_every_value_without_gap_or_overlap() {
        for bucket in 0..BUCKETS - 1 {
            assert_eq!(bucket_of(value_max(bucket)), bucket);
            assert_eq!(bucket_of(value_max(bucket) + 1), bucket + 1);
        }
        assert_eq!(bucket_of(0), 0);
        assert_eq!(bucket_of(1 << 40), BUCKETS - 1);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn one_slow_request_in_a_thousand_shows_only_in_the_maximum() {
        let latency = Latency::default();
        (0..999).for_each(|_| latency.record(20));
        latency.record(u64::MAX);
        let seen = latency.summary();
        assert_eq!((seen.ns_p50, seen.ns_p99, seen.ns_p99_9, seen.ns_max), (20, 20, 20, u64::MAX));
        latency.record(u64::MAX);
        assert_eq!(latency.summary().ns_p99_9, u64::MAX, "two of 1001 are more than one in a thousand");
    }
}
