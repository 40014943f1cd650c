//! Guest memory with a descriptor table of any contents: a chain becomes a request whose buffers lie in guest memory and whose range lies on
//! the disk, or a named reject.
//!
//! Knows the parser's promises only.
#![no_main]

use cirro_backend::guest_memory::{GuestMemory, Regions};
use cirro_backend::request::{Chain, Limits, Request, Table};
use cirro_protocol::types::{RANGE_SECTORS_MAX, SECTOR_BYTES};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const REGION_BYTES: usize = 0x8000;
/// Two regions with a hole between them.
const REGIONS: [u64; 2] = [0, 0x1_0000];
const ENTRIES_MAX: usize = 64;
/// Where buffers begin: the table, a header, both sides of the hole, the end of memory and of all addresses.
const PLACES: [u64; 8] = [0, 0x1000, 0x7ff0, 0x8000, 0xffff, 0x1_0000, 0x1_7ff8, u64::MAX - 7];
/// Request types and some that do not exist.
const TYPES: [u32; 8] = [0, 1, 4, 8, 11, 13, 2, u32::MAX];

/// An entry of a descriptor table out of seven bytes.
fn entry(bytes: &[u8]) -> [u8; 16] {
    let [place, low, high, len_low, len_high, flags, next] = *bytes else { return [0; 16] };
    let address = PLACES[usize::from(place % 8)].wrapping_add(u64::from(u16::from_le_bytes([low, high])));
    let len = u32::from(u16::from_le_bytes([len_low, len_high])) << (place >> 4);
    let mut entry = [0; 16];
    entry[..8].copy_from_slice(&address.to_le_bytes());
    entry[8..12].copy_from_slice(&len.to_le_bytes());
    entry[12] = flags;
    entry[14] = next;
    entry
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&[head, size, kind, sector, features], rest)) = bytes.split_first_chunk::<5>() else { return };
    let memory = GuestMemory::new(
        Regions::from_ranges(&REGIONS.map(|at| (GuestAddress(at), REGION_BYTES))).expect("memory"),
    );
    let entries: Vec<u8> = rest.chunks(7).take(ENTRIES_MAX).flat_map(entry).collect();
    memory.regions().write_slice(&entries, GuestAddress(0)).expect("the table lies in memory");
    let header = [TYPES[usize::from(kind % 8)].to_le_bytes(), [0; 4], [sector, 0, 0, 0], [kind; 4]].concat();
    let header = if kind < 128 { [&header[..12], &[0; 4]].concat() } else { header };
    memory.regions().write_slice(&header, GuestAddress(PLACES[1])).expect("the header lies in memory");
    let limits = Limits {
        capacity_sectors: 128,
        read_only: features & 1 != 0,
        discard: features & 2 != 0,
        write_zeroes: features & 4 != 0,
    };
    let mut chain = Chain::default();
    let parsed = chain.parse(&memory, Table { address: 0, size: u16::from(size) }, u16::from(head), &limits);
    if let Some(at) = chain.status_at {
        memory.write(at, &[0]).expect("the status byte lies in memory");
    }
    let Ok(request) = parsed else { return };
    assert!(chain.status_at.is_some(), "a request has a place for its status");
    assert!(chain.data.iter().all(|run| memory.covers(run.address, run.len)), "its buffers lie in memory");
    let disk_bytes = limits.capacity_sectors * SECTOR_BYTES as u64;
    match request {
        Request::Data { offset, len, .. } => {
            assert!(offset + u64::from(len) <= disk_bytes && len as usize % SECTOR_BYTES == 0);
            let mut next = 0;
            for run in &chain.data {
                assert_eq!(run.start - chain.data[0].start, next, "runs follow each other");
                next += run.len;
            }
            assert_eq!(next, len, "buffers and request agree");
        }
        Request::Range { offset, sectors, .. } => {
            assert!(sectors <= RANGE_SECTORS_MAX);
            assert!(offset + u64::from(sectors) * SECTOR_BYTES as u64 <= disk_bytes);
        }
        Request::Flush | Request::GetId => {}
    }
});
