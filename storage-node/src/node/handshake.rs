//! LONG frames: HELLO and its answers, WHOHAS and IHAVE, hints that a session is unknown, and the announcement of a start.
//!
//! Knows what leads to a session; keeps nothing for those who only ask. Called by `receive` and `transmit`.

use std::collections::VecDeque;
use std::sync::Arc;

use cirro_link::{FrameId, Link};
use cirro_protocol::op::Status;
use cirro_protocol::target::{Target, TargetConfig};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{
    Cid, ETHERNET_BYTES, MacAddress, REQUEST_BYTES_MAX, SECTOR_BYTES, Steer, Uuid, VolumeName,
};
use cirro_protocol::wire::Mode;
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::guarded::is_guarded;
use cirro_protocol::wire::long::{
    Body, Hello, HelloReply, IHave, LONG_FRAME_BYTES, LongFrame, Redirect, ResetHint, WhoHas,
};
use cirro_seal::{Admission, Answerer, Guard, Identity, Marked, Pending, SessionKeys, open_long, seal_long};
use log::{debug, warn};
use siphasher::sip::SipHasher13;

use super::drops::DropReason;
use super::session::{Answered, Standing, UNCONFIRMED_MAX};
use super::transmit::NO_SESSION;
use super::{Node, NodeConfig, push_bounded};
use crate::access::{Client, Right};
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
pub(super) struct Handshake {
    secret: [u8; SECRET_BYTES],
    /// Where frames are protected by keys.
    answerer: Option<Answerer>,
    outgoing: VecDeque<Vec<u8>>,
    taken_in_turn: usize,
    announcements_left: u8,
    announce_at: Instant,
    hinted: VecDeque<(MacAddress, Instant)>,
}

/// A HELLO, and who says it.
struct Greeting {
    frame: LongFrame,
    hello: Hello,
    client: Client,
    /// With keys: the ephemeral key by which the same HELLO is known again, and what the answer needs.
    call: Option<([u8; 32], Pending)>,
}

impl Handshake {
    pub(super) fn new(secret: [u8; SECRET_BYTES], identity: Option<Arc<Identity>>) -> Handshake {
        Handshake {
            secret,
            answerer: identity.map(Answerer::new),
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
        self.send(&LongFrame { ethernet, steer, body: Body::IHave(have) });
    }

    /// What a RESET_HINT for a session of ours must show. It names the initiator too: who asks about a cid from another address, to collect
    /// tokens, gets one that is of no use.
    fn token(&self, steer: Steer, cid: Cid, peer: MacAddress) -> u64 {
        let mut named = [0u8; 12];
        named[..2].copy_from_slice(&steer.0.to_be_bytes());
        named[2..6].copy_from_slice(&cid.0.to_le_bytes());
        named[6..].copy_from_slice(&peer.0);
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
        let hint = ResetHint {
            cid,
            token: self.token(config.steer, cid, frame.source),
            incarnation: config.incarnation,
        };
        // Which of its workers the session was on is not known: try one after the other.
        let steer = Steer::new(0, (now.0 / HINT_PAUSE.0) as u16);
        let ethernet =
            Ethernet { destination: frame.source, source: frame.destination, ethertype: config.ethertype };
        self.send(&LongFrame { ethernet, steer, body: Body::ResetHint(hint) });
    }

    /// Sends what needs no handshake.
    fn send(&mut self, frame: &LongFrame) {
        let bytes = match &self.answerer {
            Some(answerer) => answerer.seal_clear(frame),
            None => {
                let mut bytes = Vec::with_capacity(LONG_FRAME_BYTES);
                frame.emit(&mut bytes);
                seal_long(&mut bytes);
                bytes
            }
        };
        self.push(bytes);
    }

    fn push(&mut self, bytes: Vec<u8>) {
        if !push_bounded(&mut self.outgoing, OUTGOING_MAX, bytes) {
            debug!("more LONG frames than can be sent in a turn: one is not sent");
        }
    }
}

/// Takes a LONG frame. With keys only those that show keys, without only the others.
pub(super) fn take<S: Store>(node: &mut Node<S>, now: Instant, bytes: &[u8]) -> Result<(), DropReason> {
    node.handshake.taken_in_turn += 1;
    if node.handshake.taken_in_turn > LONG_FRAMES_MAX {
        return Err(DropReason::LongLimit);
    }
    if is_guarded(&bytes[ETHERNET_BYTES..]) != node.handshake.answerer.is_some() {
        return Err(DropReason::LongOtherMode);
    }
    let destination = Ethernet::parse(bytes).map_err(|_| DropReason::LongMalformed)?.destination;
    if destination != node.address && destination != MacAddress::BROADCAST {
        return Err(DropReason::NotForUs);
    }
    let frame = match &mut node.handshake.answerer {
        None => {
            open_long(bytes).map_err(|_| DropReason::LongMalformed)?;
            LongFrame::parse(bytes).map_err(|_| DropReason::LongMalformed)?
        }
        Some(answerer) => {
            let marked = answerer.check(bytes).map_err(|_| DropReason::LongMalformed)?;
            if let Some(ephemeral) = marked.hello() {
                return node.take_call(now, &marked, ephemeral);
            }
            marked.read_clear().map_err(|_| DropReason::LongMalformed)?
        }
    };
    match frame.body {
        Body::Hello(hello) => {
            let client = Client::Mac(frame.ethernet.source);
            node.greet(now, Greeting { frame, hello, client, call: None })
        }
        Body::WhoHas(question) => node.tell_who_has(&frame, &question),
        Body::HelloReply(_) | Body::ResetHint(_) | Body::Redirect(_) | Body::IHave(_) => {
            Err(DropReason::LongIgnored)
        }
    }
}

/// Sends what waits.
pub(super) fn transmit<L: Link, S: Store>(link: &mut L, node: &mut Node<S>) {
    while !node.handshake.outgoing.is_empty() {
        let Some(frame) = link.frame() else { return };
        let Some(bytes) = node.handshake.outgoing.pop_front() else { return };
        frame.head.extend_from_slice(&bytes);
        node.meter.frames_out.add(1);
        node.meter.bytes_out.add(frame.len() as u64);
        link.commit(FrameId { session: NO_SESSION, pn: 0 });
    }
}

impl<S: Store> Node<S> {
    /// A HELLO with keys. One that came before gets the answer it got; then what it costs is bounded; then it is read.
    fn take_call(
        &mut self,
        now: Instant,
        marked: &Marked<'_>,
        ephemeral: [u8; 32],
    ) -> Result<(), DropReason> {
        let answered = self.sessions.iter().find_map(|(_, session)| {
            let (of, answer) = session.standing.answered.as_ref()?;
            (*of == ephemeral).then(|| (!session.target.is_confirmed()).then(|| answer.clone()))
        });
        if let Some(answer) = answered {
            // Of a confirmed session it is old: somebody repeats it.
            self.handshake.push(answer.ok_or(DropReason::LongIgnored)?);
            return Ok(());
        }
        let answerer = self.handshake.answerer.as_mut().ok_or(DropReason::LongOtherMode)?;
        match answerer.admit(now, marked) {
            Admission::Go => {}
            Admission::Cookie(frame) => {
                self.handshake.push(frame);
                return Ok(());
            }
            Admission::Drop => return Err(DropReason::LongLimit),
        }
        let (frame, pending) = answerer.read_hello(marked).map_err(|_| DropReason::LongMalformed)?;
        let Body::Hello(hello) = frame.body else { return Err(DropReason::LongMalformed) };
        let client = Client::Key(pending.client);
        self.greet(now, Greeting { frame, hello, client, call: Some((ephemeral, pending)) })
    }

    /// Answers a HELLO. With keys: the keys of the session, and by what it is known again.
    fn reply(&mut self, greeting: Greeting, body: Body) -> Option<(SessionKeys, Answered)> {
        let frame = self.answer_to(&greeting.frame, greeting.hello.steer, body);
        let Some((ephemeral, pending)) = greeting.call else {
            self.handshake.send(&frame);
            return None;
        };
        let psk = self.config.access.psk(&pending.client);
        let (bytes, keys) = self.handshake.answerer.as_ref()?.answer(pending, &psk, &frame).ok()?;
        self.handshake.push(bytes.clone());
        Some((keys, (ephemeral, bytes)))
    }

    fn answer_to(&self, to: &LongFrame, steer: Steer, body: Body) -> LongFrame {
        let ethernet = Ethernet {
            destination: to.ethernet.source,
            source: self.address,
            ethertype: self.config.ethertype,
        };
        LongFrame { ethernet, steer, body }
    }

    /// Without keys it is asked who has a volume, and only those are told who may use it; with keys, whether this node is here: who asks
    /// knows its key.
    fn tell_who_has(&mut self, frame: &LongFrame, question: &WhoHas) -> Result<(), DropReason> {
        let steer = match (question.volume, self.config.identity.is_some()) {
            (Some(volume), false) => {
                let client = Client::Mac(frame.ethernet.source);
                let right = self.config.access.right(&volume, &client);
                right.and_then(|_| self.directory.steer_of(&volume))
            }
            (None, true) => Some(self.config.steer),
            (Some(_), true) | (None, false) => None,
        };
        let have = IHave {
            volume: question.volume,
            nonce: question.nonce,
            node: self.config.node,
            incarnation: self.config.incarnation,
            steer: steer.ok_or(DropReason::LongIgnored)?,
        };
        let frame = self.answer_to(frame, question.steer, Body::IHave(have));
        self.handshake.send(&frame);
        Ok(())
    }

    fn greet(&mut self, now: Instant, greeting: Greeting) -> Result<(), DropReason> {
        let hello = greeting.hello;
        if hello.node != self.config.node && hello.node != Uuid::default() || self.stop_at.is_some() {
            return Err(DropReason::LongIgnored);
        }
        let right = self.config.access.right(&hello.volume, &greeting.client);
        let Some(right) = right.filter(|_| self.directory.knows(&hello.volume)) else {
            self.refuse(greeting, Status::Access);
            return Ok(());
        };
        // Its lock is waited for; the initiator asks again.
        let steer = self.directory.steer_of(&hello.volume).ok_or(DropReason::LongIgnored)?;
        let Some(volume) = self.volume_index(&hello.volume).filter(|_| steer == self.config.steer) else {
            let redirect =
                Redirect { session_epoch: hello.session_epoch, initiator_nonce: hello.nonce, steer };
            self.reply(greeting, Body::Redirect(redirect));
            return Ok(());
        };
        match self.known_session(volume, &greeting) {
            Known::Same(reply) => {
                self.reply(greeting, Body::HelloReply(reply));
            }
            Known::Newer => self.refuse(greeting, Status::Stale),
            Known::Another => self.refuse(greeting, Status::Access),
            Known::No => self.admit(now, greeting, volume, right),
        }
        Ok(())
    }

    fn volume_index(&self, name: &VolumeName) -> Option<u16> {
        let place = self.volumes.iter().position(|served| served.volume.name == *name)?;
        Some(place as u16)
    }

    /// What the sessions of its attachment say to a HELLO. With keys one that nobody has confirmed is forgotten for a HELLO that is not older:
    /// somebody may have repeated the older one.
    fn known_session(&mut self, volume: u16, greeting: &Greeting) -> Known {
        let hello = &greeting.hello;
        let (mut known, mut outdated) = (Known::No, None);
        for (index, session) in self.sessions.iter() {
            if session.volume != volume || session.attachment() != hello.attachment {
                continue;
            }
            if greeting.call.is_some() && session.standing.client != greeting.client {
                return Known::Another;
            }
            let theirs = session.target.hello();
            if greeting.call.is_none()
                && (theirs.session_epoch, theirs.nonce) == (hello.session_epoch, hello.nonce)
            {
                return Known::Same(session.target.hello_reply());
            }
            match (session.target.is_confirmed(), theirs.session_epoch) {
                (true, epoch) if epoch >= hello.session_epoch => known = Known::Newer,
                (false, epoch) if greeting.call.is_some() && epoch > hello.session_epoch => {
                    known = Known::Newer
                }
                (false, _) if greeting.call.is_some() => outdated = Some(index),
                (true | false, _) => {}
            }
        }
        if let Some(index) = outdated.filter(|_| matches!(known, Known::No)) {
            self.forget(index);
        }
        known
    }

    fn admit(&mut self, now: Instant, greeting: Greeting, volume: u16, right: Right) {
        let (hello, peer) = (greeting.hello, greeting.frame.ethernet.source);
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
            return self.refuse(greeting, Status::Retry);
        };
        let cid = Cid::new(index, self.random.next() as u32);
        let mode = if greeting.call.is_some() { Mode::Aead } else { Mode::Crc };
        let config = TargetConfig {
            mode,
            hello,
            peer,
            address: self.address,
            ethertype: self.config.ethertype,
            node: self.config.node,
            incarnation: self.config.incarnation,
            nonce: self.random.next(),
            token: self.handshake.token(self.config.steer, cid, peer),
            cid,
            steer: self.config.steer,
            mtu: self.mtu,
            credit_sectors: (credit / SECTOR_BYTES) as u32,
            ack_delay_max: self.config.ack_delay_max,
        };
        let target = Target::accept(config, now);
        let client = greeting.client;
        let keys = self.reply(greeting, Body::HelloReply(target.hello_reply()));
        let (guard, answered) = match (mode, keys) {
            (Mode::Crc, _) => (Guard::Crc, None),
            (Mode::Aead, Some((keys, answered))) => (Guard::Aead(Box::new(keys)), Some(answered)),
            // Its public key is no key: it cannot be answered.
            (Mode::Aead, None) => return,
        };
        self.promised_bytes += credit;
        self.sessions.add(now, target, volume, credit, Standing { client, right, guard, answered });
    }

    fn refuse(&mut self, greeting: Greeting, status: Status) {
        let reply = HelloReply {
            session_epoch: greeting.hello.session_epoch,
            initiator_nonce: greeting.hello.nonce,
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
        self.reply(greeting, Body::HelloReply(reply));
    }
}

/// What is known of the attachment that says HELLO.
enum Known {
    /// This very session.
    Same(HelloReply),
    /// A session that is not older.
    Newer,
    /// Another client's session: whose an attachment is does not change.
    Another,
    /// Nothing that matters.
    No,
}
