//! Leaf 6 of a turn: frames of the sessions to the link, as long as it has room.
//!
//! Knows where the data of reads is and adds its checksums; what to send is the target's to say.

use cirro_link::{FrameId, Link, TxFrame};
use cirro_protocol::time::Instant;
use cirro_protocol::wire::body::CloseReason;
use cirro_protocol::{PayloadRef, SealWith};
use cirro_seal::{Guard, Nonces, append_payload_crcs, seal_crc, splice};

use super::session::{Session, SlotBuffer};
use super::{Node, handshake};
use crate::store::Store;

/// Bytes a session sends in one turn before the others are served.
const SESSION_BYTES_MAX: usize = 64 << 10;
/// Session number of frames that belong to none.
pub(super) const NO_SESSION: u32 = u32::MAX;

/// Sends what sessions have to say, LONG frames first.
pub(super) fn transmit<L: Link, S: Store>(link: &mut L, node: &mut Node<S>, now: Instant) {
    handshake::transmit(link, node);
    for place in 0..node.sessions.active_count() {
        let has_more = serve(link, node, now, place);
        node.sessions.served(place, has_more);
    }
    node.refused.clear();
    link.flush(&mut node.refused);
    for id in &node.refused {
        if let Some(session) = node.sessions.get(id.session as u16).filter(|_| id.session != NO_SESSION) {
            session.target.not_sent(now, id.pn);
        }
    }
}

/// Sends for the session at `place` of the active ones; true when it has more to send.
fn serve<L: Link, S: Store>(link: &mut L, node: &mut Node<S>, now: Instant, place: usize) -> bool {
    let Some(index) = node.sessions.active_at(place) else { return false };
    let Some(session) = node.sessions.get(index) else { return false };
    let mut sent = 0;
    while sent < SESSION_BYTES_MAX {
        let Some(frame) = link.frame() else { return true };
        let Some(pn) = write_frame(session, now, frame, (&mut node.payloads, &mut node.head)) else {
            return false;
        };
        let bytes = frame.len();
        node.meter.frames_out.add(1);
        node.meter.bytes_out.add(bytes as u64);
        link.commit(FrameId { session: u32::from(index), pn });
        sent += bytes;
    }
    true
}

/// Writes the session's next frame: the target's bytes, the data, the seal. Its packet number, or `None` when it has none.
fn write_frame(
    session: &mut Session,
    now: Instant,
    frame: &mut TxFrame,
    (payloads, head): (&mut Vec<PayloadRef>, &mut Vec<u8>),
) -> Option<u64> {
    loop {
        payloads.clear();
        let transmit = session.target.poll_transmit(now, &mut frame.head, payloads)?;
        let SealWith::Session(sender, receiver) = transmit.seal else {
            unreachable!("a target writes no LONG frames");
        };
        let complete = match &mut session.standing.guard {
            Guard::Crc => payloads.iter().all(|payload| insert_payload(&session.buffers, frame, payload)),
            Guard::Aead(_) => {
                head.clear();
                std::mem::swap(head, &mut frame.head);
                splice(head, payloads, &mut frame.head, |payload, out| {
                    let bytes = data(&session.buffers, payload);
                    bytes.is_some_and(|bytes| {
                        out.extend_from_slice(bytes);
                        true
                    })
                })
            }
        };
        if complete {
            match &mut session.standing.guard {
                Guard::Crc => seal_crc(Nonces { sender, receiver }, &mut frame.head),
                Guard::Aead(keys) => keys.seal(transmit.pn, &mut frame.head),
            }
            return Some(transmit.pn);
        }
        // A peer that uses a slot again before its read is done has taken its buffer away: what it breaks is its own session.
        frame.clear();
        session.target.not_sent(now, transmit.pn);
        session.close(CloseReason::Protocol);
    }
}

/// The data of one piece of a read, unless it is not there.
fn data<'a>(buffers: &'a [SlotBuffer], payload: &PayloadRef) -> Option<&'a [u8]> {
    let start = payload.offset as usize;
    match &buffers[payload.slot.index()] {
        SlotBuffer::Read(buffer) => buffer.bytes().get(start..start + payload.len as usize),
        SlotBuffer::Write(_) | SlotBuffer::None => None,
    }
}

/// Names the data of one piece to the link and adds its checksums to the trailer; false when it is not there.
fn insert_payload(buffers: &[SlotBuffer], frame: &mut TxFrame, payload: &PayloadRef) -> bool {
    let start = payload.offset as usize;
    let range = start..start + payload.len as usize;
    let SlotBuffer::Read(buffer) = &buffers[payload.slot.index()] else { return false };
    let Some(bytes) = buffer.bytes().get(range.clone()) else { return false };
    append_payload_crcs(&mut frame.head, bytes);
    frame.push_cut(payload.at, buffer.run(range));
    true
}
