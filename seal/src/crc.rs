//! CRC32C (Castagnoli, RFC 3720 appendix B.4): in one call, or fed in pieces.
//!
//! Knows nothing of frames. The work is done by `crc-fast`, which picks carry-less multiplication or table code once per process;
//! measured here: 4 KiB in 0.11 to 0.14 µs, 100 bytes in 10 ns (13 ns fed through [`Crc32c`]).

use crc_fast::CrcAlgorithm::Crc32Iscsi;
use crc_fast::{Digest, crc32_iscsi};

/// The CRC32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32_iscsi(bytes)
}

/// A CRC32C that is fed in pieces: for guest memory, which its owner copies to the stack chunk by chunk, and for what lies around payloads.
#[derive(Clone, Copy, Debug)]
pub struct Crc32c(Digest);

impl Crc32c {
    /// A checksum of nothing yet.
    pub fn new() -> Crc32c {
        Crc32c(Digest::new(Crc32Iscsi))
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The CRC32C of all bytes since the start (or since [`Crc32c::reset`]).
    pub fn finish(&self) -> u32 {
        // The digest keeps a 32-bit CRC in a wider register.
        self.0.finalize() as u32
    }

    /// Starts over, for the next block of a payload.
    pub fn reset(&mut self) {
        self.0.reset();
    }
}

impl Default for Crc32c {
    fn default() -> Self {
        Crc32c::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vectors() -> [(Vec<u8>, u32); 6] {
        let ascending: Vec<u8> = (0..32).collect();
        let descending: Vec<u8> = (0..32).rev().collect();
        let mut scsi_read = [0u8; 48];
        scsi_read[0] = 0x01;
        scsi_read[1] = 0xc0;
        scsi_read[16] = 0x14;
        scsi_read[22] = 0x04;
        scsi_read[27] = 0x14;
        scsi_read[31] = 0x18;
        scsi_read[32] = 0x28;
        scsi_read[40] = 0x02;
        [
            (vec![0; 32], 0x8a91_36aa),
            (vec![0xff; 32], 0x62a8_ab43),
            (ascending, 0x46dd_794e),
            (descending, 0x113f_db5c),
            (scsi_read.to_vec(), 0xd996_3a56),
            (b"123456789".to_vec(), 0xe306_9283),
        ]
    }

    /// The definition, bit by bit: reflected polynomial 0x82f63b78, all ones at start and end.
    fn by_definition(bytes: &[u8]) -> u32 {
        let mut crc = !0u32;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            }
        }
        !crc
    }

    #[test]
    fn vectors_of_rfc_3720_appendix_b4_hold() {
        for (bytes, expected) in vectors() {
            assert_eq!(crc32c(&bytes), expected);
            assert_eq!(by_definition(&bytes), expected);
        }
    }

    #[test]
    fn every_length_to_two_blocks_agrees_with_the_definition() {
        let bytes: Vec<u8> = (0u32..8200).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for len in (0..700).chain([1367, 1368, 1369, 4095, 4096, 4097, 8191, 8192, 8200]) {
            assert_eq!(crc32c(&bytes[..len]), by_definition(&bytes[..len]), "length {len}");
        }
    }

    #[test]
    fn pieces_give_the_same_as_the_whole() {
        let bytes: Vec<u8> = (0u32..1000).map(|i| (i * 7 + i / 250) as u8).collect();
        for split in 0..bytes.len() {
            let mut crc = Crc32c::new();
            crc.update(&bytes[..split]);
            crc.update(&bytes[split..]);
            assert_eq!(crc.finish(), by_definition(&bytes), "split at {split}");
        }
        let mut crc = Crc32c::new();
        crc.update(b"gone");
        crc.reset();
        crc.update(b"123456789");
        assert_eq!(crc.finish(), 0xe306_9283);
    }
}
