//! A ring as its worker serves it: indices, notifications, and the heads it has taken.
//!
//! Knows split virtqueues (virtio 1.2, section 2.7); does not know what a chain means, nor vhost-user. Called by `disk`. The record of what is in flight that
//! survives the process has its place in [`ServedRing::start`], which decides what is taken first, and in [`ServedRing::take`] and [`ServedRing::give`].

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::Ordering;

use cirro_protocol::time::Instant;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::guest_memory::GuestMemory;
use crate::mailbox::Reply;
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

/// A ring that stopped with requests unfinished: they are issued again when the same ring starts where it stopped.
#[derive(Debug)]
pub struct Parked {
    queue: QueueState,
    heads: Vec<u16>,
}

/// A stop that was asked for.
#[derive(Debug)]
pub struct Stopping {
    /// When waiting ends.
    pub deadline: Instant,
    /// Who waits for the answer.
    pub reply: Reply,
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
    /// Heads taken and not given back, one bit each.
    taken: [u64; QUEUE_SIZE_MAX as usize / 64],
    live: u16,
    /// Heads to take before those of the ring.
    again: VecDeque<u16>,
    used_since_signal: bool,
    /// The guest was asked to tell of new buffers.
    listening: bool,
}

impl ServedRing {
    /// Starts the ring. It is looked at in the next turn without waiting for a kick, and the guest is signalled once: some drivers lean on it.
    pub fn start(
        memory: &GuestMemory,
        state: QueueState,
        call: Option<File>,
        parked: Option<Parked>,
    ) -> ServedRing {
        let mut queue = Queue::try_from(QueueState { ready: true, ..state }).unwrap_or_default();
        let valid = queue.ready() && queue.is_valid(memory.regions());
        let mut again = VecDeque::new();
        if let Some(parked) = parked.filter(|parked| valid && parked.is_of(&state, &queue, memory)) {
            // What the front-end says it should start with is at most the used index; what was taken is known better here.
            queue.set_next_avail(parked.queue.next_avail);
            again = parked.heads.into();
        }
        ServedRing {
            queue,
            call,
            enabled: true,
            stopping: None,
            broken: (!valid).then_some(Broken::Outside),
            taken: [0; QUEUE_SIZE_MAX as usize / 64],
            live: 0,
            again,
            used_since_signal: true,
            listening: true,
        }
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
        match self.next_head(memory) {
            Ok(Some(head)) => {
                self.taken[usize::from(head) / 64] |= 1 << (head % 64);
                self.live += 1;
                self.stop_listening(memory);
                Ok(Some(head))
            }
            Ok(None) => Ok(None),
            Err(broken) => {
                self.broken = Some(broken);
                Err(broken)
            }
        }
    }

    fn next_head(&mut self, memory: &GuestMemory) -> Result<Option<u16>, Broken> {
        let head = match self.again.pop_front() {
            Some(head) => head,
            None => match self.pop(memory)? {
                Some(head) => head,
                None => return Ok(None),
            },
        };
        if head >= self.queue.size() {
            return Err(Broken::HeadOutside);
        }
        if self.taken[usize::from(head) / 64] & 1 << (head % 64) != 0 {
            return Err(Broken::HeadTwice);
        }
        Ok(Some(head))
    }

    fn pop(&mut self, memory: &GuestMemory) -> Result<Option<u16>, Broken> {
        let regions = memory.regions();
        let available = self.queue.avail_idx(regions, Ordering::Acquire).map_err(|_| Broken::Outside)?;
        let ahead = available.0.wrapping_sub(self.queue.next_avail());
        if ahead > self.queue.size() {
            return Err(Broken::IndexJump);
        }
        if ahead == 0 {
            return Ok(None);
        }
        let chain = self.queue.pop_descriptor_chain(regions).ok_or(Broken::Outside)?;
        Ok(Some(chain.head_index()))
    }

    /// Gives a head back that was taken: `used_bytes` were written into its buffers.
    pub fn give(&mut self, memory: &GuestMemory, head: u16, used_bytes: u32) {
        self.forget(head);
        match self.queue.add_used(memory.regions(), head, used_bytes) {
            Ok(()) => self.used_since_signal = true,
            // The used ring went away with its region: there is nobody to tell.
            Err(_) => self.broken = Some(Broken::Outside),
        }
    }

    fn forget(&mut self, head: u16) {
        let (word, bit) = (usize::from(head) / 64, 1 << (head % 64));
        assert!(self.taken[word] & bit != 0, "head {head} ends twice");
        self.taken[word] &= !bit;
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

    /// Ends the ring. `unfinished` are the heads that were taken and will not be given back, oldest first; gives what to answer and what to keep.
    pub fn end(mut self, unfinished: Vec<u16>) -> (u16, Parked, Option<Stopping>) {
        for head in &unfinished {
            self.forget(*head);
        }
        assert_eq!(self.live, 0, "every head that was taken was given back or is known as unfinished");
        let mut heads = unfinished;
        heads.extend(self.again.drain(..));
        // What is unfinished counts as taken: next_avail = used index + live.
        let queue = self.queue.state();
        (queue.next_avail, Parked { queue, heads }, self.stopping)
    }
}

impl Parked {
    /// Requests that wait here.
    pub fn len(&self) -> usize {
        self.heads.len()
    }

    /// True when nothing waits.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// True if a ring that starts with `state` is the one that stopped, where it stopped: the same place and used index, and an available index that
    /// covers all that was taken. A driver that began anew is back at index 0.
    fn is_of(&self, state: &QueueState, queue: &Queue, memory: &GuestMemory) -> bool {
        let place = |q: &QueueState| (q.desc_table, q.avail_ring, q.used_ring, q.size, q.next_used);
        let available = queue.avail_idx(memory.regions(), Ordering::Acquire);
        let covered = available.is_ok_and(|index| index.0.wrapping_sub(self.queue.next_avail) <= state.size);
        let base_fits = state.next_avail == self.queue.next_avail || state.next_avail == self.queue.next_used;
        place(&self.queue) == place(state) && covered && base_fits
    }
}
