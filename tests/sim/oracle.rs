//! The judge: what each sector of each volume may hold, whatever died meanwhile.
//!
//! A sector is a linearizable register. Knows which writes were begun and how they ended, in the order in which guests saw it; does not know how they travel.
//! Called by `guest`, `world` and at the end of a run.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use cirro_protocol::types::Uuid;

use crate::disk::SECTOR;

/// Not ended yet.
const OPEN: u64 = u64::MAX;
/// Entries of a sector above which the past is forgotten.
const HISTORY_MAX: usize = 24;

/// What a sector may hold. 0 is zeroes.
#[derive(Clone, Copy, Debug)]
struct Change {
    value: u64,
    begun: u64,
    ended: u64,
    /// It took effect between the two; else it may have, or may still until `ended`.
    certain: bool,
    /// Nobody wrote it: a read saw it there.
    seen: bool,
}

/// A write whose buffer was changed in flight.
#[derive(Clone, Copy, Debug)]
struct Wild {
    begun: u64,
    ended: u64,
    /// When something else had certainly taken its place.
    cured: u64,
}

/// Why a run is wrong.
#[derive(Clone, Debug)]
pub(crate) struct Violation(pub(crate) String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The registers of one volume.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    sectors: BTreeMap<u64, Vec<Change>>,
    /// Sectors whose content is anybody's guess: guests changed the buffers in flight.
    wild: BTreeMap<u64, Vec<Wild>>,
    /// When the last flush that was answered OK had been submitted.
    stable_before: u64,
    /// Of what was written before it there is no copy any more.
    orphaned_before: u64,
    /// Who may write, since when.
    owner: Option<(Uuid, u64)>,
    /// When the node ended last: what was not flushed before may be on its way to be written again, oldest first.
    node_ended_at: u64,
}

/// What all judges of a run share.
#[derive(Debug, Default)]
pub(crate) struct Court {
    tick: u64,
    next_value: u64,
    /// When reads in flight began: older history is needed.
    reads: BTreeMap<u64, u32>,
    pub(crate) violations: Vec<Violation>,
    pub(crate) requests: u64,
    pub(crate) failed_requests: u64,
}

pub(crate) type Shared = Rc<RefCell<Court>>;

impl Court {
    /// The next moment of the order that guests see.
    pub(crate) fn tick(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }

    /// A value that no sector ever held: it names its write, and with the sector's number added, its place.
    pub(crate) fn fresh_value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value << 20
    }

    pub(crate) fn violation(&mut self, what: impl fmt::Display) {
        self.violations.push(Violation(what.to_string()));
    }

    pub(crate) fn begin_read(&mut self, begun: u64) {
        *self.reads.entry(begun).or_default() += 1;
    }

    pub(crate) fn end_read(&mut self, begun: u64) {
        if let Some(count) = self.reads.get_mut(&begun) {
            *count -= 1;
            if *count == 0 {
                self.reads.remove(&begun);
            }
        }
    }

    fn oldest_read(&self) -> u64 {
        self.reads.keys().next().copied().unwrap_or(self.tick)
    }
}

/// What bytes a sector shows: its value, or none if it is not one write's.
pub(crate) fn value_of(sector: u64, bytes: &[u8]) -> Option<u64> {
    let (words, _) = bytes.as_chunks::<8>();
    let first = u64::from_le_bytes(words[0]);
    let same = words.iter().all(|word| u64::from_le_bytes(*word) == first);
    let placed = first == 0 || first & 0xf_ffff == sector & 0xf_ffff;
    (same && placed).then_some(if first == 0 { 0 } else { first & !0xf_ffff })
}

/// Fills a sector so that it names its write and its place.
pub(crate) fn stamp(value: u64, sector: u64) -> [u8; SECTOR] {
    let word = (value | sector & 0xf_ffff).to_le_bytes();
    std::array::from_fn(|at| word[at % 8])
}

impl Oracle {
    fn sector(&mut self, sector: u64) -> &mut Vec<Change> {
        let first = Change { value: 0, begun: 0, ended: 0, certain: true, seen: false };
        self.sectors.entry(sector).or_insert_with(|| vec![first])
    }

    /// A change of sectors was made available to the device.
    pub(crate) fn begin(&mut self, sectors: std::ops::Range<u64>, value: u64, begun: u64) {
        for sector in sectors {
            self.sector(sector).push(Change { value, begun, ended: OPEN, certain: false, seen: false });
        }
    }

    /// It ended: as it must, or in an unknown way (an error, a guest that gave it up).
    pub(crate) fn end(
        &mut self,
        sectors: std::ops::Range<u64>,
        begun: u64,
        ended: u64,
        certain: bool,
        court: &Court,
    ) {
        let oldest_read = court.oldest_read();
        for sector in sectors {
            let changes = self.sector(sector);
            let found = changes.iter_mut().find(|change| change.begun == begun && change.ended == OPEN);
            if let Some(change) = found {
                (change.ended, change.certain) = (ended, certain);
            }
            if let Some(wild) = self.wild.get_mut(&sector) {
                wild.iter_mut().filter(|write| write.begun == begun).for_each(|write| write.ended = ended);
                if certain {
                    let over = wild.iter_mut().filter(|write| begun > write.ended);
                    over.for_each(|write| write.cured = write.cured.min(ended));
                }
                let horizon = oldest_read.min(self.stable_before);
                wild.retain(|write| write.cured >= horizon);
            }
            let stable_before = self.stable_before;
            forget(self.sectors.get_mut(&sector).expect("it was just there"), oldest_read, stable_before);
        }
    }

    /// A guest changed the buffer of a write in flight: what it wrote is anybody's guess until something else is written.
    pub(crate) fn set_wild(&mut self, sectors: std::ops::Range<u64>, begun: u64) {
        let write = Wild { begun, ended: OPEN, cured: OPEN };
        sectors.for_each(|sector| self.wild.entry(sector).or_default().push(write));
    }

    /// A flush that was submitted at `begun` was answered OK.
    pub(crate) fn flushed(&mut self, begun: u64) {
        self.stable_before = self.stable_before.max(begun);
    }

    /// Nobody will write again what was not flushed: its host lost power, or another took the volume over.
    pub(crate) fn lose_host(&mut self, now: u64) {
        self.orphaned_before = now;
        // What the node may have forgotten was perhaps being written again: older changes are back then, and newer ones not yet.
        let node_ended_at = self.node_ended_at;
        self.doubt(now, |begun| begun < node_ended_at);
    }

    /// The node has made it durable who may write from now on.
    pub(crate) fn set_owner(&mut self, owner: Option<Uuid>, now: u64) {
        self.owner = owner.map(|owner| (owner, now));
    }

    /// Judges a change of this attachment that was answered OK: another was the owner all the while, or not.
    pub(crate) fn judge_writer(&self, attachment: Uuid, begun: u64) -> Result<(), String> {
        match self.owner {
            Some((owner, since)) if owner != attachment && begun > since => {
                Err(format!("{attachment} wrote at {begun}, but {owner} owns it since {since}"))
            }
            _ => Ok(()),
        }
    }

    /// The node's process ended.
    pub(crate) fn end_node(&mut self, now: u64) {
        self.node_ended_at = now;
    }

    /// The storage machine lost power: what lost its host before, and was not flushed, may or may not be there.
    pub(crate) fn lose_power(&mut self, now: u64) {
        let orphaned_before = self.orphaned_before;
        self.doubt(now, |begun| begun < orphaned_before);
    }

    /// Of what was not flushed, that which began at such a time may be gone, and so may what a read saw of it.
    fn doubt(&mut self, now: u64, at_risk: impl Fn(u64) -> bool) {
        let stable_before = self.stable_before;
        for change in self.sectors.values_mut().flatten() {
            let doubted = change.ended > stable_before && (change.seen || at_risk(change.begun));
            // What is still in flight was not promised to anybody, and ends later.
            if doubted && change.begun > 0 && change.ended != OPEN {
                change.certain = false;
                change.ended = now;
            }
        }
        for write in self.wild.values_mut().flatten() {
            if write.cured > stable_before && at_risk(write.begun) {
                write.cured = OPEN;
                if write.ended != OPEN {
                    write.ended = now;
                }
            }
        }
    }

    /// Judges a sector that was read between two moments.
    pub(crate) fn judge(&mut self, sector: u64, bytes: &[u8], begun: u64, ended: u64) -> Result<(), String> {
        let Some(value) = value_of(sector, bytes) else {
            if self.is_wild(sector, begun) {
                return Ok(());
            }
            let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
            return Err(format!(
                "sector {sector} is torn or another's: {:#x} .. {:#x}",
                word(0),
                word(SECTOR - 8)
            ));
        };
        if self.is_wild(sector, begun) {
            return Ok(());
        }
        let changes = self.sector(sector);
        let overwritten = |change: &Change| {
            changes.iter().any(|other| other.certain && other.begun > change.ended && other.ended < begun)
        };
        let legal = changes.iter().any(|c| c.value == value && c.begun <= ended && !overwritten(c));
        if !legal {
            return Err(format!(
                "sector {sector} holds {:#x}, which it must not (read {begun}..{ended}); history {:?}",
                value >> 20,
                changes.iter().map(|c| (c.value >> 20, c.begun, c.ended, c.certain)).collect::<Vec<_>>()
            ));
        }
        let quiet = changes.iter().all(|change| change.ended < begun);
        // A change that failed may be undone when what was not flushed is written again: only one that was promised stays.
        let promised = changes.iter().any(|change| change.value == value && change.certain && !change.seen);
        if quiet && promised {
            // Whatever it was before, it is this now: a later read must not go back.
            changes.push(Change { value, begun, ended, certain: true, seen: true });
        }
        Ok(())
    }

    fn is_wild(&self, sector: u64, begun: u64) -> bool {
        self.wild.get(&sector).is_some_and(|writes| writes.iter().any(|write| write.cured > begun))
    }

    /// Every sector that was ever changed.
    pub(crate) fn touched(&self) -> Vec<u64> {
        self.sectors.keys().copied().collect()
    }
}

/// Lets go of what no read can return any more, nor a power cut bring back.
fn forget(changes: &mut Vec<Change>, oldest_read: u64, stable_before: u64) {
    if changes.len() <= HISTORY_MAX {
        return;
    }
    let horizon = oldest_read.min(stable_before);
    let all = changes.clone();
    changes.retain(|change| {
        !all.iter().any(|other| other.certain && other.begun > change.ended && other.ended < horizon)
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(oracle: &mut Oracle, value: u64, begun: u64, ended: u64) -> bool {
        oracle.judge(7, &stamp_or_zero(value), begun, ended).is_ok()
    }

    fn stamp_or_zero(value: u64) -> [u8; SECTOR] {
        if value == 0 { [0; SECTOR] } else { stamp(value, 7) }
    }

    const A: u64 = 1 << 20;
    const B: u64 = 2 << 20;

    fn write(oracle: &mut Oracle, value: u64, begun: u64, ended: u64) {
        oracle.begin(7..8, value, begun);
        oracle.end(7..8, begun, ended, true, &Court::default());
    }

    #[test]
    fn what_was_overwritten_must_not_come_back() {
        let mut oracle = Oracle::default();
        write(&mut oracle, A, 1, 2);
        assert!(read(&mut oracle, A, 3, 4) && !read(&mut oracle, 0, 5, 6));
        write(&mut oracle, B, 7, 8);
        assert!(!read(&mut oracle, A, 9, 10) && read(&mut oracle, B, 11, 12));
    }

    #[test]
    fn writes_at_the_same_time_may_end_either_way_but_not_both() {
        let mut oracle = Oracle::default();
        oracle.begin(7..8, A, 1);
        oracle.begin(7..8, B, 2);
        oracle.end(7..8, 1, 3, true, &Court::default());
        oracle.end(7..8, 2, 4, true, &Court::default());
        assert!(read(&mut oracle, A, 5, 6) && !read(&mut oracle, B, 7, 8));
    }

    #[test]
    fn a_failed_write_may_be_there_or_not() {
        let mut oracle = Oracle::default();
        write(&mut oracle, A, 1, 2);
        oracle.begin(7..8, B, 3);
        oracle.end(7..8, 3, 4, false, &Court::default());
        assert!(read(&mut oracle, B, 5, 6) && read(&mut oracle, A, 7, 8) && !read(&mut oracle, B, 9, 10));
    }

    #[test]
    fn a_power_cut_takes_only_what_was_not_flushed() {
        let mut oracle = Oracle::default();
        write(&mut oracle, A, 1, 2);
        oracle.flushed(3);
        write(&mut oracle, B, 4, 5);
        oracle.lose_host(6);
        oracle.lose_power(7);
        assert!(!read(&mut oracle, 0, 8, 9), "A was flushed");
        assert!(read(&mut oracle, A, 8, 9) && !read(&mut oracle, B, 10, 11));
    }

    #[test]
    fn what_is_in_flight_when_a_host_is_lost_still_ends() {
        let mut oracle = Oracle::default();
        oracle.begin(7..8, A, 1);
        oracle.lose_host(2);
        write(&mut oracle, B, 3, 4);
        oracle.end(7..8, 1, 5, true, &Court::default());
        assert!(read(&mut oracle, A, 6, 7) && !read(&mut oracle, B, 8, 9));
    }

    #[test]
    fn a_sector_of_two_writes_is_torn() {
        let mut bytes = stamp(A, 7);
        bytes[256..].copy_from_slice(&stamp(B, 7)[256..]);
        assert!(Oracle::default().judge(7, &bytes, 1, 2).is_err());
        assert!(Oracle::default().judge(8, &stamp(A, 7), 1, 2).is_err(), "it is sector 7's");
    }
}
