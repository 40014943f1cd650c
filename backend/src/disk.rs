//! One disk on its worker: takes requests off the rings, gives them to the session, and gives answers back to the rings.
//!
//! Knows rings, requests, slots and the session; does not know the link, threads or vhost-user messages. Called by `worker`, in the order of a turn.

mod data;

use std::sync::Arc;

use cirro_protocol::initiator::{Event, Initiator, StateName};
use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::{Instant, Nanos, earliest};
use cirro_protocol::types::{SERIAL_BYTES, Slot, VolumeName};
use cirro_protocol::wire::body::{
    Access, VOLUME_DISCARD, VOLUME_READ_ONLY, VOLUME_WRITE_THROUGH, VOLUME_WRITE_ZEROES, VolumeInfo,
};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

use crate::attach::Attach;
use crate::guest_memory::{GuestMemory, Outside, Regions};
use crate::mailbox::{Answer, Change, Reply};
use crate::pending::{Admission, Finished, Part, Pending};
use crate::protection::Protection;
use crate::record::Record;
use crate::replay::{Life, Replay};
use crate::request::{Chain, Limits, Reject, Request};
use crate::stats::{DiskStats, SessionReport};
use crate::trouble::{self, OnTrouble, Trouble, Turn};
use crate::unflushed::{Ended, Unflushed, Verdict};
use crate::virtqueue::{ServedRing, Started, Stopping};

/// Heads taken off one ring in a turn: fairness between rings and disks.
pub const HEADS_PER_TURN_MAX: usize = 32;
/// How long a ring that is to stop waits for its requests: a dead node must not hold up the end of a VM or its migration.
pub const STOP_TIME: Nanos = Nanos::from_secs(2);
/// Losses of a piece after which it is sent from a private copy.
pub const PRIVATE_AFTER_LOSSES: u8 = 2;

/// What a disk is made of.
pub struct DiskConfig {
    /// Its volume.
    pub volume: VolumeName,
    /// Never open it for writing.
    pub read_only: bool,
    /// Rings it may have.
    pub queues: u16,
    /// Its session.
    pub initiator: Initiator,
    /// What protects it.
    pub protection: Protection,
    /// Where the vhost side waits for the volume.
    pub attach: Arc<Attach>,
    /// What is in flight on its rings, with a place for each.
    pub record: Record,
    /// What was written and not flushed.
    pub replay: Replay,
    /// What happens to requests while the volume is not open.
    pub on_trouble: OnTrouble,
    /// Its counters.
    pub stats: Arc<DiskStats>,
}

/// A change of what wakes the worker up for a ring.
#[derive(Debug)]
pub enum KickChange {
    /// Wait for this descriptor; it takes the place of the ring's last one.
    Watch(u16, std::fs::File),
    /// Wait no more.
    Forget(u16),
}

/// A disk.
pub struct Disk {
    volume: VolumeName,
    read_only: bool,
    /// Its session; the worker feeds and empties it.
    pub initiator: Initiator,
    /// What protects its frames.
    pub protection: Protection,
    attach: Arc<Attach>,
    stats: Arc<DiskStats>,
    memory: GuestMemory,
    /// The rings that are served, by number.
    rings: Vec<Option<ServedRing>>,
    record: Record,
    unflushed: Unflushed,
    pending: Pending,
    info: VolumeInfo,
    limits: Limits,
    write_through: bool,
    /// A stop ran into its deadline and nothing has been heard since: further stops do not wait.
    stalled: bool,
    trouble: Trouble,
    refusal: Option<Status>,
    /// When the volume was last opened, lost or refused.
    since: Instant,
    first_ring: usize,
    chain: Chain,
    /// Descriptors to watch or to forget, for whoever puts the worker to sleep.
    pub kick_changes: Vec<KickChange>,
}

impl Disk {
    /// A disk without rings.
    pub fn new(config: DiskConfig) -> Disk {
        let mut disk = Disk {
            volume: config.volume,
            read_only: config.read_only,
            initiator: config.initiator,
            protection: config.protection,
            attach: config.attach,
            record: config.record,
            unflushed: Unflushed::new(config.replay),
            stats: config.stats,
            memory: GuestMemory::default(),
            rings: (0..config.queues).map(|_| None).collect(),
            pending: Pending::default(),
            info: VolumeInfo::default(),
            limits: Limits::default(),
            write_through: false,
            stalled: false,
            trouble: Trouble::new(config.on_trouble),
            refusal: None,
            since: Instant::default(),
            first_ring: 0,
            chain: Chain::default(),
            kick_changes: Vec::new(),
        };
        if let Some(epoch) = disk.unflushed.held() {
            disk.initiator.resume(epoch);
        }
        if let Some(info) = disk.attach.remembered() {
            // Until the node says that it is still so, no write counts as stable without a flush.
            disk.adopt(VolumeInfo { flags: info.flags & !VOLUME_WRITE_THROUGH, ..info });
        }
        disk
    }

    /// Its volume.
    pub(crate) fn volume(&self) -> VolumeName {
        self.volume
    }

    /// Takes a command from the vhost side. Runs between turns.
    pub fn obey(&mut self, now: Instant, change: Change, reply: Reply) {
        match change {
            Change::Start { ring, queue, kick, call } => {
                if self.rings[usize::from(ring)].is_some() {
                    // The front-end did not wait for the end of the last stop.
                    self.give_up_and_end(now, ring);
                }
                let (served, started) = ServedRing::start(&self.memory, queue, call, self.record.ring(ring));
                self.log_start(ring, started);
                served.call();
                self.rings[usize::from(ring)] = Some(served);
                self.kick_changes.push(KickChange::Watch(ring, kick));
                self.choose_access();
                reply.give(Answer::Done);
            }
            Change::Stop { ring } => self.begin_stop(now, ring, reply),
            Change::Memory(regions) => self.set_memory(now, regions, reply),
            Change::Enable { ring, enabled } => {
                self.change_ring(ring, |served| served.enabled = enabled);
                reply.give(Answer::Done);
            }
            Change::Call { ring, call } => {
                self.change_ring(ring, |served| {
                    served.call = call;
                    served.call();
                });
                reply.give(Answer::Done);
            }
            Change::Kick { ring, kick } => {
                self.kick_changes.push(KickChange::Watch(ring, kick));
                reply.give(Answer::Done);
            }
            Change::WriteThrough(through) => {
                self.write_through = through;
                reply.give(Answer::Done);
            }
            Change::Report => reply.give(Answer::Session(Box::new(self.report()))),
            Change::Close => {
                self.choose_access();
                reply.give(Answer::Done);
            }
        }
    }

    fn log_start(&self, ring: u16, started: Started) {
        if started.again > 0 {
            log::info!(
                "volume {}: ring {ring} goes on where it stopped; {} requests are issued again",
                self.volume,
                started.again
            );
        }
        match started.discarded {
            Some((other, in_flight @ 1..)) => log::info!(
                "volume {}: ring {ring} begins anew; {in_flight} requests that were recorded in flight are discarded: {other}",
                self.volume
            ),
            Some((other, _)) => {
                log::debug!("volume {}: ring {ring} begins anew; its record: {other}", self.volume);
            }
            None => {}
        }
    }

    fn change_ring(&mut self, ring: u16, change: impl FnOnce(&mut ServedRing)) {
        if let Some(served) = &mut self.rings[usize::from(ring)] {
            change(served);
        }
    }

    /// Who serves a ring writes, and so does who has something to flush: the volume is given back after that.
    fn choose_access(&mut self) {
        let used = self.rings.iter().any(Option::is_some) || self.unflushed.holds();
        let write = used && !self.limits.read_only;
        self.initiator.set_access(if write { Access::ReadWrite } else { Access::ReadOnly });
        self.unflushed.set_held(self.initiator.epoch());
    }

    /// The mappings of before go away here, after the turn that used them. A request whose memory is gone ends without a write.
    fn set_memory(&mut self, now: Instant, regions: Regions, reply: Reply) {
        self.memory = GuestMemory::new(regions);
        let memory = &self.memory;
        let gone = |admission: &Admission, data: &[_]| {
            !memory.covers(admission.status_at, 1)
                || data.iter().any(|run: &crate::guest_memory::GuestRun| !memory.covers(run.address, run.len))
        };
        if self.pending.iter().any(|(admission, data)| gone(admission, data)) {
            // The session cannot take a single request back, so all of them start again in the next but those without memory.
            self.initiator.abandon(now);
            self.pending.restart_all();
            for finished in self.pending.take_out(now, gone) {
                log::warn!("volume {}: the guest took away the memory of a request in flight", self.volume);
                self.stats.finished(&finished);
                self.change_ring_with_memory(finished.admission.ring, |served, memory| {
                    served.give(memory, finished.admission.head, 0);
                });
            }
        }
        reply.give(Answer::Done);
    }

    fn change_ring_with_memory(&mut self, ring: u16, change: impl FnOnce(&mut ServedRing, &GuestMemory)) {
        if let Some(served) = &mut self.rings[usize::from(ring)] {
            change(served, &self.memory);
        }
    }

    fn report(&self) -> SessionReport {
        SessionReport {
            state: self.initiator.state(),
            since: self.since,
            refusal: self.refusal,
            node: self.initiator.node_address(),
            stats: self.initiator.stats(),
            requests: self.pending.len(),
            unflushed_bytes: self.unflushed.bytes(),
            on_trouble: self.trouble.policy(),
            cause: self.trouble.cause(),
            failing: self.trouble.is_failing(),
            replaying: self.unflushed.blocks(),
            stuck: self.unflushed.is_stuck(),
            rings: self.rings.iter().flatten().count(),
        }
    }

    /// Step 3 of a turn: what the session says has happened.
    pub fn finish(&mut self, now: Instant) {
        while let Some(event) = self.initiator.poll_event() {
            match event {
                Event::Done { slot, status } => {
                    self.stalled = false;
                    self.ended(now, slot, status);
                }
                Event::Attached(info, access) => {
                    self.stalled = false;
                    if !self.initiator.is_fenced() {
                        (self.refusal, self.since) = (None, now);
                    }
                    log::info!("volume {}: open {access:?}, {} sectors", self.volume, info.capacity_sectors);
                    self.set_info(info);
                    match access {
                        Access::ReadWrite => {
                            self.meet();
                            // Also who has stopped meanwhile keeps it, until what it had not flushed is written again.
                            self.choose_access();
                        }
                        Access::ReadOnly if self.limits.read_only => self.unflushed.attached_to_read(),
                        Access::ReadOnly => {}
                    }
                }
                Event::Changed(info) => {
                    log::info!("volume {}: has changed, {} sectors", self.volume, info.capacity_sectors);
                    self.set_info(info);
                }
                Event::Refused(status, info) => self.refused(now, status, &info),
                Event::Lost(cause) => {
                    self.since = now;
                    self.trouble.lost(cause);
                    trouble::log_loss(self.volume, cause, self.pending.len());
                    // A request of several steps begins again: a flush at another start of the node says nothing of a write at the last.
                    self.unflushed.lost();
                    self.initiator.abandon(now);
                    self.pending.restart_all();
                }
            }
        }
        self.unflushed.set_held(self.initiator.epoch());
        self.watch_trouble(now);
    }

    /// Requests that have waited too long fail, and so does every other one until the volume is open again. The session is given up, so nothing of them can
    /// land later than the drain of the next OPEN.
    fn watch_trouble(&mut self, now: Instant) {
        let open = self.initiator.state() == StateName::Open && !self.unflushed.blocks();
        let fenced = self.initiator.is_fenced();
        if fenced {
            let info = self.info;
            self.refused(now, Status::Fenced, &info);
        }
        let Some(turn) = self.trouble.observe(now, open, fenced) else { return };
        let mut gone = Vec::new();
        if turn == Turn::Fail {
            self.initiator.abandon(now);
            self.unflushed.lost();
            self.pending.restart_all();
            gone = self.pending.take_out(now, |_, _| true);
            if fenced {
                let bytes = self.unflushed.discard();
                self.log_discarded(bytes);
            }
        }
        self.trouble.log(self.volume, turn, self.refusal, gone.len());
        gone.iter().for_each(|finished| self.complete(finished));
    }

    /// A slot has ended: a part of a guest's request, or a change or flush of our own.
    fn ended(&mut self, now: Instant, slot: Slot, status: Status) {
        let node = self.node();
        let was_stuck = self.unflushed.is_stuck();
        let ended = self.unflushed.done(now, slot, status, node);
        if self.unflushed.is_stuck() && !was_stuck {
            log::error!(
                "volume {}: a change that the node had forgotten cannot be written again ({status:?}); requests wait, and it is tried again",
                self.volume
            );
        }
        let Ended::Guest(status) = ended else { return self.choose_access() };
        let kept = self.info.flags & VOLUME_WRITE_THROUGH == 0 || self.unflushed.keeps();
        let (unflushed, memory) = (&mut self.unflushed, &self.memory);
        let keep = |part: Part, runs: &[_], start| !kept || unflushed.keep(memory, part, runs, start);
        if let Some(finished) = self.pending.part_done(now, slot, status, keep) {
            self.complete(&finished);
        }
    }

    fn node(&self) -> Option<Life> {
        let incarnation = self.initiator.incarnation()?;
        Some(Life { incarnation, vol_epoch: self.info.vol_epoch })
    }

    /// The volume is open for writing: at a node that may have forgotten what was not flushed.
    fn meet(&mut self) {
        let Some(node) = self.node() else { return };
        match self.unflushed.attached(node) {
            Verdict::GoOn => {}
            Verdict::WriteAgain(bytes) => log::info!(
                "volume {}: the node was started anew; {} KiB that were not flushed are written again first",
                self.volume,
                bytes / 1024
            ),
            Verdict::Discarded(bytes) => self.log_discarded(bytes),
        }
    }

    fn log_discarded(&self, bytes: u64) {
        if bytes > 0 {
            log::error!(
                "volume {}: another attachment had it meanwhile; {} KiB that were not flushed are not written again",
                self.volume,
                bytes / 1024
            );
        }
    }

    fn set_info(&mut self, info: VolumeInfo) {
        self.adopt(info);
        self.attach.set(info);
    }

    fn adopt(&mut self, info: VolumeInfo) {
        self.info = info;
        self.limits = Limits {
            capacity_sectors: info.capacity_sectors,
            read_only: self.read_only || info.flags & VOLUME_READ_ONLY != 0,
            discard: info.flags & VOLUME_DISCARD != 0,
            write_zeroes: info.flags & VOLUME_WRITE_ZEROES != 0,
        };
        self.pending.set_part_bytes_max(info.request_bytes_max);
    }

    /// Told once per answer: the node is asked again and again.
    fn refused(&mut self, now: Instant, status: Status, info: &VolumeInfo) {
        if self.refusal.replace(status) == Some(status) {
            return;
        }
        self.since = now;
        trouble::log_refusal(self.volume, status, info);
    }

    fn complete(&mut self, finished: &Finished) {
        self.stats.finished(finished);
        let Admission { ring, head, status_at, .. } = finished.admission;
        self.answer(ring, head, Some(status_at), finished.status, finished.used_bytes);
    }

    /// Writes the status byte and gives the head back.
    fn answer(&mut self, ring: u16, head: u16, status_at: Option<u64>, status: u8, used_bytes: u32) {
        let told = status_at.is_some_and(|at| self.memory.write(at, &[status]).is_ok());
        let used_bytes = if told { used_bytes } else { 0 };
        self.change_ring_with_memory(ring, |served, memory| served.give(memory, head, used_bytes));
    }

    /// Step 4 of a turn: takes requests off the rings while there is room. True if a ring may have more although there is room.
    pub fn accept(&mut self, now: Instant) -> bool {
        let mut more = false;
        self.submit_own(now);
        self.submit_waiting(now);
        let rings = self.rings.len();
        self.first_ring = (self.first_ring + 1) % rings;
        let first = self.first_ring;
        for ring in (0..rings).map(|index| (first + index) % rings) {
            let mut taken = 0;
            while taken < HEADS_PER_TURN_MAX && self.has_room() && self.accept_one(now, ring as u16) {
                taken += 1;
            }
            more |= taken == HEADS_PER_TURN_MAX;
        }
        // What waits here, and not in the initiator, is to be served soon all the same.
        self.initiator.set_awaited(self.unflushed.blocks() || self.pending.has_waiting());
        more && self.has_room()
    }

    /// True if a request that is taken off a ring now can be given to the session at once.
    fn has_room(&self) -> bool {
        if self.trouble.is_failing() {
            // It ends at once.
            return true;
        }
        !self.unflushed.blocks() && !self.pending.has_waiting() && self.initiator.free_slots() > 0
    }

    /// What must be written again, and a flush that nobody else asked for.
    fn submit_own(&mut self, now: Instant) {
        while let Some(change) = self.unflushed.next_change(now) {
            let Some(slot) = self.initiator.submit(change.op, change.offset, change.len) else { return };
            self.unflushed.submitted(slot);
        }
        let unused = self.rings.iter().all(Option::is_none);
        if self.unflushed.wants_flush(unused)
            && let Some(slot) = self.initiator.submit(Op::Flush, 0, 0)
        {
            self.unflushed.own_flush_submitted(slot);
        }
    }

    fn submit_waiting(&mut self, now: Instant) {
        while let Some(part) = self.pending.next_part().filter(|_| !self.unflushed.blocks()) {
            let Some(slot) = self.initiator.submit(part.op, part.offset, part.len) else { break };
            self.pending.submitted(now, slot);
            if part.op == Op::Flush {
                self.unflushed.flush_submitted(slot);
            }
        }
    }

    /// Takes one request off a ring; false when there is none.
    fn accept_one(&mut self, now: Instant, ring: u16) -> bool {
        let Some(served) = &mut self.rings[usize::from(ring)] else { return false };
        let head = match served.take(&self.memory) {
            Ok(Some(head)) => head,
            Ok(None) => return false,
            Err(broken) => {
                self.stats.rings_broken.add(1);
                log::error!(
                    "volume {}: ring {ring} is served no more: {broken}; reset the guest's driver",
                    self.volume
                );
                return false;
            }
        };
        let request = self.chain.parse(&self.memory, served.table(), head, &self.limits);
        let status_at = self.chain.status_at;
        match (request, status_at) {
            (Ok(request), Some(at)) => self.begin(now, (ring, head), at, request),
            (Ok(_), None) => unreachable!("a request without a place for its status is rejected"),
            (Err(reject), status_at) => {
                self.stats.rejected(reject);
                log::debug!("volume {}: ring {ring}: request refused: {reject}", self.volume);
                self.answer(ring, head, status_at, reject.status(), 1);
            }
        }
        true
    }

    fn begin(&mut self, now: Instant, (ring, head): (u16, u16), status_at: u64, request: Request) {
        let admission = |op, offset, len| Admission {
            ring,
            head,
            status_at,
            op,
            offset,
            len,
            flush_after: self.write_through
                && op != Op::Read
                && op != Op::Flush
                && self.info.flags & VOLUME_WRITE_THROUGH == 0,
        };
        let ok = VIRTIO_BLK_S_OK as u8;
        let admitted = match request {
            Request::Data { len: 0, .. } | Request::Range { sectors: 0, .. } => {
                self.stats.answered_here.add(1);
                return self.answer(ring, head, Some(status_at), ok, 1);
            }
            Request::GetId => {
                self.stats.answered_here.add(1);
                let (status, used_bytes) =
                    self.write_serial().map_or((VIRTIO_BLK_S_IOERR as u8, 1), |len| (ok, len + 1));
                return self.answer(ring, head, Some(status_at), status, used_bytes);
            }
            Request::Data { op, offset, len } => admission(op, offset, len),
            Request::Flush => admission(Op::Flush, 0, 0),
            Request::Range { op, offset, sectors } => admission(op, offset, sectors),
        };
        if self.trouble.is_failing() {
            return self.complete(&Finished::refused(admitted));
        }
        self.pending.admit(now, admitted, &mut self.chain.data);
        self.submit_waiting(now);
    }

    /// The serial number goes into the request's data, or as much of it as fits (virtio 1.2, section 5.2.6).
    fn write_serial(&self) -> Result<u32, Outside> {
        let room = self.chain.data.last().map_or(0, |run| run.start + run.len);
        let len = room.min(SERIAL_BYTES as u32);
        self.memory.scatter(&self.chain.data, 0, &self.info.serial[..len as usize])?;
        Ok(len)
    }

    /// Step 6 of a turn: one signal per ring, if its guest wants one.
    pub fn signal(&mut self) {
        for served in self.rings.iter_mut().flatten() {
            if served.signal(&self.memory) {
                self.stats.interrupts.add(1);
            }
        }
    }

    fn begin_stop(&mut self, now: Instant, ring: u16, reply: Reply) {
        let deadline = if self.stalled { now } else { now + STOP_TIME };
        match &mut self.rings[usize::from(ring)] {
            Some(served) => {
                served.stopping = Some(Stopping { deadline, reply });
                self.kick_changes.push(KickChange::Forget(ring));
            }
            None => reply.give(Answer::Stopped { next_avail: 0, unfinished: 0 }),
        }
    }

    /// Ends the rings that are to stop and have nothing in flight, or waited long enough. True if one ended: the session may have something to say.
    pub fn end_stops(&mut self, now: Instant) -> bool {
        let mut ended = false;
        for ring in 0..self.rings.len() as u16 {
            let Some(served) = &self.rings[usize::from(ring)] else { continue };
            let Some(stopping) = &served.stopping else { continue };
            if served.live() == 0 {
                self.end_ring(ring, Vec::new());
            } else if now >= stopping.deadline {
                self.give_up_and_end(now, ring);
            } else {
                continue;
            }
            ended = true;
        }
        ended
    }

    /// Ends the session, so that nothing of it can touch the guest any more, and takes out the requests of `ring`; those of other rings start again.
    fn give_up_and_end(&mut self, now: Instant, ring: u16) {
        self.initiator.abandon(now);
        self.pending.restart_all();
        self.stalled = true;
        let gone = self.pending.take_out(now, |admission, _| admission.ring == ring);
        self.end_ring(ring, gone);
    }

    fn end_ring(&mut self, ring: u16, mut unfinished: Vec<Finished>) {
        if self.memory.is_logged() {
            self.fail_unfinished(ring, std::mem::take(&mut unfinished));
        }
        let served = self.rings[usize::from(ring)].take().expect("a ring that stops is served");
        let heads: Vec<u16> = unfinished.iter().map(|finished| finished.admission.head).collect();
        let (next_avail, in_flight, stopping) = served.end(&heads);
        self.choose_access();
        if let Some(stopping) = stopping {
            stopping.reply.give(Answer::Stopped { next_avail, unfinished: in_flight });
        }
    }

    /// The guest goes on elsewhere, where nobody knows what is in flight here, so nobody could issue it again: the guest is told that it failed.
    fn fail_unfinished(&mut self, ring: u16, unfinished: Vec<Finished>) {
        let mut failed = unfinished.len();
        for finished in unfinished {
            self.complete(&Finished::refused(finished.admission));
        }
        while let Some((table, head)) =
            self.rings[usize::from(ring)].as_mut().and_then(ServedRing::take_again)
        {
            failed += 1;
            // Of a chain that makes no sense only the status' place is of use, if there is one.
            let _ = self.chain.parse(&self.memory, table, head, &self.limits);
            self.answer(ring, head, self.chain.status_at, VIRTIO_BLK_S_IOERR as u8, 1);
        }
        if failed > 0 {
            log::error!(
                "volume {}: ring {ring} stopped with {failed} requests unfinished while its guest moves elsewhere, where nobody can issue \
                 them again: they failed",
                self.volume
            );
        }
    }

    /// When something is due although nothing comes in.
    pub fn next_deadline(&self) -> Option<Instant> {
        let mut first = earliest([
            self.initiator.poll_timeout(),
            self.trouble.next_deadline(),
            self.unflushed.next_deadline(),
        ]);
        for served in self.rings.iter().flatten() {
            first = earliest([first, served.stopping.as_ref().map(|stopping| stopping.deadline)]);
        }
        first
    }

    /// Asks every guest ring to kick for new requests. True if there are some that could be taken now.
    pub fn listen(&mut self) -> bool {
        let has_room = self.has_room();
        let mut found = false;
        for served in self.rings.iter_mut().flatten() {
            found |= served.listen(&self.memory);
        }
        found && has_room
    }

    /// Requests refused for `reject` so far.
    pub fn rejects(&self, reject: Reject) -> u64 {
        self.stats.rejects(reject)
    }
}
