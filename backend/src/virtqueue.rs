//! A ring as its worker serves it: indices, notifications, and the heads it has taken.
//!
//! Knows split virtqueues (virtio 1.2, section 2.7) and keeps the record of what is in flight, which decides what is taken first when a ring starts; does not
//! know what a chain means, nor vhost-user. Called by `disk`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::Ordering;

use cirro_protocol::time::Instant;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::guest_memory::GuestMemory;
use crate::mailbox::Reply;
use crate::record::{Other, Place, RingRecord};
use crate::request::{QUEUE_SIZE_MAX, Table};

/// `VRING_AVAIL_F_NO_INTERRUPT` (virtio 1.2, section 2.7.6), which virtio-queue does not look at.
const NO_INTERRUPT: u16 = 1;

/// How a guest broke its ring. Nothing more is taken from such a ring until it starts again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Its parts are not in guest memory, or misaligned.
    #[error("the ring is not in guest memory")]
    Outside,
    /// The available index is more than the ring's size ahead.
    #[error("the available index jumped")]
    IndexJump,
    /// A head that is no descriptor of the table.
    #[error("a head is outside of the table")]
    HeadOutside,
    /// A head that is still in flight.
    #[error("a head was made available while it is in flight")]
    HeadTwice,
}

/// A stop that was asked for.
#[derive(Debug)]
pub struct Stopping {
    /// When waiting ends.
    pub deadline: Instant,
    /// Who waits for the answer.
    pub reply: Reply,
}

/// What a ring found recorded at its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Started {
    /// Heads to be issued again.
    pub again: usize,
    /// A record that is not this ring's: why, and how many heads were in flight in it.
    pub discarded: Option<(Other, usize)>,
}

/// The worker's half of a ring that was started.
#[derive(Debug)]
pub struct ServedRing {
    queue: Queue,
    /// Where the guest is told that something was used.
    pub call: Option<File>,
    /// The front-end lets the ring be served.
    pub enabled: bool,
    /// Set while a stop is under way: nothing is taken any more.
    pub stopping: Option<Stopping>,
    broken: Option<Broken>,
    /// The available index as it was seen last: up to it there are heads to take.
    available: u16,
    record: RingRecord,
    /// Heads off the available ring and not given back, one bit each.
    taken: [u64; QUEUE_SIZE_MAX as usize / 64],
    /// Those of them that were handed out.
    live: u16,
    /// The others, which were in flight when the ring started: to be handed out first.
    again: VecDeque<u16>,
    used_since_signal: bool,
    /// The guest was asked to tell of new buffers.
    listening: bool,
}

impl ServedRing {
    /// Starts the ring. It is looked at in the next turn without waiting for a kick, and the guest is signalled once: some drivers lean on it. What `record`
    /// says is in flight is handed out again, if it is of this very ring.
    pub fn start(
        memory: &GuestMemory,
        state: QueueState,
        call: Option<File>,
        mut record: RingRecord,
    ) -> (ServedRing, Started) {
        let mut queue = Queue::try_from(QueueState { ready: true, ..state }).unwrap_or_default();
        let valid = queue.ready() && queue.is_valid(memory.regions());
        let opened =
            if valid { record.open(Place { memory, queue: &queue }, state.next_avail) } else { None };
        let mut served = ServedRing {
            queue: Queue::default(),
            call,
            enabled: true,
            stopping: None,
            broken: opened.is_none().then_some(Broken::Outside),
            available: 0,
            record,
            taken: [0; QUEUE_SIZE_MAX as usize / 64],
            live: 0,
            again: VecDeque::new(),
            used_since_signal: true,
            listening: true,
        };
        let mut started = Started::default();
        if let Some(opened) = opened {
            // What the front-end says is a guess of somebody who did not see what was taken.
            queue.set_next_used(opened.used_idx);
            queue.set_next_avail(opened.next_avail);
            opened.again.iter().for_each(|head| served.set_taken(*head));
            started = Started { again: opened.again.len(), discarded: opened.discarded };
            served.again = opened.again.into();
        }
        served.available = queue.next_avail();
        served.queue = queue;
        (served, started)
    }

    /// Where its chains start.
    pub fn table(&self) -> Table {
        Table { address: self.queue.desc_table(), size: self.queue.size() }
    }

    /// Heads taken and not given back.
    pub fn live(&self) -> u16 {
        self.live
    }

    /// The next head. `Ok(None)`: there is none now.
    ///
    /// # Errors
    /// [`Broken`], once; afterwards the ring has nothing more.
    pub fn take(&mut self, memory: &GuestMemory) -> Result<Option<u16>, Broken> {
        if self.broken.is_some() || !self.enabled || self.stopping.is_some() {
            return Ok(None);
        }
        let head = match self.again.pop_front() {
            Some(head) => head,
            None => match self.take_new(memory) {
                Ok(Some(head)) => head,
                Ok(None) => return Ok(None),
                Err(broken) => {
                    self.broken = Some(broken);
                    return Err(broken);
                }
            },
        };
        self.live += 1;
        self.stop_listening(memory);
        Ok(Some(head))
    }

    /// A head that was in flight when the ring started and was not handed out since: for a ring that stops.
    pub fn take_again(&mut self) -> Option<(Table, u16)> {
        let head = self.again.pop_front()?;
        self.live += 1;
        Some((self.table(), head))
    }

    fn take_new(&mut self, memory: &GuestMemory) -> Result<Option<u16>, Broken> {
        let Some(head) = self.pop(memory)? else { return Ok(None) };
        if head >= self.queue.size() {
            return Err(Broken::HeadOutside);
        }
        if self.is_taken(head) {
            return Err(Broken::HeadTwice);
        }
        self.set_taken(head);
        self.record.take(head);
        Ok(Some(head))
    }

    fn is_taken(&self, head: u16) -> bool {
        self.taken[usize::from(head) / 64] & 1 << (head % 64) != 0
    }

    fn set_taken(&mut self, head: u16) {
        self.taken[usize::from(head) / 64] |= 1 << (head % 64);
    }

    fn pop(&mut self, memory: &GuestMemory) -> Result<Option<u16>, Broken> {
        let (regions, next) = (memory.regions(), self.queue.next_avail());
        if self.available == next {
            let available = self.queue.avail_idx(regions, Ordering::Acquire).map_err(|_| Broken::Outside)?.0;
            if available.wrapping_sub(next) > self.queue.size() {
                return Err(Broken::IndexJump);
            }
            self.available = available;
            if available == next {
                return Ok(None);
            }
        }
        // The ring of heads comes after flags and index (virtio 1.2, section 2.7.6); that it lies in guest memory was checked when the ring started.
        let at = self.queue.avail_ring() + 4 + 2 * u64::from(next % self.queue.size());
        let head = regions.load::<u16>(GuestAddress(at), Ordering::Relaxed).map_err(|_| Broken::Outside)?;
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(Some(u16::from_le(head)))
    }

    /// Gives a head back that was taken: `used_bytes` were written into its buffers.
    pub fn give(&mut self, memory: &GuestMemory, head: u16, used_bytes: u32) {
        self.forget(head);
        let ServedRing { queue, record, .. } = self;
        match record.give(head, || queue.add_used(memory.regions(), head, used_bytes)) {
            Ok(()) => self.used_since_signal = true,
            // The used ring went away with its region: there is nobody to tell.
            Err(_) => self.broken = Some(Broken::Outside),
        }
    }

    fn forget(&mut self, head: u16) {
        assert!(self.is_taken(head), "head {head} ends twice");
        self.taken[usize::from(head) / 64] &= !(1 << (head % 64));
        self.live -= 1;
    }

    /// Tells the guest of what was used since the last time, if it wants to know. True if it was told.
    pub fn signal(&mut self, memory: &GuestMemory) -> bool {
        if !std::mem::take(&mut self.used_since_signal) || self.broken == Some(Broken::Outside) {
            return false;
        }
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(memory.regions()).unwrap_or(false)
        } else {
            // The store of the used index must be seen before the guest's flags are read.
            std::sync::atomic::fence(Ordering::SeqCst);
            let flags =
                memory.regions().load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed);
            flags.is_ok_and(|flags| u16::from_le(flags) & NO_INTERRUPT == 0)
        };
        wanted && self.call()
    }

    /// Signals the guest whatever it wants: when a ring starts.
    pub fn call(&self) -> bool {
        // A full or closed eventfd is the front-end's own doing.
        self.call.as_ref().is_some_and(|mut call| call.write(&1u64.to_ne_bytes()).is_ok())
    }

    /// Asks the guest to kick for new buffers. True if there are some already.
    pub fn listen(&mut self, memory: &GuestMemory) -> bool {
        if self.broken.is_some() || !self.enabled || self.stopping.is_some() {
            return false;
        }
        self.listening = true;
        !self.again.is_empty() || self.queue.enable_notification(memory.regions()).unwrap_or(false)
    }

    fn stop_listening(&mut self, memory: &GuestMemory) {
        if std::mem::take(&mut self.listening) {
            // An error here is found by the next pop.
            let _ = self.queue.disable_notification(memory.regions());
        }
    }

    /// Ends the ring. `unfinished` are the heads that were handed out and will not be given back: they stay in flight in the record. Gives what to answer:
    /// where the ring stands, how many heads are in flight, and to whom.
    pub fn end(mut self, unfinished: &[u16]) -> (u16, u16, Option<Stopping>) {
        for head in unfinished {
            self.forget(*head);
        }
        assert_eq!(self.live, 0, "every head that was handed out was given back or is known as unfinished");
        let in_flight = unfinished.len() + self.again.len();
        // What is unfinished counts as taken: next_avail = used index + live.
        (self.queue.next_avail(), in_flight as u16, self.stopping)
    }
}
