//! The copy of unflushed writes by itself, against a plain list: in order, over the wrap, when it is full, and after the death of the process at each step.
//!
//! Knows the layout of the header, to leave it as a process that died would; does not know sessions.

use std::sync::atomic::Ordering;

use cirro_backend::mapped::Mapped;
use cirro_backend::replay::{CAPACITY_MIN, Entry, Life, Replay};
use cirro_protocol::op::Op;
use cirro_protocol::types::Uuid;

/// Words of the header: how far entries were appended, and how far they were dropped.
const HEAD_AT: usize = 7;
const TAIL_AT: usize = 8;
const MIB: u32 = 1 << 20;
const BOOT: u128 = 77;

/// Numbers that follow from a seed (Knuth's MMIX generator).
fn dice(state: &mut u64, end: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % end
}

/// Data that tells which change it is of, and which byte.
fn byte(number: u64, at: u64) -> u8 {
    (number.wrapping_mul(151) ^ at.wrapping_mul(7) ^ at >> 8) as u8
}

fn write(offset: u64, len: u32) -> Entry {
    Entry { op: Op::Write, offset, len }
}

/// A copy and what must be in it: entries with the numbers of their data, and their positions.
struct Bench {
    memory: Mapped,
    copy: Replay,
    model: Vec<(Entry, u64, u64)>,
    count: u64,
}

impl Bench {
    fn new() -> Bench {
        let memory = Mapped::in_memory(Replay::bytes(2 * CAPACITY_MIN));
        let copy = Replay::new(memory.clone(), BOOT, CAPACITY_MIN);
        Bench { memory, copy, model: Vec::new(), count: 0 }
    }

    fn keep(&mut self, entry: Entry) -> bool {
        let (number, position) = (self.count, self.copy.head());
        let kept = self.copy.append(entry, |from, place| {
            let bytes: Vec<u8> =
                (0..place.len() as u64).map(|at| byte(number, u64::from(from) + at)).collect();
            place.copy_from(&bytes);
        });
        if kept {
            self.model.push((entry, number, position));
            self.count += 1;
        }
        kept
    }

    fn drop_before(&mut self, mark: u64) {
        self.copy.drop_before(mark);
        self.model.retain(|(_, _, position)| *position >= mark);
    }

    /// The process dies and another one opens what it left.
    fn die(&mut self, capacity: u64) {
        self.copy = Replay::new(self.memory.clone(), BOOT, capacity);
        assert!(!self.copy.was_damaged());
    }

    fn check(&self) {
        let mut next = self.copy.first();
        for (entry, number, position) in &self.model {
            let kept = next.expect("an entry of the list");
            assert_eq!((kept.entry, kept.position), (*entry, *position));
            if entry.op == Op::Write {
                let (from, mut bytes) = (entry.len / 3, vec![0; (entry.len - entry.len / 3) as usize]);
                self.copy.read(kept.position, from, &mut bytes);
                let wanted = (u64::from(from)..).map(|at| byte(*number, at));
                assert!(bytes.iter().copied().eq(wanted.take(bytes.len())), "data of entry {number}");
            }
            next = self.copy.at(kept.end());
        }
        assert_eq!(next, None);
        assert_eq!(self.copy.is_empty(), self.model.is_empty());
        let kept: u64 = self.model.iter().map(|(entry, _, _)| entry.size()).sum();
        assert_eq!(self.copy.bytes_kept(), kept);
    }
}

fn some_entry(state: &mut u64) -> Entry {
    let offset = dice(state, 1 << 20) * 512;
    match dice(state, 8) {
        0 => Entry { op: Op::Discard, offset, len: dice(state, 1 << 20) as u32 + 1 },
        1 => Entry { op: Op::WriteZeroes, offset, len: dice(state, 1 << 20) as u32 + 1 },
        2 => write(offset, (dice(state, 2048) as u32 + 1) * 512),
        _ => write(offset, (dice(state, 64) as u32 + 1) * 512),
    }
}

/// P-89: in order, each with its own data, whatever is appended, flushed, and killed.
#[test]
fn whatever_happens_the_copy_is_the_list_of_what_no_flush_covers() {
    let mut full = 0;
    for seed in 1..=20u64 {
        let (mut bench, mut state) = (Bench::new(), seed);
        let mut marks = vec![0];
        for _ in 0..600 {
            match dice(&mut state, 20) {
                0..14 => full += u32::from(!bench.keep(some_entry(&mut state))),
                14 | 15 => marks.push(bench.copy.head()),
                16 | 17 => {
                    let mark = marks[dice(&mut state, marks.len() as u64) as usize];
                    bench.drop_before(mark);
                }
                18 => {
                    // A flush dies with the process that asked for it.
                    bench.die([CAPACITY_MIN, 2 * CAPACITY_MIN][dice(&mut state, 2) as usize]);
                    marks = vec![0];
                }
                _ => bench.drop_before(bench.copy.head()),
            }
            bench.check();
        }
        assert!(bench.count > 100, "seed {seed} appends: {}", bench.count);
    }
    assert!(full > 100, "it was full {full} times");
}

#[test]
fn an_entry_counts_from_the_store_of_the_head_on_and_not_before() {
    let mut bench = Bench::new();
    assert!(bench.keep(write(0, 4096)));
    let before = bench.memory.word(HEAD_AT).load(Ordering::Acquire);
    assert!(bench.keep(write(8192, 512)));
    bench.memory.word(HEAD_AT).store(before, Ordering::Release);
    bench.model.pop();
    bench.die(CAPACITY_MIN);
    bench.check();
    assert!(bench.keep(write(512, 512)));
    bench.check();
}

/// An empty copy begins at its first place again in two stores, and the process may die between them.
#[test]
fn a_death_while_an_empty_copy_begins_again_leaves_an_empty_one() {
    let mut bench = Bench::new();
    assert!(bench.keep(write(0, 4096)));
    let head = bench.memory.word(HEAD_AT).load(Ordering::Acquire);
    bench.drop_before(bench.copy.head());
    assert!(bench.memory.word(TAIL_AT).load(Ordering::Acquire) > head);
    bench.memory.word(HEAD_AT).store(head, Ordering::Release);
    bench.die(CAPACITY_MIN);
    bench.check();
    assert!(bench.keep(write(512, 512)));
    bench.check();
}

/// P-89: a flush that was submitted before the copy was emptied covers nothing of what came after.
#[test]
fn a_mark_of_before_never_drops_what_came_after_the_copy_was_empty() {
    let mut bench = Bench::new();
    assert!(bench.keep(write(0, 1 << 19)));
    let mark = bench.copy.head();
    bench.drop_before(mark);
    assert!(bench.keep(write(4096, 512)));
    bench.copy.drop_before(mark);
    bench.check();
    assert_eq!(bench.model.len(), 1);
}

#[test]
fn a_full_copy_takes_nothing_and_stays_as_it_was() {
    let mut bench = Bench::new();
    let big = write(0, MIB - 4096);
    assert!(bench.keep(big) && bench.keep(big));
    assert!(!bench.keep(big), "a third one does not fit");
    assert!(!bench.keep(write(0, 16384)));
    bench.check();
    bench.drop_before(bench.copy.head());
    assert!(bench.keep(write(0, MIB)), "an empty copy takes the largest change");
    bench.check();
}

#[test]
fn the_epoch_held_outlives_the_process_and_not_the_boot() {
    let mut bench = Bench::new();
    bench.copy.set_held(7);
    bench.die(CAPACITY_MIN);
    assert_eq!(bench.copy.held(), 7, "with nothing kept");
    assert!(bench.keep(write(0, 512)));
    bench.die(CAPACITY_MIN);
    assert_eq!(bench.copy.held(), 7);
    assert_eq!(Replay::new(bench.memory.clone(), BOOT + 1, CAPACITY_MIN).held(), 0);
}

#[test]
fn the_life_is_kept_with_the_entries_and_another_boot_finds_nothing() {
    let mut bench = Bench::new();
    let life = Life { incarnation: Uuid(std::array::from_fn(|at| at as u8 + 1)), vol_epoch: 9 };
    bench.copy.set_life(life);
    assert!(bench.keep(write(0, 4096)));
    bench.die(CAPACITY_MIN);
    assert_eq!(bench.copy.life(), life);
    bench.check();
    let other = Replay::new(bench.memory.clone(), BOOT + 1, CAPACITY_MIN);
    assert!(other.is_empty() && !other.was_damaged());
}

/// Nothing that lies there makes it panic, and what it takes for entries can be walked and read.
#[test]
fn any_words_are_a_copy_or_an_empty_one() {
    let odd = [0, 1, 8, 24, 4096, CAPACITY_MIN, 2 * CAPACITY_MIN, u64::MAX, u64::MAX - 7, !7, 1 << 63];
    for seed in 1..=800u64 {
        let (mut bench, mut state) = (Bench::new(), seed);
        for _ in 0..dice(&mut state, 6) {
            bench.keep(some_entry(&mut state));
        }
        for _ in 0..=dice(&mut state, 3) {
            // The header behind magic number and boot, or the first entries.
            let place =
                if dice(&mut state, 2) == 0 { 3 + dice(&mut state, 6) } else { 512 + dice(&mut state, 200) };
            let word = match dice(&mut state, 3) {
                0 => odd[dice(&mut state, odd.len() as u64) as usize],
                1 => bench.memory.word(place as usize).load(Ordering::Acquire) ^ 1 << dice(&mut state, 64),
                _ => dice(&mut state, 1 << 24) * 8,
            };
            bench.memory.word(place as usize).store(word, Ordering::Release);
        }
        let mut copy = Replay::new(bench.memory.clone(), BOOT, CAPACITY_MIN);
        let mut next = copy.first();
        while let Some(kept) = next {
            let data = if kept.entry.op == Op::Write { kept.entry.len } else { 0 };
            copy.read(kept.position, 0, &mut vec![0; data as usize]);
            next = copy.at(kept.end());
        }
        copy.drop_before(copy.head());
        assert!(copy.append(write(0, 4096), |_, _| {}), "seed {seed}: it can be used");
        assert!(!copy.is_empty());
    }
}

/// Head and tail near the end of numbers, where sums would overflow.
#[test]
fn positions_that_nobody_reaches_are_damage() {
    for (head, kept) in [!7, !7 - 8, 1 << 63].into_iter().flat_map(|head| [(head, 8), (head, 1024)]) {
        let mut bench = Bench::new();
        assert!(bench.keep(write(0, 512)));
        bench.memory.word(HEAD_AT).store(head, Ordering::Release);
        bench.memory.word(TAIL_AT).store(head - kept, Ordering::Release);
        let copy = Replay::new(bench.memory.clone(), BOOT, CAPACITY_MIN);
        assert!(copy.is_empty() && copy.was_damaged());
    }
}
