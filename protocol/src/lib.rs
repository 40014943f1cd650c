//! The wire protocol of Cirrostratus as state machines without I/O.
//!
//! Time, frames and random numbers are arguments; frames and events are results. Payload never enters: the core names it by slot and
//! offset. So the same code runs under the daemons and under tests on virtual time.
//!
//! Read `docs/PROTOCOL.md` beside [`initiator`] (the backend's end) and [`target`] (the node's end).
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod handshake;
pub mod initiator;
pub mod op;
pub mod pieces;
pub mod stats;
pub mod target;
pub mod time;
pub mod types;
pub mod wire;

mod congestion;
mod connected;
mod recv_window;
mod requests;
mod rtt;
mod send_window;
mod session;

pub use session::{PayloadRef, Placement, SealWith, Transmit};
