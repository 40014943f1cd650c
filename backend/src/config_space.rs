//! The device configuration of virtio-blk (virtio 1.2, section 5.2.4) and the feature bits that go with it.
//!
//! Knows the layout and what a volume can do; does not know vhost-user messages or rings. The same volume and flags always give the same bytes,
//! so a front-end that reconnects after a restart sees the device it knew. Called by `device`.

use cirro_protocol::types::{RANGE_SECTORS_MAX, REQUEST_BYTES_MAX, SECTOR_BYTES};
use cirro_protocol::wire::body::{VOLUME_DISCARD, VOLUME_READ_ONLY, VOLUME_WRITE_ZEROES, VolumeInfo};
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Bytes of the configuration that carry a field (up to `unused1` of virtio 1.1); all behind it reads as zero.
pub const CONFIG_BYTES: usize = 60;
/// Most segments of a request: what Linux makes of 1 MiB in pages, less the two descriptors of header and status.
pub const SEG_MAX: u32 = 254;
/// Most bytes in one segment: a whole request.
pub const SIZE_MAX: u32 = REQUEST_BYTES_MAX as u32;

/// Offset of `writeback`, the one field a driver may write.
pub const WRITEBACK_OFFSET: usize = 32;

const CAPACITY: usize = 0;
const SIZE_MAX_AT: usize = 8;
const SEG_MAX_AT: usize = 12;
const BLK_SIZE: usize = 20;
const TOPOLOGY: usize = 24;
const NUM_QUEUES: usize = 34;
const DISCARD: usize = 36;
const WRITE_ZEROES: usize = 48;

/// What the device says of itself to every guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The volume behind it, as the node described it when it was first attached.
    pub volume: VolumeInfo,
    /// No writes, whatever the volume allows.
    pub read_only: bool,
    /// Queues offered.
    pub queues: u16,
    /// Largest queue accepted.
    pub queue_size_max: u16,
}

impl Identity {
    /// True if the guest may not write.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.volume.flags & VOLUME_READ_ONLY != 0
    }

    /// The feature bits offered.
    pub fn features(&self) -> u64 {
        let always = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_MQ,
        ];
        // The last two are between front-end and backend: QEMU migrates no guest without a dirty log.
        let mut bits = always.iter().fold(
            (VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL).bits(),
            |bits, bit| bits | 1 << bit,
        );
        if self.is_read_only() {
            bits |= 1 << VIRTIO_BLK_F_RO;
        } else {
            let flags = self.volume.flags;
            bits |= u64::from(flags & VOLUME_DISCARD != 0) << VIRTIO_BLK_F_DISCARD;
            bits |= u64::from(flags & VOLUME_WRITE_ZEROES != 0) << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        bits
    }

    /// Segments a request may have: a direct chain of the smallest legal use must still fit the queue with header and status.
    pub fn seg_max(&self) -> u32 {
        u32::from(self.queue_size_max).saturating_sub(2).clamp(1, SEG_MAX)
    }

    /// The configuration with the cache mode `writeback`.
    pub fn config(&self, writeback: bool) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let block_bytes = self.volume.block_bytes;
        let block_sectors = block_bytes / SECTOR_BYTES as u32;
        put(&mut config, CAPACITY, &self.volume.capacity_sectors.to_le_bytes());
        put(&mut config, SIZE_MAX_AT, &SIZE_MAX.to_le_bytes());
        put(&mut config, SEG_MAX_AT, &self.seg_max().to_le_bytes());
        put(&mut config, BLK_SIZE, &block_bytes.to_le_bytes());
        put(&mut config, TOPOLOGY, &topology(block_bytes));
        config[WRITEBACK_OFFSET] = u8::from(writeback);
        put(&mut config, NUM_QUEUES, &self.queues.to_le_bytes());
        let features = self.features();
        if features & 1 << VIRTIO_BLK_F_DISCARD != 0 {
            for (index, value) in [RANGE_SECTORS_MAX, 1, block_sectors].into_iter().enumerate() {
                put(&mut config, DISCARD + 4 * index, &value.to_le_bytes());
            }
        }
        if features & 1 << VIRTIO_BLK_F_WRITE_ZEROES != 0 {
            put(&mut config, WRITE_ZEROES, &RANGE_SECTORS_MAX.to_le_bytes());
            put(&mut config, WRITE_ZEROES + 4, &1u32.to_le_bytes());
            config[WRITE_ZEROES + 8] = 1;
        }
        config
    }
}

/// `size` bytes at `offset` of a configuration; what lies behind its last field is zero.
pub fn read(config: &[u8; CONFIG_BYTES], offset: u32, size: u32) -> Vec<u8> {
    let tail = config.get(offset as usize..).unwrap_or(&[]);
    let mut bytes = tail[..tail.len().min(size as usize)].to_vec();
    bytes.resize(size as usize, 0);
    bytes
}

/// Physical block as a power of two of logical blocks, alignment, smallest and best I/O in logical blocks (u8 u8 u16 u32): 4 KiB physical blocks
/// because a frame carries 4 KiB, and 64 KiB as the best request.
fn topology(block_bytes: u32) -> [u8; 8] {
    let exponent = (4096 / block_bytes).trailing_zeros() as u8;
    let min_io = ((4096 / block_bytes) as u16).to_le_bytes();
    let opt_io = (65536 / block_bytes).to_le_bytes();
    [exponent, 0, min_io[0], min_io[1], opt_io[0], opt_io[1], opt_io[2], opt_io[3]]
}

fn put(config: &mut [u8; CONFIG_BYTES], at: usize, bytes: &[u8]) {
    config[at..at + bytes.len()].copy_from_slice(bytes);
}

const _: () = assert!(SEG_MAX >= 126);

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(flags: u32, block_bytes: u32) -> Identity {
        let volume =
            VolumeInfo { capacity_sectors: 0x1122_3344_5566, block_bytes, flags, ..VolumeInfo::default() };
        Identity { volume, read_only: false, queues: 8, queue_size_max: 256 }
    }

    /// Offsets and values written out from `struct virtio_blk_config`, virtio 1.2 section 5.2.4.
    #[test]
    fn every_field_lies_where_the_specification_has_it() {
        let config = identity(VOLUME_DISCARD | VOLUME_WRITE_ZEROES, 512).config(true);
        assert_eq!(config[0..8], [0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0, 0], "capacity");
        assert_eq!(config[8..12], [0, 0, 0x10, 0], "size_max 1 MiB");
        assert_eq!(config[12..16], [254, 0, 0, 0], "seg_max");
        assert_eq!(config[16..20], [0; 4], "geometry");
        assert_eq!(config[20..24], [0, 2, 0, 0], "blk_size 512");
        assert_eq!(
            config[24..32],
            [3, 0, 8, 0, 128, 0, 0, 0],
            "topology: 8 blocks of 512 are 4096; 128 are 64 KiB"
        );
        assert_eq!(config[32..34], [1, 0], "writeback");
        assert_eq!(config[34..36], [8, 0], "num_queues");
        assert_eq!(config[36..48], [0xff, 0xff, 0xff, 0, 1, 0, 0, 0, 1, 0, 0, 0], "discard");
        assert_eq!(config[48..60], [0xff, 0xff, 0xff, 0, 1, 0, 0, 0, 1, 0, 0, 0], "write zeroes");
    }

    #[test]
    fn any_offset_and_size_is_answered_in_full() {
        let config = identity(0, 4096).config(false);
        assert_eq!(read(&config, 0, 57)[20..24], [0, 16, 0, 0]);
        assert_eq!(read(&config, 0, 60).len(), 60);
        assert_eq!(read(&config, 34, 2), [8, 0]);
        assert_eq!(read(&config, 58, 100), [0; 100]);
        assert_eq!(read(&config, 4000, 96), [0; 96]);
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_changes_data() {
        let bit = |features: u64, bit: u32| features >> bit & 1;
        let mut disk = identity(VOLUME_DISCARD | VOLUME_WRITE_ZEROES, 512);
        assert_eq!((bit(disk.features(), 13), bit(disk.features(), 14), bit(disk.features(), 5)), (1, 1, 0));
        disk.read_only = true;
        assert_eq!((bit(disk.features(), 13), bit(disk.features(), 14), bit(disk.features(), 5)), (0, 0, 1));
        assert_eq!(disk.config(true)[36..60], [0; 24]);
        let by_volume = identity(VOLUME_READ_ONLY, 512);
        assert_eq!(bit(by_volume.features(), 5), 1);
    }

    /// Bit numbers from virtio 1.2: 1 SIZE_MAX, 2 SEG_MAX, 6 BLK_SIZE, 9 FLUSH, 10 TOPOLOGY, 11 CONFIG_WCE, 12 MQ, 28 INDIRECT, 29 EVENT_IDX,
    /// 32 VERSION_1; vhost-user: 30 PROTOCOL_FEATURES.
    #[test]
    fn the_features_promised_are_offered() {
        let features = identity(0, 512).features();
        let promised =
            [1, 2, 6, 9, 10, 11, 12, 28, 29, 30, 32].iter().fold(0u64, |bits, bit| bits | 1 << bit);
        assert_eq!(features, promised);
    }

    #[test]
    fn segments_always_fit_the_queue() {
        let with = |queue_size_max| Identity { queue_size_max, ..identity(0, 512) }.seg_max();
        assert_eq!((with(2), with(4), with(128), with(256), with(1024)), (1, 2, 126, 254, 254));
    }
}
