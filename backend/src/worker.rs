//! A worker: one link, its disks, and [`Worker::turn`], one pass over everything that can be done without waiting.
//!
//! Knows the order of things and the seals of frames; does not know threads, clocks, sleeping or vhost-user: `server` calls it, and so does the simulator.
//! Events only say "take a turn"; nothing here blocks.

use std::sync::Arc;

use cirro_link::tap::{Exchange, Tap};
use cirro_link::{FrameId, Link, TxFrame};
use cirro_protocol::time::{Instant, earliest};
use cirro_protocol::types::{Cid, ETHERNET_BYTES, Steer};
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::guarded::{Guarded, is_guarded};
use cirro_protocol::wire::long::LongFrame;
use cirro_protocol::wire::{Header, Mode};
use cirro_protocol::{PayloadRef, Placement, SealWith};
use cirro_seal::{Guard, Mismatch, Nonces, open_long, seal_crc, splice};

use crate::disk::{Disk, KickChange};
use crate::guest_memory::PrivateCopies;
use crate::mailbox::{Command, DiskId, Inbox};
use crate::protection;
use crate::stats::{Drop, WorkerStats};

/// Frames taken from the link in a turn: acks leave at its end, and at most 48 frames may lie between two (docs/PROTOCOL.md, P-37).
pub const FRAMES_PER_TURN_MAX: usize = 48;
/// Handshake frames looked at in a turn.
pub const LONG_PER_TURN_MAX: usize = 16;
/// Bytes a session may send in a turn before the next one has its chance.
pub const BYTES_PER_TURN_MAX: usize = 64 << 10;
/// Commands obeyed in a turn.
pub const COMMANDS_PER_TURN_MAX: usize = 64;

/// What a turn found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// There is more to do at once.
    pub busy: bool,
    /// Something moved: a frame came or went. Spinning is worth while.
    pub active: bool,
    /// When something is due although nothing comes in.
    pub wake_at: Option<Instant>,
}

/// A disk of a worker.
struct Place {
    id: DiskId,
    disk: Disk,
}

/// What a turn needs and the next one uses again.
#[derive(Default)]
struct Scratch {
    placements: Vec<Placement>,
    payloads: Vec<PayloadRef>,
    /// A received frame as it was before it was encrypted, and the core's part of one that is to be.
    plain: Vec<u8>,
    head: Vec<u8>,
    crcs: Vec<u32>,
    refused: Vec<FrameId>,
    copies: PrivateCopies,
}

/// A worker.
pub struct Worker<L> {
    link: L,
    steer: Steer,
    inbox: Inbox,
    disks: Vec<Place>,
    first_disk: usize,
    scratch: Scratch,
    /// What the link's tap is to record into, until the turn is over.
    exchanges: Vec<Exchange>,
    stats: Arc<WorkerStats>,
}

impl<L: Link> Worker<L> {
    /// A worker without disks. `steer` is what its frames carry.
    pub fn new(link: L, steer: Steer, inbox: Inbox, stats: Arc<WorkerStats>) -> Worker<L> {
        Worker {
            link,
            steer,
            inbox,
            disks: Vec::new(),
            first_disk: 0,
            scratch: Scratch::default(),
            exchanges: Vec::new(),
            stats,
        }
    }

    /// Adds a disk; its place is the `cid_index` its initiator was made with: the number of disks before it.
    pub fn add(&mut self, id: DiskId, disk: Disk) {
        assert!(self.disks.len() < Cid::TABLE_MAX, "a worker addresses 4096 disks");
        self.disks.push(Place { id, disk });
    }

    /// The link, for what is outside of a turn: its descriptor, its layers.
    pub fn link(&mut self) -> &mut L {
        &mut self.link
    }

    /// The worker goes to sleep.
    pub fn slept(&self) {
        self.stats.meter.wakeups.add(1);
    }

    /// Where commands come in.
    pub fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// One pass over everything. Always in this order.
    pub fn turn(&mut self, now: Instant) -> Turn {
        self.stats.meter.turns.add(1);
        let commands_left = self.obey(now);
        let (received, link_empty) = self.receive(now);
        if self.link.take_changed() {
            let (address, mtu) = (self.link.address(), self.link.mtu() as u16);
            self.disks.iter_mut().for_each(|place| place.disk.initiator.link_changed(now, address, mtu));
        }
        if link_empty {
            for place in &mut self.disks {
                place.disk.initiator.handle_timeout(now);
            }
        }
        for place in &mut self.disks {
            place.disk.finish(now);
        }
        let mut more = false;
        for place in &mut self.disks {
            more |= place.disk.accept(now);
        }
        let (sent, unsent) = self.transmit(now);
        for place in &mut self.disks {
            place.disk.signal();
            more |= place.disk.end_stops(now);
        }
        let link = self.link.poll_timeout();
        let wake_at =
            self.disks.iter().fold(link, |first, place| earliest([first, place.disk.next_deadline()]));
        Turn { busy: commands_left || !link_empty || more || unsent, active: received + sent > 0, wake_at }
    }

    /// Asks every ring to kick for what comes; to be called before sleeping. False: something came meanwhile, take a turn instead.
    pub fn may_sleep(&mut self) -> bool {
        let mut found = false;
        for place in &mut self.disks {
            found |= place.disk.listen();
        }
        !found
    }

    /// The kick descriptors that came and went, with their disks. A simulator that calls every turn itself may ignore them.
    pub fn kick_changes(&mut self) -> impl Iterator<Item = (DiskId, KickChange)> + '_ {
        self.disks
            .iter_mut()
            .flat_map(|place| place.disk.kick_changes.drain(..).map(|change| (place.id, change)))
    }

    /// Obeys what the vhost side and the control thread ask. True if there may be more.
    fn obey(&mut self, now: Instant) -> bool {
        for _ in 0..COMMANDS_PER_TURN_MAX {
            let Some(command) = self.inbox.take() else { return false };
            match command {
                Command::Tap(exchange) => self.exchanges.push(exchange),
                Command::Disk(command) => {
                    if let Some(place) = self.disks.iter_mut().find(|place| place.id == command.disk) {
                        place.disk.obey(now, command.change, command.reply);
                    }
                }
            }
        }
        true
    }

    /// Takes frames. How many, and whether the link has no more.
    fn receive(&mut self, now: Instant) -> (usize, bool) {
        let mut long_left = LONG_PER_TURN_MAX;
        for count in 0..FRAMES_PER_TURN_MAX {
            let Some(received) = self.link.receive() else { return (count, true) };
            let (bytes, arrival) = (received.bytes, received.arrival);
            self.stats.meter.frames_in.add(1);
            self.stats.meter.bytes_in.add(bytes.len() as u64);
            let is_long = bytes.get(ETHERNET_BYTES..).and_then(Header::is_long);
            let taken = match is_long {
                None => Err(Drop::Malformed),
                Some(true) if long_left == 0 => Err(Drop::HandshakeFlood),
                Some(true) => {
                    long_left -= 1;
                    take_long(&mut self.disks, now, bytes)
                }
                Some(false) => {
                    take_short(&mut self.disks, (now, arrival), self.steer, bytes, &mut self.scratch)
                }
            };
            if let Err(drop) = taken {
                self.stats.dropped(drop);
            }
        }
        (FRAMES_PER_TURN_MAX, false)
    }

    /// Sends what there is to send and the link takes. How many frames, and whether a session has more that its share did not allow.
    fn transmit(&mut self, now: Instant) -> (usize, bool) {
        let (mut sent, mut unsent) = (0, false);
        let disks = self.disks.len();
        self.first_disk = (self.first_disk + 1) % disks.max(1);
        let first = self.first_disk;
        'disks: for index in (0..disks).map(|index| (first + index) % disks) {
            let mut bytes = 0;
            loop {
                if bytes >= BYTES_PER_TURN_MAX {
                    unsent = true;
                    break;
                }
                match self.send_one(now, index) {
                    Sent::Frame(len) => {
                        bytes += len;
                        sent += 1;
                    }
                    Sent::Nothing => break,
                    Sent::NoRoom => {
                        unsent = sent > 0;
                        break 'disks;
                    }
                }
            }
        }
        self.flush(now);
        (sent, unsent)
    }

    fn send_one(&mut self, now: Instant, index: usize) -> Sent {
        if !self.scratch.copies.has_room() {
            self.flush(now);
        }
        let Some(frame) = self.link.frame() else { return Sent::NoRoom };
        let disk = &mut self.disks[index].disk;
        self.scratch.payloads.clear();
        let Some(transmit) = disk.initiator.poll_transmit(now, &mut frame.head, &mut self.scratch.payloads)
        else {
            return Sent::Nothing;
        };
        match transmit.seal {
            SealWith::Long => disk.protection.seal_long(&mut frame.head, (disk.initiator.cid(), self.steer)),
            SealWith::Session(..) if disk.protection.is_by_keys() => {
                seal_with_keys(disk, transmit.pn, frame, &mut self.scratch);
            }
            SealWith::Session(sender, receiver) => {
                let copied = seal_with_crcs(disk, Nonces { sender, receiver }, frame, &mut self.scratch);
                self.stats.private_copies.add(copied);
            }
        }
        let len = frame.len();
        self.link.commit(FrameId { session: index as u32, pn: transmit.pn });
        self.stats.meter.frames_out.add(1);
        self.stats.meter.bytes_out.add(len as u64);
        Sent::Frame(len)
    }

    /// Gives the batch to the kernel. Afterwards no guest memory and no private copy is looked at any more.
    fn flush(&mut self, now: Instant) {
        let Scratch { refused, copies, .. } = &mut self.scratch;
        refused.clear();
        self.link.flush(refused);
        copies.clear();
        for id in refused.iter() {
            self.stats.frames_refused.add(1);
            self.disks[id.session as usize].disk.initiator.not_sent(now, id.pn);
        }
    }
}

impl<L: Link> Worker<Tap<L>> {
    /// Gives the tap what it is to record into, if that was asked. To be called between two turns.
    pub fn tend_tap(&mut self) {
        for exchange in self.exchanges.drain(..) {
            exchange.carry_out(&mut self.link);
        }
    }
}

enum Sent {
    Frame(usize),
    Nothing,
    NoRoom,
}

/// Names the data where it lies in guest memory, and adds checksums and tag. How many pieces were copied for it (P-99).
fn seal_with_crcs(disk: &Disk, nonces: Nonces, frame: &mut TxFrame, scratch: &mut Scratch) -> u64 {
    let Scratch { payloads, crcs, copies, .. } = scratch;
    crcs.clear();
    for payload in payloads.iter() {
        disk.add_payload(payload, copies, crcs, |run| frame.push_cut(payload.at, run));
    }
    for crc in crcs.iter() {
        frame.head.extend_from_slice(&crc.to_le_bytes());
    }
    seal_crc(nonces, &mut frame.head);
    payloads.iter().filter(|payload| payload.losses >= crate::disk::PRIVATE_AFTER_LOSSES).count() as u64
}

/// Copies the data into the frame, once, and encrypts it there: what the guest changes meanwhile is not looked at again.
fn seal_with_keys(disk: &mut Disk, pn: u64, frame: &mut TxFrame, scratch: &mut Scratch) {
    let Scratch { payloads, head, .. } = scratch;
    head.clear();
    std::mem::swap(head, &mut frame.head);
    splice(head, payloads, &mut frame.head, |payload, out| {
        disk.copy_payload(payload, out);
        true
    });
    match disk.protection.guard() {
        Some(Guard::Aead(keys)) => keys.seal(pn, &mut frame.head),
        Some(Guard::Crc) | None => unreachable!("with keys a session begins with its keys"),
    }
}

/// With keys an answer names the disk that it is for by its cid; without, and in a hint, no session is named that could be looked up, so each
/// disk says whether it is for it.
fn take_long(disks: &mut [Place], now: Instant, bytes: &[u8]) -> Result<(), Drop> {
    if is_guarded(&bytes[ETHERNET_BYTES..]) {
        let frame = Guarded::parse(bytes).map_err(|_| Drop::Malformed)?;
        if !frame.is_answer() {
            return protection::take_hint(disks.iter_mut().map(|place| &mut place.disk), now, bytes);
        }
        let disk = &mut disks.get_mut(frame.cid.index()).ok_or(Drop::NoSession)?.disk;
        return if disk.initiator.cid() == frame.cid {
            disk.take_answer(now, bytes)
        } else {
            Err(Drop::NoSession)
        };
    }
    let frame = LongFrame::parse(bytes).map_err(|_| Drop::Malformed)?;
    open_long(bytes).map_err(|_| Drop::Handshake)?;
    for place in disks.iter_mut().filter(|place| !place.disk.protection.is_by_keys()) {
        place.disk.initiator.handle_long(now, &frame);
    }
    Ok(())
}

/// The seal is checked before the core sees the frame; what it brought is in the guest before the next is looked at.
fn take_short(
    disks: &mut [Place],
    (now, arrival): (Instant, Instant),
    steer: Steer,
    bytes: &[u8],
    scratch: &mut Scratch,
) -> Result<(), Drop> {
    let source = Ethernet::parse(bytes).map_err(|_| Drop::Malformed)?.source;
    let header = Header::parse(&bytes[ETHERNET_BYTES..]).map_err(|_| Drop::Malformed)?;
    if header.steer != steer {
        return Err(Drop::OtherWorker);
    }
    let disk = &mut disks.get_mut(header.cid.index()).ok_or(Drop::NoSession)?.disk;
    let nonces = disk.initiator.nonces_in(header.cid, source).ok_or(Drop::NoSession)?.into();
    if header.mode == Mode::Aead && disk.initiator.has_seen(header.pn) {
        return Err(Drop::Repeated);
    }
    let Scratch { placements, plain, .. } = scratch;
    let guard = disk.protection.guard().ok_or(Drop::NoSession)?;
    let frame = guard.open(nonces, &header, bytes, plain).map_err(|mismatch| match mismatch {
        Mismatch::Layout => Drop::Malformed,
        Mismatch::Tag | Mismatch::Mode | Mismatch::Phase => Drop::Tag,
        Mismatch::Payload { .. } => Drop::Payload,
    })?;
    placements.clear();
    disk.initiator.handle_frame(now, arrival, &frame, placements);
    disk.place(frame.bytes(), placements);
    Ok(())
}
