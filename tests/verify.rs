//! The judge of a disk: writes sectors that name themselves, remembers what it wrote, and compares whatever it reads.
//!
//! Does not know how requests travel. A sector holds its own number, its generation and the run's seed, so that a wrong one tells where it comes from.
//! Lives longer than a front-end: the same judge goes on after a restart. Used by every end-to-end test that moves data.

use std::fmt;
use std::time::Duration;

use crate::frontend::{Buffer, Failure, FrontEnd, Io, Op, Outcome, Workload};

/// The unit of virtio-blk.
const SECTOR: usize = 512;
/// Tries to find a place that no request in flight touches.
const PLACE_TRIES_MAX: u32 = 64;
/// Reads of the final pass.
const PASS_BYTES: usize = 128 << 10;
/// A run longer than any final pass.
const FOREVER: Duration = Duration::from_secs(3600);

/// A sector that does not hold what it must.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sector {sector} of {io:?} must hold {wanted} but holds {found}")]
pub struct Corruption {
    /// The request that read it.
    pub io: Io,
    /// Its number on the disk.
    pub sector: u64,
    /// What was written there last.
    pub wanted: Content,
    /// What came.
    pub found: Content,
}

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeroes.
    Zeroes,
    /// Zeroes, or this generation: it was discarded.
    Discarded(u32),
    /// Whole, as this generation of that sector.
    Written {
        /// The sector it was written for.
        sector: u64,
        /// How often its place had been written.
        generation: u32,
        /// The run that wrote it.
        seed: u32,
    },
    /// Nothing that was ever written.
    Garbage,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Content::Zeroes => write!(f, "zeroes"),
            Content::Discarded(generation) => write!(f, "zeroes or generation {generation}"),
            Content::Written { sector, generation, seed } => {
                write!(f, "sector {sector}, generation {generation}, seed {seed:#x}")
            }
            Content::Garbage => write!(f, "bytes that were never written whole"),
        }
    }
}

/// How large a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Always this many bytes.
    Fixed(usize),
    /// Any number of sectors up to this many bytes, small ones more often.
    UpTo(usize),
}

/// Which requests are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Reads and writes alike.
    ReadWrite,
    /// Writes only.
    Write,
    /// Also flushes, discards and writes of zeroes.
    Everything,
}

/// The judge.
#[derive(Debug)]
pub struct Verifier {
    seed: u32,
    random: u64,
    size: Size,
    mix: Mix,
    /// Of each sector: how often it was written, or [`ZEROED`], or [`DISCARDED`] and the generation before that.
    generations: Vec<u32>,
    /// The next generation.
    next: u32,
    /// What each slot does now.
    busy: Vec<Option<Io>>,
    scratch: Vec<u8>,
    /// Where the final pass is; None: not in it.
    pass_at: Option<u64>,
}

const ZEROED: u32 = 0;
const DISCARDED: u32 = 1 << 31;

impl Verifier {
    /// For a disk of zeroes of `bytes` bytes.
    pub fn new(bytes: u64, seed: u32) -> Verifier {
        let sectors = usize::try_from(bytes / SECTOR as u64).expect("a disk for tests");
        Verifier {
            seed,
            random: u64::from(seed) << 32 | 0x9E37_79B9,
            size: Size::Fixed(4096),
            mix: Mix::ReadWrite,
            generations: vec![ZEROED; sectors],
            next: 1,
            busy: Vec::new(),
            scratch: Vec::new(),
            pass_at: None,
        }
    }

    /// Keeps the front-end busy for `time`. Places and sizes are random, and no two requests in flight overlap unless both read.
    ///
    /// # Errors
    /// The first failure.
    pub fn run(
        &mut self,
        front_end: &mut FrontEnd,
        size: Size,
        mix: Mix,
        time: Duration,
    ) -> Result<Outcome, Failure> {
        (self.size, self.mix) = (size, mix);
        self.busy.clear();
        front_end.run(self, time)
    }

    /// Reads the whole disk and compares it.
    ///
    /// # Errors
    /// The first failure.
    pub fn check_all(&mut self, front_end: &mut FrontEnd) -> Result<Outcome, Failure> {
        self.busy.clear();
        self.pass_at = Some(0);
        let outcome = front_end.run(self, FOREVER);
        self.pass_at = None;
        outcome
    }

    /// Compares a raw image, as the node's side has it, with what was written.
    ///
    /// # Errors
    /// The first sector that is wrong.
    pub fn check_image(&mut self, image: &[u8]) -> Result<(), Corruption> {
        let io = Io { op: Op::Read, offset: 0, bytes: image.len() };
        assert_eq!(image.len(), self.generations.len() * SECTOR, "the image has the disk's size");
        self.compare(&io, image)
    }

    /// Sectors that hold zeroes, as far as is known.
    pub fn zeroes(&self) -> usize {
        self.generations.iter().filter(|state| **state == ZEROED).count()
    }

    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.random)
    }

    fn choose(&mut self) -> (Op, usize) {
        let op = match (self.mix, self.random() % 100) {
            (Mix::Write, _) => Op::Write,
            (Mix::ReadWrite, dice) => {
                if dice < 50 {
                    Op::Read
                } else {
                    Op::Write
                }
            }
            (Mix::Everything, 0..45) => Op::Read,
            (Mix::Everything, 45..85) => Op::Write,
            (Mix::Everything, 85..90) => Op::Flush,
            (Mix::Everything, 90..95) => Op::Discard,
            (Mix::Everything, _) => Op::WriteZeroes,
        };
        let bytes = match self.size {
            Size::Fixed(bytes) => bytes,
            Size::UpTo(bytes) => {
                let limit = (bytes / SECTOR) as u64 >> (self.random() % 8);
                (1 + self.random() % limit.max(1)) as usize * SECTOR
            }
        };
        (op, if op == Op::Flush { 0 } else { bytes })
    }

    /// A place for `bytes` bytes that nothing in flight forbids.
    fn place(&mut self, op: Op, bytes: usize) -> Option<u64> {
        if op == Op::Flush {
            return Some(0);
        }
        let step = match self.size {
            Size::Fixed(bytes) => bytes,
            Size::UpTo(_) => SECTOR,
        };
        let places = (self.generations.len() * SECTOR - bytes) / step + 1;
        for _ in 0..PLACE_TRIES_MAX {
            let offset = self.random() % places as u64 * step as u64;
            let io = Io { op, offset, bytes };
            if !self.busy.iter().flatten().any(|other| conflict(&io, other)) {
                return Some(offset);
            }
        }
        None
    }

    /// Writes what the sectors of `io` are to hold into its buffer and remembers it.
    fn fill(&mut self, io: &Io, buffer: &Buffer<'_>) {
        self.scratch.resize(io.bytes, 0);
        let first = io.offset / SECTOR as u64;
        let generation = self.next;
        self.next += 1;
        assert!(generation < DISCARDED, "generations are not used up");
        for (index, sector) in self.scratch.chunks_exact_mut(SECTOR).enumerate() {
            let number = first + index as u64;
            stamp(sector, number, generation, self.seed);
            self.generations[number as usize] = generation;
        }
        buffer.write(&self.scratch);
    }

    fn compare(&self, io: &Io, bytes: &[u8]) -> Result<(), Corruption> {
        let first = io.offset / SECTOR as u64;
        let mut expected = [0; SECTOR];
        for (index, found) in bytes.chunks_exact(SECTOR).enumerate() {
            let sector = first + index as u64;
            let state = self.generations[sector as usize];
            let generation = state & !DISCARDED;
            if (generation == ZEROED || state & DISCARDED != 0) && found.iter().all(|byte| *byte == 0) {
                continue;
            }
            stamp(&mut expected, sector, generation, self.seed);
            if generation != ZEROED && found == expected {
                continue;
            }
            let wanted = match state {
                ZEROED => Content::Zeroes,
                _ if state & DISCARDED != 0 => Content::Discarded(generation),
                _ => Content::Written { sector, generation, seed: self.seed },
            };
            return Err(Corruption { io: *io, sector, wanted, found: identify(found) });
        }
        Ok(())
    }

    fn next_of_pass(&mut self, at: u64) -> Option<Io> {
        let size = (self.generations.len() * SECTOR) as u64;
        let bytes = (size - at).min(PASS_BYTES as u64);
        self.pass_at = Some(at + bytes);
        (bytes > 0).then_some(Io { op: Op::Read, offset: at, bytes: bytes as usize })
    }

    fn next_random(&mut self, front_buffer: &Buffer<'_>) -> Option<Io> {
        let (op, bytes) = self.choose();
        let offset = self.place(op, bytes)?;
        let io = Io { op, offset, bytes };
        let sectors = (offset / SECTOR as u64) as usize..(offset as usize + bytes) / SECTOR;
        match op {
            Op::Read | Op::Flush => {}
            Op::Write => self.fill(&io, front_buffer),
            Op::Discard => self.generations[sectors].iter_mut().for_each(|state| {
                if *state != ZEROED {
                    *state |= DISCARDED;
                }
            }),
            Op::WriteZeroes => self.generations[sectors].fill(ZEROED),
        }
        Some(io)
    }
}

impl Workload for Verifier {
    fn next(&mut self, slot: usize, buffer: &Buffer<'_>) -> Option<Io> {
        let io = match self.pass_at {
            Some(at) => self.next_of_pass(at),
            None => self.next_random(buffer),
        };
        if self.busy.len() <= slot {
            self.busy.resize(slot + 1, None);
        }
        self.busy[slot] = io;
        io
    }

    fn done(&mut self, slot: usize, io: &Io, buffer: &Buffer<'_>) -> Result<(), Corruption> {
        self.busy[slot] = None;
        if io.op != Op::Read {
            return Ok(());
        }
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.resize(io.bytes, 0);
        buffer.read(&mut bytes);
        let verdict = self.compare(io, &bytes);
        self.scratch = bytes;
        verdict
    }
}

/// Whether two requests touch a sector in common that one of them changes.
fn conflict(one: &Io, other: &Io) -> bool {
    let reads = one.op == Op::Read && other.op == Op::Read;
    let apart =
        one.offset + one.bytes as u64 <= other.offset || other.offset + other.bytes as u64 <= one.offset;
    !reads && !apart
}

/// A sector's content: number, generation and seed, then words that follow from them.
fn stamp(sector: &mut [u8], number: u64, generation: u32, seed: u32) {
    let head = u64::from(seed) << 32 | u64::from(generation);
    sector[..8].copy_from_slice(&number.to_le_bytes());
    sector[8..16].copy_from_slice(&head.to_le_bytes());
    let mut word = mix(number ^ head.rotate_left(17));
    for bytes in sector[16..].chunks_exact_mut(8) {
        word = word.wrapping_mul(0xD134_2543_DE82_EF95).wrapping_add(1);
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

/// Says what a wrong sector holds.
fn identify(found: &[u8]) -> Content {
    if found.iter().all(|byte| *byte == 0) {
        return Content::Zeroes;
    }
    let word = |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().expect("eight bytes"));
    let (sector, head) = (word(0), word(8));
    let (generation, seed) = (head as u32, (head >> 32) as u32);
    let mut whole = [0; SECTOR];
    stamp(&mut whole, sector, generation, seed);
    if whole == found { Content::Written { sector, generation, seed } } else { Content::Garbage }
}

/// The output function of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
