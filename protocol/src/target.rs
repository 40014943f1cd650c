//! The node's end of one session: takes requests apart, runs each exactly once, and sees the answers through.
//!
//! Knows slots and frames; does not know volumes, buffers or the store: the node does what [`Event`]s say and calls
//! [`Target::complete`].
//!
//! ```text
//! a slot:  Idle --REQ--> Running --complete--> Answering --(all acked, or the next REQ)--> Idle
//!            '--WDATA, REQ of a write--> Receiving --(all pieces)--> Running
//! ```
//!
//! Order of calls in a turn: for each frame [`Target::buffers_wanted`], then [`Target::handle_frame`]; [`Target::handle_timeout`] when the
//! link is empty; [`Target::poll_event`] until `None`; `complete*`; [`Target::poll_transmit`] until `None` or no room.
//!
//! Buffers: a slot has at most one. It is given by `buffers_wanted` (a write) or for [`Event::Run`] of a read. A new write in a slot whose
//! last read is not fully acked replaces its buffer, without [`Event::Free`]: that the slot is used again says that the data arrived.

mod transmit;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::handshake::agree;
use crate::op::{Op, Status};
use crate::pieces::{PieceSet, next_lower};
use crate::send_window::{Record, What};
use crate::session::{Placement, Session, SessionConfig};
use crate::stats::Stats;
use crate::time::{Instant, Nanos, earliest};
use crate::types::{
    CONTROL_SLOT, Cid, MacAddress, REQUEST_BYTES_MAX, SECTOR_BYTES, SLOTS_MAX, Slot, Steer, Uuid,
};
use crate::wire::body::{CloseReason, OpenRequest, VolumeInfo};
use crate::wire::long::{Hello, HelloReply};
use crate::wire::{Frame, Kind, Message, Mode, Payload};

/// Frames that nobody acked for so long mean that the initiator is gone.
const SILENCE_BUSY: Nanos = Nanos::from_secs(5);
/// Silence after which an idle session is freed.
const SILENCE_IDLE: Nanos = Nanos::from_secs(60);
/// A session that no frame confirmed is freed after this.
const UNCONFIRMED: Nanos = Nanos::from_secs(1);
/// A piece that was lost this often, while smaller frames pass, does not fit through the path.
const LOSSES_MAX: u8 = 8;

/// What a target is made of.
#[derive(Clone, Copy, Debug)]
pub struct TargetConfig {
    /// How frames are protected.
    pub mode: Mode,
    /// The HELLO it answers.
    pub hello: Hello,
    /// Where the HELLO came from.
    pub peer: MacAddress,
    /// Our address.
    pub address: MacAddress,
    /// The EtherType.
    pub ethertype: u16,
    /// The node.
    pub node: Uuid,
    /// This start of it.
    pub incarnation: Uuid,
    /// Our half of the nonces: random.
    pub nonce: u64,
    /// What a RESET_HINT for this session will show.
    pub token: u64,
    /// Where we want our frames.
    pub cid: Cid,
    /// See `cid`.
    pub steer: Steer,
    /// Our link's MTU.
    pub mtu: u16,
    /// Write credit to start with, in sectors; at least 1 MiB.
    pub credit_sectors: u32,
    /// How long an ack is held back.
    pub ack_delay_max: Nanos,
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoneCause {
    /// The initiator closed it.
    Closed,
    /// Nothing was heard for too long.
    Silent,
    /// No frame ever confirmed it.
    Unconfirmed,
    /// We closed it.
    ClosedHere(CloseReason),
}

/// What the node has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The first valid frame came: older sessions of the attachment end now.
    Confirmed,
    /// Run a request. A write's data is complete in the slot's buffer; a read needs one before it starts.
    Run {
        /// Its slot.
        slot: Slot,
        /// What to do.
        op: Op,
        /// Where, in bytes.
        offset: u64,
        /// How much: bytes, or sectors for discard and write-zeroes.
        len: u32,
        /// The handle OPEN gave.
        vol_handle: u32,
        /// The epoch the initiator thinks it has.
        vol_epoch: u64,
    },
    /// Open the volume, then [`Target::complete_info`].
    Open {
        /// Its slot.
        slot: Slot,
        /// What is asked for.
        request: OpenRequest,
    },
    /// The slot's buffer is not needed any more.
    Free {
        /// The slot.
        slot: Slot,
    },
    /// The session is over. Nothing comes after it.
    Gone(GoneCause),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    /// A write of which pieces are missing; the REQ may be among them.
    Receiving,
    Running,
    /// The final answer is on its way: a RESP, or read data.
    Answering(Status),
}

#[derive(Clone, Debug)]
struct SlotState {
    state: State,
    op: Op,
    /// Sequence number of the last request taken.
    last: u16,
    /// Data bytes (sectors for discard and write-zeroes).
    len: u32,
    request: Option<(u64, u32, u64)>,
    /// Receiving: pieces that came. Answering a read: pieces that were acked.
    pieces: PieceSet,
    /// The next piece of a read's answer to be sent for the first time.
    next_piece: u16,
    info: Option<VolumeInfo>,
    /// [`Event::Free`] of its last read waits in the queue: a new write makes it void.
    free_queued: bool,
}

/// The node's end of one session.
pub struct Target {
    config: TargetConfig,
    session: Session,
    slots: Box<[SlotState]>,
    confirmed: bool,
    credit: u32,
    credit_used: u32,
    /// Slots whose answer waits to be sent.
    answers: VecDeque<Slot>,
    resend: VecDeque<Record>,
    echo: Option<u16>,
    event: Option<VolumeInfo>,
    /// The news sent last, in case its frame is lost.
    event_sent: Option<VolumeInfo>,
    closing: Option<CloseReason>,
    gone: bool,
    started: Instant,
    events: VecDeque<Event>,
    stats: Stats,
}

impl Target {
    /// A session that answers `config.hello`.
    pub fn accept(config: TargetConfig, now: Instant) -> Target {
        let hello = &config.hello;
        let (piece_bytes, frame_bytes_max) =
            agree(usize::from(hello.mtu), usize::from(config.mtu), hello.piece_bytes_max);
        let session = SessionConfig {
            mode: config.mode,
            ethertype: config.ethertype,
            address: config.address,
            peer: config.peer,
            peer_steer: hello.steer,
            peer_cid: hello.cid,
            nonce: config.nonce,
            peer_nonce: hello.nonce,
            piece_bytes,
            frame_bytes_max,
            ack_delay_max: config.ack_delay_max,
        };
        let empty = SlotState {
            state: State::Idle,
            op: Op::Flush,
            last: 0,
            len: 0,
            request: None,
            pieces: PieceSet::default(),
            next_piece: 0,
            info: None,
            free_queued: false,
        };
        Target {
            session: Session::new(session, now, None),
            slots: alloc::vec![empty; SLOTS_MAX + 1].into_boxed_slice(),
            confirmed: false,
            credit: config.credit_sectors,
            credit_used: 0,
            answers: VecDeque::with_capacity(SLOTS_MAX + 1),
            resend: VecDeque::new(),
            echo: None,
            event: None,
            event_sent: None,
            closing: None,
            gone: false,
            started: now,
            events: VecDeque::with_capacity(SLOTS_MAX + 1),
            stats: Stats { sessions: 1, ..Stats::default() },
            config,
        }
    }

    /// The answer to the HELLO, the same each time.
    pub fn hello_reply(&self) -> HelloReply {
        let (config, hello) = (&self.config, &self.config.hello);
        HelloReply {
            session_epoch: hello.session_epoch,
            initiator_nonce: hello.nonce,
            status: Status::Ok,
            node: config.node,
            incarnation: config.incarnation,
            nonce: config.nonce,
            token: config.token,
            cid: config.cid,
            steer: config.steer,
            mtu: config.mtu,
            slots: hello.slots.min(SLOTS_MAX as u16),
            piece_bytes: self.session.config().piece_bytes,
            request_bytes_max: REQUEST_BYTES_MAX as u32,
            credit_sectors: config.credit_sectors,
        }
    }

    /// The HELLO that it answers.
    pub fn hello(&self) -> &Hello {
        &self.config.hello
    }

    /// The initiator's address.
    pub fn peer(&self) -> MacAddress {
        self.config.peer
    }

    /// Our cid.
    pub fn cid(&self) -> Cid {
        self.config.cid
    }

    /// True once a valid frame of the session came.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed
    }

    /// The nonces (sender's, receiver's) to check the seal of a received frame with.
    pub fn nonces_in(&self) -> (u64, u64) {
        self.session.nonces_in()
    }

    /// True if a frame with this number came before. With keys it need not be opened: nobody sends one twice.
    pub fn has_seen(&self, pn: u64) -> bool {
        self.session.has_seen(pn)
    }

    /// The buffers that the writes beginning in this frame need: slot and bytes. If one cannot be had the frame must be dropped: it is not
    /// acked, and comes again.
    pub fn buffers_wanted(&self, frame: &Frame<'_>, wanted: &mut Vec<(Slot, u32)>) {
        let mut credit_used = self.credit_used;
        for Payload { message, .. } in frame.messages() {
            let data = message.carries_data() && message.kind != Kind::ReadData;
            let first = wanted.iter().all(|(slot, _)| *slot != message.slot);
            if data && first && self.is_new_write(&message, credit_used) {
                wanted.push((message.slot, message.mlen));
                credit_used = credit_used.wrapping_add(sectors(message.mlen));
            }
        }
    }

    fn is_new_write(&self, message: &Message, credit_used: u32) -> bool {
        let Some(slot) = self.slots.get(message.slot.index()).filter(|_| message.slot != CONTROL_SLOT) else {
            return false;
        };
        let next = message.sseq == slot.last.wrapping_add(1)
            && !matches!(slot.state, State::Receiving | State::Running);
        next && self.write_is_allowed(message.mlen, credit_used)
    }

    fn write_is_allowed(&self, len: u32, credit_used: u32) -> bool {
        len >= 1 && len as usize <= REQUEST_BYTES_MAX && self.credit.wrapping_sub(credit_used) >= sectors(len)
    }

    /// Takes a frame whose seal was right. The caller copies the placements into the slots' buffers before it takes the next frame.
    pub fn handle_frame(
        &mut self,
        now: Instant,
        arrival: Instant,
        frame: &Frame<'_>,
        placements: &mut Vec<Placement>,
    ) {
        if self.gone {
            return;
        }
        let fresh = self.session.receive(now, arrival, frame, &mut self.stats);
        if !self.confirmed {
            self.confirmed = true;
            self.events.push_back(Event::Confirmed);
        }
        if fresh {
            for payload in frame.messages() {
                self.handle_message(frame, &payload, placements);
                if self.gone {
                    return;
                }
            }
        }
        self.session.conclude(now, &mut self.stats);
        self.settle();
    }

    fn handle_message(&mut self, frame: &Frame<'_>, payload: &Payload, placements: &mut Vec<Placement>) {
        let message = &payload.message;
        match message.kind {
            Kind::Request | Kind::WriteData => self.handle_request(frame, payload, placements),
            Kind::AckRanges => {
                self.session.receive_ranges(frame.payload(payload.range.clone()), &mut self.stats);
            }
            Kind::Probe if message.code == 0 => self.echo = Some(message.plen),
            Kind::Close => self.end(GoneCause::Closed),
            Kind::Ping | Kind::Pad | Kind::Probe => {}
            Kind::Response | Kind::ReadData | Kind::Event => self.stats.violations += 1,
        }
    }

    fn handle_request(&mut self, frame: &Frame<'_>, payload: &Payload, placements: &mut Vec<Placement>) {
        let message = &payload.message;
        let (Some(slot), Some(op)) = (self.slots.get(message.slot.index()), message.op()) else {
            self.stats.violations += 1;
            return;
        };
        match message.sseq.wrapping_sub(slot.last) {
            1 if matches!(slot.state, State::Receiving | State::Running) => self.stats.violations += 1,
            1 => {
                if self.begin(message, op, frame.payload(payload.range.clone())) && op == Op::Write {
                    self.write_piece(payload, placements);
                }
            }
            0 if op == Op::Write && slot.op == Op::Write && slot.state == State::Receiving => {
                self.write_piece(payload, placements);
            }
            _ => self.stats.duplicate_messages += 1,
        }
    }

    /// A slot is used again: a new request. False when it is one that must not be.
    fn begin(&mut self, message: &Message, op: Op, payload: &[u8]) -> bool {
        let is_control = matches!(op, Op::Open | Op::Release | Op::Stat);
        let legal = match op {
            Op::Read => message.mlen >= 1 && message.mlen as usize <= REQUEST_BYTES_MAX,
            Op::Write => self.write_is_allowed(message.mlen, self.credit_used),
            Op::Discard | Op::WriteZeroes => message.mlen >= 1,
            Op::Flush | Op::Release | Op::Stat | Op::Open => message.mlen == 0,
        };
        let open = if op == Op::Open { OpenRequest::parse(payload).ok() } else { None };
        if !legal || is_control != (message.slot == CONTROL_SLOT) || (op == Op::Open && open.is_none()) {
            self.stats.violations += 1;
            return false;
        }
        let grid = self.session.grid();
        let slot = &mut self.slots[message.slot.index()];
        if matches!(slot.state, State::Answering(_)) {
            // The peer says that it has the last answer: what of it was not sent yet is not wanted.
            self.answers.retain(|waiting| *waiting != message.slot);
        }
        if op == Op::Write && core::mem::take(&mut slot.free_queued) {
            self.events.retain(|event| *event != Event::Free { slot: message.slot });
        }
        if slot.op == Op::Read && slot.state == State::Answering(Status::Ok) && op != Op::Write {
            self.events.push_back(Event::Free { slot: message.slot });
        }
        (slot.last, slot.op, slot.len, slot.info) = (message.sseq, op, message.mlen, None);
        slot.request = message.request.map(|body| (body.offset, body.vol_handle, body.vol_epoch));
        slot.state = State::Running;
        match op {
            Op::Write => {
                slot.state = State::Receiving;
                slot.pieces.reset(grid.count(message.mlen));
                self.credit_used = self.credit_used.wrapping_add(sectors(message.mlen));
            }
            Op::Open => {
                if let Some(request) = open {
                    self.events.push_back(Event::Open { slot: message.slot, request });
                }
            }
            Op::Read | Op::Flush | Op::Discard | Op::WriteZeroes | Op::Release | Op::Stat => {
                self.run(message.slot)
            }
        }
        true
    }

    /// A piece of the write that the slot is receiving.
    fn write_piece(&mut self, payload: &Payload, placements: &mut Vec<Placement>) {
        let message = &payload.message;
        let slot = &mut self.slots[message.slot.index()];
        let plen = u32::from(message.plen);
        let index = self.session.grid().index_of(message.frag_off, plen, slot.len);
        let Some(index) = index.filter(|_| message.mlen == slot.len) else {
            self.stats.violations += 1;
            return;
        };
        if let Some(body) = message.request {
            slot.request = Some((body.offset, body.vol_handle, body.vol_epoch));
        }
        if slot.pieces.insert(index) {
            self.stats.payload_bytes_received += u64::from(plen);
            placements.push(Placement {
                slot: message.slot,
                offset: message.frag_off,
                range: payload.range.clone(),
            });
        } else {
            self.stats.duplicate_messages += 1;
        }
        if slot.pieces.is_complete() && slot.request.is_some() {
            slot.state = State::Running;
            self.run(message.slot);
        }
    }

    fn run(&mut self, slot: Slot) {
        let state = &self.slots[slot.index()];
        let (offset, vol_handle, vol_epoch) = state.request.unwrap_or_default();
        self.events.push_back(Event::Run {
            slot,
            op: state.op,
            offset,
            len: state.len,
            vol_handle,
            vol_epoch,
        });
    }

    /// A request that [`Event::Run`] named has ended. An OK read's data is in the slot's buffer until [`Event::Free`].
    pub fn complete(&mut self, slot: Slot, status: Status) {
        self.answer(slot, status, None);
    }

    /// A request that [`Event::Open`] named (or a Stat) has ended.
    pub fn complete_info(&mut self, slot: Slot, status: Status, info: VolumeInfo) {
        self.answer(slot, status, Some(info));
    }

    fn answer(&mut self, slot: Slot, status: Status, info: Option<VolumeInfo>) {
        if self.gone {
            return;
        }
        let grid = self.session.grid();
        let state = &mut self.slots[slot.index()];
        assert!(state.state == State::Running, "slot {} completed in {:?}", slot.0, state.state);
        state.state = State::Answering(status);
        (state.info, state.next_piece) = (info, 0);
        match state.op {
            Op::Read if status == Status::Ok => state.pieces.reset(grid.count(state.len)),
            Op::Read => {
                state.free_queued = true;
                self.events.push_back(Event::Free { slot });
            }
            Op::Write => self.credit = self.credit.wrapping_add(sectors(state.len)),
            Op::Flush | Op::Discard | Op::WriteZeroes | Op::Open | Op::Release | Op::Stat => {}
        }
        self.answers.push_back(slot);
    }

    /// Tells the initiator that the volume changed (P-120).
    pub fn notify(&mut self, info: VolumeInfo) {
        self.event = Some(info);
        // An answer that has to be sent again must not bring back how the volume was.
        if let Some(told) = &mut self.slots[CONTROL_SLOT.index()].info {
            *told = VolumeInfo { vol_epoch: told.vol_epoch, vol_handle: told.vol_handle, ..info };
        }
    }

    /// Ends the session: one CLOSE leaves, then [`Event::Gone`].
    pub fn close(&mut self, reason: CloseReason) {
        if !self.gone {
            self.closing = Some(reason);
        }
    }

    fn end(&mut self, cause: GoneCause) {
        if !self.gone {
            self.gone = true;
            self.events.push_back(Event::Gone(cause));
        }
    }

    /// What the session found acked and lost.
    fn settle(&mut self) {
        for record in self.session.verdicts.acked.drain(..) {
            let slot = &mut self.slots[record.slot.index()];
            let answering = slot.state == State::Answering(Status::Ok) && slot.last == record.sseq;
            if record.what == What::ReadData && answering && slot.op == Op::Read {
                slot.pieces.insert(record.piece);
                if slot.pieces.is_complete() {
                    (slot.state, slot.free_queued) = (State::Idle, true);
                    self.events.push_back(Event::Free { slot: record.slot });
                }
            }
        }
        let mut too_wide = false;
        for record in self.session.verdicts.lost.drain(..) {
            too_wide |= record.losses >= LOSSES_MAX && record.what == What::ReadData;
            self.resend.push_back(record);
        }
        if too_wide && next_lower(self.session.config().piece_bytes).is_some() {
            self.close(CloseReason::NarrowPath);
        }
    }

    /// Timers that are due. Run it only after the link was found empty.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.gone {
            return;
        }
        self.session.handle_timeout(now, &mut self.stats);
        self.settle();
        if !self.confirmed && now.since(self.started) >= UNCONFIRMED {
            self.end(GoneCause::Unconfirmed);
        } else if now.since(self.session.last_heard()) >= self.patience() {
            self.end(GoneCause::Silent);
        }
    }

    fn patience(&self) -> Nanos {
        if self.session.is_waiting() || !self.resend.is_empty() { SILENCE_BUSY } else { SILENCE_IDLE }
    }

    /// When something has to be done although no frame comes.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.gone {
            return None;
        }
        let unconfirmed = (!self.confirmed).then(|| self.started + UNCONFIRMED);
        let silent = Some(self.session.last_heard() + self.patience());
        earliest([self.session.poll_timeout(), silent, unconfirmed])
    }

    /// The link would not take frame `pn`.
    pub fn not_sent(&mut self, now: Instant, pn: u64) {
        if self.gone {
            return;
        }
        self.session.not_sent(now, pn, &mut self.stats);
        self.settle();
    }

    /// The next event that gives something back, for a node that has no room for another request: [`Event::Free`] or [`Event::Gone`], past
    /// those that wait before it. (Nothing of the freed slot can be among them: its last request was answered.)
    pub fn poll_freed(&mut self) -> Option<Event> {
        let frees = |event: &Event| matches!(event, Event::Free { .. } | Event::Gone(_));
        let event = self.events.remove(self.events.iter().position(frees)?)?;
        self.note_polled(event);
        Some(event)
    }

    /// What the node has to do, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        let event = self.events.pop_front()?;
        self.note_polled(event);
        Some(event)
    }

    fn note_polled(&mut self, event: Event) {
        if let Event::Free { slot } = event {
            self.slots[slot.index()].free_queued = false;
        }
    }

    /// The counters; gauges are of now.
    pub fn stats(&self) -> Stats {
        let mut stats = self.stats;
        self.session.publish(&mut stats);
        stats
    }
}

/// Write credit that `bytes` of data need.
fn sectors(bytes: u32) -> u32 {
    bytes.div_ceil(SECTOR_BYTES as u32)
}
