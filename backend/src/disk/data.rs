//! The data of a disk's requests, between guest memory and frames.
//!
//! Knows where the data of a slot is; what is sent when is the core's to say. Called by `worker` for each frame.

use cirro_protocol::types::BLOCK_BYTES;
use cirro_protocol::{PayloadRef, Placement};

use super::{Disk, PRIVATE_AFTER_LOSSES};
use crate::guest_memory::{GuestRun, Outside, PrivateCopies};

impl Disk {
    /// Step 1 of a turn: copies what a frame brought to where the guest wants it.
    pub fn place(&self, frame: &[u8], placements: &[Placement]) {
        for placement in placements {
            let (runs, start) =
                self.pending.data(placement.slot).expect("the core places only into live slots");
            let bytes = &frame[placement.range.clone()];
            let placed = self.memory.scatter(runs, start + placement.offset, bytes);
            placed.expect("requests whose memory went away were taken out when it went");
        }
    }

    /// Step 5 of a turn, for one piece of data in a frame: the guest's own memory, or a private copy of a piece that was lost too often. Appends the
    /// piece's checksums.
    pub fn add_payload(
        &self,
        payload: &PayloadRef,
        copies: &mut PrivateCopies,
        crcs: &mut Vec<u32>,
        mut each: impl FnMut(cirro_link::Run),
    ) {
        if let Some(position) = self.unflushed.position(payload.slot) {
            let copied = copies.fill(payload.len, crcs, |bytes| {
                self.unflushed.read(position, payload.offset, bytes);
                Ok::<(), Outside>(())
            });
            return copied.map(each).expect("a copy is never outside");
        }
        let (runs, start) = self.pending.data(payload.slot).expect("the core sends only from live slots");
        let (offset, len) = (start + payload.offset, payload.len);
        let added = if payload.losses >= PRIVATE_AFTER_LOSSES {
            copies.copy(&self.memory, runs, (offset, len), crcs).map(each)
        } else {
            self.add_in_place(runs, (offset, len), (copies, crcs), &mut each)
        };
        added.expect("requests whose memory went away were taken out when it went");
    }

    /// Appends the data of a piece to `out`, as it is now.
    pub fn copy_payload(&self, payload: &PayloadRef, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + payload.len as usize, 0);
        let bytes = &mut out[start..];
        if let Some(position) = self.unflushed.position(payload.slot) {
            return self.unflushed.read(position, payload.offset, bytes);
        }
        let (runs, at) = self.pending.data(payload.slot).expect("the core sends only from live slots");
        let gathered = self.memory.gather(runs, at + payload.offset, bytes);
        gathered.expect("requests whose memory went away were taken out when it went");
    }

    fn add_in_place(
        &self,
        runs: &[GuestRun],
        (offset, len): (u32, u32),
        (copies, crcs): (&mut PrivateCopies, &mut Vec<u32>),
        each: &mut impl FnMut(cirro_link::Run),
    ) -> Result<(), Outside> {
        let block = BLOCK_BYTES as u32;
        for at in (0..len).step_by(block as usize) {
            crcs.push(copies.checksum(&self.memory, runs, (offset + at, block.min(len - at)))?);
        }
        self.memory.name(runs, offset, len, each)
    }
}
