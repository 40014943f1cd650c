//! What a link counts. The same for every kind of link, so that reports need not know which it is.
//!
//! Knows numbers alone. Written by one worker's link, read by the control thread.

use std::sync::atomic::AtomicU64;

/// What happened to one worker's link: counters that other threads may read.
#[derive(Debug, Default)]
pub struct Drops {
    /// Received frames for which the ring had no room.
    pub ring_full: AtomicU64,
    /// Received frames longer than the MTU of when the ring was made.
    pub truncated: AtomicU64,
    /// Frames that the kernel would not send.
    pub refused: AtomicU64,
    /// Times the interface was opened anew.
    pub reopened: AtomicU64,
}
