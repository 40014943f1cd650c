//! The node's end of handshakes with keys: who calls, and the sealed answer.
//!
//! Knows what a handshake costs (70 µs to read, 80 µs to answer: `examples/handshake_cost.rs`), and so checks what is cheap first and bounds
//! the rest; who may have which volume is known to the node.

use std::sync::Arc;

use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{Cid, MacAddress, PublicKey, Steer};
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::guarded::{
    CODE_COOKIE, CODE_HELLO, CODE_HELLO_REPLY, FIRST_MARK_AT, GUARDED_BODY_BYTES, GUARDED_FRAME_BYTES,
    GUARDED_REPLY_BYTES, Guarded, INNER_BYTES,
};
use cirro_protocol::wire::long::{Body, LongFrame};
use snow::HandshakeState;

use crate::Mismatch;
use crate::caller::clear_body;
use crate::identity::Identity;
use crate::marks::{Mark, Marker, SEALED_COOKIE_BYTES, cookie_of, shows_cookie};
use crate::session_keys::{Secret, SessionKeys};

/// Handshakes are counted over this time.
const WINDOW: Nanos = Nanos::from_millis(100);
/// Handshakes of a window from senders who have shown nothing: with more, a cookie is asked for in the rest of it and in the next.
const FREE_HANDSHAKES_MAX: u32 = 20;
/// Handshakes of a window in all: 1000 a second take 7 % of a core, and 15 % if all are answered.
const HANDSHAKES_MAX: u32 = 100;
/// Handshakes of a window for one address, and addresses that have any in it.
const HANDSHAKES_PER_SOURCE_MAX: u32 = 25;
const SOURCES_MAX: usize = 64;
/// Cookies given in a window: a flood must not make the node send as much.
const COOKIES_MAX: u32 = 200;
/// Cookies are of a secret that lives so long; those of the one before count too.
const COOKIE_LIFE: Nanos = Nanos::from_secs(120);

/// A worker's handshakes with those who call it.
pub struct Answerer {
    identity: Arc<Identity>,
    marker: Marker,
    secrets: [[u8; 32]; 2],
    secret_since: Instant,
    window_since: Instant,
    /// HELLOs of this window, handshakes made for them, cookies given; and whether the last one had too many HELLOs.
    calls: u32,
    handshakes: u32,
    cookies: u32,
    pressed: bool,
    sources: Vec<(MacAddress, u32)>,
}

/// A frame whose first mark is right.
#[derive(Debug)]
pub struct Marked<'a> {
    frame: Guarded<'a>,
    bytes: &'a [u8],
}

/// What is to be done with a HELLO.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    /// Go on: [`Answerer::read_hello`].
    Go,
    /// Answer with this frame instead.
    Cookie(Vec<u8>),
    /// Nothing: there are too many.
    Drop,
}

/// A handshake that waits for its answer.
pub struct Pending {
    noise: Box<HandshakeState>,
    cid: Cid,
    /// Who calls. That it has the private key is sure; that it calls now, and that nobody repeats it, only when its session is confirmed.
    pub client: PublicKey,
}

impl<'a> Marked<'a> {
    /// The caller's ephemeral key if it is a HELLO: the same HELLO, sent again, has the same.
    pub fn hello(&self) -> Option<[u8; 32]> {
        let ephemeral = self.frame.body.first_chunk()?;
        (self.frame.code == CODE_HELLO).then_some(*ephemeral)
    }

    /// What it says if it needs no handshake.
    ///
    /// # Errors
    /// [`Mismatch::Layout`].
    pub fn read_clear(&self) -> Result<LongFrame, Mismatch> {
        let body = clear_body(self.frame.code, &self.frame)?;
        Ok(LongFrame { ethernet: self.frame.ethernet, steer: self.frame.steer, body })
    }

    /// Where it came from.
    pub fn source(&self) -> MacAddress {
        self.frame.ethernet.source
    }
}

impl Answerer {
    /// For one worker of the node with this identity.
    pub fn new(identity: Arc<Identity>) -> Answerer {
        let marker = Marker::new(&identity.public());
        let mut secrets = [[0; 32]; 2];
        secrets.iter_mut().for_each(|secret| identity.fill(secret));
        Answerer {
            identity,
            marker,
            secrets,
            secret_since: Instant(0),
            window_since: Instant(0),
            calls: 0,
            handshakes: 0,
            cookies: 0,
            pressed: false,
            sources: Vec::with_capacity(SOURCES_MAX),
        }
    }

    /// Checks layout and first mark.
    ///
    /// # Errors
    /// [`Mismatch::Layout`], [`Mismatch::Tag`].
    pub fn check<'a>(&self, bytes: &'a [u8]) -> Result<Marked<'a>, Mismatch> {
        let frame = Guarded::parse(bytes).map_err(|_| Mismatch::Layout)?;
        if self.marker.is_marked(bytes) { Ok(Marked { frame, bytes }) } else { Err(Mismatch::Tag) }
    }

    /// Whether there is time for the handshake of a HELLO.
    pub fn admit(&mut self, now: Instant, hello: &Marked<'_>) -> Admission {
        if now.since(self.window_since) >= WINDOW {
            let next_to_it = now.since(self.window_since) < WINDOW.times(2);
            self.pressed = next_to_it && self.calls > FREE_HANDSHAKES_MAX;
            (self.window_since, self.calls, self.handshakes, self.cookies) = (now, 0, 0, 0);
            self.sources.clear();
        }
        self.calls = self.calls.saturating_add(1);
        if !self.pressed && self.calls <= FREE_HANDSHAKES_MAX {
            self.handshakes += 1;
            return Admission::Go;
        }
        self.renew_secrets(now);
        let source = hello.source();
        let shown = self.secrets.iter().any(|secret| shows_cookie(hello.bytes, &cookie_of(secret, source)));
        match shown {
            true if self.handshakes < HANDSHAKES_MAX && self.has_turn(source) => {
                self.handshakes += 1;
                Admission::Go
            }
            false if self.cookies < COOKIES_MAX => {
                self.cookies += 1;
                Admission::Cookie(self.cookie(hello, source))
            }
            true | false => Admission::Drop,
        }
    }

    /// Whether an address has not had its share of the window.
    fn has_turn(&mut self, source: MacAddress) -> bool {
        if let Some((_, count)) = self.sources.iter_mut().find(|(address, _)| *address == source) {
            *count += 1;
            return *count <= HANDSHAKES_PER_SOURCE_MAX;
        }
        let has_room = self.sources.len() < SOURCES_MAX;
        if has_room {
            self.sources.push((source, 1));
        }
        has_room
    }

    fn renew_secrets(&mut self, now: Instant) {
        if now.since(self.secret_since) >= COOKIE_LIFE {
            self.secrets.swap(0, 1);
            self.identity.fill(&mut self.secrets[0]);
            self.secret_since = now;
        }
    }

    fn cookie(&self, hello: &Marked<'_>, source: MacAddress) -> Vec<u8> {
        let mut nonce = [0; 12];
        self.identity.fill(&mut nonce);
        let first: &Mark = hello.bytes[FIRST_MARK_AT..].first_chunk().expect("the frame's size was checked");
        let sealed = self.marker.seal_cookie(nonce, first, &cookie_of(&self.secrets[0], source));
        let mut body = [0; GUARDED_BODY_BYTES];
        body[..SEALED_COOKIE_BYTES].copy_from_slice(&sealed);
        let Guarded { ethernet, cid, answer_steer, .. } = hello.frame;
        let ethernet = Ethernet { destination: source, source: ethernet.destination, ..ethernet };
        self.finish(ethernet, answer_steer, (CODE_COOKIE, cid), &body)
    }

    /// Reads a HELLO, and who says it.
    ///
    /// # Errors
    /// [`Mismatch::Tag`]: it was not written for this node by the owner of the key it shows; [`Mismatch::Layout`].
    pub fn read_hello(&self, hello: &Marked<'_>) -> Result<(LongFrame, Pending), Mismatch> {
        let frame = &hello.frame;
        let mut inner = [0; INNER_BYTES];
        let mut noise = self.identity.answer().map_err(|_| Mismatch::Tag)?;
        noise.read_message(frame.body, &mut inner).map_err(|_| Mismatch::Tag)?;
        let client = noise.get_remote_static().and_then(|key| key.try_into().ok()).ok_or(Mismatch::Tag)?;
        let body = match Body::parse(inner[0], &inner[1..]) {
            Ok(body @ Body::Hello(_)) => body,
            Ok(_) | Err(_) => return Err(Mismatch::Layout),
        };
        let long = LongFrame { ethernet: frame.ethernet, steer: frame.steer, body };
        let pending = Pending { noise: Box::new(noise), cid: frame.cid, client: PublicKey(client) };
        Ok((long, pending))
    }

    /// The frame that answers a HELLO with `answer`, and the keys of the session that begins if it is granted. `psk` is what is shared with
    /// this client; zeroes where there is nothing.
    ///
    /// # Errors
    /// [`Mismatch::Tag`]: the client's keys are of no use.
    pub fn answer(
        &self,
        mut pending: Pending,
        psk: &Secret,
        answer: &LongFrame,
    ) -> Result<(Vec<u8>, SessionKeys), Mismatch> {
        let mut inner = Vec::with_capacity(INNER_BYTES);
        inner.push(answer.body.code());
        answer.body.emit(INNER_BYTES - 1, &mut inner);
        let mut body = [0; GUARDED_BODY_BYTES];
        pending.noise.set_psk(2, &psk[..]).map_err(|_| Mismatch::Tag)?;
        let written = pending.noise.write_message(&inner, &mut body);
        if written.map_err(|_| Mismatch::Tag)? != GUARDED_REPLY_BYTES {
            return Err(Mismatch::Layout);
        }
        let (theirs, ours) = pending.noise.dangerously_get_raw_split();
        let keys = self.identity.session_keys(ours, theirs);
        let frame = self.finish(answer.ethernet, answer.steer, (CODE_HELLO_REPLY, pending.cid), &body);
        Ok((frame, keys))
    }

    /// The frame of something that needs no handshake.
    pub fn seal_clear(&self, long: &LongFrame) -> Vec<u8> {
        let mut fields = Vec::with_capacity(GUARDED_BODY_BYTES);
        long.body.emit(GUARDED_BODY_BYTES, &mut fields);
        let body = fields.as_slice().try_into().expect("emitted to this size");
        self.finish(long.ethernet, long.steer, (long.body.code(), Cid(0)), body)
    }

    fn finish(
        &self,
        ethernet: Ethernet,
        steer: Steer,
        (code, cid): (u8, Cid),
        body: &[u8; GUARDED_BODY_BYTES],
    ) -> Vec<u8> {
        let mut frame = Vec::with_capacity(GUARDED_FRAME_BYTES);
        Guarded { ethernet, code, steer, cid, answer_steer: Steer(0), body }.emit(&mut frame);
        self.marker.mark(&mut frame, None);
        frame
    }
}
