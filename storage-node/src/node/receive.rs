//! Leaf 1 of a turn: frames from the link to the sessions, and the data in them to its buffers.
//!
//! Knows which session a frame is for and whether it may be believed; what it says is the target's to know.

use cirro_link::Link;
use cirro_protocol::Placement;
use cirro_protocol::time::Instant;
use cirro_protocol::types::{ETHERNET_BYTES, PAYLOADS_MAX, Slot};
use cirro_protocol::wire::body::CloseReason;
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::{Frame, Header, Mode};
use cirro_seal::Mismatch;

use super::drops::DropReason;
use super::session::{Session, SlotBuffer};
use super::{Node, handshake};
use crate::buffers::{Buffer, Pool};
use crate::store::Store;

/// Frames of one turn: as many as may come between two acks (docs/PROTOCOL.md, P-37), which leave at its end.
const RECEIVE_FRAMES_MAX: usize = 48;

/// Buffers for the writes that begin in one frame; kept between frames so that nothing is allocated.
#[derive(Debug)]
pub(super) struct Fresh {
    wanted: Vec<(Slot, u32)>,
    taken: Vec<(Slot, Buffer)>,
}

impl Fresh {
    pub(super) fn new() -> Fresh {
        Fresh { wanted: Vec::with_capacity(PAYLOADS_MAX), taken: Vec::with_capacity(PAYLOADS_MAX) }
    }
}

/// Takes frames in; true when the link is empty now.
pub(super) fn receive<L: Link, S: Store>(link: &mut L, node: &mut Node<S>, now: Instant) -> bool {
    node.handshake.begin_turn();
    for _ in 0..RECEIVE_FRAMES_MAX {
        let Some(received) = link.receive() else { return true };
        node.meter.frames_in.add(1);
        node.meter.bytes_in.add(received.bytes.len() as u64);
        let is_long = received.bytes.get(ETHERNET_BYTES..).and_then(Header::is_long);
        let taken = match is_long {
            None => Err(DropReason::Malformed),
            Some(true) => handshake::take(node, now, received.bytes),
            Some(false) => node.take_short(now, received.arrival, received.bytes),
        };
        if let Err(reason) = taken {
            node.meter.dropped.count(reason as usize);
        }
    }
    false
}

impl<S: Store> Node<S> {
    fn take_short(&mut self, now: Instant, arrival: Instant, bytes: &[u8]) -> Result<(), DropReason> {
        let ethernet = Ethernet::parse(bytes).map_err(|_| DropReason::Malformed)?;
        let header = Header::parse(&bytes[ETHERNET_BYTES..]).map_err(|_| DropReason::Malformed)?;
        if ethernet.destination != self.address || header.steer != self.config.steer {
            return Err(DropReason::NotForUs);
        }
        let Some((index, session)) = self.sessions.with_cid(header.cid) else {
            self.handshake.hint_reset(now, &self.config, &ethernet, header.cid);
            return Err(DropReason::UnknownSession);
        };
        // Another address needs another handshake (P-23), whatever the mode.
        if ethernet.source != session.target.peer() {
            return Err(DropReason::OtherSource);
        }
        if header.mode == Mode::Aead && session.target.has_seen(header.pn) {
            return Err(DropReason::Repeated);
        }
        let nonces = session.target.nonces_in().into();
        let frame = session.standing.guard.open(nonces, &header, bytes, &mut self.plain).map_err(reason)?;
        reserve(session, &frame, &mut self.fresh, &mut self.write_pool, &mut self.read_pool)?;
        self.placements.clear();
        session.target.handle_frame(now, arrival, &frame, &mut self.placements);
        place(session, frame.bytes(), &self.placements);
        self.sessions.activate(index);
        Ok(())
    }
}

fn reason(mismatch: Mismatch) -> DropReason {
    match mismatch {
        Mismatch::Layout => DropReason::Malformed,
        Mismatch::Mode => DropReason::OtherMode,
        Mismatch::Payload { .. } => DropReason::PayloadCrc,
        Mismatch::Phase => DropReason::KeyPhase,
        Mismatch::Tag => DropReason::Tag,
    }
}

/// Gets a buffer for each write that begins in the frame, or for none of them.
fn reserve(
    session: &mut Session,
    frame: &Frame<'_>,
    fresh: &mut Fresh,
    writes: &mut Pool,
    reads: &mut Pool,
) -> Result<(), DropReason> {
    fresh.wanted.clear();
    session.target.buffers_wanted(frame, &mut fresh.wanted);
    for (slot, bytes) in &fresh.wanted {
        match writes.take(*bytes as usize) {
            Some(buffer) => fresh.taken.push((*slot, buffer)),
            None => {
                fresh.taken.drain(..).for_each(|(_, buffer)| writes.give_back(buffer));
                return Err(DropReason::NoBuffer);
            }
        }
    }
    for (slot, buffer) in fresh.taken.drain(..) {
        // That the slot is used again says that the data of its last read has arrived.
        session.free_slot(slot, writes, reads);
        session.buffers[slot.index()] = SlotBuffer::Write(buffer);
    }
    Ok(())
}

/// Copies the data of a frame to where it belongs.
fn place(session: &mut Session, bytes: &[u8], placements: &[Placement]) {
    for placement in placements {
        let start = placement.offset as usize;
        let source = &bytes[placement.range.clone()];
        let room = match session.buffer_mut(placement.slot) {
            Some(SlotBuffer::Write(buffer)) => buffer.bytes_mut().get_mut(start..start + source.len()),
            Some(SlotBuffer::Read(_) | SlotBuffer::None) | None => None,
        };
        match room {
            Some(room) => room.copy_from_slice(source),
            // The initiator's pieces contradict each other.
            None => session.close(CloseReason::Protocol),
        }
    }
}
