//! Load without judgement: the cheapest requests a front-end can make, for measuring.
//!
//! Does not look at data. Used by the tests that compare speeds and by the benchmark.

use crate::frontend::{Buffer, Io, Op, Workload};
use crate::verify::Corruption;

/// Requests of one kind and size, at random places or one after another.
#[derive(Clone, Debug)]
pub struct Load {
    op: Op,
    bytes: usize,
    places: u64,
    sequential: bool,
    state: u64,
}

impl Load {
    /// At random places of a disk of `capacity` bytes.
    pub fn random(op: Op, bytes: usize, capacity: u64) -> Load {
        Load { op, bytes, places: capacity / bytes as u64, sequential: false, state: 88_172_645_463_325_252 }
    }

    /// From the beginning to the end, again and again.
    pub fn sequential(op: Op, bytes: usize, capacity: u64) -> Load {
        Load { op, bytes, places: capacity / bytes as u64, sequential: true, state: 0 }
    }

    /// The next request.
    pub fn next_io(&mut self) -> Io {
        Io { op: self.op, offset: self.place() * self.bytes as u64, bytes: self.bytes }
    }

    fn place(&mut self) -> u64 {
        if self.sequential {
            self.state = (self.state + 1) % self.places;
            return self.state;
        }
        // xorshift64
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % self.places
    }
}

impl Workload for Load {
    fn next(&mut self, _slot: usize, _buffer: &Buffer<'_>) -> Option<Io> {
        Some(self.next_io())
    }

    fn done(&mut self, _slot: usize, _io: &Io, _buffer: &Buffer<'_>) -> Result<(), Corruption> {
        Ok(())
    }
}

/// The median of some measurements.
///
/// # Panics
/// There are none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}
