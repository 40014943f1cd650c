//! The receive ring of a packet socket (TPACKET_V2, Linux Documentation/networking/packet_mmap.rst): the kernel fills slots, we take them in
//! order and give them back.
//!
//! Knows slots; does not know what is in a frame. Used by one `PacketLink`.

use std::io;
use std::os::fd::BorrowedFd;

use cirro_protocol::types::{ETHERNET_BYTES, MTU_MAX};

use crate::mmap::Mapping;
use crate::sys;

/// Memory of a worker's ring: the largest congestion window. The kernel goes round the whole of it, so a larger one costs cache misses with
/// every frame (16 MiB: 5 % of large requests, docs/decisions/0008-the-data-path.md); what does not fit is lost and sent again, as on a switch.
const RING_BYTES: usize = 4 << 20;
/// Slots of a ring at least, for small frames need one each: 8 turns of a worker. Only above MTU 10 K does this make the ring larger than
/// [`RING_BYTES`] (27 MiB at 65535, which no wire outside one machine has).
const SLOTS_MIN: usize = 400;
/// A block is contiguous for the kernel; frames do not cross blocks. Of 1 MiB at most 6 % is lost at its end, at any MTU.
const BLOCK_BYTES: usize = 1 << 20;
/// Where a frame begins in its slot. The kernel puts it at 66: tpacket2_hdr 32 and sockaddr_ll 20 and 16 for the link-layer header, rounded
/// to 80, less 14. The rest is asked for (PACKET_RESERVE), so that a frame and its first payload, 64 bytes on, lie on cache lines.
const FRAME_OFFSET: usize = 128;
const RESERVE_BYTES: u32 = (FRAME_OFFSET - 66) as u32;
/// Slots are multiples of a cache line (the kernel wants 16).
const SLOT_ALIGN: usize = 64;

const STATUS: usize = 0;
const LEN: usize = 4;
const SNAPLEN: usize = 8;
const MAC: usize = 12;
const SECONDS: usize = 16;
const NANOSECONDS: usize = 20;
const STATUS_KERNEL: u32 = 0;
const STATUS_USER: u32 = 1;
const TPACKET_V2: i32 = 1;

/// struct tpacket_req.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RingRequest {
    block_bytes: u32,
    blocks: u32,
    frame_bytes: u32,
    frames: u32,
}

/// How a ring is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Geometry {
    slot_bytes: usize,
    slots_per_block: usize,
    blocks: usize,
}

impl Geometry {
    const fn for_mtu(mtu: usize) -> Geometry {
        let slot_bytes = (FRAME_OFFSET + ETHERNET_BYTES + mtu).next_multiple_of(SLOT_ALIGN);
        let slots_per_block = BLOCK_BYTES / slot_bytes;
        let blocks = SLOTS_MIN.div_ceil(slots_per_block);
        let blocks_min = RING_BYTES / BLOCK_BYTES;
        Geometry {
            slot_bytes,
            slots_per_block,
            blocks: if blocks < blocks_min { blocks_min } else { blocks },
        }
    }

    const fn slots(&self) -> usize {
        self.slots_per_block * self.blocks
    }

    const fn ring_bytes(&self) -> usize {
        self.blocks * BLOCK_BYTES
    }
}

/// Where a frame lies in the ring, and when the wall clock of its arrival.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotFrame {
    offset: usize,
    len: usize,
    pub(crate) seconds: u32,
    pub(crate) nanoseconds: u32,
}

/// A ring.
#[derive(Debug)]
pub(crate) struct Ring {
    mapping: Mapping,
    geometry: Geometry,
    /// Offset of the slot that is filled next, and its place in its block.
    next: usize,
    next_in_block: usize,
    /// The slot taken last is still ours.
    held: Option<usize>,
    /// Frames longer than a slot, dropped: the MTU grew, and the ring has not followed yet.
    truncated: u64,
}

impl Ring {
    /// Gives the socket a ring for frames of `mtu`, instead of the one that it may have, which is mapped nowhere any more, and maps it.
    pub(crate) fn new(fd: BorrowedFd<'_>, mtu: usize) -> io::Result<Ring> {
        let geometry = Geometry::for_mtu(mtu);
        sys::set_option(fd, libc::SOL_PACKET, libc::PACKET_RX_RING, &RingRequest::default())?;
        sys::set_option(fd, libc::SOL_PACKET, libc::PACKET_VERSION, &TPACKET_V2)?;
        sys::set_option(fd, libc::SOL_PACKET, libc::PACKET_RESERVE, &RESERVE_BYTES)?;
        let request = RingRequest {
            block_bytes: BLOCK_BYTES as u32,
            blocks: geometry.blocks as u32,
            frame_bytes: geometry.slot_bytes as u32,
            frames: geometry.slots() as u32,
        };
        sys::set_option(fd, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        let mapping = Mapping::new(fd, geometry.ring_bytes(), 0)?;
        Ok(Ring { mapping, geometry, next: 0, next_in_block: 0, held: None, truncated: 0 })
    }

    /// Takes the next filled slot; the one before it is given back.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<SlotFrame> {
        loop {
            if let Some(held) = self.held.take() {
                self.mapping.store_release(held + STATUS, STATUS_KERNEL);
            }
            let slot = self.next;
            if self.mapping.load_acquire(slot + STATUS) & STATUS_USER == 0 {
                return None;
            }
            self.held = Some(slot);
            self.step();
            let word = |at: usize| u32::from_ne_bytes(self.mapping.read(slot + at));
            let offset = usize::from(u16::from_ne_bytes(self.mapping.read(slot + MAC)));
            let len = word(SNAPLEN) as usize;
            if len < word(LEN) as usize || offset + len > self.geometry.slot_bytes {
                self.truncated += 1;
                continue;
            }
            let (seconds, nanoseconds) = (word(SECONDS), word(NANOSECONDS));
            return Some(SlotFrame { offset: slot + offset, len, seconds, nanoseconds });
        }
    }

    /// The bytes of the frame just taken.
    #[inline]
    pub(crate) fn bytes(&self, frame: SlotFrame) -> &[u8] {
        self.mapping.owned_bytes(frame.offset, frame.len)
    }

    /// Frames that did not fit their slots since the last call.
    pub(crate) fn take_truncated(&mut self) -> u64 {
        std::mem::take(&mut self.truncated)
    }

    #[inline]
    fn step(&mut self) {
        self.next_in_block += 1;
        if self.next_in_block < self.geometry.slots_per_block {
            self.next += self.geometry.slot_bytes;
            return;
        }
        self.next_in_block = 0;
        let block_start = self.next / BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES;
        self.next = if block_start == self.geometry.ring_bytes() { 0 } else { block_start };
    }
}

const _: () = assert!(RING_BYTES.is_multiple_of(BLOCK_BYTES) && BLOCK_BYTES.is_multiple_of(4096));
const _: () = assert!(FRAME_OFFSET + ETHERNET_BYTES + MTU_MAX < BLOCK_BYTES, "a block holds a frame");
const _: () = assert!(SLOT_ALIGN.is_multiple_of(16), "TPACKET_ALIGNMENT");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_holds_a_full_frame_and_a_ring_enough_of_them_at_any_mtu() {
        for mtu in [1500, 1501, 4096, 8999, 9000, 9001, 16_000, 32_767, 65_534, 65_535] {
            let geometry = Geometry::for_mtu(mtu);
            assert!(geometry.slot_bytes >= 128 + 14 + mtu && geometry.slot_bytes < 128 + 14 + mtu + 64);
            assert!(geometry.slots_per_block * geometry.slot_bytes <= BLOCK_BYTES, "MTU {mtu}");
            assert!(geometry.slots() >= 400 && geometry.ring_bytes() >= 4 << 20, "MTU {mtu}");
            assert!(geometry.ring_bytes() <= 27 << 20, "MTU {mtu}");
        }
        // 1 MiB / 9152 = 114 slots in each of 4 blocks.
        let jumbo = Geometry { slot_bytes: 9152, slots_per_block: 114, blocks: 4 };
        assert_eq!(Geometry::for_mtu(9000), jumbo);
    }
}
