//! The nouns of the protocol as types that cannot be swapped, and every limit with the sum that produced it.
//!
//! Knows no behaviour: only names, sizes and bounds.

/// The EtherType of our frames by default: IEEE 802 local experimental 1.
pub const ETHERTYPE_DEFAULT: u16 = 0x88B5;
/// Smallest supported link MTU, bytes after the Ethernet header: what UDP over IPv4 leaves of 1500.
pub const MTU_MIN: usize = 1472;
/// Largest supported link MTU, bytes after the Ethernet header (what veth and loopback allow).
pub const MTU_MAX: usize = 65535;
/// Bytes of an Ethernet header without a VLAN tag.
pub const ETHERNET_BYTES: usize = 14;
/// Largest frame with its Ethernet header.
pub const FRAME_BYTES_MAX: usize = ETHERNET_BYTES + MTU_MAX;
/// A block of data: CRCs are counted in it, and pieces are multiples or equal fractions of it.
pub const BLOCK_BYTES: usize = 4096;
/// The unit of offsets and lengths that virtio-blk uses, and of write credit.
pub const SECTOR_BYTES: usize = 512;
/// Requests in flight in a session. 4 queues of 64, or one of 256.
pub const SLOTS_MAX: usize = 256;
/// The slot of OPEN, RELEASE and STAT, beside the data slots.
pub const CONTROL_SLOT: Slot = Slot(SLOTS_MAX as u16);
/// Largest data of one request; a larger guest request is split over slots. 256 pages, as Linux submits.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Most pieces of one request: three per block when the MTU is 1500.
pub const PIECES_MAX: usize = 3 * (REQUEST_BYTES_MAX / BLOCK_BYTES);
/// Most messages in one frame.
pub const MESSAGES_MAX: usize = 64;
/// Most payloads (and so most runs of guest memory named by the core) in one frame: 65535 / (16 + 512) rounded up to a round number would
/// be 124; a frame of more than 32 gains nothing.
pub const PAYLOADS_MAX: usize = 32;
/// Sent frames a session remembers and received packet numbers it tells apart.
pub const WINDOW_FRAMES: usize = 8192;
/// Bytes of a volume's name, UTF-8 without NUL.
pub const VOLUME_NAME_BYTES_MAX: usize = 64;
/// Bytes of a serial number (virtio-blk GET_ID, section 5.2.6).
pub const SERIAL_BYTES: usize = 20;
/// Largest discard or write-zeroes in one request: its length travels in sectors in 24 bits.
pub const RANGE_SECTORS_MAX: u32 = (1 << 24) - 1;

/// A MAC address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Every station of the segment.
    pub const BROADCAST: MacAddress = MacAddress([0xff; 6]);
}

impl core::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let m = self.0;
        write!(f, "{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", m[0], m[1], m[2], m[3], m[4], m[5])
    }
}

impl core::str::FromStr for MacAddress {
    type Err = BadMacAddress;
    fn from_str(text: &str) -> Result<Self, BadMacAddress> {
        let mut mac = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or(BadMacAddress)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| BadMacAddress)?;
        }
        if parts.next().is_some() { Err(BadMacAddress) } else { Ok(MacAddress(mac)) }
    }
}

/// The text is not six two-digit hexadecimal numbers joined by colons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a MAC address: expected six hexadecimal bytes such as 02:00:5e:10:00:01")]
pub struct BadMacAddress;

/// A slot: a place for one request in flight in a session, `0..SLOTS_MAX`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u16);

impl Slot {
    /// The slot as an index into a table of [`SLOTS_MAX`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The place of a session in its receiver's table: 12 bits of slab slot and 20 random bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cid(pub u32);

impl Cid {
    /// Entries of a session table: what 12 bits address.
    pub const TABLE_MAX: usize = 1 << 12;

    /// A cid for the table entry `index`, made hard to guess by `random`.
    pub const fn new(index: u16, random: u32) -> Cid {
        Cid(((index as u32) & 0xfff) << 20 | (random & 0xf_ffff))
    }

    /// The table entry that the cid names.
    pub const fn index(self) -> usize {
        (self.0 >> 20) as usize
    }
}

/// Which worker of which process a frame is for: 6 bits of process, 10 bits of worker. Chosen by the receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Steer(pub u16);

impl Steer {
    /// Processes on one interface.
    pub const PROCESSES_MAX: u16 = 1 << 6;
    /// Workers of one process.
    pub const WORKERS_MAX: u16 = 1 << 10;

    /// The steer of `worker` of `process`.
    pub const fn new(process: u16, worker: u16) -> Steer {
        Steer((process & 0x3f) << 10 | (worker & 0x3ff))
    }

    /// The process part.
    pub const fn process(self) -> u16 {
        self.0 >> 10
    }

    /// The worker part.
    pub const fn worker(self) -> u16 {
        self.0 & 0x3ff
    }
}

/// Sixteen bytes that name an attachment, a node or one start of a node, chosen at random.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

impl core::fmt::Display for Uuid {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A public key of X25519 (RFC 7748), by which a daemon is known to others. Written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// Not 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a public key: 64 hexadecimal digits, as `cirroctl key show` prints them")]
pub struct BadPublicKey;

impl core::str::FromStr for PublicKey {
    type Err = BadPublicKey;

    fn from_str(text: &str) -> Result<PublicKey, BadPublicKey> {
        let (digits, mut key) = (text.as_bytes(), [0; 32]);
        if digits.len() != 64 {
            return Err(BadPublicKey);
        }
        for (byte, pair) in key.iter_mut().zip(digits.chunks(2)) {
            let digit = |at: usize| char::from(pair[at]).to_digit(16).ok_or(BadPublicKey);
            *byte = (digit(0)? << 4 | digit(1)?) as u8;
        }
        Ok(PublicKey(key))
    }
}

impl core::fmt::Display for PublicKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl core::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{self}")
    }
}

/// A volume's name: 1 to [`VOLUME_NAME_BYTES_MAX`] bytes of letters, digits, `.`, `_` and `-`, not starting with `.` or `-`
/// (so it is safe as a file name and on a command line).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName {
    bytes: [u8; VOLUME_NAME_BYTES_MAX],
    len: u8,
}

impl VolumeName {
    /// The name, checked.
    ///
    /// # Errors
    /// [`BadVolumeName`] when it is empty, too long, or holds another character.
    pub fn new(name: &[u8]) -> Result<VolumeName, BadVolumeName> {
        let legal = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let starts_well = name.first().is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
        if !starts_well || name.len() > VOLUME_NAME_BYTES_MAX || !name.iter().all(legal) {
            return Err(BadVolumeName);
        }
        let mut bytes = [0; VOLUME_NAME_BYTES_MAX];
        bytes[..name.len()].copy_from_slice(name);
        Ok(VolumeName { bytes, len: name.len() as u8 })
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or_default()
    }
}

impl core::fmt::Display for VolumeName {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl core::fmt::Debug for VolumeName {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

impl core::str::FromStr for VolumeName {
    type Err = BadVolumeName;
    fn from_str(text: &str) -> Result<Self, BadVolumeName> {
        VolumeName::new(text.as_bytes())
    }
}

/// The bytes are no volume name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a volume name: 1 to 64 letters, digits, '.', '_' or '-', starting with a letter, a digit or '_'"
)]
pub struct BadVolumeName;

const _: () = assert!(SLOTS_MAX <= u16::MAX as usize);
const _: () = assert!(REQUEST_BYTES_MAX.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(REQUEST_BYTES_MAX < 1 << 24, "mlen has 24 bits");
