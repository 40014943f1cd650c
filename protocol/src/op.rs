//! What a request asks for and how it ended.
//!
//! Knows the codes on the wire and nothing about how an operation is done.

/// An operation of a REQ message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Read `mlen` bytes at `offset`.
    Read = 1,
    /// Write `mlen` bytes at `offset`.
    Write = 2,
    /// Make every write that was answered before stable.
    Flush = 3,
    /// The sectors are not needed any more; `mlen` counts sectors.
    Discard = 4,
    /// The sectors read as zero from now on; `mlen` counts sectors.
    WriteZeroes = 5,
    /// Take the volume into use; payload: [`crate::wire::body::OpenRequest`].
    Open = 16,
    /// Give the volume up.
    Release = 17,
    /// Say what the volume is; the answer's payload is [`crate::wire::body::VolumeInfo`].
    Stat = 18,
}

impl Op {
    /// The operation with this code.
    pub const fn from_code(code: u8) -> Option<Op> {
        Some(match code {
            1 => Op::Read,
            2 => Op::Write,
            3 => Op::Flush,
            4 => Op::Discard,
            5 => Op::WriteZeroes,
            16 => Op::Open,
            17 => Op::Release,
            18 => Op::Stat,
            _ => return None,
        })
    }

    /// True if the operation changes what the volume holds.
    pub const fn changes_data(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::WriteZeroes)
    }

    /// True if `mlen` counts sectors of 512 bytes and no data travels.
    pub const fn length_in_sectors(self) -> bool {
        matches!(self, Op::Discard | Op::WriteZeroes)
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// Done; what that promises is said by the volume's durability.
    Ok = 0,
    /// The store failed.
    Io = 1,
    /// The store is full.
    NoSpace = 2,
    /// The volume belongs to another attachment now.
    Fenced = 3,
    /// The handle or epoch is not of this session.
    Stale = 4,
    /// Not now; try again.
    Retry = 5,
    /// The request makes no sense: alignment, length or range.
    Invalid = 6,
    /// The volume or the attachment is read-only.
    ReadOnly = 7,
    /// A checksum did not fit the data.
    Corrupt = 8,
    /// Another attachment holds the volume.
    Busy = 9,
    /// No such volume, or no right to it: one answer.
    Access = 10,
    /// The operation is not supported by this volume.
    Unsupported = 11,
}

impl Status {
    /// The status with this code.
    pub const fn from_code(code: u8) -> Option<Status> {
        Some(match code {
            0 => Status::Ok,
            1 => Status::Io,
            2 => Status::NoSpace,
            3 => Status::Fenced,
            4 => Status::Stale,
            5 => Status::Retry,
            6 => Status::Invalid,
            7 => Status::ReadOnly,
            8 => Status::Corrupt,
            9 => Status::Busy,
            10 => Status::Access,
            11 => Status::Unsupported,
            _ => return None,
        })
    }
}
