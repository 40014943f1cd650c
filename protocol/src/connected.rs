//! An initiator's life in a session: trying the path, opening the volume, requests, and noticing that the node is gone.
//!
//! Knows one session. What outlives it (requests, the wanted access, how wide the path is) belongs to `initiator`, its only caller.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::handshake::Retry;
use crate::initiator::{Event, LossCause, StateName};
use crate::op::{Op, Status};
use crate::pieces::{LADDER, mtu_needed, next_lower, piece_bytes_for_mtu};
use crate::requests::{LOSSES_MAX, Requests, VolumeRef};
use crate::send_window::{Record, What};
use crate::session::{PayloadRef, Placement, Session, SessionConfig, Transmit};
use crate::stats::Stats;
use crate::time::{Instant, Nanos, earliest};
use crate::types::{CONTROL_SLOT, Uuid};
use crate::wire::body::{Access, CloseReason, OpenRequest, VolumeInfo};
use crate::wire::header::HEADER_BYTES;
use crate::wire::long::HelloReply;
use crate::wire::message::{MESSAGE_BYTES, RequestBody};
use crate::wire::{Frame, Kind, Message, Mode, Payload};

/// Full-size probes without an echo, while small ones are echoed, before the path counts as narrower.
const PROBE_TRIES: u32 = 8;
/// Silence after which the node is asked whether it is there: with requests pending, and without.
const SILENCE_BUSY: Nanos = Nanos::from_millis(100);
const SILENCE_IDLE: Nanos = Nanos::from_secs(10);
/// A node is dead when so many PINGs over so long a time were not answered.
const DEAD_PINGS: u32 = 10;
const DEAD_AFTER: Nanos = Nanos::from_secs(1);
/// A refused OPEN is tried again after this, and each time after half as long again, up to the longest: who has the volume may be about to give it
/// back, as when its guest moves from there to here.
const OPEN_PAUSE_FIRST: Nanos = Nanos::from_millis(5);
const OPEN_PAUSE_MAX: Nanos = Nanos::from_millis(250);
/// A narrowed path is tried at the next wider size this often.
const WIDEN_EVERY: Nanos = Nanos::from_secs(60);

/// Does the session go on?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Goes,
    Lost(LossCause),
}

impl Outcome {
    pub(crate) fn or(self, other: Outcome) -> Outcome {
        if self == Outcome::Goes { other } else { self }
    }
}

/// OPEN or RELEASE on its way.
#[derive(Clone, Copy, Debug)]
struct Control {
    op: Op,
    open: OpenRequest,
    /// Not sent yet, or lost.
    queued: bool,
    losses: u8,
}

#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) session: Session,
    pub(crate) node: Uuid,
    pub(crate) incarnation: Uuid,
    pub(crate) token: u64,
    link_mtu: usize,
    /// Probing goes on while it is there.
    probe: Option<Retry>,
    small_echoed: bool,
    widen_at: Option<Instant>,
    control: Option<Control>,
    control_sseq: u16,
    /// After a refusal: when to try again.
    control_at: Option<Instant>,
    open_pause: Nanos,
    held: Option<Access>,
    /// Nothing is to be issued.
    pub(crate) barred: bool,
    info: VolumeInfo,
    /// The frame that told its size and flags.
    told_by: u64,
    first_ping: Option<Instant>,
    pings: u32,
    ping_at: Instant,
}

impl Connected {
    pub(crate) fn new(
        config: SessionConfig,
        reply: &HelloReply,
        link_mtu: usize,
        now: Instant,
        handshake_rtt: Option<Nanos>,
    ) -> Connected {
        let narrowed = config.piece_bytes < piece_bytes_for_mtu(link_mtu);
        Connected {
            session: Session::new(config, now, handshake_rtt),
            node: reply.node,
            incarnation: reply.incarnation,
            token: reply.token,
            link_mtu,
            probe: Some(Retry::starting(now)),
            small_echoed: false,
            widen_at: narrowed.then(|| now + WIDEN_EVERY),
            control: None,
            control_sseq: 0,
            control_at: None,
            open_pause: OPEN_PAUSE_FIRST,
            held: None,
            barred: false,
            info: VolumeInfo::default(),
            told_by: 0,
            first_ping: None,
            pings: 0,
            ping_at: now,
        }
    }

    pub(crate) fn state(&self, wanted: Access) -> StateName {
        if self.probe.is_some() {
            StateName::Probing
        } else if self.held.is_some_and(|held| held >= wanted) {
            StateName::Open
        } else {
            StateName::Opening
        }
    }

    /// The piece size one rung up, within the link's MTU.
    pub(crate) fn wider_piece_bytes(&self) -> u32 {
        let widest = piece_bytes_for_mtu(self.link_mtu);
        let piece = self.session.config().piece_bytes;
        LADDER.into_iter().rev().find(|rung| *rung > piece).unwrap_or(widest).min(widest)
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "the halves that outlive the session are borrowed apart from it"
    )]
    pub(crate) fn handle_message(
        &mut self,
        now: Instant,
        frame: &Frame<'_>,
        payload: &Payload,
        requests: &mut Requests,
        placements: &mut Vec<Placement>,
        events: &mut VecDeque<Event>,
        stats: &mut Stats,
    ) -> Outcome {
        let message = &payload.message;
        match message.kind {
            Kind::ReadData => {
                if requests.read_data(self.session.grid(), payload, placements, stats) {
                    events.push_back(Event::Done { slot: message.slot, status: Status::Ok });
                }
            }
            Kind::Response if message.slot == CONTROL_SLOT => {
                let answer = (message, frame.payload(payload.range.clone()));
                self.control_answered(now, frame.header.pn, answer, events, stats);
            }
            Kind::Response => {
                if let Some(status) = requests.response(message, stats) {
                    events.push_back(Event::Done { slot: message.slot, status });
                }
            }
            Kind::AckRanges => self.session.receive_ranges(frame.payload(payload.range.clone()), stats),
            Kind::Probe => return self.probe_came(message),
            Kind::Event => match VolumeInfo::parse(frame.payload(payload.range.clone())) {
                Ok(info) => {
                    if self.learn(frame.header.pn, info) {
                        events.push_back(Event::Changed(self.info));
                    }
                }
                Err(_) => stats.violations += 1,
            },
            Kind::Close => return Outcome::Lost(LossCause::Closed(CloseReason::from_code(message.code))),
            Kind::Ping | Kind::Pad => {}
            Kind::Request | Kind::WriteData => stats.violations += 1,
        }
        Outcome::Goes
    }

    fn probe_came(&mut self, message: &Message) -> Outcome {
        if message.code != 1 {
            return Outcome::Goes;
        }
        let plen = usize::from(message.plen);
        if plen == 0 {
            self.small_echoed = true;
        } else if plen == self.probe_plen(self.session.config().frame_bytes_max) {
            self.probe = None;
        } else if plen == self.probe_plen(self.wider_frame_bytes()) && self.widen_at.is_some() {
            return Outcome::Lost(LossCause::WiderPath);
        }
        Outcome::Goes
    }

    fn probe_plen(&self, frame_bytes: usize) -> usize {
        probe_plen(frame_bytes, self.session.config().mode)
    }

    fn wider_frame_bytes(&self) -> usize {
        let wider = self.wider_piece_bytes();
        if wider == piece_bytes_for_mtu(self.link_mtu) { self.link_mtu } else { mtu_needed(wider) }
    }

    /// What frame `pn` says of the volume; false when a later frame has said it (P-121).
    fn learn(&mut self, pn: u64, info: VolumeInfo) -> bool {
        let news = pn >= self.told_by;
        if news {
            self.told_by = pn;
            self.info =
                VolumeInfo { vol_epoch: self.info.vol_epoch, vol_handle: self.info.vol_handle, ..info };
        }
        news
    }

    fn control_answered(
        &mut self,
        now: Instant,
        pn: u64,
        (message, payload): (&Message, &[u8]),
        events: &mut VecDeque<Event>,
        stats: &mut Stats,
    ) {
        let Some(control) = self.control.filter(|_| message.sseq == self.control_sseq) else {
            stats.duplicate_messages += 1;
            return;
        };
        let status = message.status().unwrap_or(Status::Invalid);
        let info = VolumeInfo::parse(payload).ok();
        self.control = None;
        match (control.op, status, info) {
            (Op::Open, Status::Ok, Some(info)) => {
                self.learn(pn, info);
                (self.info.vol_epoch, self.info.vol_handle) = (info.vol_epoch, info.vol_handle);
                self.held = Some(control.open.access);
                self.open_pause = OPEN_PAUSE_FIRST;
                events.push_back(Event::Attached(self.info, control.open.access));
            }
            (Op::Release, Status::Ok, _) => self.held = Some(Access::ReadOnly),
            (_, status, info) => {
                let info = info.unwrap_or_default();
                if control.op == Op::Open && self.held.is_none_or(|held| held == Access::ReadOnly) {
                    // The holder's epoch, which a take-over has to name.
                    self.info.vol_epoch = info.vol_epoch;
                }
                self.control_at = Some(now + self.open_pause);
                self.open_pause = Nanos(self.open_pause.0 * 3 / 2).min(OPEN_PAUSE_MAX);
                events.push_back(Event::Refused(status, info));
            }
        }
    }

    /// Hands what the session found lost to the table. A piece that does not pass makes the path be probed again: either it has become
    /// narrower, or the node has no room just now.
    pub(crate) fn settle(&mut self, now: Instant, requests: &mut Requests) {
        self.session.verdicts.acked.clear();
        let mut suspect = false;
        for record in self.session.verdicts.lost.drain(..) {
            suspect |= record.losses >= LOSSES_MAX && matches!(record.what, What::WriteData | What::Request);
            match &mut self.control {
                Some(control) if record.slot == CONTROL_SLOT && record.sseq == self.control_sseq => {
                    (control.queued, control.losses) = (true, record.losses);
                }
                _ if record.slot == CONTROL_SLOT => {}
                _ => requests.lost(record),
            }
        }
        if suspect && self.probe.is_none() {
            (self.probe, self.small_echoed) = (Some(Retry::starting(now)), false);
        }
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant, idle: bool, stats: &mut Stats) -> Outcome {
        self.session.handle_timeout(now, stats);
        if self.probe.is_some_and(|probe| probe.tries() > PROBE_TRIES && probe.next_at() <= now)
            && self.small_echoed
        {
            return match next_lower(self.session.config().piece_bytes) {
                Some(_) => Outcome::Lost(LossCause::NarrowPath),
                None => Outcome::Goes,
            };
        }
        if self.first_ping.is_some_and(|at| self.session.last_heard() > at) {
            (self.first_ping, self.pings) = (None, 0);
        }
        let silence_ends = self.session.last_heard() + self.silence(idle);
        if silence_ends <= now && self.ping_at.max(silence_ends) <= now {
            let first = *self.first_ping.get_or_insert(now);
            if self.pings >= DEAD_PINGS && now.since(first) >= DEAD_AFTER {
                return Outcome::Lost(LossCause::Dead);
            }
            self.pings += 1;
            self.ping_at = now + self.session.probe_timeout();
            self.session.ask_now();
        }
        Outcome::Goes
    }

    fn silence(&self, idle: bool) -> Nanos {
        let waits = !idle || self.control.is_some() || self.probe.is_some();
        if waits { SILENCE_BUSY } else { SILENCE_IDLE }
    }

    pub(crate) fn poll_timeout(&self, idle: bool) -> Option<Instant> {
        let ping_at = (self.session.last_heard() + self.silence(idle)).max(self.ping_at);
        let own = match self.probe {
            Some(probe) => earliest([Some(probe.next_at()), Some(ping_at)]),
            None => earliest([self.widen_at, self.control_at, Some(ping_at)]),
        };
        earliest([self.session.poll_timeout(), own.map(|at| self.session.after_rest(at))])
    }

    /// Decides whether OPEN or RELEASE must leave.
    pub(crate) fn drive_control(&mut self, now: Instant, wanted: Access, take_over: bool) {
        if self.control_at.is_some_and(|at| at > now) {
            return;
        }
        self.control_at = None;
        if self.control.is_some() || self.probe.is_some() || self.held == Some(wanted) {
            return;
        }
        let op = if self.held.is_some() && wanted == Access::ReadOnly { Op::Release } else { Op::Open };
        let named = self.info.vol_epoch != 0 && wanted == Access::ReadWrite && op == Op::Open;
        let take_over = (named && take_over).then_some(self.info.vol_epoch);
        self.control_sseq = self.control_sseq.wrapping_add(1);
        let open = OpenRequest { access: wanted, take_over };
        self.control = Some(Control { op, open, queued: true, losses: 0 });
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "the halves that outlive the session are borrowed apart from it"
    )]
    pub(crate) fn transmit(
        &mut self,
        now: Instant,
        wanted: Access,
        requests: &mut Requests,
        head: &mut Vec<u8>,
        payloads: &mut Vec<PayloadRef>,
        stats: &mut Stats,
    ) -> Option<Transmit> {
        if !self.session.can_send(now) {
            return None;
        }
        if let Some(ping) = self.session.transmit_ping(now, 0, head, payloads, stats) {
            return Some(ping);
        }
        if let Some(frame_bytes) = self.probe_due(now) {
            return Some(self.transmit_probe(now, frame_bytes, head, payloads, stats));
        }
        // While RELEASE is on its way the epoch may end any moment: nothing is issued under it.
        let settled = self.probe.is_none() && self.control.is_none() && !self.barred;
        let open = settled && self.held.is_some_and(|held| held >= wanted);
        let control_due = self.control.is_some_and(|control| control.queued);
        if !(control_due || self.session.must_send(now) || (open && requests.has_work())) {
            return None;
        }
        let mut writer = self.session.begin(now, 0, head, payloads);
        self.session.push_ranges(&mut writer);
        if let Some(control) = self.control.as_mut().filter(|control| control.queued) {
            control.queued = false;
            let message = Message {
                slot: CONTROL_SLOT,
                sseq: self.control_sseq,
                code: control.op as u8,
                request: Some(RequestBody {
                    vol_handle: self.info.vol_handle,
                    vol_epoch: self.info.vol_epoch,
                    ..RequestBody::default()
                }),
                ..Message::bare(Kind::Request)
            };
            let mut body = Vec::new();
            if control.op == Op::Open {
                control.open.emit(&mut body);
            }
            writer.push(message, &body);
            let record = Record {
                slot: CONTROL_SLOT,
                sseq: self.control_sseq,
                piece: 0,
                what: What::Request,
                losses: control.losses,
            };
            self.session.remember(&mut writer, record);
        }
        if open {
            let volume = VolumeRef { handle: self.info.vol_handle, epoch: self.info.vol_epoch };
            requests.transmit(&mut self.session, &mut writer, volume, stats);
        }
        if writer.is_empty() && !self.session.must_send(now) {
            head.clear();
            return None;
        }
        Some(self.session.finish(now, writer, stats))
    }

    /// The size of the probe that is due, if one is. Every second try is a small one, to tell a narrow path from a dead node.
    fn probe_due(&mut self, now: Instant) -> Option<usize> {
        let full = self.session.config().frame_bytes_max;
        if let Some(probe) = self.probe.as_mut().filter(|probe| probe.next_at() <= now) {
            let small = probe.tries() > 0 && !self.small_echoed && probe.tries() % 2 == 1;
            probe.tried(now, true);
            return Some(if small { 0 } else { full });
        }
        if self.probe.is_none() && self.widen_at.is_some_and(|at| at <= now) {
            self.widen_at = Some(now + WIDEN_EVERY);
            return Some(self.wider_frame_bytes());
        }
        None
    }

    fn transmit_probe(
        &mut self,
        now: Instant,
        frame_bytes: usize,
        head: &mut Vec<u8>,
        payloads: &mut Vec<PayloadRef>,
        stats: &mut Stats,
    ) -> Transmit {
        let mut writer = self.session.begin(now, 0, head, payloads);
        let filler = alloc::vec![0; self.probe_plen(frame_bytes)];
        writer.push(Message::bare(Kind::Probe), &filler);
        self.session.finish(now, writer, stats)
    }
}

/// Payload of a PROBE that makes its frame as long as `frame_bytes`, rounded down to 8; 0 for a small one.
pub(crate) const fn probe_plen(frame_bytes: usize, mode: Mode) -> usize {
    let overhead = HEADER_BYTES + MESSAGE_BYTES + mode.tag_bytes();
    if frame_bytes <= overhead { 0 } else { (frame_bytes - overhead) / 8 * 8 }
}
