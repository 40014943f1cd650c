//! The sessions of a worker: their table, their timers, and which of them have something to do.
//!
//! Knows a session's buffers and what it has open; what its frames mean is known to the protocol's target. The cost of a turn grows with
//! the sessions that do something, not with those that exist. Used by every leaf of `node`.

use cirro_protocol::target::Target;
use cirro_protocol::time::Instant;
use cirro_protocol::types::{Cid, SLOTS_MAX, Slot, Uuid};
use cirro_protocol::wire::body::{Access, CloseReason};
use cirro_seal::Guard;

use super::deadlines::Deadlines;
use crate::access::{Client, Right};
use crate::buffers::Buffer;

/// Sessions of a worker. At most what a cid addresses; the write pool usually limits it before.
pub const SESSIONS_MAX: usize = 1024;
/// Sessions that no frame has confirmed yet: they cost as much as others, and anybody can ask for them.
pub(super) const UNCONFIRMED_MAX: usize = 64;

const _: () = assert!(SESSIONS_MAX <= Cid::TABLE_MAX);

/// What the data of a slot's request is in.
#[derive(Debug, Default)]
pub(super) enum SlotBuffer {
    /// Nothing, or a store request has it.
    #[default]
    None,
    /// Data of a write, coming in.
    Write(Buffer),
    /// Data of a read, going out.
    Read(Buffer),
}

/// What a session has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opened {
    pub handle: u32,
    pub access: Access,
}

/// A HELLO that was answered, by its ephemeral key, and the answer, to be sent again for the same.
pub(super) type Answered = ([u8; 32], Vec<u8>);

/// Whose session it is, and what protects it.
pub(super) struct Standing {
    pub client: Client,
    pub right: Right,
    pub guard: Guard,
    /// With keys: the HELLO it answers.
    pub answered: Option<Answered>,
}

/// One session.
pub(super) struct Session {
    pub target: Target,
    pub standing: Standing,
    /// Told apart from all others of the worker's life, also when the table entry is used again.
    pub serial: u64,
    /// Index of its volume.
    pub volume: u16,
    pub opened: Option<Opened>,
    /// The log says that another holds its volume: it asks again and again.
    pub told_busy: bool,
    pub buffers: Box<[SlotBuffer]>,
    /// Bytes of read buffers it occupies.
    pub read_bytes: usize,
    /// Write credit it was given, in bytes.
    pub promised_bytes: usize,
    /// Being closed: nothing of it is started any more.
    pub closing: bool,
    pub since: Instant,
    active: bool,
}

impl Session {
    pub(super) fn attachment(&self) -> Uuid {
        self.target.hello().attachment
    }

    pub(super) fn close(&mut self, reason: CloseReason) {
        self.closing = true;
        self.target.close(reason);
    }

    pub(super) fn buffer_mut(&mut self, slot: Slot) -> Option<&mut SlotBuffer> {
        self.buffers.get_mut(slot.index())
    }
}

/// The table.
pub(super) struct Sessions {
    table: Vec<Option<Box<Session>>>,
    deadlines: Deadlines,
    /// Sessions with something to do, in the order they are served.
    active: Vec<u16>,
    free: Vec<u16>,
    count: usize,
    serial: u64,
}

impl Sessions {
    pub(super) fn new() -> Sessions {
        Sessions {
            table: (0..SESSIONS_MAX).map(|_| None).collect(),
            deadlines: Deadlines::new(),
            active: Vec::with_capacity(SESSIONS_MAX),
            free: (0..SESSIONS_MAX as u16).rev().collect(),
            count: 0,
            serial: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// The table entry that the next session will have.
    pub(super) fn next_index(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// A new session in the entry that [`Sessions::next_index`] named.
    pub(super) fn add(
        &mut self,
        now: Instant,
        target: Target,
        volume: u16,
        promised_bytes: usize,
        standing: Standing,
    ) {
        let index = self.free.pop().expect("next_index gave an entry");
        self.count += 1;
        self.serial += 1;
        let session = Session {
            target,
            standing,
            serial: self.serial,
            volume,
            opened: None,
            told_busy: false,
            buffers: (0..=SLOTS_MAX).map(|_| SlotBuffer::None).collect(),
            read_bytes: 0,
            promised_bytes,
            closing: false,
            since: now,
            active: false,
        };
        self.table[usize::from(index)] = Some(Box::new(session));
        self.activate(index);
    }

    pub(super) fn remove(&mut self, index: u16) -> Option<Box<Session>> {
        let session = self.table[usize::from(index)].take()?;
        self.deadlines.set(usize::from(index), None);
        self.active.retain(|active| *active != index);
        self.free.push(index);
        self.count -= 1;
        Some(session)
    }

    pub(super) fn get(&mut self, index: u16) -> Option<&mut Session> {
        self.table.get_mut(usize::from(index))?.as_deref_mut()
    }

    /// The session if it is still the one with this serial number.
    pub(super) fn get_same(&mut self, index: u16, serial: u64) -> Option<&mut Session> {
        self.get(index).filter(|session| session.serial == serial)
    }

    /// The session if it is still the one with this serial number; it has something to do then.
    pub(super) fn get_active(&mut self, index: u16, serial: u64) -> Option<&mut Session> {
        self.get_same(index, serial)?;
        self.activate(index);
        self.get(index)
    }

    pub(super) fn with_cid(&mut self, cid: Cid) -> Option<(u16, &mut Session)> {
        let index = cid.index() as u16;
        self.get(index).filter(|session| session.target.cid() == cid).map(|session| (index, session))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u16, &Session)> {
        let entries = self.table.iter().enumerate();
        entries.filter_map(|(index, session)| Some((index as u16, session.as_deref()?)))
    }

    /// The entries in use.
    pub(super) fn indexes(&self) -> Vec<u16> {
        self.iter().map(|(index, _)| index).collect()
    }

    /// The session has something to do in this turn.
    pub(super) fn activate(&mut self, index: u16) {
        if let Some(session) = self.table[usize::from(index)].as_mut().filter(|session| !session.active) {
            session.active = true;
            self.active.push(index);
        }
    }

    pub(super) fn has_active(&self) -> bool {
        !self.active.is_empty()
    }

    /// How many are active, and the one at `place`.
    pub(super) fn active_count(&self) -> usize {
        self.active.len()
    }

    pub(super) fn active_at(&self, place: usize) -> Option<u16> {
        self.active.get(place).copied()
    }

    /// Runs the timers that are due.
    pub(super) fn time_out(&mut self, now: Instant) {
        let (table, active) = (&mut self.table, &mut self.active);
        self.deadlines.take_due(now, |index| {
            let Some(session) = table[index].as_mut() else { return };
            session.target.handle_timeout(now);
            if !std::mem::replace(&mut session.active, true) {
                active.push(index as u16);
            }
        });
    }

    /// The session at `place` of the active ones has nothing more to do in this turn, or (true) has.
    pub(super) fn served(&mut self, place: usize, has_more: bool) {
        if let Some(session) = self.table[usize::from(self.active[place])].as_mut() {
            session.active = has_more;
        }
    }

    /// At the end of a turn: takes the timers of those that were served and keeps those that have more to do, rotated, so that another is
    /// first in the next turn.
    pub(super) fn settle(&mut self) {
        let (table, deadlines) = (&mut self.table, &mut self.deadlines);
        self.active.retain(|index| {
            let Some(session) = table[usize::from(*index)].as_mut() else { return false };
            let deadline = session.target.poll_timeout();
            deadlines.set(usize::from(*index), deadline);
            // Without a timer it is over: its last event waits to be seen.
            session.active |= deadline.is_none();
            session.active
        });
        if self.active.len() > 1 {
            self.active.rotate_left(1);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.next()
    }

    /// Bytes of write credit that sessions of `attachment` on `volume` were given.
    pub(super) fn promised_to(&self, attachment: Uuid, volume: u16) -> usize {
        let same = |session: &&Session| session.attachment() == attachment && session.volume == volume;
        self.iter().map(|(_, session)| session).filter(same).map(|session| session.promised_bytes).sum()
    }

    /// Sessions that no frame has confirmed.
    pub(super) fn unconfirmed(&self) -> usize {
        self.iter().filter(|(_, session)| !session.target.is_confirmed()).count()
    }
}
