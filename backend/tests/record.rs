//! The record of what is in flight, held against a guest that notices everything: whatever the moment of the kill, each head comes back once.
//!
//! The device here is `RingRecord` with a queue and nothing else; the guest is a table of what is outstanding.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use cirro_backend::guest_memory::{GuestMemory, Regions};
use cirro_backend::mapped::Mapped;
use cirro_backend::record::{Opened, Other, Place, Record, RingRecord};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::tempfile::TempFile;

const SIZE: u16 = 8;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const BYTES: usize = 0x3000;

/// Numbers that follow from a seed (Marsaglia's xorshift64).
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 as usize) % end
    }
}

fn state(base: u16) -> QueueState {
    QueueState {
        max_size: 1024,
        next_avail: base,
        next_used: 0,
        event_idx_enabled: false,
        size: SIZE,
        ready: true,
        desc_table: 0,
        avail_ring: AVAIL,
        used_ring: USED,
    }
}

/// A driver that has one descriptor per request, and gives the same head again only after it came back.
struct Guest {
    memory: GuestMemory,
    free: Vec<u16>,
    outstanding: BTreeSet<u16>,
    /// Entries of the available ring that were written; its index may be behind.
    written: u16,
    avail_idx: u16,
    seen: u16,
}

impl Guest {
    fn new(regions: Regions, index: u16) -> Guest {
        let guest = Guest {
            memory: GuestMemory::new(regions),
            free: (0..SIZE).collect(),
            outstanding: BTreeSet::new(),
            written: index,
            avail_idx: index,
            seen: index,
        };
        guest.put(AVAIL + 2, index);
        guest.put(USED + 2, index);
        guest
    }

    fn put(&self, at: u64, value: u16) {
        self.memory.regions().write_obj(value, GuestAddress(at)).unwrap();
    }

    fn used_idx(&self) -> u16 {
        self.memory.regions().read_obj(GuestAddress(USED + 2)).unwrap()
    }

    /// Writes an entry without telling of it.
    fn write(&mut self, dice: &mut Dice) {
        if self.free.is_empty() {
            return;
        }
        let head = self.free.swap_remove(dice.below(self.free.len()));
        self.put(AVAIL + 4 + 2 * u64::from(self.written % SIZE), head);
        self.written = self.written.wrapping_add(1);
        assert!(self.outstanding.insert(head));
    }

    fn tell(&mut self) {
        self.avail_idx = self.written;
        self.put(AVAIL + 2, self.avail_idx);
    }

    fn reap(&mut self) {
        while self.seen != self.used_idx() {
            let at = USED + 4 + 8 * u64::from(self.seen % SIZE);
            let head = self.memory.regions().read_obj::<u32>(GuestAddress(at)).unwrap() as u16;
            assert!(self.outstanding.remove(&head), "head {head} came back twice");
            self.free.push(head);
            self.seen = self.seen.wrapping_add(1);
        }
    }
}

/// When a process dies while it gives a head back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    BeforeUsed,
    AfterUsed,
    BeforeFree,
}

/// A backend without anything but its ring.
struct Device {
    queue: Queue,
    record: RingRecord,
    memory: Mapped,
    /// In the order in which they were taken.
    live: Vec<u16>,
}

fn open(guest: &Guest, memory: &Mapped, boot: u128, state: QueueState) -> (Device, Opened) {
    let mut queue = Queue::try_from(state).unwrap();
    let mut record = Record::new(memory.clone(), boot).ring(0);
    let opened = record.open(Place { memory: &guest.memory, queue: &queue }, state.next_avail).unwrap();
    queue.set_next_used(opened.used_idx);
    queue.set_next_avail(opened.next_avail);
    (Device { queue, record, memory: memory.clone(), live: opened.again.clone() }, opened)
}

impl Device {
    fn pop(&mut self, guest: &Guest) -> Option<u16> {
        let chain = self.queue.pop_descriptor_chain(guest.memory.regions());
        chain.map(|chain| chain.head_index())
    }

    fn take(&mut self, guest: &Guest) {
        if let Some(head) = self.pop(guest) {
            self.record.take(head);
            self.live.push(head);
        }
    }

    fn words(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.len()];
        self.memory.read(0, &mut bytes);
        bytes
    }

    /// Gives a head back; gives what the record was while the used ring was written.
    fn give(&mut self, guest: &Guest, which: usize) -> Vec<u8> {
        let head = self.live.remove(which);
        let mut inside = vec![0; self.memory.len()];
        let Device { queue, record, memory, .. } = self;
        let publish = || {
            memory.read(0, &mut inside);
            queue.add_used(guest.memory.regions(), head, 1)
        };
        record.give(head, publish).unwrap();
        inside
    }

    /// Gives a head back and dies meanwhile: makes memory what it was at that moment. True if the guest has the head.
    fn die_giving(mut self, guest: &Guest, which: usize, death: Death) -> bool {
        let used_idx = guest.used_idx();
        let inside = self.give(guest, which);
        match death {
            Death::BeforeUsed => {
                guest.put(USED + 2, used_idx);
                self.memory.write(0, &inside);
            }
            Death::AfterUsed => self.memory.write(0, &inside),
            Death::BeforeFree => {
                // The entry's store is the last of all, and it is the only one behind the header, which has 16 words.
                let after = self.words();
                let at = (128..after.len()).step_by(8).find(|at| after[*at..*at + 8] != inside[*at..*at + 8]);
                let at = at.expect("an entry changed");
                self.memory.write(at, &inside[at..at + 8]);
            }
        }
        death != Death::BeforeUsed
    }
}

fn regions() -> Regions {
    Regions::from_ranges(&[(GuestAddress(0), BYTES)]).unwrap()
}

fn one_ring() -> Mapped {
    Mapped::in_memory(Record::bytes(1))
}

/// P-91, P-92, P-93: a process that dies at any step, while heads go back in any order and entries of the available ring are written over.
#[test]
fn whenever_a_process_dies_each_head_comes_back_once() {
    for seed in 1..=400u64 {
        let mut dice = Dice::new(seed);
        // Half of the runs pass the wrap of the indices.
        let start =
            if seed % 2 == 0 { 0u16.wrapping_sub(dice.below(200) as u16) } else { dice.below(3) as u16 };
        let (mut guest, memory) = (Guest::new(regions(), start), one_ring());
        let (mut device, _) = open(&guest, &memory, 1, state(start));
        for _ in 0..600 {
            match dice.below(16) {
                0..=3 => guest.write(&mut dice),
                4 | 5 => guest.tell(),
                6..=9 => device.take(&guest),
                // The oldest stays behind as a rule, often for more than a lap.
                10..=12 if device.live.len() > 1 => {
                    let which = 1 + dice.below(device.live.len() - 1);
                    device.give(&guest, which);
                }
                13 if dice.below(8) == 0 && !device.live.is_empty() => {
                    device.give(&guest, 0);
                }
                14 => guest.reap(),
                15 => {
                    let mut live = device.live.clone();
                    let deaths = [Death::BeforeUsed, Death::AfterUsed, Death::BeforeFree];
                    match dice.below(8) {
                        kind @ 0..=2 if !live.is_empty() => {
                            let which = dice.below(live.len());
                            if device.die_giving(&guest, which, deaths[kind]) {
                                live.remove(which);
                            }
                        }
                        3 => drop(device.pop(&guest)),
                        _ => {}
                    }
                    let nonsense = dice.below(1 << 16) as u16;
                    let (next, opened) = open(&guest, &memory, 1, state(nonsense));
                    assert_eq!((opened.again, opened.discarded), (live, None), "seed {seed}");
                    device = next;
                }
                _ => {}
            }
        }
        guest.tell();
        (0..SIZE).for_each(|_| device.take(&guest));
        (0..device.live.len()).for_each(|_| drop(device.give(&guest, 0)));
        guest.reap();
        assert!(guest.outstanding.is_empty(), "seed {seed}: {:?} never came back", guest.outstanding);
    }
}

/// P-92: a request may take as long as 70 000 others; positions are wider than the ring's indices.
#[test]
fn a_head_in_flight_for_more_than_all_indices_is_not_forgotten() {
    let (mut guest, memory, mut dice) = (Guest::new(regions(), 0), one_ring(), Dice(7));
    let (mut device, _) = open(&guest, &memory, 1, state(0));
    guest.write(&mut dice);
    guest.tell();
    device.take(&guest);
    let slow = device.live[0];
    for count in 1..70_000u32 {
        guest.write(&mut dice);
        guest.tell();
        device.take(&guest);
        device.give(&guest, 1);
        guest.reap();
        if count % 8191 == 0 || (65_530..65_545).contains(&count) {
            let (next, opened) = open(&guest, &memory, 1, state(0));
            assert_eq!((opened.again, opened.discarded), (vec![slow], None), "after {count}");
            assert_eq!(opened.next_avail, (count + 1) as u16, "used index + live");
            device = next;
        }
    }
}

/// A ring with three heads in flight and two given back.
fn busy() -> (Guest, Mapped, Vec<u16>) {
    busy_on(regions())
}

fn busy_on(regions: Regions) -> (Guest, Mapped, Vec<u16>) {
    let (mut guest, memory, mut dice) = (Guest::new(regions, 0), one_ring(), Dice(3));
    let (mut device, opened) = open(&guest, &memory, 1, state(0));
    assert_eq!(opened, Opened { used_idx: 0, next_avail: 0, again: vec![], discarded: None });
    (0..5).for_each(|_| guest.write(&mut dice));
    guest.tell();
    (0..5).for_each(|_| device.take(&guest));
    device.give(&guest, 3);
    device.give(&guest, 1);
    (guest, memory, device.live)
}

/// P-90
#[test]
fn the_record_of_another_boot_place_or_size_is_discarded() {
    let other = |boot, change: &dyn Fn(&mut QueueState)| {
        let (guest, memory, live) = busy();
        let mut state = state(2);
        change(&mut state);
        // The same indices at the other place.
        guest.memory.regions().write_obj(2u16, GuestAddress(state.used_ring + 2)).unwrap();
        let (_, opened) = open(&guest, &memory, boot, state);
        assert!(opened.again.is_empty());
        assert_eq!(opened.discarded, Some((Other::Ring, live.len())));
        assert_eq!(opened.next_avail, 2, "it begins where the front-end says");
    };
    other(2, &|_| {});
    other(1, &|state| state.desc_table = 0x100);
    other(1, &|state| state.avail_ring = AVAIL + 0x200);
    other(1, &|state| state.used_ring = USED + 0x200);
    other(1, &|state| state.size = 2 * SIZE);
    let (guest, memory, live) = busy();
    assert_eq!(open(&guest, &memory, 1, state(2)).1.again, live, "the same ring goes on");
}

fn file_backed() -> Regions {
    let file = TempFile::new().unwrap().into_file();
    file.set_len(BYTES as u64).unwrap();
    Regions::from_ranges_with_files([(GuestAddress(0), BYTES, Some(FileOffset::new(file, 0)))]).unwrap()
}

/// P-90: the file behind the guest's memory is the guest.
#[test]
fn the_record_of_another_vm_is_discarded_although_all_its_memory_is_the_same() {
    let (guest, memory, live) = busy_on(file_backed());
    let mut all = vec![0; BYTES];
    guest.memory.regions().read_slice(&mut all, GuestAddress(0)).unwrap();
    let twin = Guest { memory: GuestMemory::new(file_backed()), ..guest };
    twin.memory.regions().write_slice(&all, GuestAddress(0)).unwrap();
    let (_, opened) = open(&twin, &memory, 1, state(2));
    assert_eq!((opened.again, opened.discarded), (vec![], Some((Other::Ring, live.len()))));
}

/// P-92: a driver that began anew at the same addresses.
#[test]
fn a_guest_that_was_reset_gets_nothing_of_what_was_before() {
    let (guest, memory, live) = busy();
    let mut fresh = Guest::new(guest.memory.regions().clone(), 0);
    fresh.write(&mut Dice(5));
    fresh.tell();
    let (mut device, opened) = open(&fresh, &memory, 1, state(0));
    assert_eq!((opened.again, opened.discarded), (vec![], Some((Other::Index, live.len()))));
    device.take(&fresh);
    device.give(&fresh, 0);
    fresh.reap();
    assert!(fresh.outstanding.is_empty());
}

/// P-92: nothing was given back yet, so the used index tells nothing, but the entries do.
#[test]
fn a_guest_that_was_reset_before_anything_came_back_is_known_by_its_entries() {
    let (mut guest, memory) = (Guest::new(regions(), 0), one_ring());
    let (mut device, _) = open(&guest, &memory, 1, state(0));
    guest.free = vec![6, 5];
    (0..2).for_each(|_| guest.write(&mut Dice(1)));
    guest.tell();
    (0..2).for_each(|_| device.take(&guest));
    for heads in [vec![], vec![5], vec![1, 2]] {
        let kept = device.words();
        let mut fresh = Guest::new(regions(), 0);
        for head in heads {
            fresh.free = vec![head];
            fresh.write(&mut Dice(1));
        }
        fresh.tell();
        let (_, opened) = open(&fresh, &memory, 1, state(0));
        assert_eq!((opened.again, opened.discarded), (vec![], Some((Other::Heads, 2))));
        memory.write(0, &kept);
    }
}

/// P-92: the used index of a ring that came round is that of a new one.
#[test]
fn a_ring_that_came_round_to_index_0_is_not_taken_for_a_new_one() {
    let (mut guest, memory, mut dice) = (Guest::new(regions(), 65_533), one_ring(), Dice(9));
    let (mut device, _) = open(&guest, &memory, 1, state(65_533));
    guest.free = vec![0, 1, 2, 3];
    (0..4).for_each(|_| guest.write(&mut dice));
    guest.tell();
    (0..4).for_each(|_| device.take(&guest));
    (0..3).for_each(|_| drop(device.give(&guest, 1)));
    assert_eq!(guest.used_idx(), 0);
    let live = device.live.clone();
    let (device, opened) = open(&guest, &memory, 1, state(0));
    assert_eq!(opened.again, live, "the ring itself goes on");
    drop(device);
    guest.memory.regions().write_slice(&[0; BYTES], GuestAddress(0)).unwrap();
    let mut fresh = Guest::new(guest.memory.regions().clone(), 0);
    (0..2).for_each(|_| fresh.write(&mut dice));
    fresh.tell();
    let (_, opened) = open(&fresh, &memory, 1, state(0));
    assert_eq!((opened.again, opened.discarded), (vec![], Some((Other::Index, 1))));
}

/// What others took before the record began is not ours to issue, and not counted as ours.
#[test]
fn heads_that_another_back_end_took_stay_with_it() {
    let (mut guest, memory, mut dice) = (Guest::new(regions(), 10), one_ring(), Dice(4));
    (0..4).for_each(|_| guest.write(&mut dice));
    guest.tell();
    let (mut device, opened) = open(&guest, &memory, 1, state(12));
    assert_eq!((opened.used_idx, opened.next_avail), (10, 12));
    device.take(&guest);
    let (mut device, opened) = open(&guest, &memory, 1, state(10));
    assert_eq!((opened.next_avail, opened.again.len(), opened.discarded), (13, 1, None));
    device.take(&guest);
    (0..2).for_each(|_| drop(device.give(&guest, 0)));
    let (_, opened) = open(&guest, &memory, 1, state(0));
    assert_eq!((opened.used_idx, opened.next_avail, opened.again.len()), (12, 14, 0));
}

/// P-92: bytes that no process of ours wrote are discarded, and the ring works.
#[test]
fn whatever_bytes_a_record_holds_nothing_but_heads_of_the_ring_come_out() {
    for seed in 1..=3000u64 {
        let mut dice = Dice::new(seed);
        let (mut guest, memory, _) = busy();
        let words = memory.len() / 8;
        if seed % 8 == 0 {
            (0..words).for_each(|at| memory.write(8 * at, &(dice.below(usize::MAX) as u64).to_ne_bytes()));
        }
        for _ in 0..1 + dice.below(3) {
            // A bit of the header or of the entries of the ring, or a whole word.
            let at = 8 * dice.below(16 + usize::from(SIZE) + 4);
            let mut word = [0; 8];
            memory.read(at, &mut word);
            let flipped = u64::from_ne_bytes(word) ^ 1 << dice.below(64);
            let word = if dice.below(2) == 0 { flipped } else { dice.below(usize::MAX) as u64 };
            memory.write(at, &word.to_ne_bytes());
        }
        let opened = catch_unwind(AssertUnwindSafe(|| open(&guest, &memory, 1, state(5))));
        let Ok((mut device, opened)) = opened else { panic!("seed {seed}") };
        let heads: BTreeSet<u16> = opened.again.iter().copied().collect();
        assert_eq!(heads.len(), opened.again.len(), "seed {seed}: a head twice");
        assert!(heads.iter().all(|head| *head < SIZE), "seed {seed}: {heads:?}");
        assert!(opened.discarded.is_none() || heads.is_empty(), "seed {seed}");
        guest.reap();
        guest.write(&mut dice);
        guest.tell();
        device.take(&guest);
        (0..device.live.len()).for_each(|_| drop(device.give(&guest, 0)));
        let (_, opened) = open(&guest, &memory, 1, state(0));
        assert_eq!(
            (opened.again, opened.discarded),
            (vec![], None),
            "seed {seed}: what is there now is whole"
        );
    }
}

/// The used ring went away with its region: the record ends, and nothing of it is issued again.
#[test]
fn a_record_ends_with_the_memory_of_its_ring() {
    let (guest, memory, live) = busy();
    let (mut device, opened) = open(&guest, &memory, 1, state(0));
    assert_eq!(opened.again, live);
    assert_eq!(device.record.give(live[0], || Err("gone")), Err("gone"));
    let (_, opened) = open(&guest, &memory, 1, state(5));
    assert_eq!((opened.again, opened.discarded), (vec![], None));
    let mut queue = Queue::try_from(state(0)).unwrap();
    queue.set_used_ring_address(Some(BYTES as u32), Some(0));
    let nowhere = Place { memory: &guest.memory, queue: &queue };
    assert_eq!(Record::new(memory, 1).ring(0).open(nowhere, 0), None);
    assert!(guest.memory.regions().find_region(GuestAddress(BYTES as u64)).is_none());
}
