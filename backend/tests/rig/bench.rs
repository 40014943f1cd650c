//! A worker with one disk, its node and a guest's memory, on virtual time: turns are taken by whoever asks.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cirro_backend::attach::Attach;
use cirro_backend::disk::{Disk, DiskConfig};
use cirro_backend::guest_memory::Regions;
use cirro_backend::mailbox::{Answer, Change, DiskId, Mailbox, mailbox};
use cirro_backend::mapped::Mapped;
use cirro_backend::protection::Protection;
use cirro_backend::record::Record;
use cirro_backend::replay::Replay;
use cirro_backend::stats::{DiskStats, WorkerStats};
use cirro_backend::trouble::OnTrouble;
use cirro_backend::worker::Worker;
use cirro_link::Link;
use cirro_link::memory::{MemoryLink, pair};
use cirro_protocol::initiator::{Config, Initiator};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERTYPE_DEFAULT, Steer, Uuid};
use cirro_protocol::wire::Mode;
use vm_memory::GuestAddress;

use super::guest::{Ring, Used};
use super::node::Node;

/// Room for unflushed changes: little, so that tests fill it.
const REPLAY_BYTES: u64 = 4 << 20;
pub(crate) const MIB: usize = 1 << 20;
pub(crate) const DISK: DiskId = DiskId(0);

/// What goes with a process.
struct Process {
    worker: Worker<MemoryLink>,
    mailbox: Mailbox,
    disk_stats: Arc<DiskStats>,
    stats: Arc<WorkerStats>,
}

impl Process {
    fn new(
        link: MemoryLink,
        (starts, now): (u64, Instant),
        (record, unflushed): (&Record, &Mapped),
        attach: &Arc<Attach>,
        on_trouble: OnTrouble,
    ) -> Process {
        let (mailbox, inbox) = mailbox().unwrap();
        let (stats, disk_stats) = (Arc::<WorkerStats>::default(), Arc::<DiskStats>::default());
        let config = Config {
            volume: "vol".parse().unwrap(),
            mode: Mode::Crc,
            attachment: Uuid([1; 16]),
            session_epoch: starts << 32,
            address: link.address(),
            ethertype: ETHERTYPE_DEFAULT,
            node_address: None,
            steer: Steer::new(0, 0),
            cid_index: 0,
            mtu: link.mtu() as u16,
            slots: 256,
            take_over: false,
            ack_delay_max: Nanos::from_micros(50),
            random_seed: 41 + starts,
        };
        let disk = Disk::new(DiskConfig {
            volume: config.volume,
            read_only: false,
            queues: 2,
            initiator: Initiator::new(config, now),
            protection: Protection::new(None),
            attach: Arc::clone(attach),
            record: record.clone(),
            replay: Replay::new(unflushed.clone(), 0, REPLAY_BYTES),
            on_trouble,
            stats: Arc::clone(&disk_stats),
        });
        let mut worker = Worker::new(link, Steer::new(0, 0), inbox, Arc::clone(&stats));
        worker.add(DISK, disk);
        Process { worker, mailbox, disk_stats, stats }
    }
}

/// A worker with one disk, its node, and a guest's memory.
pub(crate) struct Rig {
    pub(crate) worker: Worker<MemoryLink>,
    pub(crate) node: Node,
    pub(crate) mailbox: Mailbox,
    pub(crate) attach: Arc<Attach>,
    /// What is in flight, whichever process keeps it.
    pub(crate) record: Record,
    /// What was not flushed, likewise.
    pub(crate) unflushed: Mapped,
    /// For the next process.
    pub(crate) on_trouble: OnTrouble,
    starts: u64,
    pub(crate) disk_stats: Arc<DiskStats>,
    pub(crate) stats: Arc<WorkerStats>,
    pub(crate) memory: Regions,
    pub(crate) now: Instant,
}

impl Rig {
    pub(crate) fn new(mtu: usize) -> Rig {
        let ranges = [(GuestAddress(0), 8 * MIB), (GuestAddress(8 * MIB as u64), 8 * MIB)];
        Rig::with_memory(mtu, Regions::from_ranges(&ranges).unwrap())
    }

    pub(crate) fn with_memory(mtu: usize, memory: Regions) -> Rig {
        let now = Instant(1_000_000_000);
        let (record, attach) = (Record::in_memory(2), Arc::<Attach>::default());
        let unflushed = Mapped::in_memory(Replay::bytes(REPLAY_BYTES));
        let (here, there) = pair(mtu);
        let process = Process::new(here, (1, now), (&record, &unflushed), &attach, OnTrouble::Wait);
        let Process { worker, mailbox, disk_stats, stats } = process;
        let node = Node::new(there, 16 * MIB);
        Rig {
            worker,
            node,
            mailbox,
            attach,
            record,
            unflushed,
            on_trouble: OnTrouble::Wait,
            starts: 1,
            disk_stats,
            stats,
            memory,
            now,
        }
    }

    /// Kills the backend, and starts another one on what it left. Frames that are on their way are lost.
    pub(crate) fn kill(&mut self) {
        let (here, there) = pair(self.worker.link().mtu());
        self.node.link = there;
        self.starts += 1;
        self.attach = Arc::new(Attach::new(self.attach.get().or(self.attach.remembered())));
        let process = Process::new(
            here,
            (self.starts, self.now),
            (&self.record, &self.unflushed),
            &self.attach,
            self.on_trouble,
        );
        let killed = std::mem::replace(&mut self.worker, process.worker);
        // Whoever is killed drops nothing, and a worker that is dropped with requests in flight is a bug.
        Box::leak(Box::new(killed));
        (self.mailbox, self.disk_stats, self.stats) = (process.mailbox, process.disk_stats, process.stats);
    }

    /// The VMM comes back to a backend that was killed: it hands over memory and ring 0, which stands where its used index does, as far as the VMM knows.
    pub(crate) fn reconnect(&mut self, ring: &Ring) {
        let memory = self.memory.clone();
        self.ask(Change::Memory(memory));
        drop(self.start_at(0, ring));
    }

    /// One turn of each side, and a little time.
    pub(crate) fn step(&mut self) {
        self.worker.link().set_now(self.now);
        self.worker.turn(self.now);
        self.node.step(self.now);
        self.now += Nanos::from_micros(10);
    }

    /// Steps for `span`.
    pub(crate) fn run(&mut self, span: Nanos) {
        let end = self.now + span;
        while self.now < end {
            self.step();
        }
    }

    pub(crate) fn run_until(&mut self, what: &str, mut done: impl FnMut(&mut Rig) -> bool) {
        for _ in 0..2_000_000 {
            if done(self) {
                return;
            }
            self.step();
        }
        panic!("never: {what}");
    }

    pub(crate) fn ask(&mut self, change: Change) -> Answer {
        let awaited = self.mailbox.send(DISK, change);
        self.step();
        awaited.wait().expect("an answer within a turn")
    }

    /// Starts ring `index`; gives it and the pipe that its signals come out of.
    pub(crate) fn start(&mut self, index: u16, event_idx: bool) -> (Ring, std::io::PipeReader) {
        let ring = Ring::new(&self.memory, u64::from(index), event_idx);
        let signals = self.start_at(index, &ring);
        (ring, signals)
    }

    pub(crate) fn start_at(&mut self, index: u16, ring: &Ring) -> std::io::PipeReader {
        let (reader, writer) = std::io::pipe().unwrap();
        let kick = File::open("/dev/null").unwrap();
        let call = Some(File::from(OwnedFd::from(writer)));
        self.ask(Change::Start { ring: index, queue: ring.state(), kick, call });
        reader
    }

    /// A disk that is attached, with memory and ring 0.
    pub(crate) fn ready(mtu: usize) -> (Rig, Ring) {
        let mut rig = Rig::new(mtu);
        rig.run_until("attached", |rig| rig.attach.get().is_some());
        let memory = rig.memory.clone();
        rig.ask(Change::Memory(memory));
        let (ring, _signals) = rig.start(0, true);
        (rig, ring)
    }

    pub(crate) fn wait_for(&mut self, ring: &mut Ring, count: usize) -> Vec<Used> {
        let mut used = Vec::new();
        self.run_until("requests came back", |_| {
            used.extend(ring.used());
            used.len() >= count
        });
        used
    }

    pub(crate) fn one(&mut self, ring: &mut Ring, (kind, sector): (u32, u64), data: u64, len: usize) -> Used {
        let head = ring.add(kind, sector, data, len as u32);
        let used = self.wait_for(ring, 1);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].head, head);
        used[0]
    }
}
