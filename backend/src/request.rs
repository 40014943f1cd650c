//! A descriptor chain made into a [`Request`], or into a [`Reject`] with a name: any bytes in, one of the two out.
//!
//! Knows descriptor tables (virtio 1.2, section 2.7) and virtio-blk requests (section 5.2.6); does not know queues' indices, slots or the wire. No
//! layout is assumed: header and data may share a descriptor or be split anywhere, and the status byte is the last writable byte wherever that lies.
//! Work is bounded by [`DESCRIPTORS_MAX`]. Called by `worker` for each head that it takes off a ring.

use cirro_protocol::op::Op;
use cirro_protocol::types::{RANGE_SECTORS_MAX, SECTOR_BYTES, SERIAL_BYTES};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;

use crate::guest_memory::{GuestMemory, GuestRun, cut};

/// Most descriptors of one chain: the largest queue, and header and status beside it for drivers that count them apart.
pub const DESCRIPTORS_MAX: u32 = QUEUE_SIZE_MAX as u32 + 2;
/// Largest queue offered.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Most bytes a chain may describe: sixteen protocol requests. Linux stops at 1280 KiB unless told otherwise.
pub const CHAIN_BYTES_MAX: u32 = 16 << 20;
/// Bytes of a request header: u32 type, u32 reserved, u64 sector.
pub const HEADER_BYTES: u32 = 16;
/// Bytes of a discard or write-zeroes segment: u64 sector, u32 sectors, u32 flags.
pub const SEGMENT_BYTES: u32 = 16;

/// Where a chain starts.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Guest address of the descriptor table.
    pub address: u64,
    /// Its entries: the queue's size.
    pub size: u16,
}

/// What the disk allows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Size of the disk in sectors.
    pub capacity_sectors: u64,
    /// Nothing may be changed.
    pub read_only: bool,
    /// DISCARD is offered.
    pub discard: bool,
    /// WRITE_ZEROES is offered.
    pub write_zeroes: bool,
}

/// What a guest asks for. Its data (of a read or write) lies in [`Chain::data`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// `len` bytes at byte `offset` of the disk.
    Data {
        /// [`Op::Read`] or [`Op::Write`].
        op: Op,
        /// First byte on the disk.
        offset: u64,
        /// Bytes; a multiple of a sector, perhaps none.
        len: u32,
    },
    /// Make what was written stable.
    Flush,
    /// Discard or zero a range.
    Range {
        /// [`Op::Discard`] or [`Op::WriteZeroes`].
        op: Op,
        /// First byte on the disk.
        offset: u64,
        /// Sectors, perhaps none, at most [`RANGE_SECTORS_MAX`].
        sectors: u32,
    },
    /// The serial number goes into the data, of which at most [`SERIAL_BYTES`] are used.
    GetId,
}

/// Why a chain is no request. Counted by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Reject {
    /// More descriptors than the table has, so it runs in a circle, or more than [`DESCRIPTORS_MAX`].
    #[error("the chain does not end")]
    Endless,
    /// A descriptor's `next` is no entry of its table.
    #[error("next is outside of the table")]
    NextOutside,
    /// A descriptor table outside of guest memory.
    #[error("a descriptor table is outside of guest memory")]
    TableOutside,
    /// An indirect descriptor in an indirect table, with NEXT, empty, or of a size that is no multiple of 16.
    #[error("a malformed indirect descriptor")]
    Indirect,
    /// A readable descriptor after a writable one.
    #[error("readable after writable")]
    Order,
    /// A descriptor of no bytes.
    #[error("an empty descriptor")]
    Empty,
    /// A buffer outside of guest memory.
    #[error("a buffer is outside of guest memory")]
    BufferOutside,
    /// More than [`CHAIN_BYTES_MAX`].
    #[error("too many bytes")]
    TooLong,
    /// Fewer readable bytes than a header.
    #[error("the header is cut short")]
    Header,
    /// No writable byte, so no status can be told.
    #[error("no place for the status")]
    NoStatus,
    /// A request type we do not offer.
    #[error("an unknown or unsupported request type")]
    Type,
    /// Readable data in a read, or writable data in a write.
    #[error("data of the wrong direction")]
    Direction,
    /// Data that is not a number of sectors.
    #[error("data is not a number of sectors")]
    Sectors,
    /// Sectors that the disk does not have.
    #[error("past the end of the disk")]
    PastEnd,
    /// A change of a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
    /// Fewer bytes than one discard segment.
    #[error("the segment is cut short")]
    Segment,
    /// More than one discard segment.
    #[error("more segments than one")]
    Segments,
    /// Flags that are reserved, or unmap on a discard.
    #[error("reserved segment flags")]
    Flags,
    /// More sectors than one segment may have.
    #[error("a segment of too many sectors")]
    RangeTooLong,
}

impl Reject {
    /// Every reason, in the order of [`Reject::index`].
    pub const ALL: [Reject; 19] = [
        Reject::Endless,
        Reject::NextOutside,
        Reject::TableOutside,
        Reject::Indirect,
        Reject::Order,
        Reject::Empty,
        Reject::BufferOutside,
        Reject::TooLong,
        Reject::Header,
        Reject::NoStatus,
        Reject::Type,
        Reject::Direction,
        Reject::Sectors,
        Reject::PastEnd,
        Reject::ReadOnly,
        Reject::Segment,
        Reject::Segments,
        Reject::Flags,
        Reject::RangeTooLong,
    ];

    /// Its place in a table of counters.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The status byte the guest gets, if the chain has a place for one.
    pub const fn status(self) -> u8 {
        match self {
            Reject::Type | Reject::Segments | Reject::Flags => VIRTIO_BLK_S_UNSUPP as u8,
            Reject::Endless
            | Reject::NextOutside
            | Reject::TableOutside
            | Reject::Indirect
            | Reject::Order
            | Reject::Empty
            | Reject::BufferOutside
            | Reject::TooLong
            | Reject::Header
            | Reject::NoStatus
            | Reject::Direction
            | Reject::Sectors
            | Reject::PastEnd
            | Reject::ReadOnly
            | Reject::Segment
            | Reject::RangeTooLong => VIRTIO_BLK_S_IOERR as u8,
        }
    }
}

/// A chain taken apart. Kept by the caller and used again, so that parsing allocates only when a chain is longer than all before it.
#[derive(Debug, Default)]
pub struct Chain {
    readable: Vec<GuestRun>,
    writable: Vec<GuestRun>,
    readable_bytes: u32,
    writable_bytes: u32,
    /// The data of the request: to the device for a write, from it for a read or GET_ID.
    pub data: Vec<GuestRun>,
    /// Where the status byte goes, if there is a place for it.
    pub status_at: Option<u64>,
}

impl Chain {
    /// Takes the chain at `head` apart and reads the request in it. Afterwards [`Chain::data`] and [`Chain::status_at`] belong to it.
    ///
    /// # Errors
    /// A [`Reject`]; [`Chain::status_at`] says whether its status can be told.
    pub fn parse(
        &mut self,
        memory: &GuestMemory,
        table: Table,
        head: u16,
        limits: &Limits,
    ) -> Result<Request, Reject> {
        self.clear();
        let walked = self.walk(memory, table, head);
        if !matches!(walked, Err(Walk::Broken(_))) {
            self.status_at = self.take_status(memory);
        }
        match walked {
            Err(Walk::Broken(reject) | Walk::Odd(reject)) => Err(reject),
            Ok(()) if self.status_at.is_none() => Err(Reject::NoStatus),
            Ok(()) => self.read_request(memory, limits),
        }
    }

    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.data.clear();
        (self.readable_bytes, self.writable_bytes, self.status_at) = (0, 0, None);
    }

    fn walk(&mut self, memory: &GuestMemory, table: Table, head: u16) -> Result<(), Walk> {
        let (mut address, mut size, mut indirect) = (table.address, u32::from(table.size), false);
        let (mut index, mut left, mut odd) = (u32::from(head), size.min(DESCRIPTORS_MAX), None);
        let mut total = DESCRIPTORS_MAX;
        loop {
            if index >= size {
                return Err(Walk::Broken(Reject::NextOutside));
            }
            if left == 0 || total == 0 {
                return Err(Walk::Broken(Reject::Endless));
            }
            (left, total) = (left - 1, total - 1);
            let entry = memory.descriptor(address, index).map_err(|_| Walk::Broken(Reject::TableOutside))?;
            if entry.refers_to_indirect_table() {
                if indirect || entry.has_next() || entry.len() == 0 || entry.len() % 16 != 0 {
                    return Err(Walk::Broken(Reject::Indirect));
                }
                (address, size, indirect) = (entry.addr().0, entry.len() / 16, true);
                (index, left) = (0, size);
                continue;
            }
            if let Err(reject) = self.push(memory, &entry) {
                odd = odd.or(Some(reject));
            }
            if !entry.has_next() {
                return odd.map_or(Ok(()), |reject| Err(Walk::Odd(reject)));
            }
            index = u32::from(entry.next());
        }
    }

    /// Adds a buffer to its side. A fault is told, and the walk goes on to find the status byte.
    fn push(&mut self, memory: &GuestMemory, entry: &Descriptor) -> Result<(), Reject> {
        let (address, len) = (entry.addr().0, entry.len());
        let late = !entry.is_write_only() && !self.writable.is_empty();
        let (runs, bytes) = if entry.is_write_only() {
            (&mut self.writable, &mut self.writable_bytes)
        } else {
            (&mut self.readable, &mut self.readable_bytes)
        };
        // The last writable run is kept even when it is odd: the status byte may still have its place at the end of it.
        let start = *bytes;
        let end = start.checked_add(len).filter(|end| *end <= CHAIN_BYTES_MAX);
        *bytes = end.unwrap_or(start);
        if len > 0 {
            runs.push(GuestRun { address, len, start });
        }
        if late {
            Err(Reject::Order)
        } else if len == 0 {
            Err(Reject::Empty)
        } else if end.is_none() {
            Err(Reject::TooLong)
        } else if !memory.covers(address, len) {
            Err(Reject::BufferOutside)
        } else {
            Ok(())
        }
    }

    /// Takes the last writable byte off the buffers.
    fn take_status(&mut self, memory: &GuestMemory) -> Option<u64> {
        let last = self.writable.last_mut()?;
        last.len -= 1;
        let at = last.address.checked_add(u64::from(last.len))?;
        if last.len == 0 {
            self.writable.pop();
        }
        self.writable_bytes = self.writable_bytes.saturating_sub(1);
        memory.covers(at, 1).then_some(at)
    }

    fn read_request(&mut self, memory: &GuestMemory, limits: &Limits) -> Result<Request, Reject> {
        let mut header = [0u8; HEADER_BYTES as usize];
        if self.readable_bytes < HEADER_BYTES {
            return Err(Reject::Header);
        }
        memory.gather(&self.readable, 0, &mut header).map_err(|_| Reject::BufferOutside)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => {
                if self.readable_bytes != HEADER_BYTES {
                    return Err(Reject::Direction);
                }
                std::mem::swap(&mut self.data, &mut self.writable);
                data_request(Op::Read, sector, self.writable_bytes, limits)
            }
            VIRTIO_BLK_T_OUT => {
                if self.writable_bytes != 0 {
                    return Err(Reject::Direction);
                }
                let request = data_request(Op::Write, sector, self.readable_bytes - HEADER_BYTES, limits)?;
                self.take_data_after_header();
                Ok(request)
            }
            VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
            VIRTIO_BLK_T_GET_ID => {
                std::mem::swap(&mut self.data, &mut self.writable);
                Ok(Request::GetId)
            }
            VIRTIO_BLK_T_DISCARD if limits.discard || limits.read_only => {
                self.read_range(Op::Discard, memory, limits)
            }
            VIRTIO_BLK_T_WRITE_ZEROES if limits.write_zeroes || limits.read_only => {
                self.read_range(Op::WriteZeroes, memory, limits)
            }
            _ => Err(Reject::Type),
        }
    }

    fn take_data_after_header(&mut self) {
        let runs = cut(&self.readable, HEADER_BYTES, self.readable_bytes - HEADER_BYTES);
        self.data.extend(runs.map(|run| GuestRun { start: run.start - HEADER_BYTES, ..run }));
    }

    /// Reads the one segment of a discard or write-zeroes. The order of the checks is that of QEMU's device, which drivers were tested against.
    fn read_range(&mut self, op: Op, memory: &GuestMemory, limits: &Limits) -> Result<Request, Reject> {
        let bytes = self.readable_bytes - HEADER_BYTES;
        if limits.read_only {
            return Err(Reject::ReadOnly);
        }
        if bytes > SEGMENT_BYTES {
            return Err(Reject::Segments);
        }
        let mut segment = [0u8; SEGMENT_BYTES as usize];
        if bytes < SEGMENT_BYTES {
            return Err(Reject::Segment);
        }
        memory.gather(&self.readable, HEADER_BYTES, &mut segment).map_err(|_| Reject::BufferOutside)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        if sectors > RANGE_SECTORS_MAX {
            return Err(Reject::RangeTooLong);
        }
        let first = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let offset = offset_of(first, u64::from(sectors), limits)?;
        let allowed = if op == Op::WriteZeroes { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        if u32::from_le_bytes(flags) & !allowed != 0 {
            return Err(Reject::Flags);
        }
        Ok(Request::Range { op, offset, sectors })
    }
}

/// Why a walk gave no clean chain.
enum Walk {
    /// Its end was not found.
    Broken(Reject),
    /// It was walked to its end, but something in it is wrong.
    Odd(Reject),
}

fn data_request(op: Op, sector: u64, len: u32, limits: &Limits) -> Result<Request, Reject> {
    if limits.read_only && op.changes_data() {
        return Err(Reject::ReadOnly);
    }
    if !(len as usize).is_multiple_of(SECTOR_BYTES) {
        return Err(Reject::Sectors);
    }
    let offset = offset_of(sector, u64::from(len) / SECTOR_BYTES as u64, limits)?;
    Ok(Request::Data { op, offset, len })
}

/// The byte offset of `sector`, if `sectors` from there exist.
fn offset_of(sector: u64, sectors: u64, limits: &Limits) -> Result<u64, Reject> {
    let end = sector.checked_add(sectors).ok_or(Reject::PastEnd)?;
    if end > limits.capacity_sectors {
        return Err(Reject::PastEnd);
    }
    sector.checked_mul(SECTOR_BYTES as u64).ok_or(Reject::PastEnd)
}

const _: () = assert!(SERIAL_BYTES == 20, "GET_ID gives 20 bytes, virtio 1.2 section 5.2.6");
const _: () = assert!(Reject::ALL[Reject::RangeTooLong as usize] as usize == Reject::ALL.len() - 1);

#[cfg(test)]
mod tests;
