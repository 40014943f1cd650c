//! The backend's end of a handshake with keys: seals what its initiator asks, opens what the node answers.
//!
//! Knows one node and one disk; keeps the handshake at hand. When to ask, and what an answer means, is known to the core's initiator.

use std::sync::Arc;

use cirro_protocol::op::Status;
use cirro_protocol::types::{Cid, ETHERNET_BYTES, PublicKey, Steer};
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::guarded::{
    CODE_COOKIE, CODE_HELLO, CODE_HELLO_REPLY, GUARDED_BODY_BYTES, GUARDED_REPLY_BYTES, Guarded, INNER_BYTES,
};
use cirro_protocol::wire::header::HEADER_BYTES;
use cirro_protocol::wire::long::{Body, LONG_BODY_BYTES, LongFrame};
use snow::HandshakeState;

use crate::Mismatch;
use crate::identity::Identity;
use crate::marks::{Mark, Marker};
use crate::session_keys::{Secret, SessionKeys};

/// Answers to one HELLO that are looked at, cookies too: who hears it and knows the node's public key can forge some, and each costs two
/// multiplications on a curve. Another HELLO comes after a second.
const ANSWERS_MAX: u32 = 10;

/// One disk's handshakes with its node.
pub struct Caller {
    identity: Arc<Identity>,
    node: PublicKey,
    psk: Secret,
    marker: Marker,
    asked: Option<Asked>,
    cookie: Option<Mark>,
}

/// The HELLO at hand.
struct Asked {
    inner: [u8; INNER_BYTES],
    message: [u8; GUARDED_BODY_BYTES],
    noise: Box<HandshakeState>,
    first_mark: Mark,
    /// Answers that were looked at.
    answers: u32,
}

/// What the node answers.
#[derive(Debug)]
pub struct Answer {
    /// What it says.
    pub frame: LongFrame,
    /// If it grants a session: its keys.
    pub keys: Option<Box<SessionKeys>>,
}

impl Caller {
    /// For a disk whose node has this key. `psk` is zeroes where there is none.
    pub fn new(identity: Arc<Identity>, node: PublicKey, psk: Secret) -> Caller {
        let marker = Marker::new(&node);
        Caller { identity, node, psk, marker, asked: None, cookie: None }
    }

    /// The node's key.
    pub fn node(&self) -> PublicKey {
        self.node
    }

    /// Makes the LONG frame that the core wrote into one that only the node can read. `answer_to` is where the answer is wanted.
    ///
    /// # Panics
    /// If `head` is not what the core wrote.
    pub fn seal(&mut self, head: &mut Vec<u8>, answer_to: (Cid, Steer)) {
        let ethernet = Ethernet::parse(head).expect("the core wrote it");
        let header = &head[ETHERNET_BYTES..];
        let (code, steer) = (header[1], Steer(u16::from_be_bytes([header[2], header[3]])));
        let fields = &head[ETHERNET_BYTES + HEADER_BYTES..];
        let hello = code == CODE_HELLO;
        let mut body = [0; GUARDED_BODY_BYTES];
        if hello {
            let mut inner = [code; INNER_BYTES];
            inner[1..].copy_from_slice(&fields[..INNER_BYTES - 1]);
            body = self.message(inner);
        } else {
            body[..LONG_BODY_BYTES].copy_from_slice(&fields[..LONG_BODY_BYTES]);
        }
        head.clear();
        let (cid, answer_steer) = if hello { answer_to } else { (Cid(0), Steer(0)) };
        Guarded { ethernet, code, steer, cid, answer_steer, body: &body }.emit(head);
        let first_mark = self.marker.mark(head, self.cookie.as_ref().filter(|_| hello));
        if let Some(asked) = self.asked.as_mut().filter(|_| hello) {
            asked.first_mark = first_mark;
        }
    }

    /// The same HELLO is the same message each time; another begins another handshake.
    fn message(&mut self, inner: [u8; INNER_BYTES]) -> [u8; GUARDED_BODY_BYTES] {
        if let Some(asked) = self.asked.as_ref().filter(|asked| asked.inner == inner) {
            return asked.message;
        }
        let mut message = [0; GUARDED_BODY_BYTES];
        // A public key that is no point of the curve's large group makes a handshake that nobody answers.
        let noise = self.identity.call(&self.node, &self.psk).and_then(|mut noise| {
            noise.write_message(&inner, &mut message)?;
            Ok(Box::new(noise))
        });
        self.asked = noise.ok().map(|noise| Asked { inner, message, noise, first_mark: [0; 16], answers: 0 });
        message
    }

    /// Opens what answers our HELLO. `None`: it was a cookie, and is kept; ask again now.
    ///
    /// # Errors
    /// [`Mismatch::Tag`]: nobody wrote it who knows the node's keys and our shared secret; [`Mismatch::Layout`]: it makes no sense, nothing was
    /// asked, or this HELLO had more answers than are looked at.
    pub fn open_answer(&mut self, bytes: &[u8]) -> Result<Option<Answer>, Mismatch> {
        let frame = self.marked(bytes)?;
        let asked =
            self.asked.as_mut().filter(|asked| asked.answers < ANSWERS_MAX).ok_or(Mismatch::Layout)?;
        asked.answers += 1;
        match frame.code {
            CODE_HELLO_REPLY => {
                let (body, keys) = self.open_reply(&frame)?;
                let frame = LongFrame { ethernet: frame.ethernet, steer: frame.steer, body };
                Ok(Some(Answer { frame, keys }))
            }
            CODE_COOKIE => {
                let cookie = self.marker.open_cookie(frame.body, &asked.first_mark).ok_or(Mismatch::Tag)?;
                self.cookie = Some(cookie);
                Ok(None)
            }
            _ => Err(Mismatch::Layout),
        }
    }

    /// Reads what the node says to all, or to whoever looks for it.
    ///
    /// # Errors
    /// [`Mismatch::Tag`]: it comes from somebody who does not know the node's public key; [`Mismatch::Layout`].
    pub fn open_hint(&self, bytes: &[u8]) -> Result<LongFrame, Mismatch> {
        let frame = self.marked(bytes)?;
        let body = clear_body(frame.code, &frame)?;
        Ok(LongFrame { ethernet: frame.ethernet, steer: frame.steer, body })
    }

    fn marked<'a>(&self, bytes: &'a [u8]) -> Result<Guarded<'a>, Mismatch> {
        let frame = Guarded::parse(bytes).map_err(|_| Mismatch::Layout)?;
        if self.marker.is_marked(bytes) { Ok(frame) } else { Err(Mismatch::Tag) }
    }

    fn open_reply(&mut self, frame: &Guarded<'_>) -> Result<(Body, Option<Box<SessionKeys>>), Mismatch> {
        let asked = self.asked.as_mut().ok_or(Mismatch::Tag)?;
        let mut inner = [0; INNER_BYTES];
        let opened = asked.noise.read_message(&frame.body[..GUARDED_REPLY_BYTES], &mut inner);
        opened.map_err(|_| Mismatch::Tag)?;
        // From here on the handshake is used up, whatever it says.
        let mut noise = self.asked.take().ok_or(Mismatch::Tag)?.noise;
        let body = Body::parse(inner[0], &inner[1..]).map_err(|_| Mismatch::Layout)?;
        let keys = match &body {
            Body::HelloReply(reply) if reply.status == Status::Ok => {
                let (ours, theirs) = noise.dangerously_get_raw_split();
                Some(Box::new(self.identity.session_keys(ours, theirs)))
            }
            Body::HelloReply(_) | Body::Redirect(_) => None,
            Body::Hello(_) | Body::ResetHint(_) | Body::WhoHas(_) | Body::IHave(_) => {
                return Err(Mismatch::Layout);
            }
        };
        Ok((body, keys))
    }
}

/// The body of a frame that needs no handshake: a question or a hint.
pub(crate) fn clear_body(code: u8, frame: &Guarded<'_>) -> Result<Body, Mismatch> {
    match Body::parse(code, frame.body) {
        Ok(body @ (Body::ResetHint(_) | Body::WhoHas(_) | Body::IHave(_))) => Ok(body),
        Ok(Body::Hello(_) | Body::HelloReply(_) | Body::Redirect(_)) | Err(_) => Err(Mismatch::Layout),
    }
}
