//! Random numbers from the kernel, for nonces, cids and uuids.
//!
//! Knows no generator of its own.

use crate::sys;

/// Fills `bytes` with random ones.
pub fn fill(bytes: &mut [u8]) {
    sys::random(bytes);
}

/// A random number.
pub fn u64() -> u64 {
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// Sixteen random bytes.
pub fn uuid() -> cirro_protocol::types::Uuid {
    let mut bytes = [0; 16];
    fill(&mut bytes);
    cirro_protocol::types::Uuid(bytes)
}
