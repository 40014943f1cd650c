//! The receive ring of a packet socket (TPACKET_V2, Linux Documentation/networking/packet_mmap.rst): the kernel fills slots, we take them in
//! order and give them back.
//!
//! Knows slots; does not know what is in a frame.

use std::io;
use std::os::fd::BorrowedFd;

use cirro_protocol::types::ETHERNET_BYTES;

use super::sys;
use crate::mmap::Mapping;

/// Memory of a worker's ring: four times the largest congestion window of 4 MiB, so that several sessions' bursts fit.
const RING_BYTES: usize = 16 << 20;
/// A block is contiguous for the kernel; frames do not cross blocks.
const BLOCK_BYTES: usize = 1 << 20;
/// Room before a frame in its slot: tpacket2_hdr 32 and sockaddr_ll 20, rounded to 16, and the 16 bytes that the kernel keeps for the
/// link-layer header.
const SLOT_HEADER_BYTES: usize = 80;

const STATUS: usize = 0;
const SNAPLEN: usize = 8;
const MAC: usize = 12;
const SECONDS: usize = 16;
const NANOSECONDS: usize = 20;
/// sll_pkttype in the sockaddr_ll behind the 32-byte header.
const PACKET_TYPE: usize = 32 + 10;
const STATUS_KERNEL: u32 = 0;
const STATUS_USER: u32 = 1;
const TPACKET_V2: i32 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct RingRequest {
    block_bytes: u32,
    blocks: u32,
    frame_bytes: u32,
    frames: u32,
}

/// Where a frame lies in the ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotFrame {
    pub(crate) offset: usize,
    pub(crate) len: usize,
    pub(crate) seconds: u32,
    pub(crate) nanoseconds: u32,
    /// PACKET_HOST, PACKET_BROADCAST, …
    pub(crate) packet_type: u8,
}

/// A ring.
#[derive(Debug)]
pub(crate) struct Ring {
    mapping: Mapping,
    slot_bytes: usize,
    slots_per_block: usize,
    slots: usize,
    next: usize,
    /// The slot taken last is still ours.
    held: Option<usize>,
}

impl Ring {
    /// Gives the socket a ring for frames of `mtu` and maps it.
    pub(crate) fn new(fd: BorrowedFd<'_>, mtu: usize) -> io::Result<Ring> {
        let slot_bytes = (SLOT_HEADER_BYTES + ETHERNET_BYTES + mtu).next_multiple_of(16);
        let slots_per_block = BLOCK_BYTES / slot_bytes;
        let blocks = RING_BYTES / BLOCK_BYTES;
        let slots = blocks * slots_per_block;
        sys::set_option(fd, libc::SOL_PACKET, libc::PACKET_VERSION, &TPACKET_V2)?;
        let request = RingRequest {
            block_bytes: BLOCK_BYTES as u32,
            blocks: blocks as u32,
            frame_bytes: slot_bytes as u32,
            frames: slots as u32,
        };
        sys::set_option(fd, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        let mapping = Mapping::new(fd, RING_BYTES)?;
        Ok(Ring { mapping, slot_bytes, slots_per_block, slots, next: 0, held: None })
    }

    /// Takes the next filled slot; the one before it is given back.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<SlotFrame> {
        if let Some(held) = self.held.take() {
            self.mapping.store_release(held + STATUS, STATUS_KERNEL);
        }
        let slot = self.next / self.slots_per_block * BLOCK_BYTES
            + self.next % self.slots_per_block * self.slot_bytes;
        if self.mapping.load_acquire(slot + STATUS) & STATUS_USER == 0 {
            return None;
        }
        self.next = (self.next + 1) % self.slots;
        self.held = Some(slot);
        let word = |at: usize| u32::from_ne_bytes(self.mapping.read(slot + at));
        let mac = usize::from(u16::from_ne_bytes(self.mapping.read(slot + MAC)));
        let len = (word(SNAPLEN) as usize).min(self.slot_bytes.saturating_sub(mac));
        let [packet_type] = self.mapping.read(slot + PACKET_TYPE);
        Some(SlotFrame {
            offset: slot + mac,
            len,
            seconds: word(SECONDS),
            nanoseconds: word(NANOSECONDS),
            packet_type,
        })
    }

    /// The bytes of a frame just taken.
    #[inline]
    pub(crate) fn bytes(&self, frame: SlotFrame) -> &[u8] {
        self.mapping.owned_bytes(frame.offset, frame.len)
    }
}

const _: () = assert!(RING_BYTES.is_multiple_of(BLOCK_BYTES) && BLOCK_BYTES.is_multiple_of(4096));
