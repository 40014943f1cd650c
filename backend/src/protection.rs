//! What protects a disk's frames: checksums, or keys and the handshakes that agree on them.
//!
//! Knows which of the two; when to shake hands is known to the initiator, how to `cirro-seal`. Called by `worker`.

use cirro_protocol::time::Instant;
use cirro_protocol::types::{Cid, PublicKey, Steer};
use cirro_protocol::wire::long::LongFrame;
use cirro_seal::{Answer, Caller, Guard, Mismatch, seal_long};

use crate::disk::Disk;
use crate::stats::Drop;

/// One disk's.
pub struct Protection {
    /// With keys: its handshakes.
    caller: Option<Caller>,
    /// Of the session at hand; none before the first one that has keys.
    guard: Option<Guard>,
    /// The log says that an answer did not open.
    told: bool,
}

impl Protection {
    /// By checksums, or by keys.
    pub fn new(caller: Option<Caller>) -> Protection {
        let guard = caller.is_none().then_some(Guard::Crc);
        Protection { caller, guard, told: false }
    }

    /// True if only frames with keys are taken.
    pub fn is_by_keys(&self) -> bool {
        self.caller.is_some()
    }

    /// What seals and opens the frames of the session at hand.
    pub fn guard(&mut self) -> Option<&mut Guard> {
        self.guard.as_mut()
    }

    /// Seals a LONG frame that the core wrote; its answer is wanted at `answer_to`.
    pub fn seal_long(&mut self, head: &mut Vec<u8>, answer_to: (Cid, Steer)) {
        match &mut self.caller {
            Some(caller) => caller.seal(head, answer_to),
            None => seal_long(head),
        }
    }
}

impl Disk {
    /// Takes what answers this disk's HELLO. The core decides what it means; keys count from when it has a session by them.
    pub(crate) fn take_answer(&mut self, now: Instant, bytes: &[u8]) -> Result<(), Drop> {
        let caller = self.protection.caller.as_mut().ok_or(Drop::Handshake)?;
        match caller.open_answer(bytes) {
            Ok(None) => self.initiator.hurry(now),
            Ok(Some(Answer { frame, keys })) => {
                if self.initiator.handle_long(now, &frame)
                    && let Some(keys) = keys
                {
                    self.protection.guard = Some(Guard::Aead(keys));
                }
            }
            Err(Mismatch::Tag) => {
                self.tell_unopened();
                return Err(Drop::Handshake);
            }
            Err(Mismatch::Layout | Mismatch::Mode | Mismatch::Phase | Mismatch::Payload { .. }) => {
                return Err(Drop::Handshake);
            }
        }
        Ok(())
    }

    /// An answer to our HELLO does not open: says so once.
    fn tell_unopened(&mut self) {
        if !std::mem::replace(&mut self.protection.told, true) {
            log::warn!(
                "volume {}: the node's answer does not open: give the same --psk at both ends, or none; or somebody forges answers",
                self.volume()
            );
        }
    }
}

/// Takes a hint of a node. It is for all disks of that node, and checked once for those that follow each other.
pub(crate) fn take_hint<'d>(
    disks: impl Iterator<Item = &'d mut Disk>,
    now: Instant,
    bytes: &[u8],
) -> Result<(), Drop> {
    let mut checked: Option<(PublicKey, Result<LongFrame, Mismatch>)> = None;
    let mut taken = Err(Drop::Handshake);
    for disk in disks {
        let Some(caller) = &disk.protection.caller else { continue };
        let known = checked.filter(|(node, _)| *node == caller.node());
        let frame = known.map_or_else(|| caller.open_hint(bytes), |(_, frame)| frame);
        checked = Some((caller.node(), frame));
        if let Ok(frame) = frame {
            disk.initiator.handle_long(now, &frame);
            taken = Ok(());
        }
    }
    taken
}
