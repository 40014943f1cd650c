//! Chains of every shape, legal and not, against a model that reads them in the plainest way.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::guest_memory::Regions;

const TABLE: u64 = 0x1000;
const INDIRECT_TABLE: u64 = 0x4000;
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0x1_0000;
const MEMORY_BYTES: usize = 0x4_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const LIMITS: Limits = Limits { capacity_sectors: 1000, read_only: false, discard: true, write_zeroes: true };

fn memory() -> GuestMemory {
    GuestMemory::new(Regions::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap())
}

/// Address, length, flags, next: an entry as it lies in a table.
type Entry = (u64, u32, u16, u16);

fn put_entry(memory: &GuestMemory, table: u64, index: u16, (address, len, flags, next): Entry) {
    let mut bytes = [0u8; 16];
    bytes[0..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..16].copy_from_slice(&next.to_le_bytes());
    memory.regions().write_slice(&bytes, GuestAddress(table + u64::from(index) * 16)).unwrap();
}

fn put_header(memory: &GuestMemory, kind: u32, sector: u64) {
    let mut bytes = [0u8; 16];
    bytes[0..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
    memory.regions().write_slice(&bytes, GuestAddress(HEADER)).unwrap();
}

/// Lays `parts` (address, length, writable) out as entries 0, 1, 2… of `table` and parses them as a direct chain of a queue of 64.
fn chain_of(memory: &GuestMemory, parts: &[(u64, u32, bool)]) {
    for (index, (address, len, writable)) in parts.iter().enumerate() {
        let last = index + 1 == parts.len();
        let flags = if *writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
        put_entry(memory, TABLE, index as u16, (*address, *len, flags, index as u16 + 1));
    }
}

fn parse(memory: &GuestMemory, limits: &Limits) -> (Result<Request, Reject>, Chain) {
    let mut chain = Chain::default();
    let request = chain.parse(memory, Table { address: TABLE, size: 64 }, 0, limits);
    (request, chain)
}

fn parsed(kind: u32, sector: u64, parts: &[(u64, u32, bool)]) -> (Result<Request, Reject>, Chain) {
    let memory = memory();
    put_header(&memory, kind, sector);
    chain_of(&memory, parts);
    parse(&memory, &LIMITS)
}

#[test]
fn a_read_with_header_data_and_status_apart() {
    let (request, chain) = parsed(0, 8, &[(HEADER, 16, false), (DATA, 4096, true), (STATUS, 1, true)]);
    assert_eq!(request, Ok(Request::Data { op: Op::Read, offset: 4096, len: 4096 }));
    assert_eq!(chain.data, [GuestRun { address: DATA, len: 4096, start: 0 }]);
    assert_eq!(chain.status_at, Some(STATUS));
}

#[test]
fn the_status_is_the_last_writable_byte_of_the_data() {
    let (request, chain) = parsed(0, 0, &[(HEADER, 16, false), (DATA, 513, true)]);
    assert_eq!(request, Ok(Request::Data { op: Op::Read, offset: 0, len: 512 }));
    assert_eq!(chain.status_at, Some(DATA + 512));
    assert_eq!(chain.data, [GuestRun { address: DATA, len: 512, start: 0 }]);
}

#[test]
fn header_and_data_may_be_one_or_cut_anywhere() {
    let memory = memory();
    put_header(&memory, 1, 3);
    chain_of(&memory, &[(HEADER, 16 + 100, false), (DATA, 412, false), (STATUS, 1, true)]);
    let (request, chain) = parse(&memory, &LIMITS);
    assert_eq!(request, Ok(Request::Data { op: Op::Write, offset: 3 * 512, len: 512 }));
    let expected = [
        GuestRun { address: HEADER + 16, len: 100, start: 0 },
        GuestRun { address: DATA, len: 412, start: 100 },
    ];
    assert_eq!(chain.data, expected);

    put_header(&memory, 1, 3);
    chain_of(
        &memory,
        &[
            (HEADER, 5, false),
            (HEADER + 5, 11, false),
            (DATA, 1, false),
            (DATA + 1, 511, false),
            (STATUS, 1, true),
        ],
    );
    let (request, chain) = parse(&memory, &LIMITS);
    assert_eq!(request, Ok(Request::Data { op: Op::Write, offset: 3 * 512, len: 512 }));
    assert_eq!(chain.data.iter().map(|run| (run.len, run.start)).collect::<Vec<_>>(), [(1, 0), (511, 1)]);
}

#[test]
fn an_indirect_table_is_followed_once() {
    let memory = memory();
    put_header(&memory, 0, 1);
    put_entry(&memory, TABLE, 0, (INDIRECT_TABLE, 48, INDIRECT, 0));
    put_entry(&memory, INDIRECT_TABLE, 0, (HEADER, 16, NEXT, 2));
    put_entry(&memory, INDIRECT_TABLE, 2, (DATA, 1024, NEXT | WRITE, 1));
    put_entry(&memory, INDIRECT_TABLE, 1, (STATUS, 1, WRITE, 0));
    let (request, chain) = parse(&memory, &LIMITS);
    assert_eq!(request, Ok(Request::Data { op: Op::Read, offset: 512, len: 1024 }));
    assert_eq!(chain.status_at, Some(STATUS));

    put_entry(&memory, INDIRECT_TABLE, 2, (INDIRECT_TABLE, 48, INDIRECT, 1));
    assert_eq!(parse(&memory, &LIMITS).0, Err(Reject::Indirect));
    for odd in [
        (INDIRECT_TABLE, 47, INDIRECT, 0),
        (INDIRECT_TABLE, 0, INDIRECT, 0),
        (INDIRECT_TABLE, 48, INDIRECT | NEXT, 1),
    ] {
        put_entry(&memory, TABLE, 0, odd);
        assert_eq!(parse(&memory, &LIMITS).0, Err(Reject::Indirect), "{odd:x?}");
    }
}

#[test]
fn a_chain_without_end_is_refused_without_a_status() {
    let memory = memory();
    put_entry(&memory, TABLE, 0, (HEADER, 16, NEXT, 1));
    put_entry(&memory, TABLE, 1, (STATUS, 1, WRITE | NEXT, 0));
    let (request, chain) = parse(&memory, &LIMITS);
    assert_eq!((request, chain.status_at), (Err(Reject::Endless), None));
    put_entry(&memory, TABLE, 1, (STATUS, 1, WRITE | NEXT, 64));
    assert_eq!(parse(&memory, &LIMITS).0, Err(Reject::NextOutside));
    let mut chain = Chain::default();
    let outside = Table { address: MEMORY_BYTES as u64 - 8, size: 64 };
    assert_eq!(chain.parse(&memory, outside, 0, &LIMITS), Err(Reject::TableOutside));
}

#[test]
fn odd_buffers_get_a_status_when_its_place_is_known() {
    type Parts<'a> = &'a [(u64, u32, bool)];
    let cases: [(Parts<'_>, Reject, Option<u64>); 8] = [
        (&[(HEADER, 16, false), (DATA, 0, true), (STATUS, 1, true)], Reject::Empty, Some(STATUS)),
        (&[(HEADER, 8, false), (STATUS, 1, true)], Reject::Header, Some(STATUS)),
        (&[(DATA, 512, true), (HEADER, 16, false), (STATUS, 1, true)], Reject::Order, Some(STATUS)),
        (
            &[(HEADER, 16, false), (MEMORY_BYTES as u64 - 4, 512, true), (STATUS, 1, true)],
            Reject::BufferOutside,
            Some(STATUS),
        ),
        (&[(HEADER, 16, false), (DATA, 512, true), (u64::MAX, 1, true)], Reject::BufferOutside, None),
        (&[(HEADER, 16, false), (DATA, u32::MAX, true), (STATUS, 1, true)], Reject::TooLong, Some(STATUS)),
        (&[(HEADER, 16, false)], Reject::NoStatus, None),
        (&[(HEADER, 16, false), (DATA, 511, true), (STATUS, 1, true)], Reject::Sectors, Some(STATUS)),
    ];
    for (parts, reject, status_at) in cases {
        let (request, chain) = parsed(0, 0, parts);
        assert_eq!((request, chain.status_at), (Err(reject), status_at), "{parts:x?}");
    }
}

#[test]
fn what_the_disk_does_not_have_is_an_error() {
    let read = [(HEADER, 16, false), (DATA, 1024, true), (STATUS, 1, true)];
    assert!(parsed(0, 998, &read).0.is_ok());
    assert_eq!(parsed(0, 999, &read).0, Err(Reject::PastEnd));
    assert_eq!(parsed(0, u64::MAX, &read).0, Err(Reject::PastEnd));
    assert_eq!(
        parsed(0, 1000, &[(HEADER, 16, false), (STATUS, 1, true)]).0,
        Ok(Request::Data { op: Op::Read, offset: 512_000, len: 0 })
    );
    assert_eq!(parsed(99, 0, &read).0, Err(Reject::Type));
    assert_eq!(parsed(1, 0, &read).0, Err(Reject::Direction));
    assert_eq!(
        parsed(0, 0, &[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]).0,
        Err(Reject::Direction)
    );
}

#[test]
fn flush_and_serial_number() {
    assert_eq!(parsed(4, 77, &[(HEADER, 16, false), (STATUS, 1, true)]).0, Ok(Request::Flush));
    let (request, chain) = parsed(8, 0, &[(HEADER, 16, false), (DATA, 20, true), (STATUS, 1, true)]);
    assert_eq!(request, Ok(Request::GetId));
    assert_eq!(chain.data, [GuestRun { address: DATA, len: 20, start: 0 }]);
}

fn range(kind: u32, limits: &Limits, segments: &[(u64, u32, u32)]) -> Result<Request, Reject> {
    let memory = memory();
    put_header(&memory, kind, 0);
    let mut bytes = Vec::new();
    for (sector, sectors, flags) in segments {
        bytes.extend_from_slice(&sector.to_le_bytes());
        bytes.extend_from_slice(&sectors.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
    }
    memory.regions().write_slice(&bytes, GuestAddress(DATA)).unwrap();
    chain_of(&memory, &[(HEADER, 16, false), (DATA, bytes.len() as u32, false), (STATUS, 1, true)]);
    parse(&memory, limits).0
}

/// What strict clients check (virtio 1.2, section 5.2.6.2, and QEMU's device).
#[test]
fn discards_and_zeroes_are_checked_as_strict_clients_expect() {
    let (discard, zeroes) = (11, 13);
    let done = |op, offset, sectors| Ok(Request::Range { op, offset, sectors });
    assert_eq!(range(discard, &LIMITS, &[(2, 8, 0)]), done(Op::Discard, 1024, 8));
    assert_eq!(range(zeroes, &LIMITS, &[(2, 8, 1)]), done(Op::WriteZeroes, 1024, 8));
    assert_eq!(range(zeroes, &LIMITS, &[(1000, 0, 0)]), done(Op::WriteZeroes, 512_000, 0));
    for kind in [discard, zeroes] {
        assert_eq!(range(kind, &LIMITS, &[(0, 1, 0), (8, 1, 0)]).unwrap_err().status(), 2, "two segments");
        assert_eq!(range(kind, &LIMITS, &[(0, u32::MAX, 0)]).unwrap_err().status(), 1, "too many sectors");
        assert_eq!(range(kind, &LIMITS, &[(999, 2, 0)]), Err(Reject::PastEnd));
        assert_eq!(range(kind, &LIMITS, &[(0, 1, 2)]).unwrap_err().status(), 2, "reserved flag");
        let off = Limits { discard: false, write_zeroes: false, ..LIMITS };
        assert_eq!(range(kind, &off, &[(0, 1, 0)]), Err(Reject::Type));
        assert_eq!(range(kind, &Limits { read_only: true, ..LIMITS }, &[(0, 1, 0)]), Err(Reject::ReadOnly));
    }
    assert_eq!(range(discard, &LIMITS, &[(0, 1, 1)]), Err(Reject::Flags), "unmap on a discard");
}

#[test]
fn every_reject_has_its_own_counter() {
    let places: std::collections::HashSet<usize> = Reject::ALL.iter().map(|reject| reject.index()).collect();
    assert_eq!(places.len(), Reject::ALL.len());
    assert!(places.iter().all(|place| *place < Reject::ALL.len()));
}

/// Entries that often point at each other, at memory, and just outside of it.
fn any_entry() -> impl Strategy<Value = Entry> {
    let address = prop_oneof![
        Just(HEADER),
        Just(STATUS),
        Just(INDIRECT_TABLE),
        DATA..MEMORY_BYTES as u64 + 0x100,
        any::<u64>(),
    ];
    let len = prop_oneof![Just(16u32), Just(1), Just(512), Just(0), 0..0x2000u32, any::<u32>(), Just(48)];
    (address, len, prop_oneof![0u16..8, any::<u16>()], prop_oneof![0u16..10, any::<u16>()])
}

/// The plainest reading of a chain: follow it, note each buffer, give up on anything odd. `None`: not a clean chain.
fn model(memory: &GuestMemory, size: u16, head: u16) -> Option<(Vec<u8>, Vec<u64>)> {
    let (mut table, mut entries, mut index, mut inside) = (TABLE, u32::from(size), u32::from(head), false);
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    let mut seen = std::collections::HashSet::new();
    loop {
        if index >= entries || !seen.insert((table, index)) || seen.len() > DESCRIPTORS_MAX as usize {
            return None;
        }
        let mut bytes = [0u8; 16];
        let at = table.checked_add(u64::from(index) * 16)?;
        memory.regions().read_slice(&mut bytes, GuestAddress(at)).ok()?;
        let address = u64::from_le_bytes(bytes[0..8].try_into().unwrap());
        let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let flags = u16::from_le_bytes(bytes[12..14].try_into().unwrap());
        let next = u16::from_le_bytes(bytes[14..16].try_into().unwrap());
        if flags & INDIRECT != 0 {
            if inside || flags & NEXT != 0 || len == 0 || len % 16 != 0 {
                return None;
            }
            (table, entries, index, inside) = (address, len / 16, 0, true);
            continue;
        }
        let end = address.checked_add(u64::from(len))?;
        if len == 0 || end > MEMORY_BYTES as u64 {
            return None;
        }
        if flags & WRITE != 0 {
            writable.extend(address..end);
        } else if !writable.is_empty() {
            return None;
        } else {
            let start = readable.len();
            readable.resize(start + len as usize, 0);
            memory.regions().read_slice(&mut readable[start..], GuestAddress(address)).unwrap();
        }
        if flags & NEXT == 0 {
            return (!writable.is_empty()).then_some((readable, writable));
        }
        index = u32::from(next);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Whatever a table holds: no panic, an end, and the same reading as the model's.
    #[test]
    fn any_table_is_read_as_the_model_reads_it(
        entries in prop::collection::vec(any_entry(), 10),
        indirect in prop::collection::vec(any_entry(), 6),
        head in 0u16..12,
        kind in prop_oneof![0u32..15, any::<u32>()],
        sector in prop_oneof![0u64..1100, any::<u64>()],
    ) {
        let memory = memory();
        put_header(&memory, kind, sector);
        entries.iter().enumerate().for_each(|(index, entry)| put_entry(&memory, TABLE, index as u16, *entry));
        indirect.iter().enumerate().for_each(|(index, entry)| put_entry(&memory, INDIRECT_TABLE, index as u16, *entry));
        let mut chain = Chain::default();
        let request = chain.parse(&memory, Table { address: TABLE, size: 10 }, head, &LIMITS);
        match (request, model(&memory, 10, head)) {
            (Err(reject), None) => prop_assert!(reject.status() != 0),
            (Ok(request), None) => prop_assert!(false, "an odd chain became {request:?}"),
            (Err(_), Some((_, writable))) => prop_assert_eq!(chain.status_at, writable.last().copied()),
            (Ok(request), Some((readable, mut writable))) => {
                prop_assert_eq!(chain.status_at, writable.pop());
                if let Request::Data { op, offset, len } = request {
                    prop_assert_eq!(offset, u64::from_le_bytes(readable[8..16].try_into().unwrap()) * 512);
                    prop_assert!(offset + u64::from(len) <= 512_000 && len % 512 == 0);
                    let named: Vec<u64> = chain.data.iter().flat_map(|run| run.address..run.address + u64::from(run.len)).collect();
                    prop_assert_eq!(named.len(), len as usize);
                    if op == Op::Read {
                        prop_assert_eq!(named, writable);
                    } else {
                        let mut bytes = vec![0; len as usize];
                        memory.gather(&chain.data, 0, &mut bytes).unwrap();
                        prop_assert_eq!(&bytes, &readable[16..]);
                    }
                }
            }
        }
    }
}
