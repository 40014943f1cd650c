//! What a disk does about changes that are not flushed: keeps a copy of each, and writes all of them again when it meets another start of the node.
//!
//! Knows the copy (`replay`), which slots carry what of it, and when nothing else may be issued; does not know rings, frames or who asked. Called by `disk`.
//!
//! ```text
//!            session lost, something unflushed             another incarnation
//!   Resting -----------------------------------> Waiting ----------------------> Writing
//!      ^ ^                                          | same incarnation, or nothing left   |
//!      | '------------------------------------------'                                     |
//!      '------------------------------ every change was written again -------------------'
//! ```
//!
//! One that cannot be written again (a full disk, an error) is tried again after a while, and all with it, for later ones may lie over it: until then the guest
//! would read what it has long overwritten.

use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{SLOTS_MAX, Slot};
use vm_memory::{Bytes, VolatileSlice};

use crate::guest_memory::{GuestMemory, GuestRun};
use crate::pending::Part;
use crate::replay::{Entry, Life, Replay};

/// How long after a change could not be written again all are tried anew.
const RETRY_PAUSE: Nanos = Nanos::from_secs(1);

/// Whether the guest's requests may be issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// They may.
    Resting,
    /// The node is not known yet.
    Waiting,
    /// Changes are written again, from `not_before` on: `next` is to be submitted next, `out` are in slots. Whether one of this try failed.
    Writing { next: u64, out: u16, failed: bool, not_before: Instant },
}

/// What a slot carries of this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// A change that is written again, which is kept there.
    Again { position: u64 },
    /// A flush of the guest's, submitted at this mark.
    Flush { mark: u64 },
    /// A flush of our own.
    OwnFlush { mark: u64 },
}

/// Whose a slot was that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// A guest's request ended like this.
    Guest(Status),
    /// Ours: no request ended.
    Ours,
}

/// What is to be done after a volume was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    GoOn,
    /// So many bytes of changes are written again first.
    WriteAgain(u64),
    /// Somebody else had the volume since they were written: so many bytes of changes were let go of.
    Discarded(u64),
}

/// The unflushed changes of a disk.
#[derive(Debug)]
pub struct Unflushed {
    replay: Replay,
    phase: Phase,
    uses: Box<[Option<Use>]>,
    /// A change could not be written again, and has not been since.
    stuck: bool,
    own_flush_out: bool,
    own_flush_failed: bool,
    /// The volume was open for writing in this process.
    opened: bool,
}

impl Unflushed {
    /// Goes on with what `replay` holds: nothing is issued before the node is known.
    pub fn new(replay: Replay) -> Unflushed {
        let phase = if replay.is_empty() { Phase::Resting } else { Phase::Waiting };
        Unflushed {
            replay,
            phase,
            uses: vec![None; SLOTS_MAX].into_boxed_slice(),
            stuck: false,
            own_flush_out: false,
            own_flush_failed: false,
            opened: false,
        }
    }

    /// True while nothing of the guest's may be issued.
    pub fn blocks(&self) -> bool {
        self.phase != Phase::Resting
    }

    /// Bytes of the copy.
    pub fn bytes(&self) -> u64 {
        self.replay.bytes_kept()
    }

    /// True if something is kept: then every later change must be too, or an old one would outlive it.
    pub fn keeps(&self) -> bool {
        !self.replay.is_empty()
    }

    /// True if the volume must not be given back before a flush.
    pub fn holds(&self) -> bool {
        self.opened && !self.replay.is_empty() && !self.own_flush_failed
    }

    /// A part of a change has ended well, and no flush belongs to it: keeps a copy before the guest is told. Its data lies in `runs` from `start` on. Parts are
    /// kept in the order in which they end, which is the node's order; requests of several parts may end in another. False: there is no room, so it must
    /// be flushed first.
    pub fn keep(&mut self, memory: &GuestMemory, part: Part, runs: &[GuestRun], start: u32) -> bool {
        let Part { op, offset, len } = part;
        let entry = Entry { op, offset, len };
        self.replay.append(entry, |from, place| copy_out(memory, runs, start + from, &place))
    }

    /// The session is over, and the disk takes back what it issued: with something kept it goes on only after [`Unflushed::attached`].
    pub fn lost(&mut self) {
        self.uses.fill(None);
        self.own_flush_out = false;
        if !self.replay.is_empty() {
            self.phase = Phase::Waiting;
        }
    }

    /// The volume is open for writing.
    pub fn attached(&mut self, node: Life) -> Verdict {
        (self.opened, self.own_flush_failed) = (true, false);
        let was = self.replay.life();
        (self.phase, self.stuck) = (Phase::Resting, false);
        if self.replay.is_empty() {
            self.replay.set_life(node);
            return Verdict::GoOn;
        }
        // Our own release and new grant are one epoch; whoever was between them makes it two.
        if node.vol_epoch.wrapping_sub(was.vol_epoch) > 1 {
            let bytes = self.discard();
            self.replay.set_life(node);
            return Verdict::Discarded(bytes);
        }
        if was.incarnation == node.incarnation {
            self.replay.set_life(node);
            return Verdict::GoOn;
        }
        self.begin_writing(Instant::default());
        Verdict::WriteAgain(self.replay.bytes_kept())
    }

    /// Lets go of everything: somebody else had the volume. Gives how many bytes that was.
    pub fn discard(&mut self) -> u64 {
        let bytes = self.replay.bytes_kept();
        self.replay.drop_before(self.replay.head());
        (self.phase, self.stuck) = (Phase::Resting, false);
        bytes
    }

    /// The volume can only be read: nothing can be written again, and nothing will be changed.
    pub fn attached_to_read(&mut self) {
        self.phase = Phase::Resting;
    }

    fn begin_writing(&mut self, not_before: Instant) {
        let next = self.replay.first().map_or(self.replay.head(), |kept| kept.position);
        self.phase = Phase::Writing { next, out: 0, failed: false, not_before };
    }

    /// The epoch that an earlier process was given and did not let go of.
    pub fn held(&self) -> Option<u64> {
        Some(self.replay.held()).filter(|epoch| *epoch != 0)
    }

    /// The epoch that is held now: known to the next process before anything is issued under it.
    pub fn set_held(&mut self, epoch: Option<u64>) {
        let epoch = epoch.unwrap_or(0);
        if self.replay.held() != epoch {
            self.replay.set_held(epoch);
        }
    }

    /// The next change to be written again.
    pub fn next_change(&self, now: Instant) -> Option<Entry> {
        match self.phase {
            Phase::Writing { next, not_before, .. } if not_before <= now => {
                self.replay.at(next).map(|kept| kept.entry)
            }
            Phase::Writing { .. } | Phase::Resting | Phase::Waiting => None,
        }
    }

    /// When changes are tried again, if they wait for that.
    pub fn next_deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Writing { out: 0, not_before, .. } => Some(not_before),
            Phase::Writing { .. } | Phase::Resting | Phase::Waiting => None,
        }
    }

    /// It is in `slot` now.
    pub fn submitted(&mut self, slot: Slot) {
        let Phase::Writing { next, out, .. } = &mut self.phase else { return };
        if let Some(kept) = self.replay.at(*next) {
            self.uses[slot.index()] = Some(Use::Again { position: kept.position });
            (*next, *out) = (kept.end(), *out + 1);
        }
    }

    /// A flush of the guest's is in `slot` now.
    pub fn flush_submitted(&mut self, slot: Slot) {
        self.uses[slot.index()] = Some(Use::Flush { mark: self.replay.head() });
    }

    /// True if a flush of our own is to be submitted: before the volume is given back, and before the copy is full, which would make each change wait for
    /// a flush of its own.
    pub fn wants_flush(&self, is_unused: bool) -> bool {
        let due = is_unused || self.replay.bytes_kept() > self.replay.capacity() / 2;
        due && self.holds() && !self.own_flush_out && !self.blocks()
    }

    /// It is in `slot` now.
    pub fn own_flush_submitted(&mut self, slot: Slot) {
        self.own_flush_out = true;
        self.uses[slot.index()] = Some(Use::OwnFlush { mark: self.replay.head() });
    }

    /// Where the change that `slot` carries is kept, if it is ours: for [`Unflushed::read`].
    pub fn position(&self, slot: Slot) -> Option<u64> {
        match self.uses[slot.index()] {
            Some(Use::Again { position }) => Some(position),
            Some(Use::Flush { .. } | Use::OwnFlush { .. }) | None => None,
        }
    }

    /// Copies the data of a kept change out, from its byte `from` on.
    pub fn read(&self, position: u64, from: u32, into: &mut [u8]) {
        self.replay.read(position, from, into);
    }

    /// What `slot` carried has ended, at a node that is `node`.
    pub fn done(&mut self, now: Instant, slot: Slot, status: Status, node: Option<Life>) -> Ended {
        match self.uses[slot.index()].take() {
            None => Ended::Guest(status),
            Some(Use::Flush { mark }) => {
                self.flushed(mark, status);
                Ended::Guest(status)
            }
            Some(Use::OwnFlush { mark }) => {
                self.flushed(mark, status);
                (self.own_flush_out, self.own_flush_failed) = (false, status != Status::Ok);
                Ended::Ours
            }
            Some(Use::Again { position }) => {
                // A node that cannot discard (any more) leaves what a discard allows it to leave.
                let is_discard = self.replay.at(position).is_some_and(|kept| kept.entry.op == Op::Discard);
                let done = status == Status::Ok || (is_discard && status == Status::Unsupported);
                self.written_again(now, done, node);
                Ended::Ours
            }
        }
    }

    fn written_again(&mut self, now: Instant, done: bool, node: Option<Life>) {
        let Phase::Writing { next, out, failed, .. } = &mut self.phase else { return };
        (*out, *failed) = (*out - 1, *failed || !done);
        self.stuck |= !done;
        if *out > 0 || self.replay.at(*next).is_some() {
            return;
        }
        if *failed {
            return self.begin_writing(now + RETRY_PAUSE);
        }
        (self.phase, self.stuck) = (Phase::Resting, false);
        if let Some(node) = node {
            self.replay.set_life(node);
        }
    }

    /// A flush at `mark` ended.
    fn flushed(&mut self, mark: u64, status: Status) {
        if status == Status::Ok {
            self.replay.drop_before(mark);
        }
    }

    /// True if a change could not be written again.
    pub fn is_stuck(&self) -> bool {
        self.stuck
    }
}

/// Copies data of the guest's into the copy.
fn copy_out(memory: &GuestMemory, runs: &[GuestRun], from: u32, place: &VolatileSlice<'_>) {
    let mut piece = [0; 4096];
    let mut done = 0;
    while done < place.len() {
        let len = piece.len().min(place.len() - done);
        let read = memory.gather(runs, from + done as u32, &mut piece[..len]);
        read.expect("requests whose memory went away were taken out when it went");
        place.write_slice(&piece[..len], done).expect("a piece of the place");
        done += len;
    }
}
