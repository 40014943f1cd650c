//! Leaf 3 of a turn: what the sessions ask for is checked, locked, given a buffer, and handed to the store.
//!
//! Knows bounds, epochs and access; OPEN and RELEASE are in `opening`. A request that waits, waits here: for a place in the table (in
//! its session), for an overlapping change (in the range lock), for a buffer (`reads`) or for the store (`ready`).

use cirro_protocol::op::{Op, Status};
use cirro_protocol::target::{Event, Target};
use cirro_protocol::time::Instant;
use cirro_protocol::types::{REQUEST_BYTES_MAX, SECTOR_BYTES, Slot};
use cirro_protocol::wire::body::{Access, CloseReason};
use log::{debug, info};

use super::Node;
use super::jobs::Job;
use super::served::Served;
use super::session::{Session, SlotBuffer};
use crate::buffers::{Pool, occupied_bytes};
use crate::range_lock::Held;
use crate::store::{Request, Store, StoreOp};

/// A request as its session names it.
#[derive(Clone, Copy, Debug)]
struct Asking {
    slot: Slot,
    op: Op,
    offset: u64,
    len: u64,
    handle: u32,
    epoch: u64,
}

impl<S: Store> Node<S> {
    /// Takes events while there is room for what they ask, then starts what can be started.
    pub(super) fn accept(&mut self, now: Instant) {
        self.take_kept_records(now);
        if self.jobs.has_room() {
            let Node { sessions, starved, .. } = self;
            starved.drain(..).for_each(|index| sessions.activate(index));
        }
        let mut place = 0;
        while let Some(index) = self.sessions.active_at(place) {
            // A session that is gone leaves its place to the next.
            place += usize::from(self.take_events(now, index));
        }
        self.start_reads();
        self.submit_ready();
    }

    /// Takes the events of one session; false when it is gone.
    fn take_events(&mut self, now: Instant, index: u16) -> bool {
        loop {
            // Without room for another request, what gives buffers back is taken all the same: it is what makes room.
            let has_room = self.jobs.has_room();
            let poll = if has_room { Target::poll_event } else { Target::poll_freed };
            let Some(event) = self.sessions.get(index).and_then(|session| poll(&mut session.target)) else {
                break;
            };
            match event {
                Event::Confirmed => self.confirmed(index),
                Event::Run { slot, op, offset, len, vol_handle, vol_epoch } => {
                    let unit = if op.length_in_sectors() { SECTOR_BYTES as u64 } else { 1 };
                    let len = u64::from(len) * unit;
                    self.run(
                        now,
                        index,
                        Asking { slot, op, offset, len, handle: vol_handle, epoch: vol_epoch },
                    );
                }
                Event::Open { slot, request } => self.open(now, index, slot, request),
                Event::Free { slot } => self.free_read(index, slot),
                Event::Gone(cause) => {
                    debug!("session {index} is gone: {cause:?}");
                    self.forget(index);
                    return false;
                }
            }
        }
        if !self.jobs.has_room() && !self.starved.contains(&index) {
            self.starved.push(index);
        }
        true
    }

    /// The session's first frame came: older ones of its attachment end, or it, when a newer one was confirmed before (P-72).
    fn confirmed(&mut self, index: u16) {
        let Some(session) = self.sessions.get(index) else { return };
        let (attachment, volume) = (session.attachment(), session.volume);
        let epoch = session.target.hello().session_epoch;
        info!(
            "volume {}: attachment {attachment} has session {epoch}",
            self.volumes[usize::from(volume)].volume.name
        );
        for other in self.sessions.indexes() {
            let Some(session) =
                self.sessions.get(other).filter(|s| s.attachment() == attachment && s.volume == volume)
            else {
                continue;
            };
            if other == index || !session.target.is_confirmed() {
                continue;
            }
            let loser = if session.target.hello().session_epoch < epoch { other } else { index };
            self.sessions.activate(loser);
            if let Some(session) = self.sessions.get(loser) {
                session.close(CloseReason::Superseded);
            }
        }
    }

    fn run(&mut self, now: Instant, index: u16, asking: Asking) {
        let Some(session) = self.sessions.get(index).filter(|session| !session.closing) else { return };
        if self.stop_at.is_some() {
            // It stays unanswered: the initiator asks the next session for it.
            return;
        }
        let served = &mut self.volumes[usize::from(session.volume)];
        match asking.op {
            Op::Stat => {
                let handle = session.opened.map_or(0, |opened| opened.handle);
                let info = served.volume.info(served.owner.vol_epoch, handle, session.standing.right);
                return session.target.complete_info(asking.slot, Status::Ok, info);
            }
            Op::Release => return self.release(now, index, asking.slot),
            Op::Read | Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes | Op::Open => {}
        }
        if let Some(status) = refusal(session, served, &asking) {
            session.free_slot(asking.slot, &mut self.write_pool, &mut self.read_pool);
            if let Some(meter) = served.meters.of(asking.op) {
                meter.end(status == Status::Ok, 0, 0);
            }
            return session.target.complete(asking.slot, status);
        }
        // Within the volume, or (a flush) without length: the end of the range is a number.
        let buffer = match std::mem::take(&mut session.buffers[asking.slot.index()]) {
            SlotBuffer::Write(buffer) if asking.op == Op::Write => Some(buffer),
            // A frame that named the slot twice, once for a write.
            SlotBuffer::Write(buffer) => {
                self.write_pool.give_back(buffer);
                None
            }
            SlotBuffer::Read(buffer) => {
                session.read_bytes -= occupied_bytes(buffer.bytes().len());
                self.read_pool.give_back(buffer);
                None
            }
            SlotBuffer::None => None,
        };
        let mut job = Job {
            session: index,
            serial: session.serial,
            slot: asking.slot,
            op: asking.op,
            volume: session.volume,
            offset: if asking.op == Op::Flush { 0 } else { asking.offset },
            len: asking.len,
            buffer,
            change: 0,
            started: now,
        };
        if asking.op.changes_data() {
            job.change = served.next_change;
            served.next_change += 1;
        }
        let (op, start, end) = (job.op, job.offset, job.offset + job.len);
        let number = self.jobs.add(job);
        if op == Op::Read {
            self.jobs.reads.push_back(number);
        } else if op == Op::Flush && std::mem::replace(&mut served.flushing, true) {
            served.flushes.push_back(number);
        } else if !op.changes_data() || served.changes.acquire(Held { start, end, id: u32::from(number) }) {
            self.jobs.ready.push_back(number);
        }
    }

    /// The data of a read has arrived.
    fn free_read(&mut self, index: u16, slot: Slot) {
        let Some(session) = self.sessions.get(index) else { return };
        // A write that uses the slot meanwhile has its own buffer there.
        if matches!(session.buffers[slot.index()], SlotBuffer::Read(_)) {
            session.free_slot(slot, &mut self.write_pool, &mut self.read_pool);
        }
    }

    /// Forgets a session: its buffers are free; what the store has of it ends by itself.
    pub(super) fn forget(&mut self, index: u16) {
        let Some(mut session) = self.sessions.remove(index) else { return };
        for slot in 0..session.buffers.len() {
            session.free_slot(Slot(slot as u16), &mut self.write_pool, &mut self.read_pool);
        }
        self.promised_bytes -= session.promised_bytes;
    }

    /// Gives reads that wait a buffer, in order; those of a session that has its share of the pool wait for its others.
    fn start_reads(&mut self) {
        let share = self.read_pool.bytes_total() / 4;
        let mut place = 0;
        while let Some(number) = self.jobs.reads.get(place).copied() {
            let job = self.jobs.get(number);
            let (len, index, serial) = (job.len as usize, job.session, job.serial);
            let Some(session) = self.sessions.get_same(index, serial) else {
                self.jobs.reads.remove(place);
                self.jobs.remove(number);
                continue;
            };
            let bytes = occupied_bytes(len);
            if session.read_bytes + bytes > share.max(REQUEST_BYTES_MAX) {
                place += 1;
                continue;
            }
            let Some(buffer) = self.read_pool.take(len) else { return };
            session.read_bytes += bytes;
            self.jobs.get(number).buffer = Some(buffer);
            self.jobs.reads.remove(place);
            self.jobs.ready.push_back(number);
        }
    }

    /// Hands over what is ready, while the store has room.
    fn submit_ready(&mut self) {
        while self.store.room() > 0 {
            let Some(number) = self.jobs.ready.pop_front() else { return };
            let job = self.jobs.get(number);
            let op = match job.op {
                Op::Read => StoreOp::Read,
                Op::Write => StoreOp::Write,
                Op::Discard => StoreOp::Discard,
                Op::WriteZeroes => StoreOp::WriteZeroes,
                Op::Flush | Op::Open | Op::Release | Op::Stat => StoreOp::Flush,
            };
            let (offset, len, buffer) = (job.offset, job.len, job.buffer.take());
            let file = self.volumes[usize::from(job.volume)].file;
            let request = Request { file, op, offset, len, buffer, token: u32::from(number) };
            if let Err(request) = self.store.submit(request) {
                self.jobs.get(number).buffer = request.buffer;
                self.jobs.ready.push_front(number);
                return;
            }
        }
    }
}

/// What a request is answered without being run; `None`: run it. OK of a flush of which nothing can be stale.
fn refusal(session: &Session, served: &Served, asking: &Asking) -> Option<Status> {
    let opened = session.opened.filter(|opened| opened.handle == asking.handle);
    let Some(opened) = opened else { return Some(Status::Stale) };
    let writer = opened.access == Access::ReadWrite;
    let holds = served.owner.holder == Some(session.attachment()) && served.owner.vol_epoch == asking.epoch;
    if writer && !holds {
        return Some(Status::Fenced);
    }
    if asking.op.changes_data() && (!writer || served.volume.read_only) {
        return Some(Status::ReadOnly);
    }
    let covered = served.volume.covers(asking.offset, asking.len);
    match asking.op {
        Op::Flush if served.flush_failed.is_some() => Some(Status::Io),
        Op::Flush if !writer => Some(Status::Ok),
        Op::Read if !covered || asking.len > REQUEST_BYTES_MAX as u64 => Some(Status::Invalid),
        // A write's data is in its buffer, whose length is the request's.
        Op::Write if !covered || !holds_bytes(session, asking) => Some(Status::Invalid),
        Op::Discard | Op::WriteZeroes if !covered => Some(Status::Invalid),
        Op::Discard if !served.volume.discards() => Some(Status::Unsupported),
        Op::Read | Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes => None,
        Op::Open | Op::Release | Op::Stat => Some(Status::Invalid),
    }
}

fn holds_bytes(session: &Session, asking: &Asking) -> bool {
    match &session.buffers[asking.slot.index()] {
        SlotBuffer::Write(buffer) => buffer.bytes().len() as u64 == asking.len,
        SlotBuffer::Read(_) | SlotBuffer::None => false,
    }
}

impl Session {
    /// Gives the slot's buffer back to the pool it came from.
    pub(super) fn free_slot(&mut self, slot: Slot, writes: &mut Pool, reads: &mut Pool) {
        match std::mem::take(&mut self.buffers[slot.index()]) {
            SlotBuffer::None => {}
            SlotBuffer::Write(buffer) => writes.give_back(buffer),
            SlotBuffer::Read(buffer) => {
                self.read_bytes -= occupied_bytes(buffer.bytes().len());
                reads.give_back(buffer);
            }
        }
    }
}
