//! What cloud-hypervisor says to a vhost-user-blk device, message by message, said to the real backend: read from its source as of August 2026
//! (virtio-devices/src/vhost_user), because it boots no guest on the machines these tests run on.
//!
//! It owns the socket first, asks for replies to everything once REPLY_ACK is agreed on, also to what has an answer of its own; reads 60 bytes of
//! configuration, gives the memory in one message, and starts rings at their *available* index, also at a backend that was killed. The guest behind it is
//! the plainest of drivers (`guest`).

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cirro_backend::guest_memory::Regions;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress};

use crate::guest::{DATA, Ring, SIZE, Used, pattern};
use crate::messages::{self as vhost, Connection, longs, words};
use crate::rig::{DISK_BYTES, Rig, start_backend};

const QUEUES: u32 = 4;
const BLOCK: u32 = 4096;
/// The guest's memory, and a module that is plugged in later, behind the hole for devices as cloud-hypervisor has it.
const MEMORY_BYTES: u64 = 8 << 20;
const MODULE: u64 = 4 << 30;
const MODULE_BYTES: u64 = 2 << 20;
/// Where the VMM has both.
const MEMORY_AT: u64 = 0x7f00_0000_0000;
const MODULE_AT: u64 = 0x7e00_0000_0000;
/// What of virtio (1.2, section 5.2.3 and 6) and of vhost-user cloud-hypervisor takes for a disk of several queues: SIZE_MAX, SEG_MAX, GEOMETRY, RO,
/// BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES; LOG_ALL, INDIRECT_DESC, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1, IN_ORDER,
/// ORDER_PLATFORM, NOTIFICATION_DATA.
const FEATURES: u64 = bits(&[1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 26, 28, 29, 30, 32, 35, 36, 38]);
/// MQ, LOG_SHMFD, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS, DEVICE_STATE. No BACKEND_REQ: nobody can tell it of a new size.
const PROTOCOL_FEATURES: u64 = bits(&[0, 1, 3, 9, 12, 15, 19]);
const PROTOCOL: u64 = bits(&[30]);
const LOG_ALL: u64 = bits(&[26]);
const IN_ORDER: u64 = bits(&[35]);
const INFLIGHT_SHMFD: u64 = bits(&[12]);
const CONFIG_BYTES: u32 = 60;
const CONFIG_WRITABLE: u32 = 1;
const WRITEBACK_AT: u32 = 32;
/// Kinds of requests (virtio 1.2, section 5.2.6).
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;

const fn bits(numbers: &[u32]) -> u64 {
    let (mut bits, mut at) = (0, 0);
    while at < numbers.len() {
        bits |= 1 << numbers[at];
        at += 1;
    }
    bits
}

/// A VMM and its guest, with a ring for each queue.
struct Machine {
    socket: PathBuf,
    connection: Connection,
    memory: File,
    module: File,
    regions: Regions,
    rings: Vec<Ring>,
    kicks: Vec<OwnedFd>,
    calls: Vec<OwnedFd>,
    offered: u64,
    /// Of the device, as guest and VMM agreed on them.
    features: u64,
    protocol_features: u64,
    config: Vec<u8>,
}

fn memfd(bytes: u64) -> File {
    let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).expect("memory can be had"));
    file.set_len(bytes).expect("memory has a size");
    file
}

fn events() -> Vec<OwnedFd> {
    let event = |_| eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd can be had");
    (0..QUEUES).map(event).collect()
}

impl Machine {
    /// The start of cloud-hypervisor: it learns what the device is.
    fn new(socket: &Path) -> Machine {
        let (memory, module) = (memfd(MEMORY_BYTES), memfd(MODULE_BYTES));
        let place = |file: &File| Some(FileOffset::new(file.try_clone().expect("a descriptor is free"), 0));
        let regions = Regions::from_ranges_with_files([
            (GuestAddress(0), MEMORY_BYTES as usize, place(&memory)),
            (GuestAddress(MODULE), MODULE_BYTES as usize, place(&module)),
        ]);
        let regions = regions.expect("memory can be mapped");
        let mut connection = Connection::open(socket);
        connection.tell(vhost::SET_OWNER, &[], &[]);
        let offered = connection.ask_number(vhost::GET_FEATURES);
        let protocol_features = connection.ask_number(vhost::GET_PROTOCOL_FEATURES) & PROTOCOL_FEATURES;
        connection.tell(vhost::SET_PROTOCOL_FEATURES, &longs(&[protocol_features]), &[]);
        connection.need_reply = true;
        assert_eq!(connection.ask_number(vhost::GET_QUEUE_NUM), u64::from(QUEUES));
        let ask = words(&[0, CONFIG_BYTES, CONFIG_WRITABLE]);
        let answer = connection.ask(vhost::GET_CONFIG, &[&ask[..], &[0; CONFIG_BYTES as usize]].concat());
        assert_eq!(answer[..8], ask[..8], "offset and size are those that were asked for");
        // The guest takes everything that it is offered, but what is between VMM and back-end.
        let features = FEATURES & offered & !LOG_ALL;
        let rings = new_rings(&regions);
        Machine {
            socket: socket.to_owned(),
            connection,
            memory,
            module,
            regions,
            rings,
            kicks: events(),
            calls: events(),
            offered,
            features,
            protocol_features,
            config: answer[12..].to_vec(),
        }
    }

    /// The guest's driver is ready.
    fn activate(&mut self) {
        let connection = &mut self.connection;
        connection.tell(vhost::SET_FEATURES, &longs(&[self.features & self.offered]), &[]);
        let table = [words(&[1, 0]), longs(&[0, MEMORY_BYTES, MEMORY_AT, 0])].concat();
        connection.tell(vhost::SET_MEM_TABLE, &table, &[self.memory.as_fd()]);
        for index in 0..QUEUES {
            connection.tell(vhost::SET_VRING_NUM, &words(&[index, u32::from(SIZE)]), &[]);
        }
        for (index, ring) in (0..QUEUES).zip(&self.rings) {
            let state = ring.state();
            let at = [state.desc_table, state.used_ring, state.avail_ring].map(|at| MEMORY_AT + at);
            let addresses = [words(&[index, 0]), longs(&at), longs(&[0])].concat();
            connection.tell(vhost::SET_VRING_ADDR, &addresses, &[]);
            let available: u16 =
                self.regions.read_obj(GuestAddress(state.avail_ring + 2)).expect("it is there");
            connection.tell(vhost::SET_VRING_BASE, &words(&[index, u32::from(available)]), &[]);
            let (call, kick) = (&self.calls[index as usize], &self.kicks[index as usize]);
            connection.tell(vhost::SET_VRING_CALL, &longs(&[u64::from(index)]), &[call.as_fd()]);
            connection.tell(vhost::SET_VRING_KICK, &longs(&[u64::from(index)]), &[kick.as_fd()]);
        }
        self.enable(true);
    }

    /// Pauses the machine, or lets it go on.
    fn enable(&mut self, enabled: bool) {
        for index in 0..QUEUES {
            let body = words(&[index, u32::from(enabled)]);
            self.connection.tell(vhost::SET_VRING_ENABLE, &body, &[]);
        }
    }

    /// The guest's driver is reset. Gives where the rings stood.
    fn reset(&mut self) -> Vec<u32> {
        let stop = |index: u32| {
            self.connection.tell(vhost::SET_VRING_ENABLE, &words(&[index, 0]), &[]);
            let base = self.connection.ask(vhost::GET_VRING_BASE, &words(&[index, 0]));
            assert_eq!(base[..4], index.to_le_bytes());
            u32::from_le_bytes(base[4..].try_into().expect("an index and a number"))
        };
        let stood = (0..QUEUES).map(stop).collect();
        self.rings = new_rings(&self.regions);
        stood
    }

    /// The backend went away and is there again: protocol features are not asked for a second time.
    fn reconnect(&mut self) {
        let mut connection = Connection::open(&self.socket);
        connection.tell(vhost::SET_OWNER, &[], &[]);
        self.offered = connection.ask_number(vhost::GET_FEATURES);
        connection.tell(vhost::SET_PROTOCOL_FEATURES, &longs(&[self.protocol_features]), &[]);
        connection.need_reply = true;
        self.connection = connection;
        self.activate();
    }

    /// Makes a request of a block available on a ring, and kicks.
    fn add(&mut self, ring: usize, kind: u32, block: u64, data: u64) {
        let bytes = if kind == FLUSH { 0 } else { BLOCK };
        self.rings[ring].add(kind, block * u64::from(BLOCK / 512), data, bytes);
        rustix::io::write(&self.kicks[ring], &1u64.to_ne_bytes()).expect("an eventfd takes a number");
    }

    /// Sleeps until so many requests on a ring have ended, and wakes up only when it is interrupted.
    fn wait(&mut self, ring: usize, count: usize) -> Vec<Used> {
        let end = Instant::now() + Duration::from_secs(20);
        let (mut used, call) = (Vec::new(), &self.calls[ring]);
        loop {
            // What ends before an interrupt was asked for makes none, so it is looked for again.
            used.extend(self.rings[ring].used());
            used.extend(self.rings[ring].used());
            if used.len() >= count {
                break;
            }
            let left = Timespec { tv_sec: 20, tv_nsec: 0 };
            let woken =
                poll(&mut [PollFd::new(call, PollFlags::IN)], Some(&left)).expect("it can be waited for");
            let in_time = woken == 1 && Instant::now() < end;
            assert!(
                in_time,
                "ring {ring}: {} of {count} requests came back, interrupts: {woken}",
                used.len()
            );
            rustix::io::read(call, &mut [0; 8]).expect("it was readable");
        }
        assert_eq!(used.len(), count, "ring {ring}: no request comes back twice");
        assert!(used.iter().all(|used| used.status == 0), "ring {ring}: {used:?}");
        used
    }

    fn one(&mut self, ring: usize, kind: u32, block: u64, data: u64) {
        self.add(ring, kind, block, data);
        self.wait(ring, 1);
    }

    /// Puts the content of a block into memory at `at`.
    fn fill(&self, block: u64, at: u64) {
        self.rings[0].write(at, &content(block));
    }

    /// Writes blocks and reads each on another ring; `data` is where in memory.
    fn work(&mut self, blocks: std::ops::Range<u64>, data: u64) {
        let ring = |block: u64| (block % u64::from(QUEUES)) as usize;
        for block in blocks.clone() {
            self.fill(block, data);
            self.one(ring(block), WRITE, block, data);
        }
        self.one(0, FLUSH, 0, 0);
        for block in blocks {
            self.rings[0].write(data, &[0; BLOCK as usize]);
            self.one(ring(block + 1), READ, block, data);
            assert!(self.rings[0].read(data, BLOCK as usize) == content(block), "block {block} is wrong");
        }
    }
}

/// Rings as a driver makes them: all zeroes.
fn new_rings(regions: &Regions) -> Vec<Ring> {
    regions.write_slice(&vec![0; DATA as usize], GuestAddress(0)).expect("memory is there");
    (0..QUEUES).map(|index| Ring::new(regions, u64::from(index), true)).collect()
}

fn content(block: u64) -> Vec<u8> {
    pattern(block + 1, BLOCK as usize)
}

/// What the node has in its file.
fn check_volume(rig: Rig, blocks: std::ops::Range<u64>) {
    let path = rig.scratch.path("disk.img");
    rig.stop_keeping(|| {
        let image = File::open(&path).expect("the volume is there");
        for block in blocks {
            let mut found = vec![0; BLOCK as usize];
            image.read_exact_at(&mut found, block * u64::from(BLOCK)).expect("it can be read");
            assert!(found == content(block), "block {block} of the volume is wrong");
        }
    });
}

#[test]
fn a_machine_of_cloud_hypervisor_works_pauses_grows_and_reboots() {
    let rig = Rig::new(9000);
    let mut machine = Machine::new(&rig.scratch.path("backend.sock"));
    assert_eq!(machine.config.len(), CONFIG_BYTES as usize);
    assert_eq!(machine.config[..8], (DISK_BYTES / 512).to_le_bytes(), "capacity in sectors");
    assert_eq!((machine.config[32], machine.config[34]), (1, QUEUES as u8), "writeback and queues");
    assert_eq!(
        machine.features & IN_ORDER,
        0,
        "requests end in any order, so IN_ORDER is not for us to offer"
    );
    assert_eq!(
        machine.protocol_features & INFLIGHT_SHMFD,
        0,
        "nor a buffer of the VMM's: the backend has its own"
    );
    machine.activate();
    machine.work(0..16, DATA);

    // The guest turns its cache off.
    let through = [words(&[WRITEBACK_AT, 1, CONFIG_WRITABLE]), vec![0]].concat();
    machine.connection.tell(vhost::SET_CONFIG, &through, &[]);
    machine.work(16..20, DATA);

    machine.enable(false);
    for ring in 0..QUEUES as usize {
        machine.add(ring, READ, ring as u64, DATA + (ring as u64) * 8192);
    }
    std::thread::sleep(Duration::from_millis(100));
    assert!(
        machine.rings.iter_mut().all(|ring| ring.used().is_empty()),
        "a paused machine's disk does nothing"
    );
    machine.enable(true);
    for ring in 0..QUEUES as usize {
        machine.wait(ring, 1);
        let read = machine.rings[0].read(DATA + (ring as u64) * 8192, BLOCK as usize);
        assert!(read == content(ring as u64), "block {ring} after the pause");
    }

    let module = longs(&[0, MODULE, MODULE_BYTES, MODULE_AT, 0]);
    machine.connection.tell(vhost::ADD_MEM_REG, &module, &[machine.module.as_fd()]);
    machine.work(20..28, MODULE + MODULE_BYTES - u64::from(BLOCK));

    let available: Vec<u32> = machine.rings.iter().map(|ring| u32::from(ring.state().next_avail)).collect();
    assert_eq!(machine.reset(), available, "a ring stands where everything available was done");
    machine.activate();
    machine.work(28..36, DATA);
    assert!(machine.connection.is_silent(), "one reply to each message");
    drop(machine);
    check_volume(rig, 0..36);
}

#[test]
fn a_backend_killed_under_cloud_hypervisor_ends_what_was_in_flight_and_what_came_meanwhile() {
    let mut rig = Rig::new(9000);
    let mut machine = Machine::new(&rig.scratch.path("backend.sock"));
    machine.activate();
    machine.work(0..8, DATA);
    let place = |block: u64| DATA + block * u64::from(BLOCK);
    (8..24).for_each(|block| machine.fill(block, place(block)));

    // Two requests on each ring are in flight when it is killed, and one more comes on each while nobody is there.
    rig.node.pause();
    // A signal takes a moment to stop every thread.
    std::thread::sleep(Duration::from_millis(100));
    (8..16).for_each(|block| machine.add((block % 4) as usize, WRITE, block, place(block)));
    let end = Instant::now() + Duration::from_secs(20);
    while rig.disk().in_flight < 8 {
        assert!(Instant::now() < end, "{} of 8 requests are in flight", rig.disk().in_flight);
        std::thread::sleep(Duration::from_millis(5));
    }
    rig.backend.kill();
    rig.node.resume();
    (16..20).for_each(|block| machine.add((block % 4) as usize, WRITE, block, place(block)));
    rig.backend = start_backend(&rig.lab, &rig.scratch);
    machine.reconnect();
    (0..QUEUES as usize).for_each(|ring| _ = machine.wait(ring, 3));
    assert_eq!(rig.backend.times_said("2 requests are issued again"), QUEUES as usize);

    // The same when it ends in order: nothing is in flight, and what came meanwhile is found.
    rig.backend.stop();
    (20..24).for_each(|block| machine.add((block % 4) as usize, WRITE, block, place(block)));
    rig.backend = start_backend(&rig.lab, &rig.scratch);
    machine.reconnect();
    (0..QUEUES as usize).for_each(|ring| _ = machine.wait(ring, 1));

    machine.work(24..32, DATA);
    drop(machine);
    check_volume(rig, 0..32);
}

#[test]
fn a_feature_that_was_not_offered_is_refused_and_the_next_machine_is_served() {
    let rig = Rig::new(9000);
    let socket = rig.scratch.path("backend.sock");
    let mut machine = Machine::new(&socket);
    assert_eq!(machine.offered & PROTOCOL, PROTOCOL);
    let wrong = longs(&[machine.features | IN_ORDER]);
    assert!(!machine.connection.told(vhost::SET_FEATURES, &wrong, &[]), "a bit that was not offered");
    assert!(machine.connection.is_closed());
    drop(machine);
    let mut machine = Machine::new(&socket);
    machine.activate();
    machine.work(0..8, DATA);
    drop(machine);
    check_volume(rig, 0..8);
}
