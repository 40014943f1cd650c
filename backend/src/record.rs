//! The record of what is in flight: which heads of each ring were taken and not given back, in memory that outlives the process.
//!
//! Knows where a ring lies and what its two indices say; does not know requests or what a chain means. Called by `virtqueue`, which alone takes and gives.
//! The rules are P-90 to P-93 of docs/PROTOCOL.md; why they are as they are is in docs/decisions/0006-the-record-of-what-is-in-flight.md.
//!
//! A ring has a header and one word per head. Positions count the entries of the available ring that were taken, those of the used ring that were given;
//! both are wide, and their low 16 bits are the ring's indices. So at any moment
//!
//! ```text
//!    next position to take = used + foreign + live
//! ```
//!
//! with `live` the heads in flight, and `foreign` those that somebody else took before this record began (0 as a rule). Steps of one head, each a single
//! store that the death of the process can follow:
//!
//! ```text
//!    take   entry = INFLIGHT, position
//!    give   entry = PUBLISHING, used position, position  ->  used ring  ->  header.used + 1  ->  entry = FREE
//! ```

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::guest_memory::GuestMemory;
use crate::mapped::{Mapped, WORD_BYTES};
use crate::request::QUEUE_SIZE_MAX;

/// Says that a header is whole, and of this version.
const MAGIC: u64 = u64::from_be_bytes(*b"CIRROIF1");

/// Places in a ring's header, in words.
const MAGIC_AT: usize = 0;
const KEY_AT: usize = 1;
const FOREIGN_AT: usize = KEY_AT + KEY_WORDS;
const USED_AT: usize = FOREIGN_AT + 1;
/// Words of a key.
const KEY_WORDS: usize = 8;
/// Words of a header: two cache lines.
const HEADER_WORDS: usize = 16;
/// Words of a ring: the same for every size, so that a record fits whatever the next process offers.
const RING_WORDS: usize = HEADER_WORDS + QUEUE_SIZE_MAX as usize;
const _: () = assert!(USED_AT < HEADER_WORDS);

/// Bits of a position: at a million requests a second they last for two years without a stop of the ring.
const POSITION_BITS: u32 = 46;
const POSITION_MASK: u64 = (1 << POSITION_BITS) - 1;
const STATE_SHIFT: u32 = 62;
const FREE: u64 = 0;
const INFLIGHT: u64 = 1;
const PUBLISHING: u64 = 2;
const _: () = assert!(STATE_SHIFT == POSITION_BITS + u16::BITS);

/// The record of one disk.
#[derive(Clone, Debug)]
pub struct Record {
    memory: Mapped,
    boot: u128,
}

impl Record {
    /// Bytes for so many rings.
    pub const fn bytes(rings: u16) -> usize {
        rings as usize * RING_WORDS * WORD_BYTES
    }

    /// The record in `memory`, of [`Record::bytes`]; what a process of another `boot` left in it is of no use.
    pub fn new(memory: Mapped, boot: u128) -> Record {
        Record { memory, boot }
    }

    /// A record that ends with its last clone.
    pub fn in_memory(rings: u16) -> Record {
        Record::new(Mapped::in_memory(Record::bytes(rings)), 0)
    }

    /// The part of one ring, before its start.
    ///
    /// # Panics
    /// When the memory has no place for that ring.
    pub fn ring(&self, ring: u16) -> RingRecord {
        assert!(self.memory.len() >= Record::bytes(ring + 1), "the record has no place for ring {ring}");
        RingRecord {
            memory: self.memory.clone(),
            boot: self.boot,
            first: usize::from(ring) * RING_WORDS,
            used: 0,
            next: 0,
        }
    }
}

/// Where a ring is: what its record is recognised by and held against.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The guest's memory.
    pub memory: &'a GuestMemory,
    /// Its addresses and size.
    pub queue: &'a Queue,
}

impl Place<'_> {
    /// P-90: the file behind the used ring is the guest; memory without one is not told apart.
    fn key(&self, boot: u128) -> [u64; KEY_WORDS] {
        let region = self.memory.regions().find_region(GuestAddress(self.queue.used_ring()));
        let file = region.and_then(|region| region.file_offset()?.file().metadata().ok());
        let (device, inode) = file.map_or((0, 0), |file| (file.dev(), file.ino()));
        let queue = self.queue;
        let size = u64::from(queue.size());
        let (high, low) = ((boot >> 64) as u64, boot as u64);
        [high, low, device, inode, queue.desc_table(), queue.avail_ring(), queue.used_ring(), size]
    }

    fn used_idx(&self) -> Option<u16> {
        self.queue.used_idx(self.memory.regions(), Ordering::Acquire).ok().map(|index| index.0)
    }

    fn avail_idx(&self) -> Option<u16> {
        self.queue.avail_idx(self.memory.regions(), Ordering::Acquire).ok().map(|index| index.0)
    }

    /// The head at a position of the available ring (virtio 1.2, section 2.7.6).
    fn head_at(&self, position: u64) -> Option<u16> {
        let slot = position % u64::from(self.queue.size());
        let at = self.queue.avail_ring().checked_add(4 + 2 * slot)?;
        self.memory.regions().read_obj(GuestAddress(at)).ok().map(u16::from_le)
    }

    /// Head and length at a position of the used ring (virtio 1.2, section 2.7.8).
    fn used_at(&self, position: u64) -> Option<(u32, u32)> {
        let slot = position % u64::from(self.queue.size());
        let at = self.queue.used_ring().checked_add(4 + 8 * slot)?;
        let both: u64 = self.memory.regions().read_obj(GuestAddress(at)).ok().map(u64::from_le)?;
        Some((both as u32, (both >> 32) as u32))
    }
}

/// Why what was recorded is not of the ring that starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Other {
    /// Nothing is recorded.
    #[error("there is none")]
    Nothing,
    /// Another boot, guest or place.
    #[error("it is of another ring")]
    Ring,
    /// The used ring stands where nobody left it: the driver began anew, or another back-end served the ring.
    #[error("the used ring stands elsewhere")]
    Index,
    /// The available ring does not hold what was taken from it.
    #[error("the available ring holds other heads")]
    Heads,
    /// No process of ours wrote this.
    #[error("it is damaged")]
    Damaged,
}

/// How a ring starts.
#[derive(Debug, PartialEq, Eq)]
pub struct Opened {
    /// Where the used ring stands.
    pub used_idx: u16,
    /// The entry of the available ring to take next.
    pub next_avail: u16,
    /// Heads that were in flight, to be issued again in this order.
    pub again: Vec<u16>,
    /// What was recorded is discarded: why, and how many heads were in flight in it.
    pub discarded: Option<(Other, usize)>,
}

/// The record of one ring.
#[derive(Debug)]
pub struct RingRecord {
    memory: Mapped,
    boot: u128,
    /// Its first word.
    first: usize,
    /// Entries of the used ring given so far, wide.
    used: u64,
    /// The next position of the available ring, wide.
    next: u64,
}

/// What a record of this very ring says.
struct Found {
    used: u64,
    next: u64,
    /// In the order in which they were taken.
    live: Vec<Live>,
    /// The head that was published and not yet free.
    published: Option<u16>,
}

/// A head in flight.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Live {
    position: u64,
    head: u16,
}

/// The words of a ring, taken apart.
struct Entries {
    live: Vec<Live>,
    /// The one that was being published, and its used position.
    publishing: Option<(Live, u16)>,
}

impl RingRecord {
    /// Starts the ring: goes on with what is recorded if it is of this very ring, else begins anew at `base`, where the front-end says. `None`: the ring is not
    /// in guest memory.
    pub fn open(&mut self, place: Place<'_>, base: u16) -> Option<Opened> {
        let used_idx = place.used_idx()?;
        match self.find(place, used_idx) {
            Ok(found) => {
                let again = found.live.iter().map(|live| live.head).collect();
                self.go_on(found);
                Some(Opened { used_idx, next_avail: self.next as u16, again, discarded: None })
            }
            Err(other) => {
                let lost = (0..QUEUE_SIZE_MAX).filter(|head| state(self.load(*head)) != FREE).count();
                self.begin(place, used_idx, base);
                let discarded = (other != Other::Nothing).then_some((other, lost));
                Some(Opened { used_idx, next_avail: base, again: Vec::new(), discarded })
            }
        }
    }

    /// A head was taken off the available ring. To be called in the order of that ring, and before anything is done for the head.
    pub fn take(&mut self, head: u16) {
        self.store(head, word(INFLIGHT, 0, self.next));
        self.next += 1;
    }

    /// A head goes back: `publish` puts it into the used ring.
    ///
    /// # Errors
    /// Those of `publish`. The ring has no memory any more then, and nothing of it will be issued again.
    pub fn give<E>(&mut self, head: u16, publish: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let position = self.load(head) & POSITION_MASK;
        self.store(head, word(PUBLISHING, self.used as u16, position));
        if let Err(error) = publish() {
            self.at(MAGIC_AT).store(0, Ordering::Release);
            return Err(error);
        }
        self.used += 1;
        self.at(USED_AT).store(self.used, Ordering::Release);
        self.store(head, FREE);
        Ok(())
    }

    fn at(&self, index: usize) -> &AtomicU64 {
        self.memory.word(self.first + index)
    }

    fn load(&self, head: u16) -> u64 {
        self.at(HEADER_WORDS + usize::from(head)).load(Ordering::Acquire)
    }

    fn store(&self, head: u16, word: u64) {
        self.at(HEADER_WORDS + usize::from(head)).store(word, Ordering::Release);
    }

    /// What is recorded, if it is of this ring and the ring stands where it was left. Nothing is believed before it was held against the ring, and
    /// nothing is changed.
    fn find(&self, place: Place<'_>, used_idx: u16) -> Result<Found, Other> {
        let read = |index| self.at(index).load(Ordering::Acquire);
        if read(MAGIC_AT) != MAGIC {
            return Err(Other::Nothing);
        }
        if (KEY_AT..).zip(place.key(self.boot)).any(|(index, part)| read(index) != part) {
            return Err(Other::Ring);
        }
        let (foreign, recorded) = (read(FOREIGN_AT), read(USED_AT));
        if foreign > u64::from(u16::MAX) || recorded >= POSITION_MASK - 2 * u64::from(u16::MAX) {
            return Err(Other::Damaged);
        }
        let Entries { mut live, publishing } = self.entries(place.queue.size())?;
        let (used, published) = self.published(place, used_idx, recorded, publishing, &mut live)?;
        // A ring that came round to 0 and one that begins there differ in what was used last.
        if used > 0 && used_idx == 0 && place.used_at(used - 1).is_none_or(|(_, len)| len == 0) {
            return Err(Other::Index);
        }
        live.sort_unstable();
        let next = used + foreign + live.len() as u64;
        check_heads(place, next, &live)?;
        Ok(Found { used, next, live, published })
    }

    fn entries(&self, size: u16) -> Result<Entries, Other> {
        let mut entries = Entries { live: Vec::new(), publishing: None };
        for head in 0..QUEUE_SIZE_MAX {
            let word = self.load(head);
            let live = Live { position: word & POSITION_MASK, head };
            match state(word) {
                FREE => {}
                _ if head >= size => return Err(Other::Damaged),
                INFLIGHT => entries.live.push(live),
                PUBLISHING if entries.publishing.is_none() => {
                    entries.publishing = Some((live, (word >> POSITION_BITS) as u16));
                }
                _ => return Err(Other::Damaged),
            }
        }
        Ok(entries)
    }

    /// How far the used ring was written, and which head that ended. One that was being published and is not in the used ring yet goes to `live`.
    fn published(
        &self,
        place: Place<'_>,
        used_idx: u16,
        recorded: u64,
        publishing: Option<(Live, u16)>,
        live: &mut Vec<Live>,
    ) -> Result<(u64, Option<u16>), Other> {
        let ahead = used_idx.wrapping_sub(recorded as u16);
        match (publishing, ahead) {
            (None, 0) => Ok((recorded, None)),
            (Some((one, at)), 0) if at == recorded as u16 => {
                live.push(one);
                Ok((recorded, None))
            }
            (Some((one, at)), 0) if at == (recorded as u16).wrapping_sub(1) => Ok((recorded, Some(one.head))),
            (Some((one, at)), 1) if at == recorded as u16 => match place.used_at(recorded) {
                Some((head, _)) if head == u32::from(one.head) => Ok((recorded + 1, Some(one.head))),
                Some(_) | None => Err(Other::Heads),
            },
            (Some(_), 0) => Err(Other::Damaged),
            (None | Some(_), _) => Err(Other::Index),
        }
    }

    /// Takes up a record of this ring. Each store leaves one that says the same.
    fn go_on(&mut self, found: Found) {
        (self.used, self.next) = (found.used, found.next);
        self.at(USED_AT).store(found.used, Ordering::Release);
        if let Some(head) = found.published {
            self.store(head, FREE);
        }
        for Live { position, head } in found.live {
            self.store(head, word(INFLIGHT, 0, position));
        }
    }

    /// Begins a record of this ring; it counts once the magic number is there.
    fn begin(&mut self, place: Place<'_>, used_idx: u16, base: u16) {
        let foreign = base.wrapping_sub(used_idx);
        self.used = u64::from(used_idx);
        self.next = self.used + u64::from(foreign);
        self.at(MAGIC_AT).store(0, Ordering::Release);
        for head in 0..QUEUE_SIZE_MAX {
            self.store(head, FREE);
        }
        for (index, part) in (KEY_AT..).zip(place.key(self.boot)) {
            self.at(index).store(part, Ordering::Release);
        }
        self.at(FOREIGN_AT).store(u64::from(foreign), Ordering::Release);
        self.at(USED_AT).store(self.used, Ordering::Release);
        self.at(MAGIC_AT).store(MAGIC, Ordering::Release);
    }
}

/// P-92: a live head must still stand at its position of the available ring, as far as that can be said. Completion is out of order, so a head may be in flight
/// while the guest uses its entry again for others, and the guest may have written entries that its index does not cover yet. But it has only `size`
/// descriptors: with `live` heads in flight, none of the last `live` entries that were taken can have been written over.
fn check_heads(place: Place<'_>, next: u64, live: &[Live]) -> Result<(), Other> {
    let ahead = place.avail_idx().ok_or(Other::Ring)?.wrapping_sub(next as u16);
    if ahead > place.queue.size() {
        return Err(Other::Heads);
    }
    if live.windows(2).any(|pair| pair[0].position == pair[1].position) {
        return Err(Other::Damaged);
    }
    for one in live {
        if one.position >= next {
            return Err(Other::Damaged);
        }
        let can_be_told = next - one.position <= live.len() as u64;
        if can_be_told && place.head_at(one.position) != Some(one.head) {
            return Err(Other::Heads);
        }
    }
    Ok(())
}

fn word(state: u64, used_position: u16, position: u64) -> u64 {
    state << STATE_SHIFT | u64::from(used_position) << POSITION_BITS | position & POSITION_MASK
}

fn state(word: u64) -> u64 {
    word >> STATE_SHIFT
}
