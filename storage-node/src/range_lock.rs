//! Which writes, discards and zeroes of one volume may be in flight together: those that do not overlap.
//!
//! Knows ranges and the numbers their owner gave them; does not know what is written. A range that overlaps one in flight, or one that
//! waits already, waits its turn; so overlapping changes are done in the order they came. Reads do not come here.
//! Called by `node` around every change.

use std::collections::VecDeque;

/// Bytes `start..end` under change, with the number its owner knows it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// First byte.
    pub start: u64,
    /// First byte after it; larger than `start`.
    pub end: u64,
    /// The owner's number.
    pub id: u32,
}

impl Held {
    fn overlaps(&self, other: &Held) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// The ranges of one volume. Those in flight are disjoint and sorted; those that wait are in order of arrival.
#[derive(Debug)]
pub struct RangeLock {
    in_flight: Vec<Held>,
    waiting: VecDeque<Held>,
}

impl RangeLock {
    /// A lock with room for `ranges_max` ranges in flight and waiting together; its owner never asks for more.
    pub fn new(ranges_max: usize) -> RangeLock {
        RangeLock { in_flight: Vec::with_capacity(ranges_max), waiting: VecDeque::with_capacity(ranges_max) }
    }

    /// Ranges in flight and waiting.
    pub fn counts(&self) -> (usize, usize) {
        (self.in_flight.len(), self.waiting.len())
    }

    /// True: the range is in flight from now on. False: it waits, and [`RangeLock::release`] will name it.
    pub fn acquire(&mut self, range: Held) -> bool {
        assert!(range.start < range.end, "a change has bytes");
        if self.blocked(&range, self.waiting.len()) {
            self.waiting.push_back(range);
            return false;
        }
        self.enter(range);
        true
    }

    /// The range that starts at `start` is done. The ids of those that may go now are appended to `startable`, in order; they are in
    /// flight from now on.
    pub fn release(&mut self, start: u64, startable: &mut Vec<u32>) {
        let at = self.in_flight.binary_search_by_key(&start, |held| held.start);
        let done = self.in_flight.remove(at.expect("a range that is released is in flight"));
        // Only what overlaps the released range can have waited for it.
        let mut index = 0;
        while index < self.waiting.len() {
            let candidate = self.waiting[index];
            if candidate.overlaps(&done) && !self.blocked(&candidate, index) {
                self.waiting.remove(index);
                self.enter(candidate);
                startable.push(candidate.id);
            } else {
                index += 1;
            }
        }
    }

    fn enter(&mut self, range: Held) {
        let at = self.in_flight.partition_point(|held| held.start < range.start);
        self.in_flight.insert(at, range);
    }

    /// True if the range overlaps one in flight or one of the first `ahead` that wait.
    fn blocked(&self, range: &Held, ahead: usize) -> bool {
        // Disjoint and sorted by start, so sorted by end too: the first that ends after our start is the only one to look at.
        let at = self.in_flight.partition_point(|held| held.end <= range.start);
        self.in_flight.get(at).is_some_and(|held| held.start < range.end)
            || self.waiting.iter().take(ahead).any(|held| held.overlaps(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_overlapping_write_waits_for_the_first_and_keeps_its_order() {
        let mut lock = RangeLock::new(8);
        let mut go = Vec::new();
        assert!(lock.acquire(Held { start: 0, end: 8, id: 1 }));
        assert!(!lock.acquire(Held { start: 4, end: 12, id: 2 }));
        assert!(!lock.acquire(Held { start: 8, end: 10, id: 3 }), "overlaps number 2, which came first");
        assert!(lock.acquire(Held { start: 12, end: 16, id: 4 }), "neighbours do not overlap");
        lock.release(0, &mut go);
        assert_eq!(go, [2]);
        lock.release(4, &mut go);
        assert_eq!(go, [2, 3]);
        assert_eq!(lock.counts(), (2, 0));
    }

    /// The same promise, written the slow and obvious way: a list in order of arrival; a range goes when nothing before it overlaps.
    #[derive(Default)]
    struct Naive(Vec<(Held, bool)>);

    impl Naive {
        fn start_what_may(&mut self) -> Vec<u32> {
            let mut started = Vec::new();
            for index in 0..self.0.len() {
                let (range, going) = self.0[index];
                let earlier = &self.0[..index];
                if !going && !earlier.iter().any(|(e, _)| e.start < range.end && range.start < e.end) {
                    self.0[index].1 = true;
                    started.push(range.id);
                }
            }
            started
        }
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_list_searched_in_order(steps in prop::collection::vec((any::<bool>(), 0u64..40, 1u64..12, any::<u16>()), 1..150)) {
            let (mut lock, mut naive) = (RangeLock::new(64), Naive::default());
            for (id, (acquire, start, len, pick)) in steps.into_iter().enumerate() {
                let going: Vec<Held> = naive.0.iter().filter(|(_, going)| *going).map(|(held, _)| *held).collect();
                if acquire || going.is_empty() {
                    let range = Held { start, end: start + len, id: id as u32 };
                    naive.0.push((range, false));
                    let started = naive.start_what_may();
                    prop_assert_eq!(lock.acquire(range), started == [range.id]);
                } else {
                    let done = going[usize::from(pick) % going.len()];
                    naive.0.retain(|(held, _)| held.id != done.id);
                    let mut started = Vec::new();
                    lock.release(done.start, &mut started);
                    prop_assert_eq!(started, naive.start_what_may());
                }
                let going: Vec<Held> = naive.0.iter().filter(|(_, going)| *going).map(|(held, _)| *held).collect();
                prop_assert_eq!(lock.counts(), (going.len(), naive.0.len() - going.len()));
            }
        }
    }
}
