//! Snapshots of a worker's state for other threads: written a few times a second, off the data path, and never waited for.
//!
//! Does not know what is in a snapshot. The worker holds the [`Publisher`], the control thread a [`Reader`].
//! The price of a turn is one comparison. The worker only ever tries the lock; when a reader has it, the snapshot is made at the next turn after a millisecond.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use cirro_protocol::time::{Instant, Nanos};

/// Time between two snapshots: five a second.
pub const SNAPSHOT_NS_MIN: Nanos = Nanos::from_millis(200);
/// Time until the next try when a reader holds the lock.
const RETRY_NS: Nanos = Nanos::from_millis(1);

/// The worker's end.
#[derive(Debug)]
pub struct Publisher<T> {
    shared: Arc<Mutex<T>>,
    due: Instant,
    /// Something may have changed since the last snapshot.
    stale: bool,
}

/// A reader's end. Clones read the same.
#[derive(Debug)]
pub struct Reader<T> {
    shared: Arc<Mutex<T>>,
}

impl<T> Publisher<T> {
    /// Both ends, with what readers see before the first turn.
    pub fn new(initial: T) -> (Publisher<T>, Reader<T>) {
        let shared = Arc::new(Mutex::new(initial));
        let reader = Reader { shared: Arc::clone(&shared) };
        (Publisher { shared, due: Instant::default(), stale: true }, reader)
    }

    /// Called once in every turn: lets `fill` bring the snapshot up to date when it is time to. `fill` overwrites in place, so that strings
    /// and vectors keep their memory.
    pub fn turn(&mut self, now: Instant, fill: impl FnOnce(&mut T)) {
        self.stale = true;
        if now < self.due {
            return;
        }
        let mut snapshot = match self.shared.try_lock() {
            Ok(snapshot) => snapshot,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                self.due = now + RETRY_NS;
                return;
            }
        };
        fill(&mut snapshot);
        self.stale = false;
        self.due = now + SNAPSHOT_NS_MIN;
    }

    /// When the worker must take a turn even if nothing happens, so that what it last did is seen; None: the snapshot is up to date.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.stale.then_some(self.due)
    }
}

impl<T> Reader<T> {
    /// Looks at the latest snapshot; be short.
    pub fn with<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.lock())
    }

    /// A copy of the latest snapshot.
    pub fn read(&self) -> T
    where
        T: Clone,
    {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, T> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Clone for Reader<T> {
    fn clone(&self) -> Reader<T> {
        Reader { shared: Arc::clone(&self.shared) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Instant = Instant(1_000_000_000);

    #[test]
    fn snapshots_are_made_at_most_five_times_a_second() {
        let (mut publisher, reader) = Publisher::new(0);
        let mut made = 0;
        for ms in 0..1000 {
            publisher.turn(START + Nanos::from_millis(ms), |seen| {
                made += 1;
                *seen = ms;
            });
        }
        assert_eq!(made, 5);
        assert_eq!(reader.read(), 800);
    }

    #[test]
    fn the_last_change_before_a_worker_falls_asleep_is_seen() {
        let (mut publisher, reader) = Publisher::new("start");
        publisher.turn(START, |seen| *seen = "open");
        assert_eq!(publisher.poll_timeout(), None, "up to date: the worker may sleep for ever");
        publisher.turn(START + Nanos(5), |seen| *seen = "lost");
        assert_eq!(reader.read(), "open");
        let wake = publisher.poll_timeout().expect("a wake-up to show the change");
        publisher.turn(wake, |seen| *seen = "lost");
        assert_eq!(reader.read(), "lost");
        assert_eq!(publisher.poll_timeout(), None);
    }

    #[test]
    fn a_reader_that_holds_on_never_blocks_the_worker() {
        let (mut publisher, reader) = Publisher::new(1);
        reader.with(|seen| {
            publisher.turn(START, |seen| *seen = 2);
            assert_eq!(*seen, 1);
            assert_eq!(publisher.poll_timeout(), Some(START + Nanos::from_millis(1)));
        });
        publisher.turn(START + Nanos::from_millis(1), |seen| *seen = 2);
        assert_eq!(reader.read(), 2);
    }
}
