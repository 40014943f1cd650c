//! What the tests of the data path stand on: a node made of the protocol's own target and a vector, and the plainest of guest drivers.
//!
//! Knows no threads but in `front_end`: whoever uses it takes the turns.
#![allow(dead_code, reason = "each test program uses its part of the rig")]

pub(crate) mod bench;
pub(crate) mod front_end;
pub(crate) mod guest;
pub(crate) mod node;
