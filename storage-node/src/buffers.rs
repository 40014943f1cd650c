//! A bounded pool of page-aligned memory, in blocks of powers of two from 4 KiB to 1 MiB (a buddy allocator).
//!
//! Does not know what the bytes are. A worker has two pools: one for the data of writes, whose sessions get no more credit than it
//! can hold, and one for reads, which wait when it is full. An empty pool is a pause, never an error.

use std::ops::Range;

use cirro_link::Run;
use cirro_protocol::types::REQUEST_BYTES_MAX;

use crate::memory::{Block, PAGE_BYTES};

/// Sizes of blocks: 4 KiB << 0 ..= 4 KiB << 8.
const ORDERS: usize = 9;
/// No entry of the free lists.
const NONE: u32 = u32::MAX;

const _: () = assert!(PAGE_BYTES << (ORDERS - 1) == REQUEST_BYTES_MAX, "one block holds the largest request");

/// A block of a pool with the number of bytes that were asked for.
#[derive(Debug)]
pub struct Buffer {
    block: Block,
    len: usize,
}

impl Buffer {
    /// The bytes that were asked for.
    pub fn bytes(&self) -> &[u8] {
        &self.block.bytes()[..self.len]
    }

    /// The bytes that were asked for, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.block.bytes_mut()[..self.len]
    }

    /// The bytes in `range`, for a link to read when it sends.
    pub fn run(&self, range: Range<usize>) -> Run {
        assert!(range.end <= self.len, "a run inside the buffer");
        self.block.run(range)
    }
}

/// The pool. Each free block sits in `free` at the number of its first page and is linked into the list of its size.
#[derive(Debug)]
pub struct Pool {
    free: Vec<Option<Block>>,
    next: Vec<u32>,
    previous: Vec<u32>,
    heads: [u32; ORDERS],
    pages_free: usize,
}

fn order_of(len: usize) -> usize {
    debug_assert!((1..=REQUEST_BYTES_MAX).contains(&len));
    len.div_ceil(PAGE_BYTES).next_power_of_two().trailing_zeros() as usize
}

/// Bytes of pool that a buffer of `len` bytes occupies.
pub fn occupied_bytes(len: usize) -> usize {
    PAGE_BYTES << order_of(len.max(1))
}

impl Pool {
    /// A pool of `bytes`, rounded up to whole MiB.
    pub fn new(bytes: usize) -> Pool {
        let chunks = bytes.div_ceil(REQUEST_BYTES_MAX).max(1);
        let pages = chunks * (REQUEST_BYTES_MAX / PAGE_BYTES);
        let mut pool = Pool {
            free: (0..pages).map(|_| None).collect(),
            next: vec![NONE; pages],
            previous: vec![NONE; pages],
            heads: [NONE; ORDERS],
            pages_free: pages,
        };
        // An address that is a multiple of the page only: orders are counted from the start of the memory.
        let mut rest = Block::map(chunks * REQUEST_BYTES_MAX);
        let mut blocks = Vec::with_capacity(chunks);
        while !rest.is_empty() {
            let (block, tail) = rest.split(REQUEST_BYTES_MAX);
            blocks.push(block);
            rest = tail;
        }
        blocks.into_iter().rev().for_each(|block| pool.link(block));
        pool
    }

    /// Bytes that are free, in whatever sizes.
    pub fn bytes_free(&self) -> usize {
        self.pages_free * PAGE_BYTES
    }

    /// Bytes of the whole pool.
    pub fn bytes_total(&self) -> usize {
        self.free.len() * PAGE_BYTES
    }

    /// A buffer of `len` bytes, `1..=REQUEST_BYTES_MAX`; what it holds is left over from its last use. `None`: not now.
    pub fn take(&mut self, len: usize) -> Option<Buffer> {
        assert!((1..=REQUEST_BYTES_MAX).contains(&len), "a buffer holds one request");
        let order = order_of(len);
        let from = (order..ORDERS).find(|order| self.heads[*order] != NONE)?;
        let mut block = self.unlink(self.heads[from]);
        for smaller in (order..from).rev() {
            let (first, second) = block.split(PAGE_BYTES << smaller);
            self.link(second);
            block = first;
        }
        self.pages_free -= 1 << order;
        Some(Buffer { block, len })
    }

    /// Gives a buffer back. It came from this pool.
    pub fn give_back(&mut self, buffer: Buffer) {
        let mut block = buffer.block;
        self.pages_free += block.len() / PAGE_BYTES;
        let mut order = order_of(block.len());
        while order + 1 < ORDERS {
            let page = block.start() / PAGE_BYTES;
            let other = page ^ (1 << order);
            if self.free[other].as_ref().is_none_or(|b| b.len() != block.len()) {
                break;
            }
            let other = self.unlink(other as u32);
            block = if other.start() < block.start() { other.join(block) } else { block.join(other) };
            order += 1;
        }
        self.link(block);
    }

    fn link(&mut self, block: Block) {
        let (page, order) = (block.start() / PAGE_BYTES, order_of(block.len()));
        let head = self.heads[order];
        if head != NONE {
            self.previous[head as usize] = page as u32;
        }
        self.next[page] = head;
        self.previous[page] = NONE;
        self.heads[order] = page as u32;
        self.free[page] = Some(block);
    }

    fn unlink(&mut self, page: u32) -> Block {
        let at = page as usize;
        let block = self.free[at].take().expect("the page heads a free block");
        let (next, previous) = (self.next[at], self.previous[at]);
        if next != NONE {
            self.previous[next as usize] = previous;
        }
        if previous == NONE {
            self.heads[order_of(block.len())] = next;
        } else {
            self.next[previous as usize] = next;
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_pool_says_not_now_and_serves_again_after_a_return() {
        let mut pool = Pool::new(2 << 20);
        let first = pool.take(1 << 20).expect("the pool has two MiB");
        let second = pool.take((1 << 20) - 5).expect("the pool has two MiB");
        assert_eq!(pool.bytes_free(), 0);
        assert!(pool.take(1).is_none());
        pool.give_back(first);
        assert!(pool.take(600_000).is_some());
        pool.give_back(second);
    }

    #[test]
    fn a_buffer_is_page_aligned_and_as_long_as_asked() {
        let mut pool = Pool::new(1 << 20);
        for len in [1, 512, 4096, 4097, 65536, 100_000] {
            let buffer = pool.take(len).expect("there is room");
            assert_eq!(buffer.bytes().len(), len);
            assert_eq!(buffer.bytes().as_ptr() as usize % 4096, 0);
            pool.give_back(buffer);
        }
    }

    #[test]
    fn small_blocks_join_to_a_large_one_again() {
        let mut pool = Pool::new(1 << 20);
        let mut small: Vec<Buffer> = (0..256).map(|_| pool.take(4096).expect("256 pages")).collect();
        assert!(pool.take(1).is_none());
        // Every second one first: no neighbours meet until the end.
        for index in (0..128).rev() {
            pool.give_back(small.remove(index * 2));
        }
        assert!(pool.take(8192).is_none(), "128 single pages are free, no two of them neighbours");
        small.into_iter().for_each(|buffer| pool.give_back(buffer));
        assert!(pool.take(1 << 20).is_some());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn buffers_never_overlap_and_nothing_is_lost(steps in prop::collection::vec((any::<bool>(), 1usize..=1 << 20, any::<u16>()), 1..200)) {
            let mut pool = Pool::new(4 << 20);
            let total = pool.bytes_free();
            let mut held: Vec<(Buffer, u8)> = Vec::new();
            for (index, (take, len, pick)) in steps.into_iter().enumerate() {
                if take || held.is_empty() {
                    if let Some(mut buffer) = pool.take(len) {
                        buffer.bytes_mut().fill(index as u8);
                        held.push((buffer, index as u8));
                    }
                } else {
                    let (buffer, mark) = held.swap_remove(usize::from(pick) % held.len());
                    prop_assert!(buffer.bytes().iter().all(|b| *b == mark), "another buffer wrote here");
                    pool.give_back(buffer);
                }
                let taken: usize = held.iter().map(|(b, _)| occupied_bytes(b.bytes().len())).sum();
                prop_assert_eq!(pool.bytes_free() + taken, total);
            }
            held.into_iter().for_each(|(buffer, _)| pool.give_back(buffer));
            for _ in 0..4 {
                prop_assert!(pool.take(1 << 20).is_some());
            }
        }
    }
}
