//! The initiator's table of requests: what was submitted, what of it has been sent, what has come back.
//!
//! Outlives sessions: a request stays until it is answered, and is issued again in the next session. Knows slots, pieces, credit and
//! overlap; does not know the handshake. Called by `initiator` alone.
//!
//! ```text
//!   submit --> Queued --(room, credit, no overlap)--> Issued --(final answer)--> Free
//!                 ^-------------(session lost)-----------'
//! ```

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::op::{Op, Status};
use crate::pieces::{Grid, PieceSet};
use crate::send_window::{Record, What};
use crate::session::{FrameWriter, Placement, Session};
use crate::stats::Stats;
use crate::types::{RANGE_SECTORS_MAX, REQUEST_BYTES_MAX, SECTOR_BYTES, SLOTS_MAX, Slot};
use crate::wire::message::{MESSAGE_BYTES, REQUEST_BYTES, RequestBody};
use crate::wire::{Kind, Message, Payload};

/// Read data asked for and not yet come: four of the largest requests, and less than the link's receive ring holds.
const READ_BYTES_MAX: u64 = 4 << 20;
/// A piece that was lost this often, while other frames pass, does not fit through the path.
pub(crate) const LOSSES_MAX: u8 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Queued,
    Issued,
}

#[derive(Clone, Debug)]
struct Request {
    state: State,
    op: Op,
    sseq: u16,
    offset: u64,
    len: u32,
    /// The next piece of a write to be sent for the first time.
    next_piece: u16,
    pieces: u16,
    /// Pieces of a read that came.
    came: PieceSet,
    /// Orders submissions, so that what is issued again keeps its order.
    order: u64,
}

impl Request {
    /// The bytes of the volume that the request changes.
    fn changes(&self) -> (u64, u64) {
        let bytes = u64::from(self.len) * if self.op.length_in_sectors() { SECTOR_BYTES as u64 } else { 1 };
        (self.offset, self.offset.saturating_add(bytes))
    }

    fn data_bytes(&self) -> u32 {
        if matches!(self.op, Op::Read | Op::Write) { self.len } else { 0 }
    }
}

/// The table and its queues.
#[derive(Debug)]
pub(crate) struct Requests {
    table: Box<[Request]>,
    free: Vec<Slot>,
    /// Queued requests that change nothing.
    plain: VecDeque<Slot>,
    /// Queued writes, discards and zeroes, in the order of submission.
    changing: VecDeque<Slot>,
    /// Messages that were lost.
    resend: VecDeque<Record>,
    /// What is being changed: `[start, end)` of every issued request that changes data.
    changes: Vec<(u64, u64, Slot)>,
    /// The slot whose pieces are being sent.
    sending: Option<Slot>,
    next_order: u64,
    read_bytes: u64,
    credit_granted: u32,
    credit_used: u32,
}

/// The volume as a REQ names it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VolumeRef {
    pub(crate) handle: u32,
    pub(crate) epoch: u64,
}

impl Requests {
    /// An empty table of `slots`.
    pub(crate) fn new(slots: u16) -> Requests {
        let slots = usize::from(slots).clamp(1, SLOTS_MAX);
        let empty = Request {
            state: State::Free,
            op: Op::Flush,
            sseq: 0,
            offset: 0,
            len: 0,
            next_piece: 0,
            pieces: 0,
            came: PieceSet::default(),
            order: 0,
        };
        Requests {
            table: alloc::vec![empty; slots].into_boxed_slice(),
            free: (0..slots as u16).rev().map(Slot).collect(),
            plain: VecDeque::with_capacity(slots),
            changing: VecDeque::with_capacity(slots),
            resend: VecDeque::new(),
            changes: Vec::with_capacity(slots),
            sending: None,
            next_order: 0,
            read_bytes: 0,
            credit_granted: 0,
            credit_used: 0,
        }
    }

    pub(crate) fn free_slots(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.free.len() == self.table.len()
    }

    /// Takes a request in. `len` counts bytes, or sectors for discard and write-zeroes; 0 for a flush.
    ///
    /// Panics when the length is one that the caller must never pass on: the guest's requests are checked and split before.
    pub(crate) fn submit(&mut self, op: Op, offset: u64, len: u32) -> Option<Slot> {
        match op {
            Op::Read | Op::Write => {
                assert!(len >= 1 && len as usize <= REQUEST_BYTES_MAX, "{op:?} of {len} bytes")
            }
            Op::Discard | Op::WriteZeroes => {
                assert!((1..=RANGE_SECTORS_MAX).contains(&len), "{op:?} of {len} sectors")
            }
            Op::Flush => assert!(len == 0, "flush has no length"),
            Op::Open | Op::Release | Op::Stat => unreachable!("{op:?} is the initiator's own"),
        }
        let slot = self.free.pop()?;
        let request = &mut self.table[slot.index()];
        request.state = State::Queued;
        (request.op, request.offset, request.len) = (op, offset, len);
        request.order = self.next_order;
        self.next_order += 1;
        self.enqueue(slot);
        Some(slot)
    }

    fn enqueue(&mut self, slot: Slot) {
        if self.table[slot.index()].op.changes_data() {
            self.changing.push_back(slot);
        } else {
            self.plain.push_back(slot);
        }
    }

    /// A new session begins: nothing of an older one counts, every request is issued again in its order.
    pub(crate) fn restart(&mut self, credit_granted: u32) {
        self.resend.clear();
        self.changes.clear();
        self.plain.clear();
        self.changing.clear();
        self.sending = None;
        self.read_bytes = 0;
        (self.credit_granted, self.credit_used) = (credit_granted, 0);
        let mut live: Vec<Slot> = (0..self.table.len() as u16).map(Slot).collect();
        live.retain(|slot| self.table[slot.index()].state != State::Free);
        live.sort_unstable_by_key(|slot| self.table[slot.index()].order);
        for request in &mut self.table {
            request.sseq = 0;
            if request.state == State::Issued {
                request.state = State::Queued;
            }
        }
        live.into_iter().for_each(|slot| self.enqueue(slot));
    }

    /// Forgets every request.
    pub(crate) fn clear(&mut self) {
        for request in &mut self.table {
            request.state = State::Free;
        }
        self.free = (0..self.table.len() as u16).rev().map(Slot).collect();
        self.restart(0);
    }

    /// The peer's cumulative credit, as a frame's header has it; an older value changes nothing.
    pub(crate) fn grant(&mut self, credit: u32) {
        if (credit.wrapping_sub(self.credit_granted) as i32) > 0 {
            self.credit_granted = credit;
        }
    }

    /// True if something waits to be sent, as far as can be told without trying.
    pub(crate) fn has_work(&self) -> bool {
        !(self.resend.is_empty()
            && self.plain.is_empty()
            && self.changing.is_empty()
            && self.sending.is_none())
    }

    /// A message was lost: it leaves again, if it still matters then.
    pub(crate) fn lost(&mut self, record: Record) {
        self.resend.push_back(record);
    }

    /// Fills a frame: what was lost first, then requests, then data.
    pub(crate) fn transmit(
        &mut self,
        session: &mut Session,
        writer: &mut FrameWriter<'_>,
        volume: VolumeRef,
        stats: &mut Stats,
    ) {
        self.transmit_lost(session, writer, volume, stats);
        while let Some(slot) = self.plain.front().copied() {
            let request = &self.table[slot.index()];
            let read_bytes = self.read_bytes + u64::from(request.data_bytes());
            if !writer.fits(MESSAGE_BYTES + REQUEST_BYTES, 0)
                || (read_bytes > READ_BYTES_MAX && self.read_bytes > 0)
            {
                break;
            }
            self.plain.pop_front();
            self.read_bytes = read_bytes;
            self.issue(slot, session.grid());
            self.push_request(session, writer, slot, volume, 0);
        }
        while self.transmit_changing(session, writer, volume) {}
    }

    fn transmit_lost(
        &mut self,
        session: &mut Session,
        writer: &mut FrameWriter<'_>,
        volume: VolumeRef,
        stats: &mut Stats,
    ) {
        while let Some(record) = self.resend.front().copied() {
            let request = &self.table[record.slot.index()];
            if request.state == State::Issued && request.sseq == record.sseq {
                let whole = record.what == What::Request;
                let (header, plen) = if whole {
                    (MESSAGE_BYTES + REQUEST_BYTES, self.first_piece(record.slot, session.grid()))
                } else {
                    (MESSAGE_BYTES, session.grid().range(record.piece, request.len).1)
                };
                if !writer.fits(header, plen as usize) || (plen > 0 && !session.may_send_data()) {
                    return;
                }
                stats.messages_resent += 1;
                if whole {
                    self.push_request(session, writer, record.slot, volume, record.losses);
                } else {
                    self.push_piece(session, writer, record.slot, record.piece, record.losses);
                }
            }
            self.resend.pop_front();
        }
    }

    /// Sends the next message of a write, discard or write-zeroes; false when there is none or it has to wait.
    fn transmit_changing(
        &mut self,
        session: &mut Session,
        writer: &mut FrameWriter<'_>,
        volume: VolumeRef,
    ) -> bool {
        if let Some(slot) = self.sending {
            let request = &self.table[slot.index()];
            let piece = request.next_piece;
            let (_, plen) = session.grid().range(piece, request.len);
            if !writer.fits(MESSAGE_BYTES, plen as usize) || !session.may_send_data() {
                return false;
            }
            self.push_piece(session, writer, slot, piece, 0);
            let request = &mut self.table[slot.index()];
            request.next_piece += 1;
            if request.next_piece == request.pieces {
                self.sending = None;
            }
            return true;
        }
        let Some(slot) = self.changing.front().copied() else { return false };
        let plen = self.first_piece(slot, session.grid());
        let request = &self.table[slot.index()];
        let units = if request.op == Op::Write { request.len.div_ceil(SECTOR_BYTES as u32) } else { 0 };
        let (start, end) = request.changes();
        let overlaps = self.changes.iter().any(|(s, e, _)| start < *e && *s < end);
        let has_credit = self.credit_granted.wrapping_sub(self.credit_used) >= units;
        if overlaps || !has_credit || !writer.fits(MESSAGE_BYTES + REQUEST_BYTES, plen as usize) {
            return false;
        }
        if plen > 0 && !session.may_send_data() {
            return false;
        }
        self.changing.pop_front();
        self.credit_used = self.credit_used.wrapping_add(units);
        self.changes.push((start, end, slot));
        self.issue(slot, session.grid());
        self.push_request(session, writer, slot, volume, 0);
        let request = &self.table[slot.index()];
        if request.next_piece < request.pieces {
            self.sending = Some(slot);
        }
        true
    }

    fn issue(&mut self, slot: Slot, grid: Grid) {
        let request = &mut self.table[slot.index()];
        request.state = State::Issued;
        request.sseq = request.sseq.wrapping_add(1);
        request.pieces = grid.count(request.data_bytes());
        request.next_piece = 1;
        if request.op == Op::Read {
            request.came.reset(request.pieces);
        }
    }

    /// Bytes of data that the REQ itself carries.
    fn first_piece(&self, slot: Slot, grid: Grid) -> u32 {
        let request = &self.table[slot.index()];
        if request.op == Op::Write { grid.range(0, request.len).1 } else { 0 }
    }

    fn push_request(
        &self,
        session: &mut Session,
        writer: &mut FrameWriter<'_>,
        slot: Slot,
        volume: VolumeRef,
        losses: u8,
    ) {
        let request = &self.table[slot.index()];
        let message = Message {
            slot,
            sseq: request.sseq,
            code: request.op as u8,
            mlen: request.len,
            request: Some(RequestBody {
                offset: request.offset,
                vol_epoch: volume.epoch,
                vol_handle: volume.handle,
                ..RequestBody::default()
            }),
            ..Message::bare(Kind::Request)
        };
        match self.first_piece(slot, session.grid()) {
            0 => writer.push(message, &[]),
            plen => writer.push_data(message, 0, plen, losses),
        }
        session.remember(writer, Record { slot, sseq: request.sseq, piece: 0, what: What::Request, losses });
    }

    fn push_piece(
        &self,
        session: &mut Session,
        writer: &mut FrameWriter<'_>,
        slot: Slot,
        piece: u16,
        losses: u8,
    ) {
        let request = &self.table[slot.index()];
        let (offset, plen) = session.grid().range(piece, request.len);
        let message = Message {
            slot,
            sseq: request.sseq,
            code: Op::Write as u8,
            mlen: request.len,
            ..Message::bare(Kind::WriteData)
        };
        writer.push_data(message, offset, plen, losses);
        session.remember(writer, Record { slot, sseq: request.sseq, piece, what: What::WriteData, losses });
    }

    /// A piece of read data came. True when the request is done with it.
    pub(crate) fn read_data(
        &mut self,
        grid: Grid,
        payload: &Payload,
        placements: &mut Vec<Placement>,
        stats: &mut Stats,
    ) -> bool {
        let message = &payload.message;
        let Some(request) = self.issued(message, stats) else { return false };
        let plen = u32::from(message.plen);
        let index = grid.index_of(message.frag_off, plen, request.len);
        let Some(index) = index.filter(|_| request.op == Op::Read && message.mlen == request.len) else {
            stats.violations += 1;
            return false;
        };
        if !request.came.insert(index) {
            stats.duplicate_messages += 1;
            return false;
        }
        stats.payload_bytes_received += u64::from(plen);
        placements.push(Placement {
            slot: message.slot,
            offset: message.frag_off,
            range: payload.range.clone(),
        });
        let complete = request.came.is_complete();
        if complete {
            self.release(message.slot);
        }
        complete
    }

    /// A final answer without data came. The status, when the request is done with it.
    pub(crate) fn response(&mut self, message: &Message, stats: &mut Stats) -> Option<Status> {
        let status = message.status()?;
        let request = self.issued(message, stats)?;
        if request.op == Op::Read && status == Status::Ok {
            stats.violations += 1;
            return None;
        }
        self.release(message.slot);
        if status != Status::Retry {
            return Some(status);
        }
        // Not now, says the node: the request waits its turn anew.
        self.free.pop();
        self.table[message.slot.index()].state = State::Queued;
        self.enqueue(message.slot);
        None
    }

    fn issued(&mut self, message: &Message, stats: &mut Stats) -> Option<&mut Request> {
        let request = self.table.get_mut(message.slot.index());
        let found = request.filter(|r| r.state == State::Issued && r.sseq == message.sseq);
        if found.is_none() {
            stats.duplicate_messages += 1;
        }
        found
    }

    fn release(&mut self, slot: Slot) {
        let request = &mut self.table[slot.index()];
        request.state = State::Free;
        match request.op {
            Op::Read => self.read_bytes -= u64::from(request.len),
            Op::Write | Op::Discard | Op::WriteZeroes => self.changes.retain(|(_, _, s)| *s != slot),
            Op::Flush | Op::Open | Op::Release | Op::Stat => {}
        }
        if self.sending == Some(slot) {
            self.sending = None;
        }
        self.free.push(slot);
    }
}
