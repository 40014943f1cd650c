//! The backend's end of the protocol: one disk, one volume, one session at a time.
//!
//! Finds the node, greets it, tries the path, opens the volume, and carries requests; when the session is lost it starts over and issues
//! every unanswered request again. Knows no guest, no clock and no payload.
//!
//! ```text
//!          IHAVE             HELLO_REPLY          full PROBE echoed        OPEN answered
//! Seeking -------> Greeting ------------> Probing -----------------> Opening ----------> Open
//!    ^  ^-- 1 s ------'  ^                   |  narrower: next rung     |                 |
//!    |                   '-------------------+--------------------------+-----------------'
//!    '-- refused             session lost: dead, RESET_HINT, CLOSE
//! ```
//!
//! Order of calls in a turn: `handle_*` for each frame, [`Initiator::handle_timeout`] when the link is empty,
//! [`Initiator::poll_event`] until `None`, [`Initiator::submit`], [`Initiator::poll_transmit`] until `None` or no room.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::connected::{Connected, Outcome};
use crate::handshake::{Numbers, Retry, agree};
use crate::op::{Op, Status};
use crate::pieces::next_lower;
use crate::requests::Requests;
use crate::session::{PayloadRef, Placement, SealWith, SessionConfig, Transmit};
use crate::stats::Stats;
use crate::time::{Instant, Nanos};
use crate::types::{Cid, MacAddress, REQUEST_BYTES_MAX, Slot, Steer, Uuid, VolumeName};
use crate::wire::body::{Access, CloseReason, VolumeInfo};
use crate::wire::ethernet::Ethernet;
use crate::wire::long::{Body, Hello, HelloReply, IHave, LongFrame, WhoHas};
use crate::wire::{Frame, Mode};

/// After so long without an answer to HELLO the node is looked for again: it may have moved.
const GREETING_PATIENCE: Nanos = Nanos::from_secs(1);
/// A node that refused is asked again after this.
const REFUSED_PAUSE: Nanos = Nanos::from_millis(250);

/// What an initiator is made of.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The volume.
    pub volume: VolumeName,
    /// How frames are protected. With keys, the caller seals and opens what this writes and takes.
    pub mode: Mode,
    /// This attachment.
    pub attachment: Uuid,
    /// The first session epoch to use. Larger than any that the attachment used before: the caller made that durable.
    pub session_epoch: u64,
    /// Our address.
    pub address: MacAddress,
    /// The EtherType.
    pub ethertype: u16,
    /// The node's address; `None`: ask the segment.
    pub node_address: Option<MacAddress>,
    /// Where we want our frames.
    pub steer: Steer,
    /// This disk's index on its worker, below 4096.
    pub cid_index: u16,
    /// Our link's MTU.
    pub mtu: u16,
    /// Requests in flight, 1 to 256.
    pub slots: u16,
    /// Take the volume from another attachment, once.
    pub take_over: bool,
    /// How long an ack is held back.
    pub ack_delay_max: Nanos,
    /// Makes cids and nonces differ between disks and starts.
    pub random_seed: u64,
}

/// Why a session was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossCause {
    /// The node did not answer any more.
    Dead,
    /// The node says that it knows nothing of the session: it has restarted.
    Reset,
    /// The node closed it.
    Closed(CloseReason),
    /// Full pieces do not fit through the path; the next session uses smaller ones.
    NarrowPath,
    /// The path has become wider; the next session uses larger pieces.
    WiderPath,
    /// [`Initiator::abandon`] was called, or the link's address changed.
    Abandoned,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The request in `slot` ended; its data has been placed. The slot is free.
    Done {
        /// Its slot.
        slot: Slot,
        /// How it ended.
        status: Status,
    },
    /// The volume was opened, for the first time or again, with this access.
    Attached(VolumeInfo, Access),
    /// The node answered no. It is asked again; for `Busy` the info names the holder's epoch.
    Refused(Status, VolumeInfo),
    /// The session is gone. Requests are kept and issued again in the next.
    Lost(LossCause),
    /// The volume changed.
    Changed(VolumeInfo),
}

/// Where the initiator stands, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StateName {
    /// Looking for the node.
    Seeking,
    /// Asking it for a session.
    Greeting,
    /// Trying whether full-size frames pass.
    Probing,
    /// Opening the volume.
    Opening,
    /// Working.
    Open,
}

enum Phase {
    Seeking { retry: Retry, nonce: u64 },
    Greeting { retry: Retry, hello: Hello, node_address: MacAddress, node_steer: Steer, sent_at: Instant },
    Connected(Box<Connected>),
}

/// The backend's end.
pub struct Initiator {
    config: Config,
    numbers: Numbers,
    phase: Phase,
    cid: Cid,
    session_epoch: u64,
    wanted: Access,
    take_over: bool,
    /// The epoch under which we may write, until we let go of it.
    epoch: Option<u64>,
    /// Somebody else had the volume since: nothing is issued before we have let go.
    fenced: bool,
    /// Largest piece the path is thought to carry.
    piece_bytes_max: u32,
    requests: Requests,
    /// Somebody waits for the session who has submitted nothing yet.
    awaited: bool,
    events: VecDeque<Event>,
    stats: Stats,
}

impl Initiator {
    /// Starts to look for the node at once; the volume will be opened read-only.
    pub fn new(config: Config, now: Instant) -> Initiator {
        let mut numbers = Numbers(config.random_seed);
        let nonce = numbers.next();
        Initiator {
            requests: Requests::new(config.slots),
            cid: Cid::new(config.cid_index, numbers.next() as u32),
            session_epoch: config.session_epoch,
            take_over: config.take_over,
            epoch: None,
            fenced: false,
            phase: Phase::Seeking { retry: Retry::starting(now), nonce },
            wanted: Access::ReadOnly,
            piece_bytes_max: u32::MAX,
            awaited: false,
            events: VecDeque::with_capacity(usize::from(config.slots) + 16),
            stats: Stats::default(),
            numbers,
            config,
        }
    }

    /// Asks for this access: read-write when the guest's driver starts, read-only (which releases the volume) after it stopped. Whoever was fenced
    /// may ask for it anew after that.
    pub fn set_access(&mut self, access: Access) {
        self.wanted = access;
        if access == Access::ReadOnly {
            (self.epoch, self.fenced) = (None, false);
        }
    }

    /// Goes on under an epoch that an earlier process of the attachment was given and did not let go of.
    pub fn resume(&mut self, vol_epoch: u64) {
        self.epoch = Some(vol_epoch);
    }

    /// The epoch under which we may write, from when it was given until it is not wanted any more.
    pub fn epoch(&self) -> Option<u64> {
        self.epoch
    }

    /// True if somebody else had the volume while it was ours: every request is to be answered with an error.
    pub fn is_fenced(&self) -> bool {
        self.fenced
    }

    /// Requests that can be submitted now; they may have to wait for the session.
    pub fn free_slots(&self) -> usize {
        self.requests.free_slots()
    }

    /// The start of the node that the session is with, while there is one.
    pub fn incarnation(&self) -> Option<Uuid> {
        match &self.phase {
            Phase::Connected(connected) => Some(connected.incarnation),
            Phase::Seeking { .. } | Phase::Greeting { .. } => None,
        }
    }

    /// Takes a request in: `offset` in bytes, `len` in bytes (1 to 1 MiB), in sectors for discard and write-zeroes, 0 for flush. `None`
    /// when no slot is free.
    pub fn submit(&mut self, op: Op, offset: u64, len: u32) -> Option<Slot> {
        self.requests.submit(op, offset, len)
    }

    /// Says whether somebody waits for the session and submits nothing before it is open: it is looked for as if requests were pending.
    pub fn set_awaited(&mut self, awaited: bool) {
        self.awaited = awaited;
    }

    /// Ends the session and forgets every request; no [`Event::Done`] comes for them. What the node has begun is drained by the next OPEN.
    pub fn abandon(&mut self, now: Instant) {
        self.requests.clear();
        self.events.retain(|event| !matches!(event, Event::Done { .. }));
        if matches!(self.phase, Phase::Connected(_)) {
            self.lose(now, LossCause::Abandoned);
        }
    }

    /// The link has another address or MTU: sessions of the old ones are over.
    pub fn link_changed(&mut self, now: Instant, address: MacAddress, mtu: u16) {
        if (self.config.address, self.config.mtu) == (address, mtu) {
            return;
        }
        (self.config.address, self.config.mtu) = (address, mtu);
        self.piece_bytes_max = u32::MAX;
        self.lose(now, LossCause::Abandoned);
    }

    /// Where we want our frames: the session's cid, or that of the next.
    pub fn cid(&self) -> Cid {
        self.cid
    }

    /// What stood in the way of an answer is gone: asks again now.
    pub fn hurry(&mut self, now: Instant) {
        match &mut self.phase {
            Phase::Seeking { retry, .. } | Phase::Greeting { retry, .. } => retry.hurry(now),
            Phase::Connected(_) => {}
        }
    }

    /// The nonces (sender's, receiver's) to check the seal of a frame with; `None` when cid or source are not of our session.
    pub fn nonces_in(&self, cid: Cid, source: MacAddress) -> Option<(u64, u64)> {
        match &self.phase {
            Phase::Connected(c) if cid == self.cid && source == c.session.config().peer => {
                Some(c.session.nonces_in())
            }
            Phase::Connected(_) | Phase::Seeking { .. } | Phase::Greeting { .. } => None,
        }
    }

    /// True if a frame of the session at hand with this number came before. With keys it need not be opened: nobody sends one twice.
    pub fn has_seen(&self, pn: u64) -> bool {
        match &self.phase {
            Phase::Connected(connected) => connected.session.has_seen(pn),
            Phase::Seeking { .. } | Phase::Greeting { .. } => false,
        }
    }

    /// Takes a short frame whose seal was right. The caller copies the placements before it takes the next frame.
    pub fn handle_frame(
        &mut self,
        now: Instant,
        arrival: Instant,
        frame: &Frame<'_>,
        placements: &mut Vec<Placement>,
    ) {
        let Phase::Connected(connected) = &mut self.phase else { return };
        let fresh = connected.session.receive(now, arrival, frame, &mut self.stats);
        self.requests.grant(frame.header.credit);
        let mut outcome = Outcome::Goes;
        if fresh {
            for payload in frame.messages() {
                outcome = outcome.or(connected.handle_message(
                    now,
                    frame,
                    &payload,
                    &mut self.requests,
                    placements,
                    &mut self.events,
                    &mut self.stats,
                ));
            }
        }
        connected.session.conclude(now, &mut self.stats);
        connected.settle(now, &mut self.requests);
        self.follow(now, outcome);
    }

    /// Takes a LONG frame whose seal was right. True if it was for this initiator.
    pub fn handle_long(&mut self, now: Instant, frame: &LongFrame) -> bool {
        match &frame.body {
            Body::IHave(have) => self.on_have(now, frame, have),
            Body::HelloReply(reply) => self.on_reply(now, frame, reply),
            Body::Redirect(redirect) => match &mut self.phase {
                Phase::Greeting { retry, hello, node_steer, .. }
                    if (hello.session_epoch, hello.nonce)
                        == (redirect.session_epoch, redirect.initiator_nonce) =>
                {
                    *node_steer = redirect.steer;
                    retry.hurry(now);
                    true
                }
                Phase::Greeting { .. } | Phase::Seeking { .. } | Phase::Connected(_) => false,
            },
            Body::ResetHint(hint) => match &self.phase {
                Phase::Connected(c) if c.session.config().peer_cid == hint.cid && c.token == hint.token => {
                    self.lose(now, LossCause::Reset);
                    true
                }
                Phase::Connected(_) | Phase::Seeking { .. } | Phase::Greeting { .. } => false,
            },
            Body::Hello(_) | Body::WhoHas(_) => false,
        }
    }

    fn on_have(&mut self, now: Instant, frame: &LongFrame, have: &IHave) -> bool {
        let answers = have.nonce != 0 && have.volume == self.asked_volume();
        match &mut self.phase {
            Phase::Seeking { nonce, .. } if answers && have.nonce == *nonce => {
                self.greet(now, frame.ethernet.source, have.node, have.steer);
                true
            }
            Phase::Greeting { retry, hello, .. } if have.volume.is_none() && have.node == hello.node => {
                retry.hurry(now);
                true
            }
            Phase::Connected(c)
                if have.volume.is_none() && have.node == c.node && have.incarnation != c.incarnation =>
            {
                c.session.ask_now();
                true
            }
            Phase::Seeking { retry, .. } if have.volume.is_none() => {
                retry.hurry(now);
                false
            }
            Phase::Seeking { .. } | Phase::Greeting { .. } | Phase::Connected(_) => false,
        }
    }

    /// What is asked for on the segment: the volume; with keys only the node, which the mark on the question names.
    fn asked_volume(&self) -> Option<VolumeName> {
        (self.config.mode == Mode::Crc).then_some(self.config.volume)
    }

    fn greet(&mut self, now: Instant, node_address: MacAddress, node: Uuid, node_steer: Steer) {
        let hello = Hello {
            volume: self.config.volume,
            node,
            attachment: self.config.attachment,
            session_epoch: self.session_epoch,
            nonce: self.numbers.next(),
            cid: self.cid,
            steer: self.config.steer,
            mtu: self.config.mtu,
            slots: self.config.slots,
            piece_bytes_max: self.piece_bytes_max,
        };
        self.session_epoch += 1;
        self.phase =
            Phase::Greeting { retry: Retry::starting(now), hello, node_address, node_steer, sent_at: now };
    }

    fn on_reply(&mut self, now: Instant, frame: &LongFrame, reply: &HelloReply) -> bool {
        let Phase::Greeting { hello, retry, sent_at, node_address, .. } = &self.phase else { return false };
        let source = frame.ethernet.source;
        if (hello.session_epoch, hello.nonce) != (reply.session_epoch, reply.initiator_nonce)
            || source != *node_address
        {
            return false;
        }
        if reply.status != Status::Ok {
            self.refused(now, reply.status);
            return true;
        }
        let (piece_bytes, frame_bytes_max) =
            agree(usize::from(hello.mtu), usize::from(reply.mtu), hello.piece_bytes_max);
        let usable = reply.piece_bytes == piece_bytes
            && reply.slots >= hello.slots
            && reply.request_bytes_max as usize >= REQUEST_BYTES_MAX
            && reply.credit_sectors as usize * 512 >= REQUEST_BYTES_MAX;
        if !usable {
            self.stats.violations += 1;
            self.refused(now, Status::Invalid);
            return true;
        }
        let config = SessionConfig {
            mode: self.config.mode,
            ethertype: self.config.ethertype,
            address: self.config.address,
            peer: source,
            peer_steer: reply.steer,
            peer_cid: reply.cid,
            nonce: hello.nonce,
            peer_nonce: reply.nonce,
            piece_bytes,
            frame_bytes_max,
            ack_delay_max: self.config.ack_delay_max,
        };
        let handshake_rtt = (retry.tries() == 1).then(|| now.since(*sent_at));
        let link_mtu = usize::from(hello.mtu.min(reply.mtu));
        self.requests.restart(reply.credit_sectors);
        self.stats.sessions += 1;
        self.phase = Phase::Connected(Box::new(Connected::new(config, reply, link_mtu, now, handshake_rtt)));
        true
    }

    fn refused(&mut self, now: Instant, status: Status) {
        self.events.push_back(Event::Refused(status, VolumeInfo::default()));
        self.seek(now + REFUSED_PAUSE);
    }

    fn seek(&mut self, at: Instant) {
        self.phase = Phase::Seeking { retry: Retry::starting(at), nonce: self.numbers.next() };
    }

    /// The session is over: no frame of it is taken any more, and a new one is asked for.
    fn lose(&mut self, now: Instant, cause: LossCause) {
        let old = match &self.phase {
            Phase::Connected(c) => Some((c.session.config().peer, c.node, c.session.config().peer_steer)),
            Phase::Seeking { .. } | Phase::Greeting { .. } => None,
        };
        self.cid = Cid::new(self.config.cid_index, self.numbers.next() as u32);
        if old.is_some() {
            self.events.push_back(Event::Lost(cause));
        }
        match (old, cause) {
            (Some((peer, node, steer)), cause) if cause != LossCause::Dead => {
                self.greet(now, peer, node, steer)
            }
            _ => self.seek(now),
        }
    }

    fn follow(&mut self, now: Instant, outcome: Outcome) {
        match outcome {
            Outcome::Goes => {}
            Outcome::Lost(cause) => {
                if let Phase::Connected(c) = &self.phase {
                    let piece = c.session.config().piece_bytes;
                    match cause {
                        LossCause::NarrowPath | LossCause::Closed(CloseReason::NarrowPath) => {
                            self.piece_bytes_max = next_lower(piece).unwrap_or(piece);
                        }
                        LossCause::WiderPath => self.piece_bytes_max = c.wider_piece_bytes(),
                        LossCause::Dead | LossCause::Reset | LossCause::Closed(_) | LossCause::Abandoned => {}
                    }
                }
                self.lose(now, cause);
            }
        }
    }

    /// Timers that are due. Run it only after the link was found empty.
    pub fn handle_timeout(&mut self, now: Instant) {
        let mut outcome = Outcome::Goes;
        match &mut self.phase {
            Phase::Greeting { retry, .. } if retry.lasting(now) >= GREETING_PATIENCE => self.seek(now),
            Phase::Seeking { .. } | Phase::Greeting { .. } => {}
            Phase::Connected(connected) => {
                let idle = !self.awaited && self.requests.is_idle();
                outcome = connected.handle_timeout(now, idle, &mut self.stats);
                connected.settle(now, &mut self.requests);
            }
        }
        self.follow(now, outcome);
    }

    /// When something has to be done although no frame comes.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Seeking { retry, .. } | Phase::Greeting { retry, .. } => Some(retry.next_at()),
            Phase::Connected(connected) => connected.poll_timeout(!self.awaited && self.requests.is_idle()),
        }
    }

    /// The link would not take frame `pn`.
    pub fn not_sent(&mut self, now: Instant, pn: u64) {
        if let Phase::Connected(connected) = &mut self.phase {
            connected.session.not_sent(now, pn, &mut self.stats);
            connected.settle(now, &mut self.requests);
        }
    }

    /// Writes the next frame into `head` (all but CRC trailer and tag) and names its payloads; `None` when there is nothing to send now.
    pub fn poll_transmit(
        &mut self,
        now: Instant,
        head: &mut Vec<u8>,
        payloads: &mut Vec<PayloadRef>,
    ) -> Option<Transmit> {
        let busy = self.awaited || !self.requests.is_idle();
        let (address, steer) = (self.config.address, self.config.steer);
        let volume = self.asked_volume();
        let (destination, to_steer, body) = match &mut self.phase {
            Phase::Connected(connected) => {
                connected.barred = self.fenced;
                let wanted = if self.fenced { Access::ReadOnly } else { self.wanted };
                connected.drive_control(now, wanted, self.take_over);
                return connected.transmit(
                    now,
                    self.wanted,
                    &mut self.requests,
                    head,
                    payloads,
                    &mut self.stats,
                );
            }
            Phase::Seeking { retry, .. } | Phase::Greeting { retry, .. } if retry.next_at() > now => {
                return None;
            }
            Phase::Seeking { retry, nonce } => {
                retry.tried(now, busy);
                let to = self.config.node_address.unwrap_or(MacAddress::BROADCAST);
                (to, Steer((*nonce >> 48) as u16), Body::WhoHas(WhoHas { volume, nonce: *nonce, steer }))
            }
            Phase::Greeting { retry, hello, node_address, node_steer, sent_at } => {
                retry.tried(now, busy);
                *sent_at = now;
                (*node_address, *node_steer, Body::Hello(*hello))
            }
        };
        let ethernet = Ethernet { destination, source: address, ethertype: self.config.ethertype };
        LongFrame { ethernet, steer: to_steer, body }.emit(head);
        self.stats.frames_sent += 1;
        Some(Transmit { pn: 0, seal: SealWith::Long })
    }

    /// What happened, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        let event = self.events.pop_front()?;
        match event {
            Event::Attached(info, Access::ReadWrite) => {
                let other = self.epoch.is_some_and(|epoch| epoch != info.vol_epoch) && !self.take_over;
                if other {
                    // It is free, and so it was given to us; but what our guest knows of it is another's past.
                    self.fenced = true;
                    return Some(Event::Refused(Status::Fenced, info));
                }
                // Given although it is not wanted any more: it will be let go of.
                self.epoch = Some(info.vol_epoch).filter(|_| self.wanted == Access::ReadWrite);
                self.take_over = false;
            }
            Event::Done { status: Status::Fenced, .. } => self.fenced = true,
            Event::Attached(..)
            | Event::Done { .. }
            | Event::Refused(..)
            | Event::Lost(_)
            | Event::Changed(_) => {}
        }
        Some(event)
    }

    /// The counters; gauges are of now.
    pub fn stats(&self) -> Stats {
        let mut stats = self.stats;
        if let Phase::Connected(connected) = &self.phase {
            connected.session.publish(&mut stats);
        }
        stats
    }

    /// The session epoch of the session at hand, or of the last one.
    pub fn session_epoch(&self) -> u64 {
        self.session_epoch.saturating_sub(1).max(self.config.session_epoch)
    }

    /// Where it stands.
    pub fn state(&self) -> StateName {
        match &self.phase {
            Phase::Seeking { .. } => StateName::Seeking,
            Phase::Greeting { .. } => StateName::Greeting,
            Phase::Connected(_) if self.fenced => StateName::Opening,
            Phase::Connected(connected) => connected.state(self.wanted),
        }
    }

    /// The node's address, once it is known.
    pub fn node_address(&self) -> Option<MacAddress> {
        match &self.phase {
            Phase::Seeking { .. } => self.config.node_address,
            Phase::Greeting { node_address, .. } => Some(*node_address),
            Phase::Connected(connected) => Some(connected.session.config().peer),
        }
    }
}
