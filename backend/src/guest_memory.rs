//! The guest's memory: the only file that touches guest bytes.
//!
//! Knows regions, mappings and the dirty bitmap; does not know rings, requests or frames. Memory that a guest can change at any time is never a
//! `&[u8]`: it is copied through the stack, or named as a [`Run`] that the link reads once. Called by `request` (headers), `pending` (status
//! bytes) and `worker` (payloads).
#![allow(unsafe_code, reason = "a Run names guest memory by pointer; the one call that makes one is below")]

use std::sync::Arc;

use cirro_link::Run;
use cirro_protocol::types::BLOCK_BYTES;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
    VolatileSlice,
};

use crate::dirty_log::DirtyLog;
use crate::memory_guard::Guard;

/// Guest memory as the front-end described it; cheap to clone, and a clone keeps the mappings alive.
pub type Regions = GuestMemoryMmap<DirtyLog>;

/// A run of guest-physical memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestRun {
    /// Its first address.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// Where it starts in the data of its request.
    pub start: u32,
}

/// A part of guest memory that no region (any more) backs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest address {address:#x} (+{len}) is outside of guest memory")]
pub struct Outside {
    /// The first address of the access.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
}

/// The memory of one guest, as it is for the length of a turn.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    // Goes before the mappings that it guards.
    guard: Arc<Guard>,
    regions: Regions,
}

impl GuestMemory {
    /// The memory behind `regions`.
    pub fn new(regions: Regions) -> GuestMemory {
        let host_memory = regions.iter().map(|region| (region.as_ptr() as usize, region.len() as usize));
        GuestMemory { guard: Arc::new(Guard::new(host_memory)), regions }
    }

    /// The regions, for the operations of a virtqueue.
    pub fn regions(&self) -> &Regions {
        &self.regions
    }

    /// Pages that the front-end took away while they were wanted: its memory file became shorter.
    pub fn pages_replaced(&self) -> u64 {
        self.guard.pages_replaced()
    }

    /// True while the front-end keeps a log of what is written: it moves the guest elsewhere.
    pub fn is_logged(&self) -> bool {
        self.regions.iter().any(|region| region.bitmap().is_on())
    }

    /// True if every byte of the run is backed by a region.
    pub fn covers(&self, address: u64, len: u32) -> bool {
        self.pieces(address, len).is_ok_and(|mut pieces| pieces.all(|piece| piece.is_ok()))
    }

    /// One entry of a descriptor table.
    ///
    /// # Errors
    /// [`Outside`] when the entry is not in guest memory.
    pub fn descriptor(&self, table: u64, index: u32) -> Result<Descriptor, Outside> {
        let outside = Outside { address: table, len: 16 };
        let address = table.checked_add(u64::from(index) * 16).ok_or(outside)?;
        let mut entry = Descriptor::default();
        self.read(address, entry.as_mut_slice()).map_err(|_| Outside { address, ..outside })?;
        Ok(entry)
    }

    /// Copies from the guest, into a buffer of ours.
    ///
    /// # Errors
    /// [`Outside`]; the buffer's contents are then undefined.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Outside> {
        let mut at = 0;
        for piece in self.pieces(address, into.len() as u32)? {
            at += piece?.copy_to(&mut into[at..]);
        }
        Ok(())
    }

    /// Copies into the guest and marks what was written as dirty.
    ///
    /// # Errors
    /// [`Outside`]; nothing is written then.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Outside> {
        let len = bytes.len() as u32;
        // Nearly always one region holds it all, and then there is nothing to check before.
        if let Some(piece) = self.piece(address, u64::from(len)).filter(|piece| piece.len() == bytes.len()) {
            piece.copy_from(bytes);
            return Ok(());
        }
        if !self.covers(address, len) {
            return Err(Outside { address, len });
        }
        let mut at = 0;
        for piece in self.pieces(address, len)? {
            let piece = piece?;
            piece.copy_from(&bytes[at..at + piece.len()]);
            at += piece.len();
        }
        Ok(())
    }

    /// Copies `bytes` to `offset` of the data that lies in `runs`, and marks them dirty. Returns the bytes written.
    ///
    /// # Errors
    /// [`Outside`] when memory is gone; what lies before it has been written.
    pub fn scatter(&self, runs: &[GuestRun], offset: u32, bytes: &[u8]) -> Result<(), Outside> {
        let mut at = 0usize;
        for run in cut(runs, offset, bytes.len() as u32) {
            self.write(run.address, &bytes[at..at + run.len as usize])?;
            at += run.len as usize;
        }
        Ok(())
    }

    /// Copies `into.len()` bytes at `offset` of the data that lies in `runs`.
    ///
    /// # Errors
    /// [`Outside`].
    pub fn gather(&self, runs: &[GuestRun], offset: u32, into: &mut [u8]) -> Result<(), Outside> {
        let mut at = 0usize;
        for run in cut(runs, offset, into.len() as u32) {
            let end = at + run.len as usize;
            self.read(run.address, &mut into[at..end])?;
            at = end;
        }
        Ok(())
    }

    /// Names `len` bytes at `offset` of the data in `runs` as host memory for the link to read. The caller keeps this `GuestMemory` unchanged until
    /// the link's next flush has returned.
    ///
    /// # Errors
    /// [`Outside`]; the runs named before it are harmless.
    pub fn name(
        &self,
        runs: &[GuestRun],
        offset: u32,
        len: u32,
        mut each: impl FnMut(Run),
    ) -> Result<(), Outside> {
        for run in cut(runs, offset, len) {
            for piece in self.pieces(run.address, run.len)? {
                let piece = piece?;
                let guard = piece.ptr_guard();
                // SAFETY: pointer and length are of one mapped region (`get_slice` checked both), and the mapping lives as long as `self.regions`, which the
                // worker replaces only between turns, after the flush that ends each turn. The bytes may change meanwhile: a Run promises no content.
                each(unsafe { Run::new(guard.as_ptr(), guard.len()) });
            }
        }
        Ok(())
    }

    /// The host memory behind a run, in order; each piece lies in one region.
    fn pieces(
        &self,
        address: u64,
        len: u32,
    ) -> Result<impl Iterator<Item = Result<VolatileSlice<'_, DirtyLog>, Outside>>, Outside> {
        let outside = Outside { address, len };
        let end = address.checked_add(u64::from(len)).ok_or(outside)?;
        let mut at = address;
        Ok(std::iter::from_fn(move || {
            if at == end {
                return None;
            }
            let piece = self.piece(at, end - at).ok_or(outside);
            at = piece.as_ref().map_or(end, |piece| at + piece.len() as u64);
            Some(piece)
        }))
    }

    fn piece(&self, address: u64, len_max: u64) -> Option<VolatileSlice<'_, DirtyLog>> {
        let region = self.regions.find_region(GuestAddress(address))?;
        let within = address - region.start_addr().0;
        let len = len_max.min(region.len() - within);
        region.get_slice(MemoryRegionAddress(within), len as usize).ok()
    }
}

/// The parts of `runs` (which are in order and start at 0) that hold `len` bytes at `offset` of their data.
pub(crate) fn cut(runs: &[GuestRun], offset: u32, len: u32) -> impl Iterator<Item = GuestRun> + '_ {
    let first = runs.partition_point(|run| run.start + run.len <= offset);
    let end = offset + len;
    runs[first..].iter().take_while(move |run| run.start < end).map(move |run| {
        let from = run.start.max(offset);
        let to = (run.start + run.len).min(end);
        GuestRun { address: run.address + u64::from(from - run.start), len: to - from, start: from }
    })
}

/// Copies of payloads that were lost before: a guest that changes its buffer while it is sent hurts only itself, once.
///
/// The memory never moves; what it hands out is valid until [`PrivateCopies::clear`].
#[derive(Debug)]
pub struct PrivateCopies {
    bytes: Vec<u8>,
    /// What a checksum is made of: a guest may change its memory while it is read.
    block: Box<[u8; BLOCK_BYTES]>,
}

/// Bytes of private copies between two flushes: four of the largest frames.
pub const PRIVATE_BYTES_MAX: usize = 4 * cirro_protocol::types::FRAME_BYTES_MAX;

impl Default for PrivateCopies {
    fn default() -> PrivateCopies {
        PrivateCopies { bytes: Vec::with_capacity(PRIVATE_BYTES_MAX), block: Box::new([0; BLOCK_BYTES]) }
    }
}

impl PrivateCopies {
    /// True if a whole frame's payload still fits.
    pub fn has_room(&self) -> bool {
        self.bytes.len() + cirro_protocol::types::FRAME_BYTES_MAX <= PRIVATE_BYTES_MAX
    }

    /// The CRC32C of `len` bytes, at most a block, at `offset` of the data in `runs`, as they are now.
    ///
    /// # Errors
    /// [`Outside`].
    pub fn checksum(
        &mut self,
        memory: &GuestMemory,
        runs: &[GuestRun],
        (offset, len): (u32, u32),
    ) -> Result<u32, Outside> {
        let block = &mut self.block[..len as usize];
        memory.gather(runs, offset, block)?;
        Ok(cirro_seal::crc32c(block))
    }

    /// Forgets all copies. Only after the link's flush.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Copies `len` bytes at `offset` of the data in `runs`; gives them as a run for the link, and appends one CRC32C per block to `crcs`.
    ///
    /// # Errors
    /// [`Outside`].
    pub fn copy(
        &mut self,
        memory: &GuestMemory,
        runs: &[GuestRun],
        range: (u32, u32),
        crcs: &mut Vec<u32>,
    ) -> Result<Run, Outside> {
        let (offset, len) = range;
        self.fill(len, crcs, |bytes| memory.gather(runs, offset, bytes))
    }

    /// Lets `put` fill `len` bytes; gives them as a run for the link, and appends one CRC32C per block to `crcs`.
    ///
    /// # Errors
    /// That of `put`.
    pub fn fill<E>(
        &mut self,
        len: u32,
        crcs: &mut Vec<u32>,
        put: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Run, E> {
        let start = self.bytes.len();
        assert!(start + len as usize <= PRIVATE_BYTES_MAX, "room was checked before");
        self.bytes.resize(start + len as usize, 0);
        put(&mut self.bytes[start..])?;
        let copy = &self.bytes[start..];
        crcs.extend(copy.chunks(BLOCK_BYTES).map(cirro_seal::crc32c));
        // SAFETY: the vector's capacity was reserved at the start and is never exceeded (asserted above), so the bytes do not move; they are only dropped by
        // `clear`, which the worker calls after the flush.
        Ok(unsafe { Run::new(copy.as_ptr(), copy.len()) })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::FileOffset;

    use super::*;

    /// Two regions that touch at 0x2000, and a hole from 0x3000.
    fn memory() -> GuestMemory {
        GuestMemory::new(
            Regions::from_ranges(&[(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x1000)]).unwrap(),
        )
    }

    fn run(address: u64, len: u32, start: u32) -> GuestRun {
        GuestRun { address, len, start }
    }

    #[test]
    fn data_that_crosses_regions_and_runs_comes_back_as_written() {
        let memory = memory();
        let runs = [run(0x1ff0, 0x20, 0), run(0x1100, 3, 0x20), run(0x2800, 0x100, 0x23)];
        let bytes: Vec<u8> = (0..0x123u32).map(|i| (i * 7) as u8).collect();
        memory.scatter(&runs, 0, &bytes).unwrap();
        let mut back = vec![0; 0x60];
        memory.gather(&runs, 0x0f, &mut back).unwrap();
        assert_eq!(back, bytes[0x0f..0x6f]);
        let crc = PrivateCopies::default().checksum(&memory, &runs, (0x0f, 0x60)).unwrap();
        assert_eq!(crc, cirro_seal::crc32c(&bytes[0x0f..0x6f]));
    }

    #[test]
    fn a_write_that_leaves_memory_changes_nothing() {
        let memory = memory();
        assert_eq!(memory.write(0x2ffe, &[9; 4]), Err(Outside { address: 0x2ffe, len: 4 }));
        let mut back = [1; 2];
        memory.read(0x2ffe, &mut back).unwrap();
        assert_eq!(back, [0; 2]);
        assert!(!memory.covers(u64::MAX - 3, 8));
        assert!(memory.covers(0x1ffe, 4));
        assert!(!memory.covers(0xfff, 2));
    }

    /// What a VMM that shrinks its memory file does to us.
    #[test]
    fn memory_whose_file_became_shorter_reads_as_zeroes_and_takes_writes() {
        let file =
            std::fs::File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(0x3000).unwrap();
        let ranges = [(GuestAddress(0), 0x3000, Some(FileOffset::new(file.try_clone().unwrap(), 0)))];
        let memory = GuestMemory::new(Regions::from_ranges_with_files(ranges).unwrap());
        memory.write(0, &[7; 0x3000]).unwrap();
        file.set_len(0x1000).unwrap();
        let mut back = [1; 0x3000];
        memory.read(0, &mut back).unwrap();
        assert_eq!((back[0xfff], &back[0x1000..]), (7, &[0; 0x2000][..]));
        memory.write(0x2000, &[9; 4]).unwrap();
        memory.read(0x2000, &mut back[..4]).unwrap();
        assert_eq!(back[..4], [9; 4]);
        assert_eq!(memory.pages_replaced(), 2);
    }

    #[test]
    fn an_empty_range_touches_nothing() {
        assert!(memory().covers(0x9_0000, 0));
        let crc = PrivateCopies::default().checksum(&memory(), &[], (0, 0)).unwrap();
        assert_eq!(crc, cirro_seal::crc32c(&[]));
    }

    /// P-99: what the guest writes later is not in the copy.
    #[test]
    fn a_private_copy_does_not_follow_the_guest() {
        let memory = memory();
        memory.write(0x1000, &[5; 8192]).unwrap();
        let mut copies = PrivateCopies::default();
        let mut crcs = Vec::new();
        let run = copies.copy(&memory, &[run(0x1000, 8192, 0)], (0, 8192), &mut crcs).unwrap();
        memory.write(0x1000, &[6; 8192]).unwrap();
        assert_eq!(run.len(), 8192);
        assert_eq!(copies.bytes, vec![5; 8192]);
        assert_eq!(crcs, [cirro_seal::crc32c(&[5; 4096]); 2]);
    }
}
