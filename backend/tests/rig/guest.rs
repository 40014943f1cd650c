//! The plainest of guest drivers: one split ring in memory, three descriptors a request.

use cirro_backend::guest_memory::Regions;
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Bytes that one ring takes: tables, headers and status bytes.
const RING_BYTES: u64 = 0x1_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x5000;
const HEADERS: u64 = 0x8000;
const STATUSES: u64 = 0xc000;
/// Where data starts; every request of every ring has its own place.
pub(crate) const DATA: u64 = 0x10_0000;
pub(crate) const SIZE: u16 = 256;

/// One ring of a guest.
pub(crate) struct Ring {
    pub(crate) memory: Regions,
    base: u64,
    event_idx: bool,
    size: u16,
    next_avail: u16,
    next_used: u16,
    free: Vec<u16>,
}

/// A request that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) head: u16,
    pub(crate) len: u32,
    pub(crate) status: u8,
}

impl Ring {
    /// Ring `index` of a guest.
    pub(crate) fn new(memory: &Regions, index: u64, event_idx: bool) -> Ring {
        Ring::of_size(memory, index, event_idx, SIZE)
    }

    /// One that is smaller than most.
    pub(crate) fn of_size(memory: &Regions, index: u64, event_idx: bool, size: u16) -> Ring {
        let base = 0x1000 + index * RING_BYTES;
        Ring {
            memory: memory.clone(),
            base,
            event_idx,
            size,
            next_avail: 0,
            next_used: 0,
            free: (0..size.div_ceil(4)).map(|place| place * 4).rev().collect(),
        }
    }

    /// What the device is told of it.
    pub(crate) fn state(&self) -> QueueState {
        QueueState {
            max_size: SIZE,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: true,
            desc_table: self.base,
            avail_ring: self.base + AVAIL,
            used_ring: self.base + USED,
        }
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16) {
        let at = self.base + u64::from(index) * 16;
        self.put(at, address);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, index + 1);
    }

    /// The head of the next request.
    pub(crate) fn next_head(&self) -> u16 {
        *self.free.last().expect("a free place on the ring")
    }

    /// Makes a request available: header, data of `len` bytes at `data`, status. Gives its head.
    pub(crate) fn add(&mut self, kind: u32, sector: u64, data: u64, len: u32) -> u16 {
        let head = self.free.pop().expect("a free place on the ring");
        let header = self.base + HEADERS + u64::from(head) * 16;
        let status = self.base + STATUSES + u64::from(head);
        self.put(header, kind);
        self.put(header + 8, sector);
        self.put(status, 0xffu8);
        let to_guest = if matches!(kind, 0 | 8) { 2 } else { 0 };
        self.descriptor(head, header, 16, 1);
        if len > 0 {
            self.descriptor(head + 1, data, len, 1 | to_guest);
            self.descriptor(head + 2, status, 1, 2);
        } else {
            self.descriptor(head + 1, status, 1, 2);
        }
        self.offer(head);
        head
    }

    /// Makes a request available in two descriptors, all that a ring of two has: what is read by the device, header first, and what it writes, status
    /// last. The data is at `DATA + 16`; gives where the status will be.
    pub(crate) fn add_in_two(&mut self, kind: u32, sector: u64, len: u32) -> u64 {
        let head = self.free.pop().expect("a free place on the ring");
        self.put(DATA, kind);
        self.put(DATA + 8, sector);
        let (read, status) =
            if kind == 0 { (16, DATA + 16 + u64::from(len)) } else { (16 + len, self.base + STATUSES) };
        let written = if kind == 0 { (DATA + 16, len + 1) } else { (status, 1) };
        self.put(status, 0xffu8);
        self.descriptor(head, DATA, read, 1);
        self.descriptor(head + 1, written.0, written.1, 2);
        self.offer(head);
        status
    }

    /// Makes a head available, whatever it is.
    pub(crate) fn offer(&mut self, head: u16) {
        self.put(self.base + AVAIL + 4 + u64::from(self.next_avail % self.size) * 2, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.put(self.base + AVAIL + 2, self.next_avail);
    }

    /// Takes what lies in memory for what this driver did: so many requests came back of those that were made available.
    pub(crate) fn skip_to(&mut self, used: u16, available: u16) {
        (self.next_used, self.next_avail) = (used, available);
    }

    /// Sets the available index to something foolish.
    pub(crate) fn jump(&self, index: u16) {
        self.put(self.base + AVAIL + 2, index);
    }

    /// What came back since the last time; asks for a signal for the next.
    pub(crate) fn used(&mut self) -> Vec<Used> {
        let index: u16 = self.get(self.base + USED + 2);
        let mut used = Vec::new();
        while self.next_used != index {
            let at = self.base + USED + 4 + u64::from(self.next_used % self.size) * 8;
            let (head, len): (u32, u32) = (self.get(at), self.get(at + 4));
            let head = head as u16;
            used.push(Used { head, len, status: self.get(self.base + STATUSES + u64::from(head)) });
            assert!(!self.free.contains(&head), "head {head} came back twice");
            self.free.push(head);
            self.next_used = self.next_used.wrapping_add(1);
        }
        // used_event, which lies behind the available ring.
        self.put(self.base + AVAIL + 4 + u64::from(self.size) * 2, self.next_used);
        used
    }

    /// How many kicks the device wants: true if it asked for one for the request made available last (virtio 1.2, section 2.7.10).
    pub(crate) fn wants_kick(&self) -> bool {
        if self.event_idx {
            let event: u16 = self.get(self.base + USED + 4 + u64::from(self.size) * 8);
            self.next_avail.wrapping_sub(event).wrapping_sub(1) < 1
        } else {
            self.get::<u16>(self.base + USED) & 1 == 0
        }
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory.last_addr().0 + 1
    }
}

/// `len` bytes that are different everywhere.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(31).wrapping_add(i >> 9).wrapping_add(seed * 77)) as u8).collect()
}
