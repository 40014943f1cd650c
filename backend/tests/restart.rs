//! The backend is killed, and another one goes on with what it left: the record of what is in flight and the volume that was remembered.
//!
//! The same rig as in `worker`: a guest, a node, virtual time; a kill is a worker that takes no more turns.

mod rig;

use std::io::Read;

use cirro_backend::guest_memory::Regions;
use cirro_backend::mailbox::{Answer, Change};
use cirro_protocol::op::Op;
use cirro_protocol::time::Nanos;
use rig::bench::{DISK, MIB, Rig};
use rig::guest::{DATA, Ring, SIZE, Used, pattern};
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

/// Numbers that follow from a seed (Knuth's MMIX generator).
fn dice(state: &mut u64, end: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % end
}

/// Writes of which each has its own place on the disk, and in the guest for as long as it is in flight.
struct Writes {
    ring: Ring,
    count: u64,
    /// By head: which write it carries.
    in_flight: Vec<Option<u64>>,
    done: u64,
}

impl Writes {
    fn add(&mut self) {
        let number = self.count;
        let head = self.ring.next_head();
        // Heads are four apart.
        let data = DATA + u64::from(head) * 1024;
        self.ring.write(data, &pattern(number, 4096));
        self.ring.add(1, number * 8, data, 4096);
        assert_eq!(self.in_flight[usize::from(head)].replace(number), None);
        self.count += 1;
    }

    /// What came back is on the node.
    fn reap(&mut self, rig: &Rig) {
        for used in self.ring.used() {
            let number = self.in_flight[usize::from(used.head)].take().expect("a write in flight");
            assert_eq!((used.status, used.len), (0, 1), "write {number}");
            let at = number as usize * 4096;
            assert!(rig.node.image[at..at + 4096] == pattern(number, 4096), "write {number} is on the node");
            self.done += 1;
        }
    }
}

/// P-75, P-91, P-92, P-93: killed at any moment, with requests taken, with the node, and answered. The front-end names the available index, which is wrong.
#[test]
fn whenever_the_backend_is_killed_each_request_is_done_once_for_the_guest() {
    for seed in 1..=16u64 {
        let (mut rig, ring) = Rig::ready(9000);
        let mut writes = Writes { ring, count: 0, in_flight: vec![None; SIZE.into()], done: 0 };
        let mut state = seed;
        while writes.count < 2000 {
            let free = u64::from(SIZE) / 4 - (writes.count - writes.done);
            (0..dice(&mut state, 8).min(free)).for_each(|_| writes.add());
            (0..dice(&mut state, 6)).for_each(|_| rig.step());
            rig.node.hold = dice(&mut state, 8) == 0;
            rig.node.silent = dice(&mut state, 16) == 0;
            writes.reap(&rig);
            if dice(&mut state, 16) == 0 {
                rig.kill();
                (0..dice(&mut state, 40)).for_each(|_| rig.step());
                rig.reconnect(&writes.ring);
            }
        }
        (rig.node.hold, rig.node.silent) = (false, false);
        rig.run_until("every write came back", |rig| {
            writes.reap(rig);
            writes.done == writes.count
        });
    }
}

/// P-92: a request that is older than a lap of the ring is not in the available ring any more, and is issued again all the same.
#[test]
fn a_request_that_all_others_overtook_survives_the_backend() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.hold_back = Some(Op::Flush);
    let slow = ring.add(4, 0, 0, 0);
    for sector in 0..2 * u64::from(SIZE) {
        rig.one(&mut ring, (0, sector), DATA, 512);
    }
    rig.kill();
    rig.node.hold_back = None;
    rig.run(Nanos::from_millis(5));
    assert!(ring.used().is_empty());
    rig.reconnect(&ring);
    assert_eq!(rig.wait_for(&mut ring, 1), [Used { head: slow, len: 1, status: 0 }]);
    assert_eq!(rig.one(&mut ring, (0, 0), DATA, 512).status, 0);
}

fn file_backed() -> Regions {
    let file = TempFile::new().unwrap().into_file();
    file.set_len(16 * MIB as u64).unwrap();
    Regions::from_ranges_with_files([(GuestAddress(0), 16 * MIB, Some(FileOffset::new(file, 0)))]).unwrap()
}

/// A guest with a write in flight, whose backend is then killed.
fn killed_with_a_write(memory: Regions) -> (Rig, Ring) {
    let mut rig = Rig::with_memory(9000, memory);
    rig.run_until("attached", |rig| rig.attach.get().is_some());
    let memory = rig.memory.clone();
    rig.ask(Change::Memory(memory));
    let (mut ring, _signals) = rig.start(0, true);
    assert_eq!(rig.one(&mut ring, (0, 0), DATA, 512).status, 0);
    rig.node.silent = true;
    ring.write(DATA, &pattern(1, 4096));
    ring.add(1, 16, DATA, 4096);
    rig.run(Nanos::from_millis(1));
    rig.kill();
    rig.node.silent = false;
    (rig, ring)
}

/// P-90
#[test]
fn the_same_vm_gets_its_request_done_and_another_one_does_not() {
    let (mut rig, mut ring) = killed_with_a_write(file_backed());
    rig.reconnect(&ring);
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
    assert_eq!(rig.node.image[16 * 512..][..4096], pattern(1, 4096));

    let (mut rig, _ring) = killed_with_a_write(file_backed());
    let mut all = vec![0; 16 * MIB];
    rig.memory.read_slice(&mut all, GuestAddress(0)).unwrap();
    rig.memory = file_backed();
    rig.memory.write_slice(&all, GuestAddress(0)).unwrap();
    let mut twin = Ring::new(&rig.memory, 0, true);
    twin.skip_to(1, 2);
    rig.reconnect(&twin);
    rig.run(Nanos::from_millis(300));
    assert!(rig.node.runs.iter().all(|run| run.0 != Op::Write), "{:?}", rig.node.runs);
}

/// P-92: a guest that was reset while its node was dead and its backend was killed.
#[test]
fn a_reset_guest_at_the_same_addresses_gets_nothing_of_what_was_before() {
    let (mut rig, ring) = killed_with_a_write(file_backed());
    ring.write(0, &vec![0; DATA as usize]);
    let mut fresh = Ring::new(&rig.memory, 0, true);
    rig.reconnect(&fresh);
    assert_eq!(rig.one(&mut fresh, (0, 0), DATA, 512).status, 0);
    rig.run(Nanos::from_millis(300));
    assert!(rig.node.runs.iter().all(|run| run.0 != Op::Write), "{:?}", rig.node.runs);
    assert!(fresh.used().is_empty());
}

/// P-94: without a kick, with avail_event armed again, and with one signal for what was used and not told of.
#[test]
fn a_ring_that_starts_is_looked_at_and_its_guest_is_signalled_once() {
    let (mut rig, mut ring) = Rig::ready(9000);
    let first = ring.add(0, 0, DATA, 512);
    rig.run(Nanos::from_micros(100));
    rig.kill();
    let second = ring.add(0, 0, DATA, 512);
    let memory = rig.memory.clone();
    rig.ask(Change::Memory(memory));
    let mut signals = rig.start_at(0, &ring);
    let mut bytes = [0; 8];
    signals.read_exact(&mut bytes).unwrap();
    assert_eq!(u64::from_ne_bytes(bytes), 1);
    let heads: Vec<u16> = rig.wait_for(&mut ring, 2).iter().map(|used| used.head).collect();
    assert_eq!(heads, [first, second]);
    rig.run(Nanos::from_millis(1));
    assert!(rig.worker.may_sleep());
    ring.add(0, 0, DATA, 512);
    assert!(ring.wants_kick());
}

/// P-95: heads that a stop left unfinished are issued again by the next process too.
#[test]
fn what_a_stop_left_unfinished_survives_the_backend() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.silent = true;
    ring.write(DATA, &pattern(2, 4096));
    ring.add(1, 16, DATA, 4096);
    rig.run(Nanos::from_millis(1));
    let stopped = rig.mailbox.send(DISK, Change::Stop { ring: 0 });
    rig.run(Nanos::from_millis(2010));
    assert!(matches!(stopped.wait(), Some(Answer::Stopped { next_avail: 1, unfinished: 1 })));
    rig.kill();
    rig.node.silent = false;
    rig.reconnect(&ring);
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
    assert_eq!(rig.node.image[16 * 512..][..4096], pattern(2, 4096));
}

#[test]
fn a_backend_that_remembers_its_volume_takes_requests_before_a_node_is_there() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.silent = true;
    rig.kill();
    rig.reconnect(&ring);
    ring.write(DATA, &pattern(3, 4096));
    ring.add(1, 16 * 2048 - 8, DATA, 4096);
    rig.run(Nanos::from_secs(3));
    assert!(ring.used().is_empty(), "it waits, and is not refused");
    assert!(rig.attach.get().is_none());
    rig.node.silent = false;
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
    assert_eq!(rig.node.image[16 * MIB - 4096..], pattern(3, 4096));
}

#[test]
fn a_volume_that_changed_while_the_backend_was_away_is_taken_as_it_is() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.kill();
    rig.node.info.capacity_sectors /= 2;
    rig.reconnect(&ring);
    rig.run_until("attached", |rig| rig.attach.get().is_some());
    assert_eq!(rig.one(&mut ring, (0, 8 * 2048 - 8), DATA, 4096).status, 0);
    assert_eq!(rig.one(&mut ring, (0, 8 * 2048), DATA, 4096).status, 1, "past the new end");
}
