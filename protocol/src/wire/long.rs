//! LONG frames: the handshake and the questions around it. Each is a 34-byte header, a body of fixed size and a 4-byte CRC32C tag
//! (mode none), and stands alone in its frame.
//!
//! Knows the layout; who may say what when is known to `handshake`.

use alloc::vec::Vec;

use super::ethernet::Ethernet;
use super::header::{HEADER_BYTES, VERSION, VT_LONG};
use super::{Reader, Reject};
use crate::op::Status;
use crate::types::{
    Cid, ETHERNET_BYTES, ETHERTYPE_DEFAULT, MTU_MIN, MacAddress, SLOTS_MAX, Steer, Uuid,
    VOLUME_NAME_BYTES_MAX, VolumeName,
};

/// Every LONG body has this size, so that no answer is larger than its question.
pub const LONG_BODY_BYTES: usize = 152;
/// Bytes of a whole LONG frame with its Ethernet header.
pub const LONG_FRAME_BYTES: usize = ETHERNET_BYTES + HEADER_BYTES + LONG_BODY_BYTES + 4;

/// Asks a node for a session on a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The volume.
    pub volume: VolumeName,
    /// The node that is meant.
    pub node: Uuid,
    /// The attachment that asks.
    pub attachment: Uuid,
    /// Orders the sessions of one attachment; grows with each.
    pub session_epoch: u64,
    /// The initiator's half of what ties a frame to this session.
    pub nonce: u64,
    /// Where the initiator wants its frames: cid and steer.
    pub cid: Cid,
    /// See `cid`.
    pub steer: Steer,
    /// The initiator's link MTU.
    pub mtu: u16,
    /// Slots wanted.
    pub slots: u16,
    /// Largest piece the initiator wants, after what it learned of the path.
    pub piece_bytes_max: u32,
}

/// Grants or refuses a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HelloReply {
    /// Echo of the HELLO.
    pub session_epoch: u64,
    /// Echo of the HELLO.
    pub initiator_nonce: u64,
    /// `Ok`, or why there is no session.
    pub status: Status,
    /// The node that answers.
    pub node: Uuid,
    /// This start of the node.
    pub incarnation: Uuid,
    /// The target's half of what ties a frame to this session.
    pub nonce: u64,
    /// What a RESET_HINT for this session will show.
    pub token: u64,
    /// Where the target wants its frames: cid and steer.
    pub cid: Cid,
    /// See `cid`.
    pub steer: Steer,
    /// The node's link MTU.
    pub mtu: u16,
    /// Slots granted: what was wanted, at most [`SLOTS_MAX`].
    pub slots: u16,
    /// The piece size of the session.
    pub piece_bytes: u32,
    /// Largest data of one request.
    pub request_bytes_max: u32,
    /// Write credit to start with, in sectors.
    pub credit_sectors: u32,
}

/// "I know nothing of this session."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetHint {
    /// The cid of the frame that nobody knew.
    pub cid: Cid,
    /// What HELLO_REPLY showed for it.
    pub token: u64,
    /// This start of the node.
    pub incarnation: Uuid,
}

/// Says which worker to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// Echo of the HELLO.
    pub session_epoch: u64,
    /// Echo of the HELLO.
    pub initiator_nonce: u64,
    /// The worker that owns the volume.
    pub steer: Steer,
}

/// Who serves this volume?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WhoHas {
    /// The volume; none where a node is asked for by its key.
    pub volume: Option<VolumeName>,
    /// Ties the answer to the question.
    pub nonce: u64,
    /// Where the answer goes.
    pub steer: Steer,
}

/// I serve it; or, without a volume: I have just started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IHave {
    /// The volume, if it is an answer.
    pub volume: Option<VolumeName>,
    /// Echo of the question; 0 in an announcement.
    pub nonce: u64,
    /// The node.
    pub node: Uuid,
    /// This start of it.
    pub incarnation: Uuid,
    /// The worker to send HELLO to.
    pub steer: Steer,
}

/// The body of a LONG frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "lives on the stack for one call, a few times per session")]
pub enum Body {
    /// Asks for a session.
    Hello(Hello),
    /// Answers it.
    HelloReply(HelloReply),
    /// The session is unknown here.
    ResetHint(ResetHint),
    /// Ask another worker.
    Redirect(Redirect),
    /// Who serves a volume?
    WhoHas(WhoHas),
    /// I do, or I have started.
    IHave(IHave),
}

/// A LONG frame: where it goes and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongFrame {
    /// Destination and source.
    pub ethernet: Ethernet,
    /// Which worker it is for; process bits are not looked at.
    pub steer: Steer,
    /// What it says.
    pub body: Body,
}

impl Body {
    /// Its type on the wire.
    pub const fn code(&self) -> u8 {
        match self {
            Body::Hello(_) => 1,
            Body::HelloReply(_) => 2,
            Body::ResetHint(_) => 4,
            Body::Redirect(_) => 5,
            Body::WhoHas(_) => 6,
            Body::IHave(_) => 7,
        }
    }

    /// Reads the fields of a body of type `code`; what follows them is zeroes.
    ///
    /// # Errors
    /// [`Reject::Kind`], [`Reject::Field`], [`Reject::Padding`].
    pub fn parse(code: u8, fields: &[u8]) -> Result<Body, Reject> {
        let mut r = Reader(fields);
        let body = match code {
            1 => Hello::read(&mut r).map(Body::Hello),
            2 => HelloReply::read(&mut r).map(Body::HelloReply),
            4 => ResetHint::read(&mut r).map(Body::ResetHint),
            5 => Redirect::read(&mut r).map(Body::Redirect),
            6 => WhoHas::read(&mut r).map(Body::WhoHas),
            7 => IHave::read(&mut r).map(Body::IHave),
            _ => return Err(Reject::Kind),
        };
        let body = body.ok_or(Reject::Field)?;
        if r.0.iter().any(|byte| *byte != 0) { Err(Reject::Padding) } else { Ok(body) }
    }

    /// Appends the fields, and zeroes up to `bytes`.
    pub fn emit(&self, bytes: usize, head: &mut Vec<u8>) {
        let end = head.len() + bytes;
        match self {
            Body::Hello(b) => b.emit(head),
            Body::HelloReply(b) => b.emit(head),
            Body::ResetHint(b) => b.emit(head),
            Body::Redirect(b) => b.emit(head),
            Body::WhoHas(b) => b.emit(head),
            Body::IHave(b) => b.emit(head),
        }
        head.resize(end, 0);
    }
}

impl LongFrame {
    /// A frame from `source` to `destination` with the default EtherType.
    pub fn new(source: MacAddress, destination: MacAddress, steer: Steer, body: Body) -> LongFrame {
        LongFrame { ethernet: Ethernet { destination, source, ethertype: ETHERTYPE_DEFAULT }, steer, body }
    }

    /// Takes a whole LONG frame apart, Ethernet header included. The tag is not checked here.
    ///
    /// # Errors
    /// A [`Reject`] that names what is wrong.
    pub fn parse(frame: &[u8]) -> Result<LongFrame, Reject> {
        let ethernet = Ethernet::parse(frame)?;
        let frame: &[u8; LONG_FRAME_BYTES] = frame.try_into().map_err(|_| Reject::Truncated)?;
        let header = &frame[ETHERNET_BYTES..ETHERNET_BYTES + HEADER_BYTES];
        let [vt, code] = [header[0], header[1]];
        if vt >> 5 != VERSION {
            return Err(Reject::Version);
        }
        if vt & VT_LONG == 0 {
            return Err(Reject::Form);
        }
        if vt & 0b1111 != 0 {
            return Err(Reject::Mode);
        }
        let steer = Steer(u16::from_be_bytes([header[2], header[3]]));
        let body = Body::parse(code, &frame[ETHERNET_BYTES + HEADER_BYTES..LONG_FRAME_BYTES - 4])?;
        if header[4..].iter().any(|byte| *byte != 0) {
            return Err(Reject::Padding);
        }
        Ok(LongFrame { ethernet, steer, body })
    }

    /// Appends the whole frame but its tag, which `cirro-seal` adds.
    pub fn emit(&self, head: &mut Vec<u8>) {
        self.ethernet.emit(head);
        let start = head.len();
        head.extend_from_slice(&[VERSION << 5 | VT_LONG, self.body.code()]);
        head.extend_from_slice(&self.steer.0.to_be_bytes());
        head.resize(start + HEADER_BYTES, 0);
        self.body.emit(LONG_BODY_BYTES, head);
    }
}

fn read_name(r: &mut Reader<'_>) -> Option<Option<VolumeName>> {
    let len = usize::from(r.u8()?);
    let field = r.bytes(VOLUME_NAME_BYTES_MAX)?;
    let (name, rest) = field.split_at_checked(len)?;
    if rest.iter().any(|byte| *byte != 0) {
        return None;
    }
    if len == 0 { Some(None) } else { VolumeName::new(name).ok().map(Some) }
}

fn emit_name(name: Option<&VolumeName>, head: &mut Vec<u8>) {
    let text = name.map_or("", |name| name.as_str());
    head.push(text.len() as u8);
    head.extend_from_slice(text.as_bytes());
    head.resize(head.len() + VOLUME_NAME_BYTES_MAX - text.len(), 0);
}

impl Hello {
    fn read(r: &mut Reader<'_>) -> Option<Hello> {
        let hello = Hello {
            volume: read_name(r)??,
            node: Uuid(r.array()?),
            attachment: Uuid(r.array()?),
            session_epoch: r.u64()?,
            nonce: r.u64()?,
            cid: Cid(r.u32()?),
            steer: Steer(r.u16()?),
            mtu: r.u16()?,
            slots: r.u16()?,
            piece_bytes_max: r.u32()?,
        };
        let sane = usize::from(hello.mtu) >= MTU_MIN && hello.slots >= 1 && hello.piece_bytes_max >= 8;
        sane.then_some(hello)
    }

    fn emit(&self, head: &mut Vec<u8>) {
        emit_name(Some(&self.volume), head);
        head.extend_from_slice(&self.node.0);
        head.extend_from_slice(&self.attachment.0);
        head.extend_from_slice(&self.session_epoch.to_le_bytes());
        head.extend_from_slice(&self.nonce.to_le_bytes());
        head.extend_from_slice(&self.cid.0.to_le_bytes());
        head.extend_from_slice(&self.steer.0.to_le_bytes());
        head.extend_from_slice(&self.mtu.to_le_bytes());
        head.extend_from_slice(&self.slots.to_le_bytes());
        head.extend_from_slice(&self.piece_bytes_max.to_le_bytes());
    }
}

impl HelloReply {
    fn read(r: &mut Reader<'_>) -> Option<HelloReply> {
        let reply = HelloReply {
            session_epoch: r.u64()?,
            initiator_nonce: r.u64()?,
            status: Status::from_code(r.u8()?)?,
            node: Uuid(r.array()?),
            incarnation: Uuid(r.array()?),
            nonce: r.u64()?,
            token: r.u64()?,
            cid: Cid(r.u32()?),
            steer: Steer(r.u16()?),
            mtu: r.u16()?,
            slots: r.u16()?,
            piece_bytes: r.u32()?,
            request_bytes_max: r.u32()?,
            credit_sectors: r.u32()?,
        };
        let sane = reply.status != Status::Ok
            || (usize::from(reply.mtu) >= MTU_MIN && (1..=SLOTS_MAX).contains(&usize::from(reply.slots)));
        sane.then_some(reply)
    }

    fn emit(&self, head: &mut Vec<u8>) {
        head.extend_from_slice(&self.session_epoch.to_le_bytes());
        head.extend_from_slice(&self.initiator_nonce.to_le_bytes());
        head.push(self.status as u8);
        head.extend_from_slice(&self.node.0);
        head.extend_from_slice(&self.incarnation.0);
        head.extend_from_slice(&self.nonce.to_le_bytes());
        head.extend_from_slice(&self.token.to_le_bytes());
        head.extend_from_slice(&self.cid.0.to_le_bytes());
        head.extend_from_slice(&self.steer.0.to_le_bytes());
        head.extend_from_slice(&self.mtu.to_le_bytes());
        head.extend_from_slice(&self.slots.to_le_bytes());
        head.extend_from_slice(&self.piece_bytes.to_le_bytes());
        head.extend_from_slice(&self.request_bytes_max.to_le_bytes());
        head.extend_from_slice(&self.credit_sectors.to_le_bytes());
    }
}

impl ResetHint {
    fn read(r: &mut Reader<'_>) -> Option<ResetHint> {
        Some(ResetHint { cid: Cid(r.u32()?), token: r.u64()?, incarnation: Uuid(r.array()?) })
    }

    fn emit(&self, head: &mut Vec<u8>) {
        head.extend_from_slice(&self.cid.0.to_le_bytes());
        head.extend_from_slice(&self.token.to_le_bytes());
        head.extend_from_slice(&self.incarnation.0);
    }
}

impl Redirect {
    fn read(r: &mut Reader<'_>) -> Option<Redirect> {
        Some(Redirect { session_epoch: r.u64()?, initiator_nonce: r.u64()?, steer: Steer(r.u16()?) })
    }

    fn emit(&self, head: &mut Vec<u8>) {
        head.extend_from_slice(&self.session_epoch.to_le_bytes());
        head.extend_from_slice(&self.initiator_nonce.to_le_bytes());
        head.extend_from_slice(&self.steer.0.to_le_bytes());
    }
}

impl WhoHas {
    fn read(r: &mut Reader<'_>) -> Option<WhoHas> {
        Some(WhoHas { volume: read_name(r)?, nonce: r.u64()?, steer: Steer(r.u16()?) })
    }

    fn emit(&self, head: &mut Vec<u8>) {
        emit_name(self.volume.as_ref(), head);
        head.extend_from_slice(&self.nonce.to_le_bytes());
        head.extend_from_slice(&self.steer.0.to_le_bytes());
    }
}

impl IHave {
    fn read(r: &mut Reader<'_>) -> Option<IHave> {
        Some(IHave {
            volume: read_name(r)?,
            nonce: r.u64()?,
            node: Uuid(r.array()?),
            incarnation: Uuid(r.array()?),
            steer: Steer(r.u16()?),
        })
    }

    fn emit(&self, head: &mut Vec<u8>) {
        emit_name(self.volume.as_ref(), head);
        head.extend_from_slice(&self.nonce.to_le_bytes());
        head.extend_from_slice(&self.node.0);
        head.extend_from_slice(&self.incarnation.0);
        head.extend_from_slice(&self.steer.0.to_le_bytes());
    }
}

/// Fields of the largest body, HELLO.
pub(super) const HELLO_BYTES: usize = 1 + VOLUME_NAME_BYTES_MAX + 16 + 16 + 8 + 8 + 4 + 2 + 2 + 2 + 4;
const _: () = assert!(HELLO_BYTES <= LONG_BODY_BYTES);
const _: () = assert!(LONG_BODY_BYTES.is_multiple_of(8));
