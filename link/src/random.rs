//! Random numbers from the kernel, good enough for keys.
//!
//! Called at start and per session, never per frame: each call is a system call.

use crate::sys;

/// Fills `bytes`.
///
/// # Panics
/// If the kernel gives none: no nonce or cid would be safe then.
pub fn fill(bytes: &mut [u8]) {
    sys::random(bytes).expect("getrandom does not fail once the kernel has booted");
}

/// A random number.
///
/// # Panics
/// As [`fill`].
pub fn u64() -> u64 {
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn large_and_small_requests_are_filled_whole() {
        let mut bytes = vec![0u8; 5000];
        super::fill(&mut bytes);
        // 64 zero bytes in a row have a chance of 5000 / 2^512.
        assert!(bytes.chunks(64).all(|chunk| chunk.iter().any(|byte| *byte != 0)));
        assert_ne!(super::u64(), super::u64());
    }
}
