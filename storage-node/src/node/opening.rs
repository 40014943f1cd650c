//! OPEN and RELEASE: who may write, and since when nothing older can land.
//!
//! Knows the order (decide, record, drain, answer) of docs/PROTOCOL.md, "Ownership"; the rules are in `owner`. Called by `accept` and `finish`.

use cirro_protocol::op::Status;
use cirro_protocol::time::Instant;
use cirro_protocol::types::Slot;
use cirro_protocol::wire::body::{Access, OpenRequest};
use log::{info, warn};

use super::Node;
use super::served::{Asked, Opening, Stage};
use super::session::Opened;
use crate::access::Right;
use crate::owner::{Claim, Keeping, OwnerRecord};
use crate::store::Store;

/// What the front one of a volume's openings does next.
enum Step {
    /// It waits.
    Wait,
    /// It is answered; OK makes it so.
    Answer(Status),
}

impl<S: Store> Node<S> {
    /// A session asks for the volume.
    pub(super) fn open(&mut self, now: Instant, session: u16, slot: Slot, request: OpenRequest) {
        self.enqueue(now, session, slot, Asked::Open(request));
    }

    /// A session gives up writing.
    pub(super) fn release(&mut self, now: Instant, session: u16, slot: Slot) {
        self.enqueue(now, session, slot, Asked::Release);
    }

    fn enqueue(&mut self, now: Instant, index: u16, slot: Slot, asked: Asked) {
        let Some(session) = self.sessions.get(index).filter(|session| !session.closing) else { return };
        let opening = Opening {
            session: index,
            serial: session.serial,
            slot,
            asked,
            stage: Stage::Waiting,
            since: now,
        };
        let volume = session.volume;
        self.volumes[usize::from(volume)].openings.push_back(opening);
        self.advance_openings(now, volume);
    }

    /// Records that became durable, or could not.
    pub(super) fn take_kept_records(&mut self, now: Instant) {
        while let Some((keeping, kept)) = self.keeper.kept() {
            let volume = keeping.token as u16;
            let served = &mut self.volumes[usize::from(volume)];
            let front = served.openings.front_mut().filter(|front| front.stage == Stage::Keeping);
            let front = front.expect("a record is kept for the first of the openings");
            if kept {
                served.owner = keeping.record;
                front.stage = Stage::Draining { before: served.next_change };
                self.advance_openings(now, volume);
            } else {
                self.answer_first(volume, Status::Io);
                self.advance_openings(now, volume);
            }
        }
    }

    /// Goes on with the openings of a volume, in order, until one waits.
    pub(super) fn advance_openings(&mut self, now: Instant, volume: u16) {
        while let Some(opening) = self.volumes[usize::from(volume)].openings.front().copied() {
            match self.next_step(now, volume, &opening) {
                Step::Wait => return,
                Step::Answer(status) => self.answer_first(volume, status),
            }
        }
    }

    fn next_step(&mut self, now: Instant, volume: u16, opening: &Opening) -> Step {
        match opening.stage {
            Stage::Keeping => Step::Wait,
            Stage::Draining { before } if self.jobs.has_older_change(volume, before) => Step::Wait,
            Stage::Draining { .. } => {
                let waited = now.since(opening.since);
                if waited.0 > 1_000_000_000 {
                    let name = self.volumes[usize::from(volume)].volume.name;
                    info!("volume {name}: an open waited {} ms for older writes", waited.as_micros() / 1_000);
                }
                Step::Answer(Status::Ok)
            }
            Stage::Waiting => self.begin(volume, opening),
        }
    }

    fn begin(&mut self, volume: u16, opening: &Opening) -> Step {
        let Some(session) = self.sessions.get_same(opening.session, opening.serial) else {
            return Step::Answer(Status::Stale);
        };
        let (attachment, right) = (session.attachment(), session.standing.right);
        let told_busy = &mut session.told_busy;
        let served = &mut self.volumes[usize::from(volume)];
        let name = served.volume.name;
        let record = match opening.asked {
            Asked::Release => served.owner.release(attachment),
            Asked::Open(OpenRequest { access: Access::ReadOnly, .. }) => None,
            Asked::Open(OpenRequest { access: Access::ReadWrite, .. })
                if served.volume.read_only || right != Right::ReadWrite =>
            {
                return Step::Answer(Status::ReadOnly);
            }
            Asked::Open(OpenRequest { access: Access::ReadWrite, take_over }) => {
                match served.owner.claim(attachment, take_over) {
                    Claim::Held => None,
                    Claim::Grant(record) => {
                        log_grant(&name.to_string(), &served.owner, &record);
                        Some(record)
                    }
                    Claim::Busy(holder) => {
                        let epoch = served.owner.vol_epoch;
                        if !std::mem::replace(told_busy, true) {
                            warn!(
                                "volume {name}: attachment {attachment} wants it, but {holder} holds it in epoch {epoch}"
                            );
                        }
                        return Step::Answer(Status::Busy);
                    }
                }
            }
        };
        let before = served.next_change;
        let stage = match record {
            None => Stage::Draining { before },
            Some(record) => {
                let taken = self.keeper.keep(Keeping { volume: name, token: u32::from(volume), record });
                assert!(taken, "the keeper has room for one record of each volume");
                Stage::Keeping
            }
        };
        if let Some(front) = served.openings.front_mut() {
            front.stage = stage;
        }
        // The next pass over the openings looks at the new stage.
        match stage {
            Stage::Draining { before } if !self.jobs.has_older_change(volume, before) => {
                Step::Answer(Status::Ok)
            }
            Stage::Draining { .. } | Stage::Keeping | Stage::Waiting => Step::Wait,
        }
    }

    /// Answers the first of the openings, if its session is still there.
    fn answer_first(&mut self, volume: u16, status: Status) {
        let served = &mut self.volumes[usize::from(volume)];
        let Some(opening) = served.openings.pop_front() else { return };
        let Some(session) = self.sessions.get_active(opening.session, opening.serial) else { return };
        let ok = status == Status::Ok;
        match opening.asked {
            Asked::Release => {
                if let Some(opened) = session.opened.as_mut().filter(|_| ok) {
                    opened.access = Access::ReadOnly;
                }
                session.target.complete(opening.slot, status);
            }
            Asked::Open(request) => {
                if ok {
                    session.opened = Some(Opened { handle: served.next_handle, access: request.access });
                    served.next_handle = served.next_handle.wrapping_add(1).max(1);
                }
                let handle = session.opened.map_or(0, |opened| opened.handle);
                let info = served.volume.info(served.owner.vol_epoch, handle, session.standing.right);
                session.target.complete_info(opening.slot, status, info);
            }
        }
    }
}

fn log_grant(name: &str, before: &OwnerRecord, after: &OwnerRecord) {
    let new = after.holder.unwrap_or_default();
    match before.holder {
        Some(old) => {
            warn!("volume {name}: attachment {new} takes it over from {old}, epoch {}", after.vol_epoch)
        }
        None => info!("volume {name}: attachment {new} holds it, epoch {}", after.vol_epoch),
    }
}
