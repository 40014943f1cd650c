//! The storage machine's disks: a volume as the kernel has it and as it is after a power cut, the store over it, and the keeper of owners.
//!
//! Knows requests of the store and virtual time; does not know sessions. The production node drives [`SimStore`] and [`SimKeeper`]; `machine` kills them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cirro_node::owner::{Keeper, Keeping, OwnerRecord};
use cirro_node::store::{Completion, FileId, Request, STORE_REQUESTS_MAX, Store, StoreError, StoreOp};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::Uuid;
use cirro_protocol::types::VolumeName;
use fastrand::Rng;

/// The unit that is written whole or not at all.
pub(crate) const SECTOR: usize = 512;

/// What a disk does wrong, in millionths of the requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DiskTrouble {
    /// EIO on a read or write, which then did a part.
    pub(crate) errors: u32,
    /// EIO on a flush: what was not stable never will be.
    pub(crate) flush_errors: u32,
    /// No space for a write.
    pub(crate) no_space: u32,
    /// A request takes up to `slow_time`.
    pub(crate) slow: u32,
    pub(crate) slow_time: Nanos,
}

/// A volume's bytes.
#[derive(Debug)]
pub(crate) struct Image {
    /// As every reader sees them.
    pub(crate) live: Vec<u8>,
    /// As they are after a power cut, but for what the disk happened to have written.
    pub(crate) durable: Vec<u8>,
    /// Sectors that differ, or may, with the number of their last change.
    dirty: BTreeMap<u64, u64>,
    /// Changes of sectors so far.
    puts: u64,
    /// Which change of a sector is the durable one.
    stable_puts: BTreeMap<u64, u64>,
    pub(crate) write_through: bool,
    pub(crate) trouble: DiskTrouble,
    /// The node's process that was told of a failed flush last.
    flush_failed_in: Option<u32>,
}

impl Image {
    pub(crate) fn new(bytes: usize, write_through: bool) -> Image {
        Image {
            live: vec![0; bytes],
            durable: vec![0; bytes],
            dirty: BTreeMap::new(),
            puts: 0,
            stable_puts: BTreeMap::new(),
            write_through,
            trouble: DiskTrouble::default(),
            flush_failed_in: None,
        }
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.live[offset..offset + bytes.len()].copy_from_slice(bytes);
        for sector in offset / SECTOR..(offset + bytes.len()).div_ceil(SECTOR) {
            self.puts += 1;
            self.dirty.insert(sector as u64, self.puts);
        }
    }

    fn sectors_to_flush(&self) -> Vec<Flushed> {
        let flushed = |(sector, put): (&u64, &u64)| (*sector, *put, self.sector(*sector));
        self.dirty.iter().map(flushed).collect()
    }

    fn sector(&self, sector: u64) -> [u8; SECTOR] {
        let at = sector as usize * SECTOR;
        self.live[at..at + SECTOR].try_into().expect("a sector")
    }

    /// What is stable already and newer stays: a flush that takes long does not bring back what it saw at its start.
    fn make_stable(&mut self, sectors: &[Flushed]) {
        for (sector, put, bytes) in sectors {
            let at = *sector as usize * SECTOR;
            let newest = self.stable_puts.entry(*sector).or_default();
            if *put > *newest {
                *newest = *put;
                self.durable[at..at + SECTOR].copy_from_slice(bytes);
            }
            if self.dirty.get(sector) == Some(put) {
                self.dirty.remove(sector);
            }
        }
    }

    /// The machine loses power: of what was not stable, some sectors were written all the same.
    pub(crate) fn lose_power(&mut self, rng: &mut Rng) {
        for sector in std::mem::take(&mut self.dirty).into_keys() {
            let at = sector as usize * SECTOR;
            if rng.u8(0..3) == 0 {
                let bytes = self.sector(sector);
                self.durable[at..at + SECTOR].copy_from_slice(&bytes);
            }
        }
        self.live.copy_from_slice(&self.durable);
    }
}

/// A sector with the number of its last change and its bytes.
type Flushed = (u64, u64, [u8; SECTOR]);

/// A request in the kernel.
#[derive(Debug)]
struct Busy {
    due: Instant,
    number: u64,
    process: u32,
    image: usize,
    request: Request,
    /// What a flush will make stable: the contents at its start.
    stable: Vec<Flushed>,
    errno: Option<i32>,
}

/// The kernel below the store: it outlives the node's process.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) images: Vec<Image>,
    busy: Vec<Busy>,
    next_number: u64,
    pub(crate) now: Instant,
    /// The node's process of now.
    pub(crate) process: u32,
    /// Requests that a disk failed.
    pub(crate) failed: u64,
    rng: Rng,
}

impl Kernel {
    pub(crate) fn new(images: Vec<Image>, rng: Rng) -> Kernel {
        Kernel {
            images,
            busy: Vec::new(),
            next_number: 0,
            now: Instant::default(),
            process: 0,
            failed: 0,
            rng,
        }
    }

    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.busy.iter().map(|busy| busy.due).min()
    }

    /// True if the node of now had a flush that failed: it answers none with OK any more.
    pub(crate) fn has_failed_flush(&self, image: usize) -> bool {
        self.images[image].flush_failed_in == Some(self.process)
    }

    /// The process is gone: its requests end by themselves, and their files stay locked until then.
    pub(crate) fn finish_orphans(&mut self) {
        let process = self.process;
        while let Some(busy) = self.take_due(|of| of != process) {
            self.perform(busy);
        }
    }

    /// True while a request of a process that is gone keeps the volume's lock.
    pub(crate) fn is_locked(&self, image: usize) -> bool {
        self.busy.iter().any(|busy| busy.image == image && busy.process != self.process)
    }

    /// The machine loses power: requests in the kernel are done in part, or not.
    pub(crate) fn lose_power(&mut self) {
        for busy in std::mem::take(&mut self.busy) {
            if busy.request.op == StoreOp::Write && self.rng.bool() {
                self.write_part(&busy);
            }
        }
        let rng = &mut self.rng;
        self.images.iter_mut().for_each(|image| image.lose_power(rng));
    }

    fn take_due(&mut self, of: impl Fn(u32) -> bool) -> Option<Busy> {
        let now = self.now;
        let due = self.busy.iter().enumerate().filter(|(_, busy)| busy.due <= now && of(busy.process));
        let (place, _) = due.min_by_key(|(_, busy)| (busy.due, busy.number))?;
        Some(self.busy.swap_remove(place))
    }

    fn submit(&mut self, image: usize, request: Request) {
        let trouble = &self.images[image].trouble;
        let roll = |rng: &mut Rng, chance: u32| chance > 0 && rng.u32(0..1_000_000) < chance;
        let errno = match request.op {
            StoreOp::Flush => roll(&mut self.rng, trouble.flush_errors).then_some(libc::EIO),
            StoreOp::Read => roll(&mut self.rng, trouble.errors).then_some(libc::EIO),
            StoreOp::Write | StoreOp::WriteZeroes | StoreOp::Discard => {
                let failed = roll(&mut self.rng, trouble.errors).then_some(libc::EIO);
                failed.or(roll(&mut self.rng, trouble.no_space).then_some(libc::ENOSPC))
            }
        };
        let mut takes = Nanos(self.rng.u64(0..200_000));
        if roll(&mut self.rng, trouble.slow) {
            takes = Nanos(self.rng.u64(0..trouble.slow_time.0.max(1)));
        }
        let image_now = &mut self.images[image];
        let stable = if request.op == StoreOp::Flush { image_now.sectors_to_flush() } else { Vec::new() };
        self.next_number += 1;
        let (due, number, process) = (self.now + takes, self.next_number, self.process);
        self.busy.push(Busy { due, number, process, image, request, stable, errno });
    }

    /// A part of a write, in whole sectors and from its start.
    fn write_part(&mut self, busy: &Busy) {
        let Some(buffer) = &busy.request.buffer else { return };
        let sectors = self.rng.usize(0..=buffer.bytes().len() / SECTOR);
        self.images[busy.image].put(busy.request.offset as usize, &buffer.bytes()[..sectors * SECTOR]);
    }

    fn perform(&mut self, mut busy: Busy) -> Completion {
        let (offset, len) = (busy.request.offset as usize, busy.request.len as usize);
        let (op, token) = (busy.request.op, busy.request.token);
        if let Some(errno) = busy.errno {
            self.failed += 1;
            if op == StoreOp::Write {
                self.write_part(&busy);
            }
            if op == StoreOp::Flush {
                // What a kernel does: the pages count as clean from now on, and were never written.
                let image = &mut self.images[busy.image];
                image.flush_failed_in = Some(busy.process);
                image.dirty.retain(|sector, _| busy.stable.iter().all(|(flushed, ..)| flushed != sector));
            }
            let error =
                StoreError::Failed { op, offset: busy.request.offset, len: busy.request.len, done: 0, errno };
            return Completion { token, op, result: Err(error), buffer: busy.request.buffer.take() };
        }
        let image = &mut self.images[busy.image];
        match (op, &mut busy.request.buffer) {
            (StoreOp::Read, Some(buffer)) => {
                buffer.bytes_mut().copy_from_slice(&image.live[offset..offset + len])
            }
            (StoreOp::Write, Some(buffer)) => image.put(offset, buffer.bytes()),
            (StoreOp::WriteZeroes | StoreOp::Discard, _) => image.put(offset, &vec![0; len]),
            (StoreOp::Flush, _) => image.make_stable(&busy.stable),
            (StoreOp::Read | StoreOp::Write, None) => unreachable!("reads and writes have buffers"),
        }
        if image.write_through && !matches!(op, StoreOp::Read | StoreOp::Flush) {
            let sectors: Vec<_> = (offset / SECTOR..(offset + len) / SECTOR)
                .map(|sector| (sector as u64, image.dirty[&(sector as u64)], image.sector(sector as u64)))
                .collect();
            image.make_stable(&sectors);
        }
        Completion { token, op, result: Ok(()), buffer: busy.request.buffer.take() }
    }
}

/// The store that the node drives. Files are images by number.
pub(crate) struct SimStore {
    kernel: Rc<RefCell<Kernel>>,
    files: Vec<usize>,
}

impl SimStore {
    pub(crate) fn new(kernel: &Rc<RefCell<Kernel>>) -> SimStore {
        SimStore { kernel: Rc::clone(kernel), files: Vec::new() }
    }

    pub(crate) fn attach(&mut self, image: usize) -> FileId {
        self.files.push(image);
        FileId(self.files.len() as u16 - 1)
    }
}

impl Store for SimStore {
    fn room(&self) -> usize {
        STORE_REQUESTS_MAX - self.kernel.borrow().busy.len().min(STORE_REQUESTS_MAX)
    }

    fn submit(&mut self, request: Request) -> Result<(), Request> {
        if self.room() == 0 {
            return Err(request);
        }
        let image = self.files[usize::from(request.file.0)];
        self.kernel.borrow_mut().submit(image, request);
        Ok(())
    }

    fn push(&mut self) {}

    fn complete(&mut self) -> Option<Completion> {
        let mut kernel = self.kernel.borrow_mut();
        let process = kernel.process;
        let busy = kernel.take_due(|of| of == process)?;
        Some(kernel.perform(busy))
    }
}

/// Owners' records on the storage machine's own disk, with those on their way to it.
#[derive(Debug, Default)]
pub(crate) struct Records {
    durable: BTreeMap<String, OwnerRecord>,
    waiting: Vec<(Instant, Keeping)>,
    /// Who had a volume before and who has it now, since the last look.
    changes: Vec<(String, Option<Uuid>, Option<Uuid>)>,
    pub(crate) now: Instant,
    takes: u64,
}

impl Records {
    fn put(&mut self, keeping: &Keeping) {
        let name = keeping.volume.as_str().to_owned();
        let before = self.durable.insert(name.clone(), keeping.record).and_then(|record| record.holder);
        if before != keeping.record.holder {
            self.changes.push((name, before, keeping.record.holder));
        }
    }
}

/// The keeper that the node drives.
#[derive(Clone, Debug, Default)]
pub(crate) struct SimKeeper(Arc<Mutex<Records>>);

impl SimKeeper {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Records> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the next node finds.
    pub(crate) fn record(&self, volume: &VolumeName) -> OwnerRecord {
        self.lock().durable.get(volume.as_str()).copied().unwrap_or_default()
    }

    /// The node is gone: records on their way were written or not.
    pub(crate) fn crash(&self, rng: &mut Rng) {
        let mut records = self.lock();
        for (_, keeping) in std::mem::take(&mut records.waiting) {
            if rng.bool() {
                records.put(&keeping);
            }
        }
    }

    /// Which volumes have another holder since the last time: volume, who had it, who has it.
    pub(crate) fn take_changes(&self) -> Vec<(String, Option<Uuid>, Option<Uuid>)> {
        std::mem::take(&mut self.lock().changes)
    }

    /// How long the next records take.
    pub(crate) fn set_time(&self, takes: Nanos) {
        self.lock().takes = takes.0;
    }

    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.lock().waiting.iter().map(|(due, _)| *due).min()
    }
}

impl Keeper for SimKeeper {
    fn keep(&mut self, keeping: Keeping) -> bool {
        let mut records = self.lock();
        let due = records.now + Nanos(records.takes);
        records.waiting.push((due, keeping));
        true
    }

    fn kept(&mut self) -> Option<(Keeping, bool)> {
        let mut records = self.lock();
        let now = records.now;
        let place = records.waiting.iter().position(|(due, _)| *due <= now)?;
        let (_, keeping) = records.waiting.remove(place);
        records.put(&keeping);
        Some((keeping, true))
    }
}
