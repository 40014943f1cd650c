//! What both ends of a session do alike: packet numbers, acks, loss detection, the probe timeout, and the writing of frames.
//!
//! Knows frames and their fate. What a message means, and whether it is worth sending again, is known to its owner, `initiator` or
//! `target`: it drains [`Session::verdicts`].
//!
//! ```text
//!   frame in --> receive() --> verdicts.{acked,lost} --> owner
//!   owner --> begin() --> FrameWriter::{push, push_data}* --> finish() --> frame out
//!   loss time | probe timeout --> handle_timeout() --> verdicts.lost --> owner
//! ```

use alloc::vec::Vec;

use crate::congestion::{Acked, Congestion};
use crate::pieces::Grid;
use crate::recv_window::RecvWindow;
use crate::rtt::Rtt;
use crate::send_window::{AckSums, Record, SendWindow, Verdicts};
use crate::stats::Stats;
use crate::time::{Instant, Nanos, earliest};
use crate::types::{Cid, ETHERNET_BYTES, MESSAGES_MAX, MacAddress, PAYLOADS_MAX, Slot, Steer};
use crate::wire::body::{ACK_RANGE_BYTES, parse_ack_ranges};
use crate::wire::ethernet::Ethernet;
use crate::wire::header::{FLAG_ACK_NOW, FLAG_CRC_TRAILER, HEADER_BYTES};
use crate::wire::{Frame, Header, Kind, Message, Mode, pad_to_8};

/// The longest that a peer means to hold an ack back: what it does when it does not spin.
const PEER_ACK_DELAY: Nanos = Nanos::from_micros(200);
/// The probe timeout does not double beyond this.
const PROBE_TIMEOUT_MAX: Nanos = Nanos::from_millis(10);
/// A peer that holds acks back for longer (its processor is busy) is given up to this much time.
const PATIENCE_MAX: Nanos = Nanos::from_millis(5);
/// How often that patience shrinks by a quarter.
const PATIENCE_EVERY: Nanos = Nanos::from_millis(100);
/// Frames given up and sent again at a probe timeout.
const PROBE_FRAMES: u32 = 2;
/// How long sending rests after the link refused a frame, doubling up to the maximum.
const REFUSED_REST_MIN: Nanos = Nanos::from_micros(100);
const REFUSED_REST_MAX: Nanos = Nanos::from_millis(10);
/// Shortest frame: IEEE 802.3 without the frame check sequence.
const ETHERNET_FRAME_MIN: usize = 60;

/// Bytes of a volume's data that go into the frame being written: `len` bytes at `offset` of the data of the request in `slot`, inserted
/// at head offset `at`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadRef {
    /// Where in the head the bytes are inserted.
    pub at: usize,
    /// The request's slot.
    pub slot: Slot,
    /// Offset in the request's data.
    pub offset: u32,
    /// How many bytes.
    pub len: u32,
    /// How often this piece was lost before.
    pub losses: u8,
}

/// Bytes of a received frame that go to `offset` of the data of the request in `slot`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The request's slot.
    pub slot: Slot,
    /// Offset in the request's data.
    pub offset: u32,
    /// The bytes, as a range of the whole frame.
    pub range: core::ops::Range<usize>,
}

/// How the frame just written is to be sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealWith {
    /// As a LONG frame.
    Long,
    /// As the session's mode says; with CRCs, its nonces: the sender's, the receiver's.
    Session(u64, u64),
}

/// A frame was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Its packet number; 0 for a LONG frame.
    pub pn: u64,
    /// How to seal it.
    pub seal: SealWith,
}

/// What a session is made of, once both sides have agreed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionConfig {
    /// How its frames are protected.
    pub mode: Mode,
    /// The EtherType of its frames.
    pub ethertype: u16,
    /// Our address.
    pub address: MacAddress,
    /// The peer's.
    pub peer: MacAddress,
    /// Where the peer wants its frames.
    pub peer_steer: Steer,
    /// See `peer_steer`.
    pub peer_cid: Cid,
    /// Our half of the nonces.
    pub nonce: u64,
    /// The peer's half.
    pub peer_nonce: u64,
    /// The piece size.
    pub piece_bytes: u32,
    /// Largest frame after the Ethernet header.
    pub frame_bytes_max: usize,
    /// How long we hold an ack back.
    pub ack_delay_max: Nanos,
}

/// One end of a session.
#[derive(Debug)]
pub(crate) struct Session {
    config: SessionConfig,
    grid: Grid,
    sent: SendWindow,
    received: RecvWindow,
    rtt: Rtt,
    congestion: Congestion,
    /// What became of messages since the owner looked last.
    pub verdicts: Verdicts,
    last_heard: Instant,
    last_asked: Instant,
    backoff: u32,
    /// The longest that the peer held an ack back of late, and when that was decided.
    patience: Nanos,
    patience_at: Instant,
    loss_at: Option<Instant>,
    /// Frames were acked since losses were looked for.
    acks_came: bool,
    /// The next frame asks for an ack at once.
    ack_now: bool,
    /// A PING leaves in a frame of its own: small, so that it passes where a full one does not.
    ping_alone: bool,
    /// Sending rests until then, after the link refused a frame.
    rest_until: Option<Instant>,
    rest: Nanos,
    was_limited: bool,
}

/// A frame that is being written. Keep the order: [`Session::begin`], pushes, [`Session::finish`].
#[derive(Debug)]
pub(crate) struct FrameWriter<'a> {
    head: &'a mut Vec<u8>,
    payloads: &'a mut Vec<PayloadRef>,
    mode: Mode,
    /// Bytes after the Ethernet header, CRCs and tag included.
    used: usize,
    limit: usize,
    messages: usize,
    records: usize,
    asks: bool,
    data_bytes: usize,
}

impl FrameWriter<'_> {
    /// True if a message with `plen` bytes of payload still fits.
    pub(crate) fn fits(&self, header_bytes: usize, plen: usize) -> bool {
        let needed = header_bytes + plen + pad_to_8(plen) + self.mode.trailer_bytes(plen);
        self.used + needed <= self.limit && self.messages < MESSAGES_MAX && self.payloads.len() < PAYLOADS_MAX
    }

    /// Appends a message with a control payload, which may be empty.
    pub(crate) fn push(&mut self, mut message: Message, payload: &[u8]) {
        message.plen = payload.len() as u16;
        message.emit(self.head);
        self.head.extend_from_slice(payload);
        self.pad(payload.len());
        self.count(&message, payload.len());
    }

    /// Appends a message whose payload is `len` bytes at `offset` of the data of its slot.
    pub(crate) fn push_data(&mut self, mut message: Message, offset: u32, len: u32, losses: u8) {
        (message.frag_off, message.plen) = (offset, len as u16);
        message.emit(self.head);
        self.payloads.push(PayloadRef { at: self.head.len(), slot: message.slot, offset, len, losses });
        self.pad(len as usize);
        self.count(&message, len as usize);
        self.used += self.mode.trailer_bytes(len as usize);
        self.data_bytes += len as usize;
    }

    /// True if nothing was pushed.
    pub(crate) fn is_empty(&self) -> bool {
        self.messages == 0
    }

    fn pad(&mut self, plen: usize) {
        self.head.resize(self.head.len() + pad_to_8(plen), 0);
    }

    fn count(&mut self, message: &Message, plen: usize) {
        self.used += message.header_bytes() + plen + pad_to_8(plen);
        self.messages += 1;
        self.asks |= message.kind.asks_for_ack();
    }
}

impl Session {
    /// A session that begins now; `handshake_rtt` is what the handshake took.
    pub(crate) fn new(config: SessionConfig, now: Instant, handshake_rtt: Option<Nanos>) -> Session {
        let mut rtt = Rtt::new(now);
        if let Some(sample) = handshake_rtt {
            rtt.sample(now, sample, Nanos::ZERO);
        }
        Session {
            grid: Grid::new(config.piece_bytes),
            sent: SendWindow::new(),
            received: RecvWindow::new(config.ack_delay_max),
            rtt,
            congestion: Congestion::new(config.frame_bytes_max),
            verdicts: Verdicts::default(),
            last_heard: now,
            last_asked: now,
            backoff: 0,
            patience: Nanos::ZERO,
            patience_at: now,
            loss_at: None,
            acks_came: false,
            ack_now: false,
            ping_alone: false,
            rest_until: None,
            rest: REFUSED_REST_MIN,
            was_limited: false,
            config,
        }
    }

    /// What it was made of.
    pub(crate) fn config(&self) -> &SessionConfig {
        &self.config
    }

    /// The grid on which it cuts data.
    pub(crate) fn grid(&self) -> Grid {
        self.grid
    }

    /// True if frames that ask for an ack are in flight.
    pub(crate) fn is_waiting(&self) -> bool {
        self.sent.is_waiting()
    }

    /// When a frame of the peer last came.
    pub(crate) fn last_heard(&self) -> Instant {
        self.last_heard
    }

    /// The nonces of a received frame: the sender's (the peer's) and ours.
    pub(crate) fn nonces_in(&self) -> (u64, u64) {
        (self.config.peer_nonce, self.config.nonce)
    }

    /// True if a frame of this number came before, or is too old to tell.
    pub(crate) fn has_seen(&self, pn: u64) -> bool {
        !self.received.is_new(pn)
    }

    /// True if the window has room for more data.
    pub(crate) fn may_send_data(&mut self) -> bool {
        let room = self.sent.in_flight_bytes() < self.congestion.window_bytes();
        self.was_limited |= !room;
        room
    }

    /// The probe timeout as it stands, doubled as often as it fired.
    pub(crate) fn probe_timeout(&self) -> Nanos {
        let base = self.rtt.probe_timeout(PEER_ACK_DELAY.max(self.patience));
        base.times(1 << self.backoff.min(8)).min(PROBE_TIMEOUT_MAX).max(Nanos::from_micros(100))
    }

    /// Takes a frame whose seal was right. False: it was seen before and must not be processed.
    pub(crate) fn receive(
        &mut self,
        now: Instant,
        arrival: Instant,
        frame: &Frame<'_>,
        stats: &mut Stats,
    ) -> bool {
        stats.frames_received += 1;
        self.last_heard = now;
        let header = &frame.header;
        let ack_now = header.flags & FLAG_ACK_NOW != 0;
        let new = self.received.is_new(header.pn);
        if new {
            self.received.mark(now, arrival, header.pn, frame.asks_for_ack(), ack_now);
        } else {
            stats.duplicate_frames += 1;
            if ack_now {
                self.received.ack_again(now);
            }
            return false;
        }
        self.handle_ack(now, arrival, header, stats);
        true
    }

    /// Takes the payload of an ACK_RANGES message.
    pub(crate) fn receive_ranges(&mut self, payload: &[u8], stats: &mut Stats) {
        let Ok(ranges) = parse_ack_ranges(payload) else {
            stats.violations += 1;
            return;
        };
        let mut sums = AckSums::default();
        for (first, last) in ranges {
            let part = self.sent.on_ack_range(first, last, &mut self.verdicts);
            sums.frames += part.frames;
            sums.bytes += part.bytes;
            sums.spurious += part.spurious;
        }
        stats.spurious_losses += u64::from(sums.spurious);
        self.acks_came = true;
    }

    /// The whole frame has been looked at, bitmap and ranges: what neither names and later ones overtook is lost.
    pub(crate) fn conclude(&mut self, now: Instant, stats: &mut Stats) {
        if core::mem::take(&mut self.acks_came) {
            self.detect_lost(now, stats);
        }
    }

    fn handle_ack(&mut self, now: Instant, arrival: Instant, header: &Header, stats: &mut Stats) {
        if header.ack_pn == 0 && header.ack_bits == 0 {
            return;
        }
        let Some(largest) = self.sent.expand(header.ack_pn) else {
            stats.violations += 1;
            return;
        };
        let sums = self.sent.on_ack(largest, header.ack_bits, &mut self.verdicts);
        stats.spurious_losses += u64::from(sums.spurious);
        if let Some(sent_at) = sums.largest_sent_at {
            let held = Nanos(u64::from(header.ack_delay) * 250);
            self.learn_patience(now, held);
            self.rtt.sample(now, arrival.since(sent_at), held);
        }
        if sums.frames > 0 {
            self.backoff = 0;
            self.rest = REFUSED_REST_MIN;
            let acked = Acked {
                bytes: sums.bytes,
                frames: sums.frames,
                delay: self.rtt.latest(),
                limited: sums.limited,
            };
            self.congestion.on_acked(now, acked, self.rtt.min(), self.rtt.smoothed());
            self.acks_came = true;
        }
    }

    /// The peer says how long it held an ack back. When its processor is busy with others that is longer than it promised, and lasts longer
    /// than round-trip samples remember: the longest of late counts, up to a limit, and fades.
    fn learn_patience(&mut self, now: Instant, held: Nanos) {
        if held > self.patience {
            (self.patience, self.patience_at) = (held.min(PATIENCE_MAX), now);
        } else if now.since(self.patience_at) >= PATIENCE_EVERY {
            (self.patience, self.patience_at) = (Nanos(self.patience.0 * 3 / 4), now);
        }
    }

    fn detect_lost(&mut self, now: Instant, stats: &mut Stats) {
        let (lost, next) = self.sent.detect_lost(now, self.rtt.loss_delay(), &mut self.verdicts);
        self.loss_at = next;
        if lost > 0 {
            stats.frames_lost += u64::from(lost);
            self.congestion.on_lost(now, lost, self.rtt.smoothed());
        }
    }

    fn probe_at(&self) -> Option<Instant> {
        self.sent.is_waiting().then(|| self.last_asked + self.probe_timeout())
    }

    /// When [`Session::handle_timeout`] or a pending ack has something to do.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let timers = [self.loss_at, self.probe_at(), self.received.ack_at(), self.rest_until];
        earliest(timers).map(|at| self.after_rest(at))
    }

    /// `at`, or the end of the rest after a refused frame if that is later: nothing can be sent before.
    pub(crate) fn after_rest(&self, at: Instant) -> Instant {
        self.rest_until.map_or(at, |rest_until| at.max(rest_until))
    }

    /// Frames become lost by time; a tail that nobody acks is given up and sent again. Run it only after the link was found empty.
    pub(crate) fn handle_timeout(&mut self, now: Instant, stats: &mut Stats) {
        if self.rest_until.is_some_and(|at| at <= now) {
            self.rest_until = None;
        }
        if self.loss_at.is_some_and(|at| at <= now) {
            self.detect_lost(now, stats);
        }
        if self.probe_at().is_some_and(|at| at <= now) {
            stats.probe_timeouts += 1;
            self.sent.lose_oldest(PROBE_FRAMES, self.last_heard, &mut self.verdicts);
            self.backoff += 1;
            self.last_asked = now;
            self.ack_now = true;
            self.ping_alone |= self.backoff > 1;
        }
    }

    /// The link would not take frame `pn`: its messages leave again, after a rest.
    pub(crate) fn not_sent(&mut self, now: Instant, pn: u64, stats: &mut Stats) {
        stats.frames_refused += 1;
        self.sent.lose_one(pn, &mut self.verdicts);
        if self.rest_until.is_none() {
            self.rest_until = Some(now + self.rest);
            self.rest = self.rest.times(2).min(REFUSED_REST_MAX);
        }
    }

    /// Asks the peer for an ack with a small frame of its own.
    pub(crate) fn ask_now(&mut self) {
        self.ping_alone = true;
    }

    /// Writes that small frame, if one is wanted.
    pub(crate) fn transmit_ping(
        &mut self,
        now: Instant,
        credit: u32,
        head: &mut Vec<u8>,
        payloads: &mut Vec<PayloadRef>,
        stats: &mut Stats,
    ) -> Option<Transmit> {
        if !core::mem::take(&mut self.ping_alone) {
            return None;
        }
        let mut writer = self.begin(now, credit, head, payloads);
        writer.push(Message::bare(Kind::Ping), &[]);
        let ask_again = core::mem::replace(&mut self.ack_now, true);
        let transmit = self.finish(now, writer, stats);
        self.ack_now = ask_again;
        Some(transmit)
    }

    /// True if a frame must leave although no message waits.
    pub(crate) fn must_send(&self, now: Instant) -> bool {
        self.ack_now || self.ping_alone || self.received.ack_at().is_some_and(|at| at <= now)
    }

    /// True if a frame can leave now.
    pub(crate) fn can_send(&self, now: Instant) -> bool {
        self.rest_until.is_none_or(|at| at <= now) && self.sent.has_room(MESSAGES_MAX)
    }

    /// Starts a frame. `credit` goes into its header.
    pub(crate) fn begin<'a>(
        &mut self,
        now: Instant,
        credit: u32,
        head: &'a mut Vec<u8>,
        payloads: &'a mut Vec<PayloadRef>,
    ) -> FrameWriter<'a> {
        self.rest_until = None;
        let c = &self.config;
        Ethernet { destination: c.peer, source: c.address, ethertype: c.ethertype }.emit(head);
        let ack = self.received.ack(now);
        let header = Header {
            mode: c.mode,
            key_phase: 0,
            flags: 0,
            steer: c.peer_steer,
            cid: c.peer_cid,
            pn: self.sent.next_pn(),
            ack_pn: ack.pn,
            ack_bits: ack.bits,
            ack_delay: ack.delay,
            credit,
        };
        header.emit(head);
        FrameWriter {
            head,
            payloads,
            mode: header.mode,
            used: HEADER_BYTES + header.mode.tag_bytes(),
            limit: c.frame_bytes_max,
            messages: 0,
            records: 0,
            asks: false,
            data_bytes: 0,
        }
    }

    /// Says what arrived that the header's bitmap cannot say.
    pub(crate) fn push_ranges(&mut self, writer: &mut FrameWriter<'_>) {
        if !self.received.needs_ranges() {
            return;
        }
        let mut ranges = Vec::new();
        self.received.ranges(|first, last| {
            ranges.extend_from_slice(&first.to_le_bytes());
            ranges.extend_from_slice(&last.to_le_bytes());
        });
        if !ranges.is_empty() {
            writer.push(Message::bare(Kind::AckRanges), &ranges);
        }
        self.received.ranges_written();
    }

    /// Remembers that the message just pushed was `record`, for when it is acked or lost.
    pub(crate) fn remember(&mut self, writer: &mut FrameWriter<'_>, record: Record) {
        self.sent.push_record(record);
        writer.records += 1;
    }

    /// Ends the frame: adds what it still needs, and counts it as sent.
    pub(crate) fn finish(
        &mut self,
        now: Instant,
        mut writer: FrameWriter<'_>,
        stats: &mut Stats,
    ) -> Transmit {
        if self.ack_now && !writer.asks {
            writer.push(Message::bare(Kind::Ping), &[]);
        }
        if writer.messages == 0 || ETHERNET_BYTES + writer.used < ETHERNET_FRAME_MIN {
            writer.push(Message::bare(Kind::Pad), &[]);
        }
        let mut flags = 0;
        if self.ack_now {
            flags |= FLAG_ACK_NOW;
        }
        if !writer.payloads.is_empty() && writer.mode == Mode::Crc {
            flags |= FLAG_CRC_TRAILER;
        }
        writer.head[ETHERNET_BYTES + 1] = flags;
        self.ack_now = false;
        self.received.ack_written();
        if writer.asks {
            self.last_asked = now;
        }
        stats.frames_sent += 1;
        stats.payload_bytes_sent += writer.data_bytes as u64;
        let pn = self.sent.push_frame(now, writer.used, writer.records, writer.asks, self.was_limited);
        self.was_limited = false;
        Transmit { pn, seal: SealWith::Session(self.config.nonce, self.config.peer_nonce) }
    }

    /// Writes the gauges.
    pub(crate) fn publish(&self, stats: &mut Stats) {
        stats.rtt_ns_min = self.rtt.min().0;
        stats.rtt_ns_smoothed = self.rtt.smoothed().0;
        stats.window_bytes = self.congestion.window_bytes();
        stats.in_flight_bytes = self.sent.in_flight_bytes();
        stats.piece_bytes = self.config.piece_bytes;
    }
}

const _: () = assert!(
    HEADER_BYTES + 16 + ACK_RANGE_BYTES * crate::wire::body::ACK_RANGES_MAX + 16 <= crate::types::MTU_MIN
);
