//! A guest's driver for one ring: makes requests of every kind and layout, and checks every answer.
//!
//! Knows split virtqueues (virtio 1.2, section 2.7) and virtio-blk from the driver's side; does not know what is behind the device. Sleeps until it is
//! interrupted, and kicks only when it is asked to, so a lost notification is a request that never ends. Called by `host`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use cirro_backend::guest_memory::Regions;
use cirro_protocol::types::Uuid;
use fastrand::Rng;
use rustix::event::{EventfdFlags, eventfd};
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress};

use crate::disk::SECTOR;
use crate::oracle::{Oracle, Shared, stamp};

/// Requests of a ring in flight.
const PLACES: usize = 32;
/// Data of a place; the last one has [`BIG_BYTES`].
const SMALL_BYTES: u64 = 64 << 10;
const BIG_BYTES: u64 = 1 << 20;
/// Of each place: header, segment, status, indirect table.
const PLACE_BYTES: u64 = 0x2000;
const STATUS: u64 = 0x40;
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const PLACES_AT: u64 = 0x4000;
/// Guest memory of a ring.
pub(crate) const RING_BYTES: u64 = 4 << 20;
/// Fills what belongs to the guest again: the device must not touch it.
const POISON: u8 = 0xd6;
/// Segments of a request's data.
const SEGMENTS_MAX: usize = 200;

const WRITABLE: u16 = 2;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

/// How a ring is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RingOptions {
    pub(crate) size: u16,
    pub(crate) depth: usize,
    pub(crate) event_idx: bool,
    /// In percent of the requests.
    pub(crate) garbage: u32,
    pub(crate) flushes: u32,
    pub(crate) big: u32,
    /// Buffers of writes that change in flight, in percent.
    pub(crate) meddling: u32,
    pub(crate) discards: bool,
    /// Half of the requests meet in so many sectors at the start of the volume.
    pub(crate) corner: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    Zeroes,
    Id,
    Garbage,
}

#[derive(Debug)]
struct Outstanding {
    place: usize,
    kind: Kind,
    sectors: Range<u64>,
    begun: u64,
    /// Where the data lies, in order.
    runs: Vec<(u64, u32)>,
    value: u64,
    /// Descriptors of the ring it takes.
    descriptors: Vec<u16>,
    has_status: bool,
}

/// Buffers that the guest changes while they are in flight.
pub(crate) type Meddled = Rc<RefCell<BTreeMap<u64, (Regions, u64, u32)>>>;

/// One ring.
pub(crate) struct Ring {
    memory: Regions,
    attachment: Uuid,
    base: u64,
    options: RingOptions,
    next_avail: u16,
    kicked: u16,
    next_used: u16,
    free_descriptors: Vec<u16>,
    free_places: Vec<usize>,
    outstanding: BTreeMap<u16, Outstanding>,
    /// What was written when the driver began anew: it may be there or not, and is read, as a journal is.
    doubtful: Vec<Range<u64>>,
    /// Places whose bytes nobody may touch, and how far.
    poisoned: BTreeMap<usize, u64>,
    pub(crate) call: Rc<OwnedFd>,
    oracle: Rc<RefCell<Oracle>>,
    court: Shared,
    meddled: Meddled,
    volume_sectors: u64,
}

/// What a ring belongs to.
pub(crate) struct Belongings {
    pub(crate) memory: Regions,
    pub(crate) attachment: Uuid,
    pub(crate) oracle: Rc<RefCell<Oracle>>,
    pub(crate) court: Shared,
    pub(crate) meddled: Meddled,
    pub(crate) volume_sectors: u64,
}

impl Ring {
    pub(crate) fn new(index: u64, options: RingOptions, of: &Belongings) -> Ring {
        let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        let mut ring = Ring {
            memory: of.memory.clone(),
            attachment: of.attachment,
            base: index * RING_BYTES,
            next_avail: 0,
            kicked: 0,
            next_used: 0,
            free_descriptors: Vec::new(),
            free_places: (0..PLACES).collect(),
            outstanding: BTreeMap::new(),
            doubtful: Vec::new(),
            poisoned: BTreeMap::new(),
            call: Rc::new(call),
            oracle: Rc::clone(&of.oracle),
            court: Rc::clone(&of.court),
            meddled: Rc::clone(&of.meddled),
            volume_sectors: of.volume_sectors,
            options,
        };
        ring.reset();
        ring
    }

    /// The driver begins anew: what was in flight may have happened or not. The device has stopped the ring before.
    pub(crate) fn reset(&mut self) {
        self.give_up();
        (self.next_avail, self.kicked, self.next_used) = (0, 0, 0);
        self.free_descriptors = (0..self.options.size).rev().collect();
        self.free_places = (0..PLACES).collect();
        let zeroes = vec![0; PLACES_AT as usize];
        self.memory.write_slice(&zeroes, GuestAddress(self.base)).expect("guest memory");
    }

    /// Nobody waits for what is in flight any more.
    pub(crate) fn give_up(&mut self) {
        let now = self.court.borrow_mut().tick();
        for (_, lost) in std::mem::take(&mut self.outstanding) {
            self.end_in_oracle(&lost, now, false);
            if matches!(lost.kind, Kind::Write | Kind::Discard | Kind::Zeroes) {
                self.doubtful.push(lost.sectors.clone());
            }
            self.meddled.borrow_mut().remove(&self.place_at(lost.place));
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.outstanding.len()
    }

    /// What the front-end tells the device. `next_avail` as a VMM knows it that saw the device die: the used index.
    pub(crate) fn state(&self, next_avail: u16) -> QueueState {
        QueueState {
            max_size: 256,
            next_avail,
            next_used: self.used_index(),
            event_idx_enabled: self.options.event_idx,
            size: self.options.size,
            ready: true,
            desc_table: self.base,
            avail_ring: self.base + AVAIL,
            used_ring: self.base + USED,
        }
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.get(self.base + USED + 2)
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).expect("guest memory");
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).expect("guest memory")
    }

    fn place_at(&self, place: usize) -> u64 {
        self.base + PLACES_AT + place as u64 * (PLACE_BYTES + SMALL_BYTES)
    }

    fn data_at(&self, place: usize) -> (u64, u64) {
        let bytes = if place == PLACES - 1 { BIG_BYTES } else { SMALL_BYTES };
        (self.place_at(place) + PLACE_BYTES, bytes)
    }

    /// Takes back what the device has used, if it interrupted.
    pub(crate) fn reap(&mut self, always: bool) -> usize {
        let mut count = [0; 8];
        let interrupted = rustix::io::read(&*self.call, &mut count).is_ok();
        if !interrupted && !always {
            return 0;
        }
        let mut reaped = 0;
        loop {
            let index = self.used_index();
            while self.next_used != index {
                let at = self.base + USED + 4 + u64::from(self.next_used % self.options.size) * 8;
                let (head, len): (u32, u32) = (self.get(at), self.get(at + 4));
                self.next_used = self.next_used.wrapping_add(1);
                self.end(head, len);
                reaped += 1;
            }
            // used_event, behind the available ring: interrupt me for the next.
            self.put(self.base + AVAIL + 4 + u64::from(self.options.size) * 2, self.next_used);
            if self.used_index() == index {
                return reaped;
            }
        }
    }

    fn end(&mut self, head: u32, len: u32) {
        let Some(ended) = u16::try_from(head).ok().and_then(|head| self.outstanding.remove(&head)) else {
            self.court.borrow_mut().violation(format!("head {head} was used but is not in flight"));
            return;
        };
        let now = self.court.borrow_mut().tick();
        let status: u8 = self.get(self.place_at(ended.place) + STATUS);
        let ok = status == 0;
        self.court.borrow_mut().requests += 1;
        if !ok && ended.kind != Kind::Garbage {
            self.court.borrow_mut().failed_requests += 1;
        }
        if ended.has_status && status > 2 {
            self.court.borrow_mut().violation(format!("status {status:#x} of a {:?}", ended.kind));
        }
        let wanted = match ended.kind {
            Kind::Read => (ended.sectors.end - ended.sectors.start) as u32 * SECTOR as u32 + 1,
            Kind::Id => 21,
            Kind::Write | Kind::Flush | Kind::Discard | Kind::Zeroes | Kind::Garbage => 1,
        };
        if ok && ended.kind != Kind::Garbage && len != wanted {
            self.court
                .borrow_mut()
                .violation(format!("{:?} says it wrote {len} bytes, not {wanted}", ended.kind));
        }
        if ended.kind == Kind::Read && ok {
            self.judge(&ended, now);
        }
        self.end_in_oracle(&ended, now, ok);
        self.poison(&ended);
        self.free_descriptors.extend(&ended.descriptors);
        self.free_places.push(ended.place);
    }

    fn judge(&self, read: &Outstanding, now: u64) {
        let mut bytes = Vec::new();
        for (at, len) in &read.runs {
            let from = bytes.len();
            bytes.resize(from + *len as usize, 0);
            self.memory.read_slice(&mut bytes[from..], GuestAddress(*at)).expect("guest memory");
        }
        for (sector, bytes) in read.sectors.clone().zip(bytes.chunks_exact(SECTOR)) {
            if let Err(what) = self.oracle.borrow_mut().judge(sector, bytes, read.begun, now) {
                self.court.borrow_mut().violation(what);
            }
        }
    }

    fn end_in_oracle(&self, ended: &Outstanding, now: u64, ok: bool) {
        let mut oracle = self.oracle.borrow_mut();
        if ok
            && matches!(ended.kind, Kind::Write | Kind::Zeroes | Kind::Discard)
            && let Err(what) = oracle.judge_writer(self.attachment, ended.begun)
        {
            self.court.borrow_mut().violation(what);
        }
        match ended.kind {
            Kind::Read => self.court.borrow_mut().end_read(ended.begun),
            // A discard leaves what was there, or zeroes.
            Kind::Discard => oracle.end(ended.sectors.clone(), ended.begun, now, false, &self.court.borrow()),
            Kind::Write | Kind::Zeroes => {
                oracle.end(ended.sectors.clone(), ended.begun, now, ok, &self.court.borrow());
            }
            Kind::Flush if ok => oracle.flushed(ended.begun),
            Kind::Flush | Kind::Id | Kind::Garbage => {}
        }
    }

    /// What comes back belongs to the guest: it writes there, and it must stay so.
    fn poison(&mut self, ended: &Outstanding) {
        self.meddled.borrow_mut().remove(&self.place_at(ended.place));
        let (at, _) = self.data_at(ended.place);
        let bytes: u64 = ended.runs.iter().map(|(_, len)| u64::from(*len)).sum();
        self.memory.write_slice(&vec![POISON; bytes as usize], GuestAddress(at)).expect("guest memory");
        self.put(self.place_at(ended.place) + STATUS, POISON);
        self.poisoned.insert(ended.place, bytes);
    }

    /// Nothing of the guest was touched after it came back.
    pub(crate) fn check_poison(&mut self) {
        for place in self.poisoned.keys().copied().collect::<Vec<_>>() {
            self.check_place(place);
        }
    }

    fn check_place(&mut self, place: usize) {
        let Some(bytes) = self.poisoned.remove(&place) else { return };
        let mut found = vec![0; bytes as usize];
        self.memory.read_slice(&mut found, GuestAddress(self.data_at(place).0)).expect("guest memory");
        let status: u8 = self.get(self.place_at(place) + STATUS);
        if status != POISON || found.iter().any(|byte| *byte != POISON) {
            self.court.borrow_mut().violation("the device wrote into a buffer after it had given it back");
        }
    }

    /// Makes up to `count` requests available. True if the device is to be kicked.
    pub(crate) fn submit(&mut self, rng: &mut Rng, count: usize) -> bool {
        for _ in 0..count {
            if self.outstanding.len() >= self.options.depth || !self.submit_one(rng) {
                break;
            }
        }
        self.put(self.base + AVAIL + 2, self.next_avail);
        let (new, old) = (self.next_avail, std::mem::replace(&mut self.kicked, self.next_avail));
        if new == old {
            return false;
        }
        if self.options.event_idx {
            let event: u16 = self.get(self.base + USED + 4 + u64::from(self.options.size) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.get::<u16>(self.base + USED) & 1 == 0
        }
    }

    fn choose(&self, rng: &mut Rng) -> Kind {
        let roll = rng.u32(0..100);
        let (garbage, flushes) = (self.options.garbage, self.options.garbage + self.options.flushes);
        match roll {
            _ if roll < garbage => Kind::Garbage,
            _ if roll < flushes => Kind::Flush,
            _ => match rng.u8(0..20) {
                0 if self.options.discards => Kind::Discard,
                1 => Kind::Zeroes,
                2 => Kind::Id,
                3..=10 => Kind::Read,
                _ => Kind::Write,
            },
        }
    }

    fn submit_one(&mut self, rng: &mut Rng) -> bool {
        let doubtful = self.doubtful.last().cloned();
        let kind = if doubtful.is_some() { Kind::Read } else { self.choose(rng) };
        let big = rng.u32(0..100) < self.options.big;
        let Some(at) = self.free_places.iter().rposition(|place| big || *place != PLACES - 1) else {
            return false;
        };
        let place = self.free_places[at];
        let room = (self.data_at(place).1 / SECTOR as u64).min(self.volume_sectors);
        let count = match rng.u8(0..8) {
            0 => rng.u64(1..=room),
            1..=3 => 8.min(room),
            _ => rng.u64(1..=16.min(room)),
        };
        let corner = (self.options.corner + count).min(self.volume_sectors);
        let span = if rng.bool() { self.volume_sectors } else { corner };
        let first = rng.u64(0..=span - count);
        let sectors = match &doubtful {
            Some(sectors) => sectors.start..sectors.end.min(sectors.start + room),
            None => first..first + count,
        };
        let count = sectors.end - sectors.start;
        let runs = match kind {
            Kind::Read | Kind::Write => self.cut(rng, place, (count as usize * SECTOR) as u32),
            Kind::Id => vec![(self.data_at(place).0, 20)],
            Kind::Flush | Kind::Discard | Kind::Zeroes | Kind::Garbage => Vec::new(),
        };
        let Some((head, descriptors, has_status)) = self.lay_out(rng, kind, place, &sectors, &runs) else {
            return false;
        };
        if doubtful.is_some() {
            self.doubtful.pop();
        }
        self.free_places.remove(at);
        self.check_place(place);
        let begun = self.court.borrow_mut().tick();
        let value = if kind == Kind::Write { self.court.borrow_mut().fresh_value() } else { 0 };
        let mut request = Outstanding { place, kind, sectors, begun, runs, value, descriptors, has_status };
        self.prepare(rng, &mut request);
        self.put(self.place_at(place) + STATUS, if kind == Kind::Garbage { 0xfdu8 } else { 0xfe });
        self.outstanding.insert(head, request);
        self.put(self.base + AVAIL + 4 + u64::from(self.next_avail % self.options.size) * 2, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        true
    }

    /// Data into the buffers, and word to the oracle.
    fn prepare(&mut self, rng: &mut Rng, request: &mut Outstanding) {
        let (sectors, begun) = (request.sectors.clone(), request.begun);
        match request.kind {
            Kind::Read => self.court.borrow_mut().begin_read(begun),
            Kind::Write => {
                let bytes: Vec<u8> =
                    sectors.clone().flat_map(|sector| stamp(request.value, sector)).collect();
                let mut done = 0;
                for (at, len) in &request.runs {
                    self.memory
                        .write_slice(&bytes[done..done + *len as usize], GuestAddress(*at))
                        .expect("guest memory");
                    done += *len as usize;
                }
                self.oracle.borrow_mut().begin(sectors.clone(), request.value, begun);
                if rng.u32(0..100) < self.options.meddling {
                    self.oracle.borrow_mut().set_wild(sectors, begun);
                    let target = (self.memory.clone(), request.runs[0].0, request.runs[0].1);
                    self.meddled.borrow_mut().insert(self.place_at(request.place), target);
                }
            }
            Kind::Discard | Kind::Zeroes => self.oracle.borrow_mut().begin(sectors, 0, begun),
            Kind::Flush | Kind::Id | Kind::Garbage => {}
        }
    }

    /// Cuts the data into runs that lie anywhere in the place, in any order.
    fn cut(&self, rng: &mut Rng, place: usize, bytes: u32) -> Vec<(u64, u32)> {
        let pieces = match rng.u8(0..4) {
            0 => rng.usize(1..=SEGMENTS_MAX.min(bytes as usize)),
            1 => (bytes as usize).div_ceil(4096).min(SEGMENTS_MAX),
            _ => 1,
        };
        let mut ends: Vec<u32> =
            (1..pieces).map(|_| rng.u32(1..bytes.max(2))).filter(|end| *end < bytes).collect();
        ends.push(bytes);
        ends.sort_unstable();
        ends.dedup();
        let mut lens = Vec::new();
        let mut start = 0;
        for end in ends {
            lens.push(end - start);
            start = end;
        }
        let mut order: Vec<usize> = (0..lens.len()).collect();
        rng.shuffle(&mut order);
        let mut at = self.data_at(place).0;
        let mut runs = vec![(0, 0); lens.len()];
        for piece in order {
            runs[piece] = (at, lens[piece]);
            at += u64::from(lens[piece]);
        }
        runs
    }

    /// Writes header and descriptors; gives the head, the ring's descriptors it takes, and whether it has a place for a status.
    fn lay_out(
        &mut self,
        rng: &mut Rng,
        kind: Kind,
        place: usize,
        sectors: &Range<u64>,
        runs: &[(u64, u32)],
    ) -> Option<(u16, Vec<u16>, bool)> {
        let at = self.place_at(place);
        let (code, mut sector): (u32, u64) = match kind {
            Kind::Read => (0, sectors.start),
            Kind::Write => (1, sectors.start),
            Kind::Flush => (4, 0),
            Kind::Id => (8, 0),
            Kind::Discard => (11, 0),
            Kind::Zeroes => (13, 0),
            Kind::Garbage => (*rng.choice(&[0u32, 1, 2, 99, u32::MAX])?, rng.u64(..)),
        };
        let mut chain = vec![(at, 16, 0)];
        match kind {
            Kind::Discard | Kind::Zeroes => {
                chain.push((at + 16, 16, 0));
            }
            Kind::Garbage => {
                sector |= 1 << 40;
                if rng.bool() {
                    chain.push((rng.u64(..), rng.u32(..), *rng.choice(&[0, WRITABLE])?));
                }
            }
            Kind::Read | Kind::Id => chain.extend(runs.iter().map(|(at, len)| (*at, *len, WRITABLE))),
            Kind::Write => chain.extend(runs.iter().map(|(at, len)| (*at, *len, 0))),
            Kind::Flush => {}
        }
        let has_status = kind != Kind::Garbage || rng.u8(0..4) > 0;
        if has_status {
            chain.push((at + STATUS, 1, WRITABLE));
        }
        let indirect = chain.len() > self.free_descriptors.len().min(8) || rng.bool();
        let needed = if indirect { 1 } else { chain.len() };
        if self.free_descriptors.len() < needed {
            return None;
        }
        self.put(at, code);
        self.put(at + 8, sector);
        self.put(at + 16, sectors.start);
        self.put(at + 24, (sectors.end - sectors.start) as u32);
        self.put(at + 28, 0u32);
        let taken = self.free_descriptors.split_off(self.free_descriptors.len() - needed);
        if indirect {
            let table = at + TABLE;
            let indexes: Vec<u16> = (0..chain.len() as u16).collect();
            self.write_chain(table, &indexes, &chain);
            self.descriptor(self.base, taken[0], (table, chain.len() as u32 * 16), INDIRECT, 0);
        } else {
            self.write_chain(self.base, &taken, &chain);
        }
        Some((taken[0], taken, has_status))
    }

    fn write_chain(&self, table: u64, indexes: &[u16], chain: &[(u64, u32, u16)]) {
        for (place, (address, len, flags)) in chain.iter().enumerate() {
            let next = indexes.get(place + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            self.descriptor(table, indexes[place], (*address, *len), flags, next.unwrap_or(0));
        }
    }

    fn descriptor(&self, table: u64, index: u16, (address, len): (u64, u32), flags: u16, next: u16) {
        let at = table + u64::from(index) * 16;
        self.put(at, address);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }
}

const _: () = assert!(
    PLACES_AT + PLACES as u64 * (PLACE_BYTES + SMALL_BYTES) + BIG_BYTES <= RING_BYTES,
    "a ring's memory holds its places"
);
