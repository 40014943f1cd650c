//! How a request's data is cut into pieces, and which of them are done.
//!
//! Knows lengths and offsets only. A piece is what one frame carries: a multiple of a block, or a block cut into the fewest equal parts.

use crate::types::{BLOCK_BYTES, PIECES_MAX, REQUEST_BYTES_MAX};

/// The sizes that a session steps down through when its path is narrower than its links, largest first.
pub const LADDER: [u32; 7] = [61_440, 32_768, 16_384, 8_192, 4_096, 2_048, 1_368];

/// What a frame of one REQ with one payload needs besides the payload and its CRCs: header 34, message 16, body 32, tag 16.
const OVERHEAD_BYTES: usize = 98;

/// MTU that a session of this piece size needs: 98 + Q + Q/1024, the CRCs rounded up.
pub const fn mtu_needed(piece_bytes: u32) -> usize {
    let piece = piece_bytes as usize;
    OVERHEAD_BYTES + piece.next_multiple_of(8) + 4 * piece.div_ceil(BLOCK_BYTES)
}

/// The piece size for a link MTU of at least 1500: the largest multiple of 4096 that fits, else a block cut into the fewest equal pieces,
/// rounded up to 8.
pub fn piece_bytes_for_mtu(mtu: usize) -> u32 {
    let blocks = (1..=15).rev().find(|n| mtu_needed(n * BLOCK_BYTES as u32) <= mtu);
    if let Some(blocks) = blocks {
        return blocks * BLOCK_BYTES as u32;
    }
    let parts = (2..=3u32).find(|n| mtu_needed((BLOCK_BYTES as u32).div_ceil(*n).next_multiple_of(8)) <= mtu);
    (BLOCK_BYTES as u32).div_ceil(parts.unwrap_or(3)).next_multiple_of(8)
}

/// The next smaller size of the ladder, if there is one.
pub fn next_lower(piece_bytes: u32) -> Option<u32> {
    LADDER.into_iter().find(|rung| *rung < piece_bytes)
}

/// True for a size that a session may have.
pub fn is_legal(piece_bytes: u32) -> bool {
    let whole = piece_bytes.is_multiple_of(BLOCK_BYTES as u32) && (4_096..=61_440).contains(&piece_bytes);
    whole || piece_bytes == 2_048 || piece_bytes == 1_368
}

/// The grid on which a session cuts data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    piece_bytes: u32,
    /// Pieces of a block, for pieces smaller than one; else 1.
    per_block: u32,
}

impl Grid {
    /// The grid of a [legal](is_legal) piece size.
    pub fn new(piece_bytes: u32) -> Grid {
        assert!(is_legal(piece_bytes), "piece size {piece_bytes}");
        Grid { piece_bytes, per_block: (BLOCK_BYTES as u32).div_ceil(piece_bytes) }
    }

    /// Bytes of a full piece.
    pub fn piece_bytes(&self) -> u32 {
        self.piece_bytes
    }

    /// Pieces of `len` bytes of data.
    pub fn count(&self, len: u32) -> u16 {
        let count = if self.per_block == 1 {
            len.div_ceil(self.piece_bytes)
        } else {
            let block = BLOCK_BYTES as u32;
            len / block * self.per_block + (len % block).div_ceil(self.piece_bytes)
        };
        count as u16
    }

    /// Offset and length of piece `index` of `len` bytes of data.
    pub fn range(&self, index: u16, len: u32) -> (u32, u32) {
        let index = u32::from(index);
        if self.per_block == 1 {
            let start = index * self.piece_bytes;
            return (start, self.piece_bytes.min(len - start));
        }
        let block = BLOCK_BYTES as u32;
        let within = index % self.per_block * self.piece_bytes;
        let start = index / self.per_block * block + within;
        (start, self.piece_bytes.min(block - within).min(len - start))
    }

    /// The piece at `offset` with exactly `plen` bytes of data of `len`, if there is such a one.
    pub fn index_of(&self, offset: u32, plen: u32, len: u32) -> Option<u16> {
        if offset >= len {
            return None;
        }
        let index = if self.per_block == 1 {
            offset / self.piece_bytes
        } else {
            let block = BLOCK_BYTES as u32;
            offset / block * self.per_block + offset % block / self.piece_bytes
        } as u16;
        (self.range(index, len) == (offset, plen)).then_some(index)
    }
}

/// A set of pieces of one request.
#[derive(Clone, Debug, Default)]
pub struct PieceSet {
    words: [u64; PIECES_MAX / 64],
    /// Pieces that are not in the set yet.
    missing: u16,
}

impl PieceSet {
    /// Empties the set, which is to hold `count` pieces.
    pub fn reset(&mut self, count: u16) {
        self.words[..usize::from(count).div_ceil(64)].fill(0);
        self.missing = count;
    }

    /// Puts `index`, which is below the count, in; false if it was in.
    pub fn insert(&mut self, index: u16) -> bool {
        let (word, bit) = (usize::from(index) / 64, 1u64 << (index % 64));
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.missing -= u16::from(new);
        new
    }

    /// True if `index` is in.
    pub fn contains(&self, index: u16) -> bool {
        self.words[usize::from(index) / 64] >> (index % 64) & 1 == 1
    }

    /// True if every piece is in.
    pub fn is_complete(&self) -> bool {
        self.missing == 0
    }
}

const _: () = assert!(PIECES_MAX.is_multiple_of(64) && PIECES_MAX == 3 * REQUEST_BYTES_MAX / BLOCK_BYTES);
const _: () =
    assert!(mtu_needed(1_368) <= 1_500 && mtu_needed(8_192) <= 9_000 && mtu_needed(61_440) <= 65_535);

#[cfg(test)]
mod tests {
    use super::*;

    /// P-57
    #[test]
    fn piece_sizes_are_those_of_the_specification() {
        assert_eq!(piece_bytes_for_mtu(1500), 1368);
        assert_eq!(piece_bytes_for_mtu(2200), 2048);
        assert_eq!(piece_bytes_for_mtu(4200), 4096);
        assert_eq!(piece_bytes_for_mtu(9000), 8192);
        assert_eq!(piece_bytes_for_mtu(65535), 61440);
    }

    /// P-58
    #[test]
    fn pieces_cover_the_data_once_and_are_found_again() {
        for piece in LADDER {
            let grid = Grid::new(piece);
            for len in [512u32, 1024, 1368, 4096, 4608, 8192, 12_800, 65_536, 1 << 20] {
                let mut next = 0;
                for index in 0..grid.count(len) {
                    let (offset, plen) = grid.range(index, len);
                    assert_eq!(offset, next, "piece {piece} len {len} index {index}");
                    assert!(plen > 0 && plen <= piece);
                    assert_eq!(grid.index_of(offset, plen, len), Some(index));
                    assert_eq!(grid.index_of(offset, plen + 1, len), None);
                    assert_eq!(grid.index_of(offset + 1, plen, len), None);
                    next += plen;
                }
                assert_eq!(next, len);
                assert_eq!(grid.index_of(len, piece, len), None);
            }
        }
    }

    #[test]
    fn a_set_is_complete_when_every_piece_came_once() {
        let mut set = PieceSet::default();
        set.reset(70);
        assert!((0..70).all(|i| set.insert(i)));
        assert!(set.is_complete() && !set.insert(69) && set.contains(69));
        set.reset(1);
        assert!(!set.is_complete() && !set.contains(0));
    }
}
