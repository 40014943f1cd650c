//! A node and some backends on a wire in memory, on virtual time: the production worker over a link, a store and a keeper of the test's.
//!
//! Knows the backend's end of the protocol; its guests are vectors of bytes. Included by the tests beside it.

mod hello;
pub(crate) mod stranger;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use cirro_link::memory::{MemoryLink, pair};
use cirro_link::{FrameId, Link};
use cirro_node::access::AccessList;
use cirro_node::node::{Directory, NodeConfig, NodeWorker, Wake};
use cirro_node::owner::MemoryKeeper;
use cirro_node::store::pread::PreadStore;
use cirro_node::store::{Completion, FileId, Request, Store, StoreError, StoreOp};
use cirro_node::volume::{Volume, VolumeSpec};
use cirro_protocol::SealWith;
use cirro_protocol::initiator::{Config, Event, Initiator};
use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERTYPE_DEFAULT, MacAddress, Slot, Steer, Uuid};
use cirro_protocol::wire::body::Access;
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::long::LongFrame;
use cirro_protocol::wire::{Frame, Header, Mode};
use cirro_seal::{Nonces, append_payload_crcs, open_crc, open_long, seal_crc, seal_long};

/// Size of the test's volume.
pub(crate) const BYTES: u64 = 4 << 20;

/// What a store is told to do wrong, and what it saw.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// Completions of these operations are held back.
    pub(crate) hold: Vec<StoreOp>,
    /// Requests of these operations fail with this error number.
    pub(crate) fail: Vec<(StoreOp, i32)>,
    /// Everything that was submitted: operation, offset, length.
    pub(crate) seen: Vec<(StoreOp, u64, u64)>,
}

/// The simple store with faults.
pub(crate) struct FaultStore {
    inner: PreadStore,
    faults: Rc<RefCell<Faults>>,
    held: VecDeque<Completion>,
}

impl Store for FaultStore {
    fn room(&self) -> usize {
        self.inner.room() - self.held.len()
    }

    fn submit(&mut self, request: Request) -> Result<(), Request> {
        let mut faults = self.faults.borrow_mut();
        faults.seen.push((request.op, request.offset, request.len));
        if let Some((op, errno)) = faults.fail.iter().find(|(op, _)| *op == request.op).copied() {
            let error = StoreError::Failed { op, offset: request.offset, len: request.len, done: 0, errno };
            self.held.push_back(Completion {
                token: request.token,
                op,
                result: Err(error),
                buffer: request.buffer,
            });
            return Ok(());
        }
        self.inner.submit(request)
    }

    fn push(&mut self) {}

    fn complete(&mut self) -> Option<Completion> {
        self.held.extend(std::iter::from_fn(|| self.inner.complete()));
        let faults = self.faults.borrow();
        let free = self.held.iter().position(|completion| !faults.hold.contains(&completion.op))?;
        self.held.remove(free)
    }
}

pub(crate) type Worker = NodeWorker<MemoryLink, FaultStore>;

/// One attachment.
pub(crate) struct Guest {
    pub(crate) initiator: Initiator,
    data: HashMap<Slot, (Op, Vec<u8>)>,
    /// What ended: slot, status, the data of a read.
    pub(crate) done: Vec<(Slot, Status, Vec<u8>)>,
    pub(crate) events: Vec<Event>,
}

/// The wire with everything on it.
pub(crate) struct Segment {
    pub(crate) now: Instant,
    pub(crate) worker: Worker,
    pub(crate) guests: Vec<Guest>,
    pub(crate) link: MemoryLink,
    pub(crate) keeper: MemoryKeeper,
    pub(crate) faults: Rc<RefCell<Faults>>,
    /// Every LONG frame that reached the guests.
    pub(crate) long: Vec<LongFrame>,
    /// Frames from the guests are lost.
    pub(crate) cut: bool,
    /// Frames to the guests are lost.
    pub(crate) deaf: bool,
    pub(crate) path: PathBuf,
    wake: Wake,
    option: String,
    incarnation: u8,
    _folder: tempfile::TempDir,
}

fn worker(
    link: MemoryLink,
    faults: &Rc<RefCell<Faults>>,
    keeper: &MemoryKeeper,
    incarnation: u8,
    names: &[(&str, u16)],
    access: AccessList,
) -> Worker {
    let config = NodeConfig {
        node: Uuid([0x11; 16]),
        incarnation: Uuid([incarnation; 16]),
        secret: [5; 16],
        identity: None,
        access: Arc::new(access),
        random_seed: [incarnation; 16],
        ethertype: ETHERTYPE_DEFAULT,
        steer: Steer::new(2, 0),
        ack_delay_max: Nanos::from_micros(50),
        write_pool_bytes: 32 << 20,
        read_pool_bytes: 8 << 20,
    };
    let directory = Directory::new(2, names.iter().map(|(name, worker)| (name.parse().unwrap(), *worker)));
    let store = FaultStore { inner: PreadStore::new(), faults: Rc::clone(faults), held: VecDeque::new() };
    NodeWorker::new(config, Arc::new(directory), link, store, Box::new(keeper.clone()))
}

impl Segment {
    /// A node that serves volume `v` with these options (`,ro` for example), and no guest.
    pub(crate) fn new(option: &str) -> Segment {
        Segment::with_access(option, |_| AccessList::fixed(true, &[]))
    }

    /// The same, with grants for whoever has the address of the guests.
    pub(crate) fn with_access(option: &str, access: impl FnOnce(MacAddress) -> AccessList) -> Segment {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("v.img");
        File::create(&path).unwrap().set_len(BYTES).unwrap();
        let (node_end, link) = pair(9000);
        let (faults, keeper) = (Rc::default(), MemoryKeeper::default());
        let access = access(link.address());
        let worker =
            worker(node_end, &faults, &keeper, 1, &[("v", 0), ("elsewhere", 3), ("unserved", 0)], access);
        let mut segment = Segment {
            now: Instant(1_000_000),
            worker,
            guests: Vec::new(),
            link,
            keeper,
            faults,
            long: Vec::new(),
            cut: false,
            deaf: false,
            path,
            wake: Wake::Now,
            option: option.to_owned(),
            incarnation: 1,
            _folder: folder,
        };
        segment.serve();
        segment
    }

    fn serve(&mut self) {
        let spec: VolumeSpec = format!("v={}{}", self.path.display(), self.option).parse().unwrap();
        let volume = Volume::open(&spec).unwrap();
        let file: FileId = self.worker.store_mut().inner.attach(volume.store_file());
        let owner = self.keeper.record(&volume.name);
        self.worker.add_volume(self.now, volume, file, owner);
    }

    /// The node is killed and started again: it knows what is on disk, and nothing else.
    pub(crate) fn restart_node(&mut self) {
        self.incarnation += 1;
        let (node_end, link) = pair(9000);
        self.link = link;
        self.worker = worker(
            node_end,
            &self.faults,
            &self.keeper,
            self.incarnation,
            &[("v", 0)],
            AccessList::fixed(true, &[]),
        );
        self.serve();
        self.wake = Wake::Now;
    }

    /// A guest of attachment `id`; a later one of the same has a larger session epoch.
    pub(crate) fn add_guest(&mut self, id: u8, access: Access, take_over: bool) -> usize {
        let number = self.guests.len();
        let config = Config {
            volume: "v".parse().unwrap(),
            mode: Mode::Crc,
            attachment: Uuid([id; 16]),
            session_epoch: (number as u64 + 1) << 32,
            address: self.link.address(),
            ethertype: ETHERTYPE_DEFAULT,
            node_address: None,
            steer: Steer::new(1, 0),
            cid_index: number as u16,
            mtu: 9000,
            slots: 64,
            take_over,
            ack_delay_max: Nanos::from_micros(50),
            random_seed: 77 + number as u64,
        };
        let mut initiator = Initiator::new(config, self.now);
        initiator.set_access(access);
        self.guests.push(Guest { initiator, data: HashMap::new(), done: Vec::new(), events: Vec::new() });
        number
    }

    /// Submits a request; `data` is what is written, or as long as what is read or zeroed.
    pub(crate) fn submit(&mut self, guest: usize, op: Op, offset: u64, data: Vec<u8>) -> Slot {
        let guest = &mut self.guests[guest];
        let len = if op.length_in_sectors() { data.len() / 512 } else { data.len() } as u32;
        let slot = guest.initiator.submit(op, offset, len).expect("a slot is free");
        guest.data.insert(slot, (op, data));
        slot
    }

    /// Submits one request, runs until it has ended, and gives its status and data.
    pub(crate) fn ask(&mut self, guest: usize, op: Op, offset: u64, data: Vec<u8>) -> (Status, Vec<u8>) {
        let slot = self.submit(guest, op, offset, data);
        self.run_until("the request ended", |s| {
            s.guests[guest].done.iter().any(|(done, _, _)| *done == slot)
        });
        let place = self.guests[guest].done.iter().position(|(done, _, _)| *done == slot).unwrap();
        let (_, status, data) = self.guests[guest].done.remove(place);
        (status, data)
    }

    /// Runs until the guest has the volume with this access.
    pub(crate) fn attach(&mut self, guest: usize, access: Access) {
        self.run_until("the volume was opened", |s| s.is_attached(guest, access));
    }

    pub(crate) fn is_attached(&self, guest: usize, access: Access) -> bool {
        self.guests[guest].events.iter().any(|e| matches!(e, Event::Attached(_, got) if *got == access))
    }

    /// The epoch that the guest was last given.
    pub(crate) fn epoch(&self, guest: usize) -> u64 {
        let attached = self.guests[guest].events.iter().rev().find_map(|event| match event {
            Event::Attached(info, _) => Some(info.vol_epoch),
            Event::Done { .. } | Event::Refused(..) | Event::Lost(_) | Event::Changed(_) => None,
        });
        attached.expect("the guest has the volume")
    }

    pub(crate) fn refused(&self, guest: usize, status: Status) -> bool {
        self.guests[guest].events.iter().any(|e| matches!(e, Event::Refused(got, _) if *got == status))
    }

    /// Runs until `done`, at most a minute of virtual time.
    pub(crate) fn run_until(&mut self, what: &str, done: impl Fn(&Segment) -> bool) {
        let end = self.now + Nanos::from_secs(60);
        while !done(self) {
            assert!(self.now < end, "not in a minute: {what}");
            self.step();
        }
    }

    /// Runs for a span of virtual time.
    pub(crate) fn run_for(&mut self, span: Nanos) {
        let end = self.now + span;
        while self.now < end {
            self.step();
        }
    }

    /// Sends a frame to the node that nobody of the guests wrote.
    pub(crate) fn send_raw(&mut self, head: &[u8]) {
        if let Some(frame) = self.link.frame() {
            frame.head.extend_from_slice(head);
            self.link.commit(FrameId::default());
        }
        self.link.flush(&mut Vec::new());
    }

    fn step(&mut self) {
        self.worker.link_mut().set_now(self.now);
        self.link.set_now(self.now);
        self.wake = self.worker.turn(self.now);
        let heard = self.receive();
        let mut due = None;
        for index in 0..self.guests.len() {
            let guest = &mut self.guests[index];
            if guest.initiator.poll_timeout().is_some_and(|at| at <= self.now) {
                guest.initiator.handle_timeout(self.now);
            }
            guest.take_events();
            self.transmit(index);
            due = [due, self.guests[index].initiator.poll_timeout()].into_iter().flatten().min();
        }
        let node_due = match self.wake {
            Wake::Now => Some(self.now),
            Wake::At(at) => Some(at),
            Wake::Idle => None,
        };
        let idle = !heard && !self.worker.link_mut().has_frames() && !self.link.has_frames();
        let next = if idle { [due, node_due].into_iter().flatten().min() } else { None };
        let soon = self.now + Nanos::from_micros(1);
        // A test that waits for something the store holds back lets time pass.
        self.now = next.unwrap_or(soon).max(soon).min(self.now + Nanos::from_millis(1));
    }

    fn receive(&mut self) -> bool {
        let mut heard = false;
        while let Some(received) = self.link.receive() {
            heard = true;
            if self.deaf {
                continue;
            }
            let bytes = received.bytes.to_vec();
            if Header::is_long(&bytes[14..]) == Some(true) {
                open_long(&bytes).expect("the node seals");
                let long = LongFrame::parse(&bytes).expect("the node writes whole frames");
                self.long.push(long);
                self.guests.iter_mut().for_each(|guest| {
                    guest.initiator.handle_long(self.now, &long);
                });
                continue;
            }
            let frame = Frame::parse(&bytes).expect("the node writes whole frames");
            let source = Ethernet::parse(&bytes).unwrap().source;
            for guest in &mut self.guests {
                if let Some((sender, receiver)) = guest.initiator.nonces_in(frame.header.cid, source) {
                    open_crc(Nonces { sender, receiver }, &frame).expect("the node's checksums are right");
                    guest.take_frame(self.now, received.arrival, &frame);
                }
            }
        }
        heard
    }

    fn transmit(&mut self, index: usize) {
        let guest = &mut self.guests[index];
        let (mut head, mut payloads) = (Vec::new(), Vec::new());
        while let Some(transmit) = guest.initiator.poll_transmit(self.now, &mut head, &mut payloads) {
            let bytes = |p: &cirro_protocol::PayloadRef| {
                guest.data[&p.slot].1[p.offset as usize..(p.offset + p.len) as usize].to_vec()
            };
            payloads.iter().for_each(|p| append_payload_crcs(&mut head, &bytes(p)));
            match transmit.seal {
                SealWith::Long => seal_long(&mut head),
                SealWith::Session(sender, receiver) => seal_crc(Nonces { sender, receiver }, &mut head),
            }
            for payload in payloads.iter().rev() {
                head.splice(payload.at..payload.at, bytes(payload));
            }
            if !self.cut {
                self.link.frame().expect("the memory link has room").head.extend_from_slice(&head);
                self.link.commit(FrameId::default());
                self.link.flush(&mut Vec::new());
            }
            head.clear();
            payloads.clear();
        }
    }

    /// The node's address.
    pub(crate) fn node_address(&mut self) -> MacAddress {
        self.worker.link_mut().address()
    }
}

impl Guest {
    fn take_frame(&mut self, now: Instant, arrival: Instant, frame: &Frame<'_>) {
        let mut placements = Vec::new();
        self.initiator.handle_frame(now, arrival, frame, &mut placements);
        for placement in placements {
            let source = frame.payload(placement.range);
            let data = &mut self.data.get_mut(&placement.slot).expect("a read of ours").1;
            data[placement.offset as usize..][..source.len()].copy_from_slice(source);
        }
    }

    fn take_events(&mut self) {
        while let Some(event) = self.initiator.poll_event() {
            if let Event::Done { slot, status } = event {
                let (op, data) = self.data.remove(&slot).expect("a request ends once");
                self.done.push((slot, status, if op == Op::Read { data } else { Vec::new() }));
            }
            self.events.push(event);
        }
    }

    /// The attachment's process dies: it says nothing any more.
    pub(crate) fn die(&mut self) {
        self.data.clear();
    }
}
