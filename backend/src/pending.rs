//! The requests in flight of one disk, and the one place that can forget none: dropping an unfinished one is a bug that panics.
//!
//! Maps a guest's request to one or several protocol slots and back; keeps where its data lies in the guest, what is still out, and how it went.
//! Does not know rings, frames or memory contents. Called by `worker`.

use std::collections::VecDeque;

use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{REQUEST_BYTES_MAX, SLOTS_MAX, Slot};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

use crate::guest_memory::GuestRun;

/// Requests at most: the worker takes one off a ring only when a slot is free and nothing waits, so each has a slot but the one that is being cut up.
pub const ENTRIES_MAX: usize = SLOTS_MAX + 1;

/// A request as the worker took it off a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The ring it came from.
    pub ring: u16,
    /// Its head on that ring.
    pub head: u16,
    /// Where its status byte goes.
    pub status_at: u64,
    /// Read, write, flush, discard or write-zeroes.
    pub op: Op,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes; sectors for a discard or write-zeroes; 0 for a flush.
    pub len: u32,
    /// Flush before it counts as done (the guest asked for write-through).
    pub flush_after: bool,
}

/// A part of a request that fits a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// What is to be done.
    pub op: Op,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes; sectors for a discard or write-zeroes.
    pub len: u32,
}

/// A request that has ended: what its ring and its statistics need to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// As it was admitted.
    pub admission: Admission,
    /// The status byte.
    pub status: u8,
    /// Bytes written into the guest, status byte included.
    pub used_bytes: u32,
    /// From the ring to the first slot.
    pub queued: Nanos,
    /// From the first slot to the end.
    pub served: Nanos,
}

impl Finished {
    /// A request that fails at once.
    pub fn refused(admission: Admission) -> Finished {
        let status = VIRTIO_BLK_S_IOERR as u8;
        Finished { admission, status, used_bytes: 1, queued: Nanos(0), served: Nanos(0) }
    }
}

/// A request in flight. Only [`Entry::end`] lets go of one.
#[derive(Debug)]
struct Entry {
    admission: Admission,
    data: Vec<GuestRun>,
    /// What of it was given to slots: bytes of a read or write, else 0 or 1.
    submitted: u32,
    parts_out: u16,
    flush: Flush,
    status: u8,
    arrived: Instant,
    started: Option<Instant>,
    ended: bool,
}

/// The flush that a write-through request ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    No,
    Wanted,
    Out,
}

/// Which part of which request a slot carries.
#[derive(Clone, Copy, Debug)]
struct SlotUse {
    entry: u16,
    /// Where the part starts in the request's data.
    start: u32,
    /// What the part is.
    part: Part,
}

/// The table.
#[derive(Debug)]
pub struct Pending {
    entries: Vec<Option<Entry>>,
    free: Vec<u16>,
    slots: [Option<SlotUse>; SLOTS_MAX],
    /// Requests with parts that no slot carries yet, oldest first.
    waiting: VecDeque<u16>,
    spare: Vec<Vec<GuestRun>>,
    part_bytes_max: u32,
}

impl Default for Pending {
    fn default() -> Pending {
        Pending {
            entries: (0..ENTRIES_MAX).map(|_| None).collect(),
            free: (0..ENTRIES_MAX as u16).rev().collect(),
            slots: [None; SLOTS_MAX],
            waiting: VecDeque::with_capacity(ENTRIES_MAX),
            spare: Vec::with_capacity(ENTRIES_MAX),
            part_bytes_max: REQUEST_BYTES_MAX as u32,
        }
    }
}

impl Pending {
    /// Sets the largest data of one slot, as the node says it when the volume is opened. At least a block.
    pub fn set_part_bytes_max(&mut self, bytes: u32) {
        self.part_bytes_max = bytes.clamp(4096, REQUEST_BYTES_MAX as u32) & !4095;
    }

    /// Requests in the table.
    pub fn len(&self) -> usize {
        ENTRIES_MAX - self.free.len()
    }

    /// True when nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when some part waits for a slot: nothing new may be admitted before.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes a request in; its data's runs are swapped out of `data`, which gets an empty vector back.
    pub fn admit(&mut self, now: Instant, admission: Admission, data: &mut Vec<GuestRun>) {
        let id = self.free.pop().expect("the worker admits only while nothing waits, so an entry is free");
        let mut runs = self.spare.pop().unwrap_or_default();
        std::mem::swap(&mut runs, data);
        self.entries[usize::from(id)] = Some(Entry {
            admission,
            data: runs,
            submitted: 0,
            parts_out: 0,
            flush: if admission.flush_after { Flush::Wanted } else { Flush::No },
            status: VIRTIO_BLK_S_OK as u8,
            arrived: now,
            started: None,
            ended: false,
        });
        self.waiting.push_back(id);
    }

    /// The part that is to get the next slot.
    pub fn next_part(&self) -> Option<Part> {
        let entry = self.entry(*self.waiting.front()?);
        Some(entry.next_part(self.part_bytes_max))
    }

    /// The part that [`Pending::next_part`] gave is now in `slot`.
    pub fn submitted(&mut self, now: Instant, slot: Slot) {
        let part_bytes_max = self.part_bytes_max;
        let id = *self.waiting.front().expect("a part was asked for");
        let entry = self.entry_mut(id);
        let start = entry.submitted;
        let part = entry.next_part(part_bytes_max);
        if part.op == Op::Flush && entry.flush == Flush::Wanted {
            entry.flush = Flush::Out;
        } else {
            entry.submitted += if entry.has_data() { part.len } else { 1 };
        }
        entry.parts_out += 1;
        entry.started.get_or_insert(now);
        if !entry.has_part() {
            self.waiting.pop_front();
        }
        let use_of = &mut self.slots[slot.index()];
        assert!(use_of.is_none(), "slot {} was given out twice", slot.0);
        *use_of = Some(SlotUse { entry: id, start, part });
    }

    /// Where the data of the part in `slot` lies: the request's runs, and the part's place in them.
    pub fn data(&self, slot: Slot) -> Option<(&[GuestRun], u32)> {
        let SlotUse { entry, start, .. } = (*self.slots.get(slot.index())?)?;
        Some((&self.entry(entry).data, start))
    }

    /// The part in `slot` has ended. Gives the request when that was the last of it. `keep` is asked about each part of a change that ends well and has no
    /// flush of its own, in the order in which they end: where its data lies, and from which byte on. If it cannot be kept, the request gets a flush.
    pub fn part_done(
        &mut self,
        now: Instant,
        slot: Slot,
        status: Status,
        keep: impl FnOnce(Part, &[GuestRun], u32) -> bool,
    ) -> Option<Finished> {
        let SlotUse { entry: id, start, part } =
            self.slots[slot.index()].take().expect("the core ends only what it was given");
        let entry = self.entry_mut(id);
        entry.parts_out -= 1;
        if entry.status == VIRTIO_BLK_S_OK as u8 {
            entry.status = status_byte(status);
        }
        let bare = entry.flush == Flush::No && part.op.changes_data();
        if bare && status == Status::Ok && !keep(part, &entry.data, start) {
            entry.flush = Flush::Wanted;
        }
        let failed = entry.status != VIRTIO_BLK_S_OK as u8;
        if entry.parts_out > 0 || (entry.has_data_part() && !failed) {
            return None;
        }
        if entry.flush == Flush::Wanted && !failed {
            self.waiting.push_back(id);
            return None;
        }
        if failed && entry.has_part() {
            self.waiting.retain(|waiting| *waiting != id);
        }
        Some(self.remove(id).end(now))
    }

    /// The session was abandoned: every part starts again from the beginning.
    pub fn restart_all(&mut self) {
        self.slots = [None; SLOTS_MAX];
        self.waiting.clear();
        let mut ids: Vec<u16> =
            (0..ENTRIES_MAX as u16).filter(|id| self.entries[usize::from(*id)].is_some()).collect();
        ids.sort_by_key(|id| self.entry(*id).arrived);
        for id in ids {
            let entry = self.entry_mut(id);
            entry.restart();
            self.waiting.push_back(id);
        }
    }

    /// Takes out, unfinished, the requests that `which` picks, oldest first. Only after [`Pending::restart_all`]: no slot may carry a part of them.
    pub fn take_out(
        &mut self,
        now: Instant,
        mut which: impl FnMut(&Admission, &[GuestRun]) -> bool,
    ) -> Vec<Finished> {
        let mut taken = Vec::new();
        for _ in 0..self.waiting.len() {
            let Some(id) = self.waiting.pop_front() else { break };
            let entry = self.entry_mut(id);
            assert_eq!(entry.parts_out, 0, "a part of the request is still in a slot");
            if which(&entry.admission, &entry.data) {
                entry.status = VIRTIO_BLK_S_IOERR as u8;
                taken.push(self.remove(id).end(now));
            } else {
                self.waiting.push_back(id);
            }
        }
        taken
    }

    /// Every request in the table with its data's runs.
    pub fn iter(&self) -> impl Iterator<Item = (&Admission, &[GuestRun])> {
        self.entries.iter().flatten().map(|entry| (&entry.admission, entry.data.as_slice()))
    }

    fn entry(&self, id: u16) -> &Entry {
        self.entries[usize::from(id)].as_ref().expect("ids in slots and in the waiting line are live")
    }

    fn entry_mut(&mut self, id: u16) -> &mut Entry {
        self.entries[usize::from(id)].as_mut().expect("ids in slots and in the waiting line are live")
    }

    fn remove(&mut self, id: u16) -> Entry {
        let mut entry = self.entries[usize::from(id)].take().expect("a live request");
        self.free.push(id);
        let mut runs = std::mem::take(&mut entry.data);
        runs.clear();
        self.spare.push(runs);
        entry
    }
}

impl Entry {
    fn has_data(&self) -> bool {
        matches!(self.admission.op, Op::Read | Op::Write)
    }

    /// What of the request goes to slots in parts: its bytes, or 1 for all else.
    fn whole(&self) -> u32 {
        if self.has_data() { self.admission.len } else { 1 }
    }

    fn has_data_part(&self) -> bool {
        self.submitted < self.whole()
    }

    /// True if something of it can be given to a slot now.
    fn has_part(&self) -> bool {
        self.has_data_part() || (self.flush == Flush::Wanted && self.parts_out == 0)
    }

    fn next_part(&self, part_bytes_max: u32) -> Part {
        let Admission { op, offset, len, .. } = self.admission;
        if !self.has_data_part() {
            Part { op: Op::Flush, offset: 0, len: 0 }
        } else if self.has_data() {
            let len = (len - self.submitted).min(part_bytes_max);
            Part { op, offset: offset + u64::from(self.submitted), len }
        } else {
            Part { op, offset, len }
        }
    }

    fn restart(&mut self) {
        self.submitted = 0;
        self.parts_out = 0;
        self.status = VIRTIO_BLK_S_OK as u8;
        self.flush = if self.admission.flush_after { Flush::Wanted } else { Flush::No };
    }

    fn end(mut self, now: Instant) -> Finished {
        self.ended = true;
        let started = self.started.unwrap_or(now);
        let ok = self.status == VIRTIO_BLK_S_OK as u8;
        let data_bytes = if ok && self.admission.op == Op::Read { self.admission.len } else { 0 };
        Finished {
            admission: self.admission,
            status: self.status,
            used_bytes: data_bytes + 1,
            queued: started.since(self.arrived),
            served: now.since(started),
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        assert!(
            self.ended || std::thread::panicking(),
            "a guest's request was forgotten: {:?}",
            self.admission
        );
    }
}

/// What the guest is told: virtio-blk knows three answers.
fn status_byte(status: Status) -> u8 {
    let byte = match status {
        Status::Ok => VIRTIO_BLK_S_OK,
        Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        Status::Io
        | Status::NoSpace
        | Status::Fenced
        | Status::Stale
        | Status::Retry
        | Status::Invalid
        | Status::ReadOnly
        | Status::Corrupt
        | Status::Busy
        | Status::Access => VIRTIO_BLK_S_IOERR,
    };
    byte as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u32 = 1 << 20;

    fn admission(op: Op, len: u32) -> Admission {
        Admission { ring: 0, head: 7, status_at: 0x1000, op, offset: 4096, len, flush_after: false }
    }

    fn admit(pending: &mut Pending, admission: Admission) {
        let mut data = vec![GuestRun { address: 0x10_0000, len: admission.len, start: 0 }];
        pending.admit(Instant(5), admission, &mut data);
    }

    /// Gives every waiting part a slot, counting up from `first`; the parts in order.
    fn submit_all(pending: &mut Pending, first: u16) -> Vec<Part> {
        let mut parts = Vec::new();
        while let Some(part) = pending.next_part() {
            pending.submitted(Instant(6), Slot(first + parts.len() as u16));
            parts.push(part);
        }
        parts
    }

    /// P-55: a request larger than a slot takes becomes several, and the guest sees one.
    #[test]
    fn a_large_read_is_cut_into_slots_and_ends_once() {
        let mut pending = Pending::default();
        admit(&mut pending, admission(Op::Read, 2 * MIB + 512));
        let part = |at: u32, len| Part { op: Op::Read, offset: 4096 + u64::from(at), len };
        assert_eq!(submit_all(&mut pending, 0), [part(0, MIB), part(MIB, MIB), part(2 * MIB, 512)]);
        assert_eq!(pending.data(Slot(2)).unwrap().1, 2 * MIB);
        assert_eq!(pending.part_done(Instant(7), Slot(1), Status::Ok, |_, _, _| true), None);
        assert_eq!(pending.part_done(Instant(8), Slot(0), Status::Ok, |_, _, _| true), None);
        let done = pending.part_done(Instant(9), Slot(2), Status::Ok, |_, _, _| true).unwrap();
        assert_eq!((done.status, done.used_bytes), (0, 2 * MIB + 512 + 1));
        assert_eq!((done.queued, done.served), (Nanos(1), Nanos(3)));
        assert!(pending.is_empty());
    }

    #[test]
    fn one_failed_part_fails_the_request_after_the_others_came_back() {
        let mut pending = Pending::default();
        admit(&mut pending, admission(Op::Write, 2 * MIB));
        submit_all(&mut pending, 0);
        assert_eq!(pending.part_done(Instant(7), Slot(0), Status::NoSpace, |_, _, _| true), None);
        let done = pending.part_done(Instant(8), Slot(1), Status::Ok, |_, _, _| true).unwrap();
        assert_eq!((done.status, done.used_bytes), (1, 1));
    }

    #[test]
    fn a_part_that_fails_before_the_rest_was_sent_stops_the_rest() {
        let mut pending = Pending::default();
        admit(&mut pending, admission(Op::Write, 3 * MIB));
        pending.submitted(Instant(6), Slot(9));
        let done = pending.part_done(Instant(7), Slot(9), Status::Io, |_, _, _| true).unwrap();
        assert_eq!(done.status, 1);
        assert!(!pending.has_waiting() && pending.is_empty());
    }

    #[test]
    fn a_write_through_write_is_flushed_before_it_ends() {
        let mut pending = Pending::default();
        admit(&mut pending, Admission { flush_after: true, ..admission(Op::Write, 512) });
        assert_eq!(submit_all(&mut pending, 0).len(), 1, "the flush waits for the write");
        assert_eq!(pending.part_done(Instant(7), Slot(0), Status::Ok, |_, _, _| true), None);
        assert_eq!(submit_all(&mut pending, 1), [Part { op: Op::Flush, offset: 0, len: 0 }]);
        let done = pending.part_done(Instant(8), Slot(1), Status::Io, |_, _, _| true).unwrap();
        assert_eq!(done.status, 1, "a failed flush fails the write");
    }

    #[test]
    fn a_flush_and_a_discard_take_one_slot_each() {
        let mut pending = Pending::default();
        admit(&mut pending, admission(Op::Flush, 0));
        admit(&mut pending, admission(Op::Discard, 99));
        let parts = submit_all(&mut pending, 0);
        assert_eq!(
            parts.iter().map(|part| (part.op, part.len)).collect::<Vec<_>>(),
            [(Op::Flush, 0), (Op::Discard, 99)]
        );
        assert_eq!(pending.part_done(Instant(7), Slot(0), Status::Ok, |_, _, _| true).unwrap().used_bytes, 1);
        assert_eq!(
            pending.part_done(Instant(7), Slot(1), Status::Unsupported, |_, _, _| true).unwrap().status,
            2
        );
    }

    #[test]
    fn after_an_abandoned_session_everything_starts_again() {
        let mut pending = Pending::default();
        admit(&mut pending, admission(Op::Write, 2 * MIB));
        admit(&mut pending, Admission { ring: 1, flush_after: true, ..admission(Op::Write, 512) });
        submit_all(&mut pending, 0);
        assert_eq!(pending.part_done(Instant(7), Slot(0), Status::Ok, |_, _, _| true), None);
        pending.restart_all();
        let gone = pending.take_out(Instant(8), |admission, _| admission.ring == 1);
        assert_eq!(gone.iter().map(|gone| gone.admission.ring).collect::<Vec<_>>(), [1]);
        assert_eq!(submit_all(&mut pending, 0).len(), 2);
        assert_eq!(pending.part_done(Instant(9), Slot(0), Status::Ok, |_, _, _| true), None);
        assert_eq!(pending.part_done(Instant(9), Slot(1), Status::Ok, |_, _, _| true).unwrap().status, 0);
    }

    #[test]
    fn the_table_takes_as_many_requests_as_there_are_slots() {
        let mut pending = Pending::default();
        for slot in 0..SLOTS_MAX as u16 {
            admit(&mut pending, admission(Op::Read, 512));
            pending.submitted(Instant(6), Slot(slot));
        }
        admit(&mut pending, admission(Op::Read, 512));
        assert!(pending.has_waiting());
        assert_eq!(pending.len(), ENTRIES_MAX);
        for slot in 0..SLOTS_MAX as u16 {
            assert!(pending.part_done(Instant(7), Slot(slot), Status::Ok, |_, _, _| true).is_some());
        }
        submit_all(&mut pending, 0);
        assert!(pending.part_done(Instant(7), Slot(0), Status::Ok, |_, _, _| true).is_some());
    }

    #[test]
    #[should_panic(expected = "a guest's request was forgotten")]
    fn a_forgotten_request_is_a_bug() {
        let mut pending = Pending::default();
        admit(&mut pending, admission(Op::Flush, 0));
    }
}
