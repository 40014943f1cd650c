//! What protects a disk's frames: checksums, or keys and the handshakes that agree on them.
//!
//! Knows which of the two; when to shake hands is known to the initiator, how to `cirro-seal`. Called by `worker`.

use cirro_protocol::initiator::StateName;
use cirro_protocol::time::Instant;
use cirro_protocol::types::{Cid, PublicKey, Steer};
use cirro_protocol::wire::guarded::Guarded;
use cirro_protocol::wire::long::{Body, LongFrame};
use cirro_protocol::wire::{Frame, Header};
use cirro_seal::{Caller, Guard, Mismatch, Nonces, Said, SessionKeys, seal_long};

use crate::disk::Disk;
use crate::stats::Drop;

/// One disk's.
pub struct Protection {
    /// With keys: its handshakes.
    caller: Option<Caller>,
    /// Of the session at hand.
    guard: Guard,
    /// The log says that an answer did not open.
    told: bool,
}

impl Protection {
    /// By checksums, or by keys.
    pub fn new(caller: Option<Caller>) -> Protection {
        Protection { caller, guard: Guard::Crc, told: false }
    }

    /// True if only frames with keys are taken.
    pub fn is_by_keys(&self) -> bool {
        self.caller.is_some()
    }

    /// True if the session at hand has keys.
    pub fn has_keys(&self) -> bool {
        matches!(self.guard, Guard::Aead(_))
    }

    /// Seals a LONG frame that the core wrote; its answer is wanted at `answer_to`.
    pub fn seal_long(&mut self, head: &mut Vec<u8>, answer_to: (Cid, Steer)) {
        match &mut self.caller {
            Some(caller) => caller.seal(head, answer_to),
            None => seal_long(head),
        }
    }

    /// Encrypts a whole frame of the session, and appends its tag.
    ///
    /// # Panics
    /// If the session has no keys.
    pub fn seal(&mut self, pn: u64, frame: &mut Vec<u8>) {
        match &mut self.guard {
            Guard::Aead(keys) => keys.seal(pn, frame),
            Guard::Crc => panic!("the session has no keys"),
        }
    }

    /// Opens a short frame.
    ///
    /// # Errors
    /// [`Mismatch`]; with keys also for every frame before the first session has them.
    pub fn open<'a>(
        &mut self,
        nonces: Nonces,
        header: &Header,
        bytes: &'a [u8],
        plain: &'a mut Vec<u8>,
    ) -> Result<Frame<'a>, Mismatch> {
        if self.is_by_keys() && !self.has_keys() {
            return Err(Mismatch::Mode);
        }
        self.guard.open(nonces, header, bytes, plain)
    }
}

/// Takes a LONG frame with keys. An answer is for the disk whose cid it names; a hint is for those whose node gives it, and is checked once
/// for all of them.
pub(crate) fn take_guarded<'d>(
    disks: impl Iterator<Item = &'d mut Disk>,
    now: Instant,
    bytes: &[u8],
) -> Result<(), Drop> {
    let cid = Guarded::parse(bytes).map_err(|_| Drop::Malformed)?.cid;
    let mut checked: Option<(PublicKey, Result<LongFrame, Mismatch>)> = None;
    let mut taken = Err(Drop::Handshake);
    for disk in disks.filter(|disk| cid == Cid(0) || disk.initiator.cid() == cid) {
        let Some(caller) = &mut disk.protection.caller else { continue };
        let mut waited = false;
        let known = checked.filter(|(node, _)| *node == caller.node());
        let said = match known {
            Some((_, frame)) => frame.map(|frame| Said::Frame(frame, None)),
            None => {
                waited = caller.is_waiting();
                caller.open(bytes)
            }
        };
        if cid == Cid(0) {
            let frame = said.as_ref().map_err(|mismatch| *mismatch).and_then(|said| match said {
                Said::Frame(frame, _) => Ok(*frame),
                Said::Cookie => Err(Mismatch::Layout),
            });
            checked = Some((caller.node(), frame));
        }
        match said {
            Ok(Said::Frame(frame, keys)) => {
                follow(disk, now, &frame, keys);
                taken = Ok(());
            }
            Ok(Said::Cookie) => {
                disk.initiator.hurry(now);
                taken = Ok(());
            }
            Err(_) if waited && cid != Cid(0) => disk.tell_unopened(),
            Err(_) => {}
        }
    }
    taken
}

impl Disk {
    /// An answer to our HELLO came from somebody who knows the node's public key, and does not open: says so once.
    fn tell_unopened(&mut self) {
        if !std::mem::replace(&mut self.protection.told, true) {
            log::warn!(
                "volume {}: the node's answer does not open: give the same --psk at both ends, or none; or somebody forges answers",
                self.volume()
            );
        }
    }
}

/// The core decides what an answer means; the keys count from when it has a session.
fn follow(disk: &mut Disk, now: Instant, frame: &LongFrame, keys: Option<SessionKeys>) {
    let greeting = disk.initiator.state() == StateName::Greeting;
    let grants = matches!(frame.body, Body::HelloReply(_)) && greeting;
    if disk.initiator.handle_long(now, frame)
        && let Some(keys) = keys.filter(|_| grants)
    {
        disk.protection.guard = Guard::Aead(Box::new(keys));
    }
}
