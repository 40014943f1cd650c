//! The frames in flight: when each was sent, how large it was and which messages it carried; which of them are acked or lost.
//!
//! Never the payload, and not what a message means: `initiator` and `target` decide what an acked or a lost [`Record`] asks for.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use crate::time::{Instant, Nanos};
use crate::types::Slot;

/// Frames remembered. A window of 4 MiB is 512 frames of 8 KiB, or 2800 of 1500 bytes of which most are acked.
pub(crate) const FRAMES_MAX: usize = 4096;
/// Messages remembered: at depth 256 a frame of 32 requests needs 32, a frame of data one.
pub(crate) const RECORDS_MAX: usize = 8192;
/// Later frames that must be acked before an earlier one counts as lost (RFC 9002 section 6.1.1), and how far that adapts.
const REORDER_MIN: u64 = 3;
const REORDER_MAX: u64 = 64;

/// What a message was, so that it can be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// A REQ, with a write's first piece.
    Request,
    /// A further piece of a write.
    WriteData,
    /// A final answer without data.
    Response,
    /// A piece of a read's data.
    ReadData,
    /// News of the volume.
    Event,
}

/// A message in flight. 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// Its slot.
    pub slot: Slot,
    /// Its slot sequence number.
    pub sseq: u16,
    /// Its piece, 0 where there is none.
    pub piece: u16,
    /// What it was.
    pub what: What,
    /// How often it was lost while the peer could be heard.
    pub losses: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Nobody waits for its ack.
    Settled,
    InFlight,
    /// Taken for lost because later ones were acked.
    Lost,
    /// Given up at a probe timeout.
    GivenUp,
}

#[derive(Clone, Copy, Debug)]
struct SentFrame {
    sent_at: Instant,
    bytes: u32,
    first_record: u32,
    records: u16,
    fate: Fate,
    limited: bool,
}

/// What became of frames: filled by [`SendWindow`], drained by the session's owner.
#[derive(Debug, Default)]
pub(crate) struct Verdicts {
    /// Messages that arrived.
    pub acked: Vec<Record>,
    /// Messages to send again, if they still matter.
    pub lost: Vec<Record>,
}

/// Sums over the frames of one ack.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AckSums {
    /// Frames newly acked.
    pub frames: u32,
    /// Their bytes.
    pub bytes: u64,
    /// When the largest of them was sent, if it is the one that `ack_pn` names.
    pub largest_sent_at: Option<Instant>,
    /// Frames acked after they had been taken for lost.
    pub spurious: u32,
    /// True if the window was the limit when one of them was sent.
    pub limited: bool,
}

/// The send window of a session.
#[derive(Debug)]
pub(crate) struct SendWindow {
    frames: Box<[SentFrame]>,
    records: Box<[Record]>,
    next_pn: u64,
    /// No frame below it is in flight.
    oldest: u64,
    largest_acked: u64,
    /// The newest frame that an ack has named and settled, and those before it that are settled since, as in an ack.
    known: (u64, u64),
    next_record: u32,
    in_flight_bytes: u64,
    in_flight_frames: u32,
    reorder: u64,
}

impl SendWindow {
    /// A window out of which nothing was sent; the first packet number is 1.
    pub(crate) fn new() -> SendWindow {
        let frame = SentFrame {
            sent_at: Instant(0),
            bytes: 0,
            first_record: 0,
            records: 0,
            fate: Fate::Settled,
            limited: false,
        };
        let record = Record { slot: Slot(0), sseq: 0, piece: 0, what: What::Event, losses: 0 };
        SendWindow {
            frames: vec![frame; FRAMES_MAX].into_boxed_slice(),
            records: vec![record; RECORDS_MAX].into_boxed_slice(),
            next_pn: 1,
            oldest: 1,
            largest_acked: 0,
            known: (0, 0),
            next_record: 0,
            in_flight_bytes: 0,
            in_flight_frames: 0,
            reorder: REORDER_MIN,
        }
    }

    /// The number of the next frame.
    pub(crate) fn next_pn(&self) -> u64 {
        self.next_pn
    }

    /// Bytes in flight that ask for an ack.
    pub(crate) fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes
    }

    /// True if frames that ask for an ack are in flight.
    pub(crate) fn is_waiting(&self) -> bool {
        self.in_flight_frames > 0
    }

    /// True if a frame with `records` messages can be remembered.
    pub(crate) fn has_room(&self, records: usize) -> bool {
        let oldest_record =
            if self.oldest < self.next_pn { self.frame(self.oldest).first_record } else { self.next_record };
        let used = self.next_record.wrapping_sub(oldest_record) as usize;
        self.next_pn - self.oldest < FRAMES_MAX as u64 && used + records <= RECORDS_MAX
    }

    /// Remembers a message of the frame that is being written.
    pub(crate) fn push_record(&mut self, record: Record) {
        self.records[self.next_record as usize % RECORDS_MAX] = record;
        self.next_record = self.next_record.wrapping_add(1);
    }

    /// The frame with the last `records` messages leaves now. Returns its number.
    pub(crate) fn push_frame(
        &mut self,
        now: Instant,
        bytes: usize,
        records: usize,
        asks: bool,
        limited: bool,
    ) -> u64 {
        let pn = self.next_pn;
        self.next_pn += 1;
        let fate = if asks { Fate::InFlight } else { Fate::Settled };
        *self.frame_mut(pn) = SentFrame {
            sent_at: now,
            bytes: bytes as u32,
            first_record: self.next_record.wrapping_sub(records as u32),
            records: records as u16,
            fate,
            limited,
        };
        if asks {
            self.in_flight_bytes += bytes as u64;
            self.in_flight_frames += 1;
        } else {
            self.skip_settled();
        }
        pn
    }

    /// The full number that `low` (the low 32 bits of one) means, if such a frame was sent.
    pub(crate) fn expand(&self, low: u32) -> Option<u64> {
        let last = self.next_pn - 1;
        let back = (last as u32).wrapping_sub(low);
        last.checked_sub(u64::from(back)).filter(|pn| *pn > 0)
    }

    /// Takes `largest` and the 64 numbers that `bits` says below it as acked.
    pub(crate) fn on_ack(&mut self, largest: u64, bits: u64, verdicts: &mut Verdicts) -> AckSums {
        let mut sums = AckSums::default();
        if largest >= self.oldest {
            sums.largest_sent_at = self.ack_one(largest, &mut sums, verdicts);
        }
        let reach = self.oldest_remembered();
        // Each ack repeats what the ones before it said: only what is new in it is looked at.
        let known = self.known_at(largest);
        let mut rest = bits & !known;
        if sums.largest_sent_at.is_some() || largest == self.known.0 {
            self.known = (largest, bits | known);
        }
        while rest != 0 {
            let i = u64::from(rest.trailing_zeros());
            rest &= rest - 1;
            match largest.checked_sub(1 + i) {
                Some(pn) if pn >= reach => _ = self.ack_one(pn, &mut sums, verdicts),
                _ => break,
            }
        }
        self.after_ack(largest, sums)
    }

    /// Frames before `largest` that acks have settled before, one bit each as in an ack.
    fn known_at(&self, largest: u64) -> u64 {
        let (newest, bits) = self.known;
        match largest.checked_sub(newest) {
            Some(0) => bits,
            Some(newer @ 1..=64) => bits.checked_shl(newer as u32).unwrap_or(0) | 1 << (newer - 1),
            Some(_) | None => 0,
        }
    }

    /// Takes `first..=last`, from an ACK_RANGES, as acked.
    pub(crate) fn on_ack_range(&mut self, first: u64, last: u64, verdicts: &mut Verdicts) -> AckSums {
        let mut sums = AckSums::default();
        let last = last.min(self.next_pn - 1);
        for pn in first.max(self.oldest_remembered())..=last {
            self.ack_one(pn, &mut sums, verdicts);
        }
        self.after_ack(last, sums)
    }

    /// Frames that count as lost now: too many later ones were acked, or they are older than `loss_delay`. Returns how many, and when
    /// the next one will be.
    pub(crate) fn detect_lost(
        &mut self,
        now: Instant,
        loss_delay: Nanos,
        verdicts: &mut Verdicts,
    ) -> (u32, Option<Instant>) {
        let (mut lost, mut next) = (0, None);
        for pn in self.oldest..self.largest_acked {
            let frame = *self.frame(pn);
            if frame.fate != Fate::InFlight {
                continue;
            }
            let due = frame.sent_at + loss_delay;
            if self.largest_acked - pn >= self.reorder || due <= now {
                self.lose(pn, Fate::Lost, true, verdicts);
                lost += 1;
            } else if next.is_none() {
                next = Some(due);
            }
        }
        self.skip_settled();
        (lost, next)
    }

    /// Gives up on the `count` oldest frames in flight so that their messages leave again. Returns how many there were. The peer was last
    /// heard at `last_heard`: a piece that was sent after that may have met a dead link, not a narrow one.
    pub(crate) fn lose_oldest(&mut self, count: u32, last_heard: Instant, verdicts: &mut Verdicts) -> u32 {
        let mut lost = 0;
        for pn in self.oldest..self.next_pn {
            if lost == count {
                break;
            }
            let SentFrame { fate, sent_at, .. } = *self.frame(pn);
            if fate == Fate::InFlight {
                self.lose(pn, Fate::GivenUp, last_heard > sent_at, verdicts);
                lost += 1;
            }
        }
        self.skip_settled();
        lost
    }

    /// The kernel refused frame `pn`: it is lost at once.
    pub(crate) fn lose_one(&mut self, pn: u64, verdicts: &mut Verdicts) {
        if pn >= self.oldest && pn < self.next_pn && self.frame(pn).fate == Fate::InFlight {
            self.lose(pn, Fate::Lost, false, verdicts);
            self.skip_settled();
        }
    }

    fn ack_one(&mut self, pn: u64, sums: &mut AckSums, verdicts: &mut Verdicts) -> Option<Instant> {
        let frame = *self.frame(pn);
        match frame.fate {
            Fate::Settled => return None,
            Fate::InFlight => {
                self.in_flight_bytes -= u64::from(frame.bytes);
                self.in_flight_frames -= 1;
                sums.frames += 1;
                sums.bytes += u64::from(frame.bytes);
                sums.limited |= frame.limited;
            }
            Fate::Lost => {
                sums.spurious += 1;
                self.reorder = (self.reorder * 2).min(REORDER_MAX);
            }
            Fate::GivenUp => sums.spurious += 1,
        }
        self.frame_mut(pn).fate = Fate::Settled;
        if self.next_record.wrapping_sub(frame.first_record) as usize <= RECORDS_MAX {
            self.copy_records(frame, |record| verdicts.acked.push(record));
        }
        Some(frame.sent_at)
    }

    fn after_ack(&mut self, largest: u64, sums: AckSums) -> AckSums {
        if largest < self.next_pn {
            self.largest_acked = self.largest_acked.max(largest);
        }
        self.skip_settled();
        sums
    }

    fn lose(&mut self, pn: u64, fate: Fate, counts: bool, verdicts: &mut Verdicts) {
        let frame = *self.frame(pn);
        self.in_flight_bytes -= u64::from(frame.bytes);
        self.in_flight_frames -= 1;
        self.frame_mut(pn).fate = fate;
        self.copy_records(frame, |record| {
            verdicts.lost.push(Record { losses: record.losses.saturating_add(u8::from(counts)), ..record });
        });
    }

    fn copy_records(&self, frame: SentFrame, mut put: impl FnMut(Record)) {
        for i in 0..u32::from(frame.records) {
            put(self.records[frame.first_record.wrapping_add(i) as usize % RECORDS_MAX]);
        }
    }

    /// Moves `oldest` over frames that nobody waits for. A lost frame's records stay readable until they are overwritten, for an ack that
    /// comes late.
    fn skip_settled(&mut self) {
        while self.oldest < self.next_pn && self.frame(self.oldest).fate != Fate::InFlight {
            self.oldest += 1;
        }
    }

    /// Below it a late ack for a lost frame is not looked at.
    fn oldest_remembered(&self) -> u64 {
        self.oldest.saturating_sub(64).max(1).max(self.next_pn.saturating_sub(FRAMES_MAX as u64))
    }

    fn frame(&self, pn: u64) -> &SentFrame {
        &self.frames[pn as usize % FRAMES_MAX]
    }

    fn frame_mut(&mut self, pn: u64) -> &mut SentFrame {
        &mut self.frames[pn as usize % FRAMES_MAX]
    }
}

impl Default for SendWindow {
    fn default() -> Self {
        Self::new()
    }
}

const _: () = assert!(RECORDS_MAX.is_power_of_two() && FRAMES_MAX.is_power_of_two(), "indices wrap");
const _: () = assert!(core::mem::size_of::<Record>() == 8);

#[cfg(test)]
mod tests {
    use alloc::format;

    use super::*;

    fn record(slot: u16) -> Record {
        Record { slot: Slot(slot), sseq: 1, piece: 0, what: What::Request, losses: 0 }
    }

    fn sent(count: u16) -> SendWindow {
        let mut window = SendWindow::new();
        for slot in 1..=count {
            window.push_record(record(slot));
            window.push_frame(Instant(u64::from(slot)), 1000, 1, true, false);
        }
        window
    }

    fn slots(records: &[Record]) -> Vec<u16> {
        records.iter().map(|r| r.slot.0).collect()
    }

    #[test]
    fn acked_messages_are_named_and_bytes_leave_the_flight() {
        let (mut window, mut verdicts) = (sent(4), Verdicts::default());
        let sums = window.on_ack(4, 0b101, &mut verdicts);
        assert_eq!((sums.frames, sums.bytes, sums.largest_sent_at), (3, 3000, Some(Instant(4))));
        assert_eq!(slots(&verdicts.acked), [4, 3, 1]);
        assert_eq!(window.in_flight_bytes(), 1000);
    }

    /// An ack is judged by what is new in it, and that is the same as judging all of it.
    #[test]
    fn what_earlier_acks_have_said_changes_nothing_when_it_is_left_out() {
        let mut state = 88_172_645_463_325_252u64;
        let mut random = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for _ in 0..200 {
            let (mut window, mut plain) = (SendWindow::new(), SendWindow::new());
            for step in 0..100u64 {
                for slot in 0..random(8) as u16 {
                    for window in [&mut window, &mut plain] {
                        window.push_record(record(slot));
                        window.push_frame(Instant(step), 1000, 1, true, false);
                    }
                }
                // Old acks come late, and gaps fill or stay.
                let largest = window.next_pn().saturating_sub(1 + random(90)).max(1);
                let bits = random(u64::MAX) | random(u64::MAX);
                if largest >= window.next_pn() {
                    continue;
                }
                let (mut one, mut other) = (Verdicts::default(), Verdicts::default());
                plain.known = (0, 0);
                let sums = [window.on_ack(largest, bits, &mut one), plain.on_ack(largest, bits, &mut other)];
                assert_eq!(format!("{:?}{one:?}", sums[0]), format!("{:?}{other:?}", sums[1]));
                let lost =
                    [&mut window, &mut plain].map(|w| w.detect_lost(Instant(step), Nanos(20), &mut one));
                assert_eq!((lost[0], window.in_flight_bytes()), (lost[1], plain.in_flight_bytes()));
            }
        }
    }

    /// P-42
    #[test]
    fn a_frame_is_lost_after_three_later_acks_or_after_its_time() {
        let (mut window, mut verdicts) = (sent(5), Verdicts::default());
        window.on_ack(3, 0, &mut verdicts);
        let (lost, next) = window.detect_lost(Instant(10), Nanos(100), &mut verdicts);
        assert_eq!((lost, next), (0, Some(Instant(101))));
        window.on_ack(4, 0, &mut verdicts);
        assert_eq!(window.detect_lost(Instant(10), Nanos(100), &mut verdicts).0, 1);
        assert_eq!(slots(&verdicts.lost), [1]);
        assert_eq!(window.detect_lost(Instant(102), Nanos(100), &mut verdicts).0, 1);
        assert_eq!((slots(&verdicts.lost), verdicts.lost[0].losses), (vec![1, 2], 1));
    }

    /// P-42
    #[test]
    fn an_ack_after_a_loss_counts_as_spurious_and_widens_the_threshold() {
        let (mut window, mut verdicts) = (sent(8), Verdicts::default());
        window.on_ack(4, 0, &mut verdicts);
        window.detect_lost(Instant(10), Nanos(1000), &mut verdicts);
        assert_eq!(slots(&verdicts.lost), [1]);
        assert_eq!(window.on_ack(4, 0b100, &mut verdicts).spurious, 1);
        assert_eq!(window.reorder, 6);
    }

    #[test]
    fn an_ack_for_what_was_never_sent_is_nothing() {
        let (mut window, mut verdicts) = (sent(2), Verdicts::default());
        assert_eq!(window.expand(0), None);
        assert_eq!(window.expand(2), Some(2));
        assert_eq!(window.expand(3), None);
        assert_eq!(window.on_ack_range(1, u64::MAX, &mut verdicts).frames, 2);
    }

    #[test]
    fn low_bits_are_expanded_near_the_last_number() {
        let mut window = SendWindow::new();
        window.next_pn = (1 << 32) + 5;
        window.oldest = window.next_pn;
        assert_eq!(window.expand(3), Some((1 << 32) + 3));
        assert_eq!(window.expand(u32::MAX), Some(u64::from(u32::MAX)));
    }

    #[test]
    fn the_window_says_when_it_is_full() {
        let mut window = SendWindow::new();
        while window.has_room(1) {
            window.push_record(record(1));
            window.push_frame(Instant(0), 100, 1, true, false);
        }
        assert_eq!(window.next_pn, FRAMES_MAX as u64 + 1);
        let mut verdicts = Verdicts::default();
        assert_eq!(window.lose_oldest(2, Instant(0), &mut verdicts), 2);
        assert!(window.has_room(1));
    }
}
