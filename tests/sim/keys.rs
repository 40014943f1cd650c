//! Keys of a simulated segment: who is who, random bytes that a seed repeats, and a witness who sees every nonce.
//!
//! Knows identities and counts; does not know frames. Called by `machine` and `host` when their processes start, and by `world`, which judges.

use std::cell::RefCell;
use std::collections::HashSet;
use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cirro_node::access::{AccessList, Client, Grant, Right};
use cirro_protocol::types::VolumeName;
use cirro_seal::{Caller, Entropy, Identity, Nonce, Secret, new_private};
use siphasher::sip::SipHasher13;

/// Keys change every 64 frames.
const PHASE_BITS: u32 = 6;
/// The node among those who have keys; hosts are numbered from 0.
const NODE: u64 = 1_000;

thread_local! {
    /// The nonces of the run on this thread, each with its key's name, and the first that was used again.
    static SEEN: RefCell<(HashSet<Nonce>, Option<Nonce>)> = RefCell::default();
}

/// A run begins on this thread.
pub(crate) fn begin() {
    SEEN.take();
}

/// A nonce that was used twice under one key.
pub(crate) fn used_twice() -> Option<Nonce> {
    SEEN.with_borrow(|(_, twice)| *twice)
}

fn witness(nonce: Nonce) {
    SEEN.with_borrow_mut(|(seen, twice)| {
        if !seen.insert(nonce) {
            twice.get_or_insert(nonce);
        }
    });
}

/// Bytes that follow from the seed, who asks, and how often that process was started.
fn entropy(seed: u64, who: u64, starts: u64) -> Entropy {
    let count = AtomicU64::new(0);
    Arc::new(move |bytes| {
        for chunk in bytes.chunks_mut(8) {
            let mut hash = SipHasher13::new_with_keys(seed, who << 32 | starts);
            hash.write_u64(count.fetch_add(1, Ordering::Relaxed));
            chunk.copy_from_slice(&hash.finish().to_le_bytes()[..chunk.len()]);
        }
    })
}

fn private(seed: u64, who: u64) -> Secret {
    // A key outlives its process: it does not depend on the start.
    new_private(&entropy(seed, who, 0))
}

fn identity(seed: u64, who: u64, starts: u64) -> Arc<Identity> {
    let identity = Identity::new(private(seed, who), entropy(seed, who, 1 + starts));
    Arc::new(identity.with_phase_bits(PHASE_BITS).with_witness(Arc::new(witness)))
}

/// The node's at one of its starts.
pub(crate) fn node(seed: u64, starts: u64) -> Arc<Identity> {
    identity(seed, NODE, starts)
}

/// A disk's handshakes at one of its host's starts.
pub(crate) fn caller(seed: u64, host: u16, starts: u64) -> Caller {
    let node = cirro_seal::public_of(&private(seed, NODE));
    Caller::new(identity(seed, host.into(), starts), node, Secret::default())
}

/// Every host may have every volume.
pub(crate) fn access(seed: u64, hosts: usize, volumes: &[VolumeName]) -> AccessList {
    let of_host = |host: usize| Client::Key(cirro_seal::public_of(&private(seed, host as u64)));
    let grant =
        |volume: &VolumeName, host| Grant { volume: *volume, client: of_host(host), right: Right::ReadWrite };
    let grants = volumes.iter().flat_map(|volume| (0..hosts).map(move |host| grant(volume, host)));
    AccessList::fixed(false, &grants.collect::<Vec<_>>())
}
