//! LONG frames: HELLO and its answers, WHOHAS and IHAVE, hints that a session is unknown, and the announcement of a start.
//!
//! Knows what leads to a session; keeps nothing for those who only ask. Called by `receive` and `transmit`.

use std::collections::VecDeque;

use cirro_link::{FrameId, Link};
use cirro_protocol::op::Status;
use cirro_protocol::target::TargetConfig;
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{Cid, MacAddress, REQUEST_BYTES_MAX, SECTOR_BYTES, Steer, Uuid, VolumeName};
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::long::{Body, Hello, HelloReply, IHave, LongFrame, Redirect, ResetHint, WhoHas};
use cirro_seal::{open_long, seal_long};
use log::{debug, warn};
use siphasher::sip::SipHasher13;

use super::drops::DropReason;
use super::session::UNCONFIRMED_MAX;
use super::transmit::NO_SESSION;
use super::{Node, NodeConfig, push_bounded};
use crate::state_dir::SECRET_BYTES;
use crate::store::Store;

/// LONG frames taken in one turn: sessions come first.
const LONG_FRAMES_MAX: usize = 16;
/// LONG frames that wait to be sent: what a turn may cause, and an announcement.
const OUTGOING_MAX: usize = 2 * LONG_FRAMES_MAX;
/// An announcement is made this often, because it may be lost.
const ANNOUNCEMENTS: u8 = 3;
const ANNOUNCEMENT_PAUSE: Nanos = Nanos::from_millis(10);
/// A source gets one hint in this time.
const HINT_PAUSE: Nanos = Nanos::from_millis(5);
/// Sources remembered for that; the one longest ago makes room.
const HINT_SOURCES_MAX: usize = 64;
/// Write credit of a session while the pool is less than half promised; then the least that the protocol allows.
const CREDIT_BYTES: usize = 4 << 20;

/// What waits to be sent, and what is remembered so that it is not sent too often.
#[derive(Debug)]
pub(super) struct Handshake {
    secret: [u8; SECRET_BYTES],
    outgoing: VecDeque<LongFrame>,
    taken_in_turn: usize,
    announcements_left: u8,
    announce_at: Instant,
    hinted: VecDeque<(MacAddress, Instant)>,
}

impl Handshake {
    pub(super) fn new(secret: [u8; SECRET_BYTES]) -> Handshake {
        Handshake {
            secret,
            outgoing: VecDeque::with_capacity(OUTGOING_MAX),
            taken_in_turn: 0,
            announcements_left: 0,
            announce_at: Instant(0),
            hinted: VecDeque::with_capacity(HINT_SOURCES_MAX),
        }
    }

    /// Tells the segment that there is something new, three times from now on.
    pub(super) fn announce(&mut self, now: Instant) {
        (self.announcements_left, self.announce_at) = (ANNOUNCEMENTS, now);
    }

    pub(super) fn begin_turn(&mut self) {
        self.taken_in_turn = 0;
    }

    pub(super) fn has_frames(&self) -> bool {
        !self.outgoing.is_empty()
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        (self.announcements_left > 0).then_some(self.announce_at)
    }

    /// An announcement that is due.
    pub(super) fn time_out(&mut self, now: Instant, config: &NodeConfig, address: MacAddress) {
        if self.announcements_left == 0 || now < self.announce_at {
            return;
        }
        self.announcements_left -= 1;
        self.announce_at = now + ANNOUNCEMENT_PAUSE;
        let have = IHave {
            volume: None,
            nonce: 0,
            node: config.node,
            incarnation: config.incarnation,
            steer: config.steer,
        };
        // Each goes to another worker of the listeners: their fan-out takes the worker bits.
        let steer = Steer::new(0, u16::from(self.announcements_left));
        let ethernet =
            Ethernet { destination: MacAddress::BROADCAST, source: address, ethertype: config.ethertype };
        self.send(LongFrame { ethernet, steer, body: Body::IHave(have) });
    }

    /// What a RESET_HINT for a session of ours must show.
    fn token(&self, steer: Steer, cid: Cid) -> u64 {
        let mut named = [0u8; 6];
        named[..2].copy_from_slice(&steer.0.to_be_bytes());
        named[2..].copy_from_slice(&cid.0.to_le_bytes());
        SipHasher13::new_with_key(&self.secret).hash(&named)
    }

    /// A frame came for a session that is not there: says so to its sender, seldom (P-77).
    pub(super) fn hint_reset(&mut self, now: Instant, config: &NodeConfig, frame: &Ethernet, cid: Cid) {
        if let Some(place) = self.hinted.iter().position(|(source, _)| *source == frame.source) {
            if now.since(self.hinted[place].1) < HINT_PAUSE {
                return;
            }
            self.hinted.remove(place);
        } else if self.hinted.len() == HINT_SOURCES_MAX {
            self.hinted.pop_front();
        }
        self.hinted.push_back((frame.source, now));
        let hint = ResetHint { cid, token: self.token(config.steer, cid), incarnation: config.incarnation };
        // Which of its workers the session was on is not known: try one after the other.
        let steer = Steer::new(0, (now.0 / HINT_PAUSE.0) as u16);
        let ethernet =
            Ethernet { destination: frame.source, source: frame.destination, ethertype: config.ethertype };
        self.send(LongFrame { ethernet, steer, body: Body::ResetHint(hint) });
    }

    fn send(&mut self, frame: LongFrame) {
        if !push_bounded(&mut self.outgoing, OUTGOING_MAX, frame) {
            debug!("more LONG frames than can be sent in a turn: one is not sent");
        }
    }
}

/// Takes a LONG frame.
pub(super) fn take<S: Store>(node: &mut Node<S>, now: Instant, bytes: &[u8]) -> Result<(), DropReason> {
    node.handshake.taken_in_turn += 1;
    if node.handshake.taken_in_turn > LONG_FRAMES_MAX {
        return Err(DropReason::LongLimit);
    }
    let frame = LongFrame::parse(bytes).map_err(|_| DropReason::LongMalformed)?;
    open_long(bytes).map_err(|_| DropReason::LongMalformed)?;
    let destination = frame.ethernet.destination;
    if destination != node.address && destination != MacAddress::BROADCAST {
        return Err(DropReason::NotForUs);
    }
    match &frame.body {
        Body::Hello(hello) => node.greet(now, &frame, hello),
        Body::WhoHas(question) => node.tell_who_has(&frame, question),
        Body::HelloReply(_) | Body::ResetHint(_) | Body::Redirect(_) | Body::IHave(_) => {
            Err(DropReason::LongIgnored)
        }
    }
}

/// Sends what waits.
pub(super) fn transmit<L: Link, S: Store>(link: &mut L, node: &mut Node<S>) {
    while !node.handshake.outgoing.is_empty() {
        let Some(frame) = link.frame() else { return };
        let Some(long) = node.handshake.outgoing.pop_front() else { return };
        long.emit(&mut frame.head);
        seal_long(&mut frame.head);
        node.meter.frames_out.add(1);
        node.meter.bytes_out.add(frame.len() as u64);
        link.commit(FrameId { session: NO_SESSION, pn: 0 });
    }
}

impl<S: Store> Node<S> {
    fn reply(&mut self, to: &LongFrame, steer: Steer, body: Body) {
        let ethernet = Ethernet {
            destination: to.ethernet.source,
            source: self.address,
            ethertype: self.config.ethertype,
        };
        self.handshake.send(LongFrame { ethernet, steer, body });
    }

    fn tell_who_has(&mut self, frame: &LongFrame, question: &WhoHas) -> Result<(), DropReason> {
        let steer = self.directory.steer_of(&question.volume).ok_or(DropReason::LongIgnored)?;
        let have = IHave {
            volume: Some(question.volume),
            nonce: question.nonce,
            node: self.config.node,
            incarnation: self.config.incarnation,
            steer,
        };
        self.reply(frame, question.steer, Body::IHave(have));
        Ok(())
    }

    fn greet(&mut self, now: Instant, frame: &LongFrame, hello: &Hello) -> Result<(), DropReason> {
        if hello.node != self.config.node && hello.node != Uuid::default() || self.stop_at.is_some() {
            return Err(DropReason::LongIgnored);
        }
        let Some(steer) = self.directory.steer_of(&hello.volume) else {
            if self.directory.knows(&hello.volume) {
                // Its lock is waited for; the initiator asks again.
                return Err(DropReason::LongIgnored);
            }
            self.refuse(frame, hello, Status::Access);
            return Ok(());
        };
        let Some(volume) = self.volume_index(&hello.volume).filter(|_| steer == self.config.steer) else {
            let redirect =
                Redirect { session_epoch: hello.session_epoch, initiator_nonce: hello.nonce, steer };
            self.reply(frame, hello.steer, Body::Redirect(redirect));
            return Ok(());
        };
        match self.known_session(volume, hello) {
            Known::Same(reply) => self.reply(frame, hello.steer, Body::HelloReply(reply)),
            Known::Newer => self.refuse(frame, hello, Status::Stale),
            Known::No => self.admit(now, frame, hello, volume),
        }
        Ok(())
    }

    fn volume_index(&self, name: &VolumeName) -> Option<u16> {
        let place = self.volumes.iter().position(|served| served.volume.name == *name)?;
        Some(place as u16)
    }

    fn known_session(&self, volume: u16, hello: &Hello) -> Known {
        let of_attachment = self
            .sessions
            .iter()
            .filter(|(_, session)| session.volume == volume && session.attachment() == hello.attachment);
        let mut known = Known::No;
        for (_, session) in of_attachment {
            let theirs = session.target.hello();
            if (theirs.session_epoch, theirs.nonce) == (hello.session_epoch, hello.nonce) {
                return Known::Same(session.target.hello_reply());
            }
            if session.target.is_confirmed() && theirs.session_epoch >= hello.session_epoch {
                known = Known::Newer;
            }
        }
        known
    }

    fn admit(&mut self, now: Instant, frame: &LongFrame, hello: &Hello, volume: u16) {
        let pool = self.write_pool.bytes_total();
        // What the attachment's older sessions were promised ends with them, as soon as this one is confirmed.
        let promised = self.promised_bytes - self.sessions.promised_to(hello.attachment, volume);
        let credit = if promised + CREDIT_BYTES <= pool / 2 { CREDIT_BYTES } else { REQUEST_BYTES_MAX };
        let index = self.sessions.next_index().filter(|_| promised + credit <= pool);
        let Some(index) = index.filter(|_| self.sessions.unconfirmed() < UNCONFIRMED_MAX) else {
            let count = self.sessions.len();
            warn!(
                "volume {}: no room for another session besides {count}: give the node a larger write pool",
                hello.volume
            );
            return self.refuse(frame, hello, Status::Retry);
        };
        let cid = Cid::new(index, self.random.next() as u32);
        let config = TargetConfig {
            hello: *hello,
            peer: frame.ethernet.source,
            address: self.address,
            ethertype: self.config.ethertype,
            node: self.config.node,
            incarnation: self.config.incarnation,
            nonce: self.random.next(),
            token: self.handshake.token(self.config.steer, cid),
            cid,
            steer: self.config.steer,
            mtu: self.mtu,
            credit_sectors: (credit / SECTOR_BYTES) as u32,
            ack_delay_max: self.config.ack_delay_max,
        };
        self.promised_bytes += credit;
        let reply = self.sessions.add(now, config, volume).target.hello_reply();
        self.reply(frame, hello.steer, Body::HelloReply(reply));
    }

    fn refuse(&mut self, frame: &LongFrame, hello: &Hello, status: Status) {
        let reply = HelloReply {
            session_epoch: hello.session_epoch,
            initiator_nonce: hello.nonce,
            status,
            node: self.config.node,
            incarnation: self.config.incarnation,
            nonce: 0,
            token: 0,
            cid: Cid(0),
            steer: self.config.steer,
            mtu: self.mtu,
            slots: 0,
            piece_bytes: 0,
            request_bytes_max: 0,
            credit_sectors: 0,
        };
        self.reply(frame, hello.steer, Body::HelloReply(reply));
    }
}

/// What is known of the attachment that says HELLO.
enum Known {
    /// This very session.
    Same(HelloReply),
    /// A confirmed session that is not older.
    Newer,
    /// Nothing that matters.
    No,
}
