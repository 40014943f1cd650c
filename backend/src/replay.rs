//! The copy of what a node may still lose: completed writes, discards and zeroes that no flush covers yet, in memory that outlives the process (P-89).
//!
//! Knows entries and their order; does not know sessions, slots or the guest. Called by `unflushed`, which decides when; opened by `main`. The order that
//! makes it safe:
//!
//! 1. A change's entry is appended when its OK arrives and before the guest can see that: what a guest knows to be done is here or stable.
//! 2. Without room for it the change gets a flush of its own before it counts as done. The flush drops what was appended before.
//! 3. Entries stand in the order of the answers. The initiator has no two overlapping changes out (P-67), so it is the node's order for each byte.
//! 4. While one change is kept, every later one is: an older entry never outlives a newer one of the same bytes.
//! 5. A flush drops, when it is answered OK, what was appended before it was submitted, and no more: always the oldest entries, never from the middle.
//! 6. Entries belong to one incarnation of the node and one epoch of the volume. Another incarnation gets them all, oldest first, before anything else
//!    of the disk is issued; only after its last OK does the copy take its name. Another epoch never gets them: the bytes may be somebody else's.
//! 7. An entry counts once `head` says so (a `Release` store behind its bytes), and is gone once `tail` does. A process that dies in between leaves the
//!    copy as it was before the step. What cannot be right is an empty copy, and never a panic.
//!
//! Positions count bytes and only grow; a byte's place is its position modulo the capacity. When the copy is empty it begins again at the first place, so it
//! touches no more memory than it once had to hold.

use std::sync::atomic::Ordering;

use cirro_protocol::op::Op;
use cirro_protocol::types::{RANGE_SECTORS_MAX, REQUEST_BYTES_MAX, Uuid};
use vm_memory::VolatileSlice;

use crate::mapped::{Mapped, WORD_BYTES};

/// Says that a header is whole, and of this version.
const MAGIC: u64 = u64::from_be_bytes(*b"CIRRORP1");
/// Places in the header, in words.
const MAGIC_AT: usize = 0;
const BOOT_AT: usize = 1;
const CAPACITY_AT: usize = 3;
const INCARNATION_AT: usize = 4;
const EPOCH_AT: usize = 6;
const HEAD_AT: usize = 7;
const TAIL_AT: usize = 8;
const HELD_AT: usize = 9;
/// Bytes before the first entry: a page, which has space before the memory is given to [`Replay::new`].
pub const HEADER_BYTES: usize = 4096;
const _: () = assert!((HELD_AT + 1) * WORD_BYTES <= HEADER_BYTES);

/// Bytes of an entry before its data: position, offset, operation and length.
const ENTRY_BYTES: u64 = 24;
/// The largest entry: a part of a request is at most 1 MiB.
const ENTRY_BYTES_MAX: u64 = ENTRY_BYTES + REQUEST_BYTES_MAX as u64;
/// Capacity of a disk's copy: space is taken only as far as it is used.
pub const BYTES_DEFAULT: u64 = 64 << 20;
/// Smallest capacity: an empty copy always takes a part.
pub const CAPACITY_MIN: u64 = 2 << 20;
const _: () = assert!(ENTRY_BYTES_MAX <= CAPACITY_MIN);
/// Nobody writes so much; sums of positions never overflow below it.
const POSITION_MAX: u64 = 1 << 62;
/// Space is asked for in steps of this.
const SPACE_STEP: u64 = 1 << 20;

/// A change as it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Write, discard or write-zeroes.
    pub op: Op,
    /// First byte on the volume.
    pub offset: u64,
    /// Bytes of a write, else sectors.
    pub len: u32,
}

impl Entry {
    /// Bytes it takes, its data rounded up to a word.
    pub fn size(&self) -> u64 {
        ENTRY_BYTES + u64::from(self.data_bytes()).next_multiple_of(WORD_BYTES as u64)
    }

    fn data_bytes(&self) -> u32 {
        if self.op == Op::Write { self.len } else { 0 }
    }

    /// The entry that these words are at `position`; `None`: no process of ours wrote them there.
    fn parse([at, offset, what]: [u64; 3], position: u64) -> Option<Entry> {
        let op = [Op::Write, Op::Discard, Op::WriteZeroes].into_iter().find(|op| *op as u64 == what >> 32)?;
        let len_max = if op == Op::Write { REQUEST_BYTES_MAX as u32 } else { RANGE_SECTORS_MAX };
        let len = what as u32;
        (at == position && (1..=len_max).contains(&len)).then_some(Entry { op, offset, len })
    }
}

/// An entry in the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// What it says.
    pub entry: Entry,
    /// Where it begins.
    pub position: u64,
}

impl Kept {
    /// Where the next one begins.
    pub fn end(&self) -> u64 {
        self.position + self.entry.size()
    }
}

/// Whose unflushed writes they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Life {
    /// The start of the node that answered them.
    pub incarnation: Uuid,
    /// The volume's epoch they were written under.
    pub vol_epoch: u64,
}

/// The copy of one disk.
#[derive(Debug)]
pub struct Replay {
    memory: Mapped,
    /// Bytes for entries, as long as there are any.
    capacity: u64,
    /// Bytes for entries from when it is next empty.
    capacity_wanted: u64,
    /// Bytes for entries that have space, from the first place on.
    space: u64,
    head: u64,
    tail: u64,
    damaged: bool,
}

impl Replay {
    /// Bytes of memory for so many of entries.
    pub const fn bytes(capacity: u64) -> usize {
        HEADER_BYTES + capacity as usize
    }

    /// The copy in `memory`, which has [`Replay::bytes`] of `capacity` or more, with what an earlier process of this `boot` left in it.
    ///
    /// # Panics
    /// When the memory is too small, or the capacity below [`CAPACITY_MIN`].
    pub fn new(memory: Mapped, boot: u128, capacity: u64) -> Replay {
        let capacity = capacity & !(WORD_BYTES as u64 - 1);
        assert!(capacity >= CAPACITY_MIN && memory.len() >= Replay::bytes(capacity), "room for a change");
        let mut copy = Replay {
            memory,
            capacity,
            capacity_wanted: capacity,
            space: 0,
            head: 0,
            tail: 0,
            damaged: false,
        };
        copy.damaged = !copy.recover(boot);
        if copy.is_empty() {
            copy.begin(boot);
        }
        copy
    }

    /// A copy that ends with its last clone of memory.
    pub fn in_memory(capacity: u64) -> Replay {
        Replay::new(Mapped::in_memory(Replay::bytes(capacity)), 0, capacity)
    }

    /// Takes what lies there if it can be right. False: something lies there that cannot.
    fn recover(&mut self, boot: u128) -> bool {
        let capacity = self.load(CAPACITY_AT);
        if self.load(MAGIC_AT) != MAGIC || self.load_pair(BOOT_AT) != boot {
            self.store(HELD_AT, 0);
            return true;
        }
        let room = (self.memory.len() - HEADER_BYTES) as u64;
        let (head, tail) = (self.load(HEAD_AT), self.load(TAIL_AT));
        // `tail` is ahead for a moment when an empty copy begins again.
        if tail >= head {
            return true;
        }
        let words = [capacity, head, tail].iter().all(|word| word.is_multiple_of(WORD_BYTES as u64));
        if !words
            || !(CAPACITY_MIN..=room).contains(&capacity)
            || head - tail > capacity
            || head > POSITION_MAX
        {
            return false;
        }
        let intended = self.capacity;
        (self.capacity, self.head, self.tail) = (capacity, head, tail);
        let mut at = tail;
        while at < head {
            match self.entry_at(at).filter(|kept| kept.end() <= head) {
                Some(kept) => at = kept.end(),
                None => {
                    (self.capacity, self.head, self.tail) = (intended, 0, 0);
                    return false;
                }
            }
        }
        // Where entries lie there is space; between them and the first place there was once.
        let (from, to) = (tail % capacity, head % capacity);
        self.space = if from < to { to } else { capacity };
        true
    }

    /// Begins an empty copy; it counts once the magic number is there.
    fn begin(&mut self, boot: u128) {
        self.store(MAGIC_AT, 0);
        self.store_pair(BOOT_AT, boot);
        self.store(CAPACITY_AT, self.capacity);
        self.store(HEAD_AT, 0);
        self.store(TAIL_AT, 0);
        self.store(MAGIC_AT, MAGIC);
    }

    /// True if what was found in the memory could not be right; it is an empty copy now.
    pub fn was_damaged(&self) -> bool {
        self.damaged
    }

    /// True if every change that was answered is stable, as far as is known.
    pub fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// Bytes that entries take.
    pub fn bytes_kept(&self) -> u64 {
        self.head - self.tail
    }

    /// Bytes that entries can take.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Whose they are.
    pub fn life(&self) -> Life {
        let incarnation = Uuid(self.load_pair(INCARNATION_AT).to_le_bytes());
        Life { incarnation, vol_epoch: self.load(EPOCH_AT) }
    }

    /// They are this life's now: there are none, or all were written again. A process that dies in between leaves a name that nobody has, so they would be
    /// written again.
    pub fn set_life(&mut self, life: Life) {
        self.store_pair(INCARNATION_AT, u128::from_le_bytes(life.incarnation.0));
        self.store(EPOCH_AT, life.vol_epoch);
    }

    /// Sees to it that every place up to the position `end` can be stored to.
    fn make_space(&mut self, end: u64) -> bool {
        let needed = if end / self.capacity == self.head / self.capacity {
            end % self.capacity
        } else {
            self.capacity
        };
        while self.space < needed {
            let step = SPACE_STEP.min(self.capacity - self.space);
            if self.memory.reserve(HEADER_BYTES + self.space as usize, step as usize).is_err() {
                return false;
            }
            self.space += step;
        }
        true
    }

    /// Keeps a change that was answered OK. `fill` puts the data from its argument on into each part of its place. False: there is no room, nothing happened.
    #[must_use]
    pub fn append(&mut self, entry: Entry, mut fill: impl FnMut(u32, VolatileSlice<'_>)) -> bool {
        let size = entry.size();
        if self.bytes_kept() + size > self.capacity || !self.make_space(self.head + size) {
            return false;
        }
        let what = (entry.op as u64) << 32 | u64::from(entry.len);
        for (index, word) in (0..).zip([self.head, entry.offset, what]) {
            self.memory.write(self.place(self.head + index * WORD_BYTES as u64), &word.to_le_bytes());
        }
        for (from, place, len) in self.runs(self.head + ENTRY_BYTES, entry.data_bytes()) {
            fill(from, self.memory.slice(place, len as usize));
        }
        self.head += size;
        self.store(HEAD_AT, self.head);
        true
    }

    /// The position that the next entry will have: what a flush that is submitted now will cover lies before it.
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Everything before `position` is stable.
    pub fn drop_before(&mut self, position: u64) {
        let tail = position.min(self.head);
        if tail <= self.tail {
            return;
        }
        self.tail = tail;
        self.store(TAIL_AT, tail);
        if self.is_empty() {
            self.begin_again();
        }
    }

    /// An empty copy begins at its first place again. `tail` goes first: ahead of `head` it is an empty copy too. Positions go on, so one that was handed out
    /// before covers nothing that comes now.
    fn begin_again(&mut self) {
        if self.capacity != self.capacity_wanted {
            (self.capacity, self.space) = (self.capacity_wanted, 0);
            self.store(CAPACITY_AT, self.capacity);
        }
        let first = self.head.next_multiple_of(self.capacity);
        (self.head, self.tail) = (first, first);
        self.store(TAIL_AT, first);
        self.store(HEAD_AT, first);
    }

    /// The volume's epoch under which this disk may write and has not let go of; 0: none. It outlives the process as the entries do.
    pub fn held(&self) -> u64 {
        self.load(HELD_AT)
    }

    /// Sets it.
    pub fn set_held(&mut self, vol_epoch: u64) {
        self.store(HELD_AT, vol_epoch);
    }

    /// The oldest entry.
    pub fn first(&self) -> Option<Kept> {
        self.at(self.tail)
    }

    /// The entry at a position where one begins; `None` at the end.
    pub fn at(&self, position: u64) -> Option<Kept> {
        (position < self.head).then(|| self.entry_at(position).expect("what this process wrote, or checked"))
    }

    /// Copies data of a kept write from its byte `from` on.
    pub fn read(&self, position: u64, from: u32, into: &mut [u8]) {
        let start = position + ENTRY_BYTES + u64::from(from);
        for (at, place, len) in self.runs(start, into.len() as u32) {
            self.memory.read(place, &mut into[at as usize..(at + len) as usize]);
        }
    }

    fn entry_at(&self, position: u64) -> Option<Kept> {
        let word = |index: u64| {
            let mut bytes = [0; WORD_BYTES];
            self.memory.read(self.place(position + index * WORD_BYTES as u64), &mut bytes);
            u64::from_le_bytes(bytes)
        };
        let entry = Entry::parse([word(0), word(1), word(2)], position)?;
        Some(Kept { entry, position })
    }

    /// Where the byte at a position lies in the memory.
    fn place(&self, position: u64) -> usize {
        HEADER_BYTES + (position % self.capacity) as usize
    }

    /// The one or two places of `len` bytes from a position on: which byte comes first, where, and how many.
    fn runs(&self, position: u64, len: u32) -> impl Iterator<Item = (u32, usize, u32)> + use<> {
        let to_the_end = self.capacity - position % self.capacity;
        let first = to_the_end.min(u64::from(len)) as u32;
        let runs = [(0, self.place(position), first), (first, HEADER_BYTES, len - first)];
        runs.into_iter().filter(|(_, _, len)| *len > 0)
    }

    fn load(&self, index: usize) -> u64 {
        self.memory.word(index).load(Ordering::Acquire)
    }

    fn store(&self, index: usize, word: u64) {
        self.memory.word(index).store(word, Ordering::Release);
    }

    fn load_pair(&self, index: usize) -> u128 {
        u128::from(self.load(index)) << 64 | u128::from(self.load(index + 1))
    }

    fn store_pair(&self, index: usize, pair: u128) {
        self.store(index, (pair >> 64) as u64);
        self.store(index + 1, pair as u64);
    }
}
