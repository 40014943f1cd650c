//! The earliest timer of each of many: set one, take those that are due.
//!
//! Knows numbers of entries and times, nothing of what waits. Entries are looked at by the group: a timer that is due costs a look at
//! each group and at each entry of its own, so that a busy session's timers cost hardly more beside hundreds of idle ones. A bound is
//! lowered at once and raised only when its group is looked at: a later time, set again and again, costs one comparison.

use cirro_protocol::time::Instant;

/// Entries looked at together: near the square root of the most there are.
const GROUP: usize = 32;
/// No timer.
const NEVER: Instant = Instant(u64::MAX);

/// A time, or none, for each of some entries: as many as the highest number that was set.
pub(super) struct Deadlines {
    entries: Vec<Instant>,
    /// For each group, not later than the earliest of its entries.
    bounds: Vec<Instant>,
    /// Not later than the earliest bound.
    next: Instant,
}

impl Deadlines {
    pub(super) fn new() -> Deadlines {
        Deadlines { entries: Vec::new(), bounds: Vec::new(), next: NEVER }
    }

    #[inline]
    pub(super) fn set(&mut self, index: usize, deadline: Option<Instant>) {
        if index >= self.entries.len() {
            self.entries.resize(index + 1, NEVER);
            self.bounds.resize(index / GROUP + 1, NEVER);
        }
        let deadline = deadline.unwrap_or(NEVER);
        self.entries[index] = deadline;
        let bound = &mut self.bounds[index / GROUP];
        *bound = deadline.min(*bound);
        self.next = deadline.min(self.next);
    }

    /// Not later than the earliest deadline.
    pub(super) fn next(&self) -> Option<Instant> {
        (self.next != NEVER).then_some(self.next)
    }

    /// Calls `due` with every entry whose time has come; it has none then until another is set.
    #[inline]
    pub(super) fn take_due(&mut self, now: Instant, due: impl FnMut(usize)) {
        if now >= self.next {
            self.look(now, due);
        }
    }

    fn look(&mut self, now: Instant, mut due: impl FnMut(usize)) {
        let groups = self.entries.chunks_mut(GROUP).zip(&mut self.bounds).enumerate();
        for (group, (entries, bound)) in groups.filter(|(_, (_, bound))| **bound <= now) {
            *bound = NEVER;
            for (place, entry) in entries.iter_mut().enumerate() {
                if *entry <= now {
                    *entry = NEVER;
                    due(group * GROUP + place);
                }
                *bound = (*bound).min(*entry);
            }
        }
        self.next = self.bounds.iter().copied().min().unwrap_or(NEVER);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const ENTRIES: usize = 3 * GROUP - 5;

    proptest! {
        #[test]
        fn takes_what_is_due_and_nothing_else(steps in prop::collection::vec((0..ENTRIES, 0..200u64, any::<bool>()), 1..200)) {
            let (mut deadlines, mut model) = (Deadlines::new(), BTreeMap::new());
            for (now, (index, span, is_set)) in steps.into_iter().enumerate() {
                let now = Instant(now as u64);
                let deadline = is_set.then_some(Instant(now.0 + span));
                deadlines.set(index, deadline);
                model.remove(&index);
                model.extend(deadline.map(|deadline| (index, deadline)));
                let mut taken = Vec::new();
                deadlines.take_due(now, |index| taken.push(index));
                let expected: Vec<usize> =
                    model.iter().filter(|(_, time)| **time <= now).map(|(index, _)| *index).collect();
                prop_assert_eq!(taken, expected);
                model.retain(|_, time| *time > now);
                // The bound is never late, and never in the past: a turn after `take_due` does not look again.
                let earliest = model.values().copied().min();
                prop_assert!(deadlines.next().is_none_or(|next| next > now));
                prop_assert!(earliest.is_none_or(|earliest| deadlines.next().is_some_and(|next| next <= earliest)));
            }
        }
    }
}
