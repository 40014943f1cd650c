//! A layer that loses, duplicates, delays, reorders and damages frames, by chance that a seed fixes.
//!
//! Knows frames as bytes and nothing of what they mean. For tests on wires that are too good, and for trying what an operator fears; pushed
//! and popped by `stack`. One seed and one sequence of calls and times give one run.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERNET_BYTES, MacAddress};

use crate::clock::Source;
use crate::{FrameId, Link, Received, TxFrame};

/// Frames held back in one direction: a window of 8192 frames is lost before it is filled, 36 MiB at 9 KiB a frame.
pub const HELD_MAX: usize = 4096;
/// Frames taken from the link below in one call, so that one call stays short.
const TAKE_MAX: usize = 64;
/// One in a million.
const MILLION: u64 = 1_000_000;

/// What happens to frames in one direction. Chances are in parts per million (10 000 is 1 %).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mischief {
    /// The frame is gone.
    pub loss_ppm: u32,
    /// It comes twice.
    pub duplicate_ppm: u32,
    /// One bit behind the Ethernet header is flipped.
    pub damage_ppm: u32,
    /// It is held back by up to `reorder_by` more, so that later ones overtake it.
    pub reorder_ppm: u32,
    /// See `reorder_ppm`.
    pub reorder_by: Nanos,
    /// Every frame takes at least this much longer.
    pub delay_min: Nanos,
    /// And at most this much, evenly spread.
    pub delay_max: Nanos,
}

/// What happens in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Fixes every chance.
    pub seed: u64,
    /// To frames that are sent.
    pub transmit: Mischief,
    /// To frames that are received.
    pub receive: Mischief,
}

/// What happened in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames that came to the layer.
    pub frames: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Lost because [`HELD_MAX`] were held.
    pub overflowed: u64,
    /// Sent on twice.
    pub duplicated: u64,
    /// Damaged.
    pub damaged: u64,
    /// Held back longer than their neighbours.
    pub reordered: u64,
}

/// A link with mischief before it.
pub struct Faults<L> {
    link: L,
    clock: Source,
    transmit: Lane,
    receive: Lane,
    /// The frame that the caller fills.
    frame: TxFrame,
    /// The frame that was received last.
    current: Vec<u8>,
}

/// One direction.
struct Lane {
    mischief: Mischief,
    random: Random,
    held: BinaryHeap<Reverse<Held>>,
    order: u64,
    counts: Counts,
}

/// A frame held back. Ordered by when it is due, then by when it came.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    due: Instant,
    order: u64,
    session: u32,
    pn: u64,
    bytes: Vec<u8>,
}

impl<L: Link> Faults<L> {
    /// Puts mischief before `link`. `clock` is that of the arrivals of `link`.
    pub fn new(link: L, plan: Plan, clock: Source) -> Faults<L> {
        let frame = TxFrame::with_capacity(ETHERNET_BYTES + link.mtu());
        Faults {
            link,
            clock,
            transmit: Lane::new(plan.transmit, plan.seed),
            receive: Lane::new(plan.receive, !plan.seed),
            frame,
            current: Vec::new(),
        }
    }

    /// Takes the layer off. Frames that are held are lost with it.
    pub fn into_link(self) -> L {
        self.link
    }

    /// The link below.
    pub fn below(&self) -> &L {
        &self.link
    }

    /// The link below.
    pub fn below_mut(&mut self) -> &mut L {
        &mut self.link
    }

    /// What happened to frames sent, and to frames received.
    pub fn counts(&self) -> (Counts, Counts) {
        (self.transmit.counts, self.receive.counts)
    }
}

impl<L: Link> Link for Faults<L> {
    fn mtu(&self) -> usize {
        self.link.mtu()
    }

    fn address(&self) -> MacAddress {
        self.link.address()
    }

    fn receive(&mut self) -> Option<Received<'_>> {
        for _ in 0..TAKE_MAX {
            let Some(frame) = self.link.receive() else { break };
            self.receive.admit(frame.arrival, FrameId::default(), frame.bytes.to_vec());
        }
        let held = self.receive.take_due((self.clock)())?;
        self.current = held.bytes;
        Some(Received { bytes: &self.current, arrival: held.due })
    }

    fn frame(&mut self) -> Option<&mut TxFrame> {
        if self.transmit.held.len() >= HELD_MAX {
            return None;
        }
        self.frame.clear();
        Some(&mut self.frame)
    }

    fn commit(&mut self, id: FrameId) {
        let mut bytes = Vec::new();
        self.frame.gather(&mut bytes);
        self.frame.clear();
        self.transmit.admit((self.clock)(), id, bytes);
    }

    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        let now = (self.clock)();
        while let Some(held) = self.transmit.take_due(now) {
            if self.link.frame().is_none() {
                self.link.flush(refused);
            }
            let frame = self.link.frame().expect("a link has room after a flush");
            frame.head.extend_from_slice(&held.bytes);
            self.link.commit(FrameId { session: held.session, pn: held.pn });
        }
        self.link.flush(refused);
    }

    fn poll_timeout(&self) -> Option<Instant> {
        [self.link.poll_timeout(), self.transmit.next_due(), self.receive.next_due()]
            .into_iter()
            .flatten()
            .min()
    }

    fn take_changed(&mut self) -> bool {
        self.link.take_changed()
    }
}

impl Lane {
    fn new(mischief: Mischief, seed: u64) -> Lane {
        let counts = Counts::default();
        Lane { mischief, random: Random(seed), held: BinaryHeap::new(), order: 0, counts }
    }

    /// Decides what becomes of a frame that came at `at`. The same number of random draws for each frame, whatever is decided, so that a
    /// change of one chance does not change the others' victims.
    fn admit(&mut self, at: Instant, id: FrameId, mut bytes: Vec<u8>) {
        self.counts.frames += 1;
        let Mischief { loss_ppm, duplicate_ppm, damage_ppm, reorder_ppm, .. } = self.mischief;
        let [lost, duplicated, damaged, reordered] = [loss_ppm, duplicate_ppm, damage_ppm, reorder_ppm]
            .map(|ppm| self.random.below(MILLION) < u64::from(ppm));
        let bit = self.random.below((8 * bytes.len().saturating_sub(ETHERNET_BYTES)).max(1) as u64) as usize;
        let delay = self.delay();
        let more = Nanos(self.random.below(self.mischief.reorder_by.0.saturating_add(1)));
        if lost {
            self.counts.lost += 1;
            return;
        }
        if damaged && bytes.len() > ETHERNET_BYTES {
            self.counts.damaged += 1;
            bytes[ETHERNET_BYTES + bit / 8] ^= 1 << (bit % 8);
        }
        if duplicated {
            self.counts.duplicated += 1;
            self.hold(at + delay, id, bytes.clone());
        }
        if reordered {
            self.counts.reordered += 1;
            self.hold(at + delay + more, id, bytes);
        } else {
            self.hold(at + delay, id, bytes);
        }
    }

    fn delay(&mut self) -> Nanos {
        let spread = self.mischief.delay_max - self.mischief.delay_min;
        self.mischief.delay_min + Nanos(self.random.below(spread.0.saturating_add(1)))
    }

    fn hold(&mut self, due: Instant, id: FrameId, bytes: Vec<u8>) {
        if self.held.len() >= HELD_MAX {
            self.counts.overflowed += 1;
            return;
        }
        self.order += 1;
        self.held.push(Reverse(Held { due, order: self.order, session: id.session, pn: id.pn, bytes }));
    }

    fn take_due(&mut self, now: Instant) -> Option<Held> {
        let due = self.held.peek().is_some_and(|Reverse(held)| held.due <= now);
        if due { self.held.pop().map(|Reverse(held)| held) } else { None }
    }

    fn next_due(&self) -> Option<Instant> {
        self.held.peek().map(|Reverse(held)| held.due)
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): chance that a seed fixes; not for secrets.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Evenly in `0..bound` (to 2^-64), `bound` not zero.
    fn below(&mut self, bound: u64) -> u64 {
        (u128::from(self.next()) * u128::from(bound) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::tests::static_run;
    use crate::memory::{self, MemoryLink};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Rig {
        link: Faults<MemoryLink>,
        far: MemoryLink,
        now: Arc<AtomicU64>,
    }

    impl Rig {
        fn new(plan: Plan) -> Rig {
            let (near, far) = memory::pair(1500);
            let now = Arc::new(AtomicU64::new(0));
            let clock = Arc::clone(&now);
            Rig {
                link: Faults::new(near, plan, Box::new(move || Instant(clock.load(Ordering::Relaxed)))),
                far,
                now,
            }
        }

        fn set_now(&mut self, now: u64) {
            self.now.store(now, Ordering::Relaxed);
            self.link.below_mut().set_now(Instant(now));
        }

        fn send(&mut self, number: u64) -> Vec<FrameId> {
            let mut refused = Vec::new();
            let frame = self.link.frame().unwrap();
            frame.head.extend_from_slice(&[0; ETHERNET_BYTES]);
            frame.head.extend_from_slice(&number.to_le_bytes());
            self.link.commit(FrameId { session: 3, pn: number });
            self.link.flush(&mut refused);
            refused
        }

        fn sent(&mut self) -> Vec<u64> {
            numbers(&mut self.far).into_iter().map(|(number, _)| number).collect()
        }
    }

    fn numbers(link: &mut impl Link) -> Vec<(u64, Instant)> {
        let next = || {
            link.receive()
                .map(|frame| (u64::from_le_bytes(*frame.bytes.last_chunk().unwrap()), frame.arrival))
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn without_mischief_everything_passes_at_once_and_in_order() {
        let mut rig = Rig::new(Plan::default());
        let frame = rig.link.frame().unwrap();
        frame.head.extend_from_slice(&[0; 22]);
        frame.push_cut(14, static_run(b"data"));
        rig.link.commit(FrameId::default());
        rig.link.flush(&mut Vec::new());
        assert_eq!(rig.far.receive().unwrap().bytes[12..20], *b"\0\0data\0\0");
        (0..100).for_each(|number| assert_eq!(rig.send(number), []));
        assert_eq!(rig.sent(), (0..100).collect::<Vec<_>>());
        rig.set_now(500);
        (0..100u64).for_each(|number| rig.link.below().inject(number.to_le_bytes().to_vec()));
        assert_eq!(numbers(&mut rig.link), (0..100).map(|number| (number, Instant(500))).collect::<Vec<_>>());
        assert_eq!(rig.link.poll_timeout(), None);
    }

    #[test]
    fn chances_are_kept_and_one_seed_gives_one_run() {
        let transmit =
            Mischief { loss_ppm: 50_000, duplicate_ppm: 20_000, damage_ppm: 10_000, ..Mischief::default() };
        let run = |seed| {
            let mut rig = Rig::new(Plan { seed, transmit, ..Plan::default() });
            let mut sent = Vec::new();
            for number in 0..20_000 {
                rig.send(number);
                sent.extend(rig.sent());
            }
            (sent, rig.link.counts().0)
        };
        let (first, counts) = run(1);
        // 20 000 · 5 %, 2 %, 1 % of what is left, each within five standard deviations: √(n·p·q) is 31, 20, 14.
        assert!(counts.lost.abs_diff(1000) < 155, "{counts:?}");
        assert!(counts.duplicated.abs_diff(380) < 100, "{counts:?}");
        assert!(counts.damaged.abs_diff(190) < 70, "{counts:?}");
        assert_eq!(first.len() as u64, 20_000 - counts.lost + counts.duplicated);
        assert_eq!(run(1), (first.clone(), counts));
        assert_ne!(run(2).0, first);
    }

    #[test]
    fn damage_is_one_bit_behind_the_ethernet_header() {
        let transmit = Mischief { damage_ppm: 1_000_000, ..Mischief::default() };
        let mut rig = Rig::new(Plan { seed: 4, transmit, ..Plan::default() });
        for _ in 0..500 {
            rig.send(0);
            let frame = rig.far.receive().unwrap();
            assert_eq!(frame.bytes[..ETHERNET_BYTES], [0; ETHERNET_BYTES]);
            assert_eq!(frame.bytes.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
        }
    }

    #[test]
    fn a_delay_holds_frames_both_ways_and_says_when_they_are_due() {
        let slow = Mischief { delay_min: Nanos(1_000), delay_max: Nanos(1_000), ..Mischief::default() };
        let mut rig = Rig::new(Plan { seed: 5, transmit: slow, receive: slow });
        rig.set_now(10_000);
        rig.send(1);
        rig.link.below().inject(7u64.to_le_bytes().to_vec());
        assert!(rig.link.receive().is_none() && rig.sent().is_empty());
        assert_eq!(rig.link.poll_timeout(), Some(Instant(11_000)));
        rig.set_now(10_999);
        rig.link.flush(&mut Vec::new());
        assert!(rig.link.receive().is_none() && rig.sent().is_empty());
        rig.set_now(12_000);
        rig.link.flush(&mut Vec::new());
        assert_eq!(rig.sent(), [1]);
        // It arrives when it was due, not when it was looked at.
        assert_eq!(numbers(&mut rig.link), [(7, Instant(11_000))]);
    }

    #[test]
    fn reordered_frames_are_overtaken_and_none_is_lost() {
        let receive = Mischief { reorder_ppm: 100_000, reorder_by: Nanos(5_000), ..Mischief::default() };
        let mut rig = Rig::new(Plan { seed: 6, receive, ..Plan::default() });
        let mut seen = Vec::new();
        for number in 0..1000u64 {
            rig.set_now(number * 1000);
            rig.link.below().inject(number.to_le_bytes().to_vec());
            seen.extend(numbers(&mut rig.link));
        }
        rig.set_now(2_000_000);
        seen.extend(numbers(&mut rig.link));
        let overtaken = seen.windows(2).filter(|pair| pair[0].0 > pair[1].0).count();
        assert!(overtaken > 30 && seen.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{overtaken}");
        seen.sort_unstable();
        assert!(seen.iter().map(|(number, _)| *number).eq(0..1000));
    }

    #[test]
    fn what_is_held_is_bounded_and_then_there_is_no_room() {
        let slow = Mischief { delay_min: Nanos(1_000), delay_max: Nanos(2_000), ..Mischief::default() };
        let mut rig = Rig::new(Plan { seed: 7, transmit: slow, receive: slow });
        for number in 0..HELD_MAX as u64 {
            rig.send(number);
        }
        assert!(rig.link.frame().is_none());
        for number in 0..HELD_MAX as u64 + 10 {
            rig.link.below().inject(number.to_le_bytes().to_vec());
            assert!(rig.link.receive().is_none());
        }
        assert_eq!(rig.link.counts().1.overflowed, 10);
        rig.set_now(2_000);
        rig.link.flush(&mut Vec::new());
        assert_eq!(rig.sent().len(), HELD_MAX);
        assert!(rig.link.frame().is_some());
        assert_eq!(numbers(&mut rig.link).len(), HELD_MAX);
    }

    #[test]
    fn a_refusal_of_the_link_below_comes_up_under_the_frames_own_name() {
        let mut rig = Rig::new(Plan::default());
        rig.link.below_mut().set_refuses(true);
        assert_eq!(rig.send(9), [FrameId { session: 3, pn: 9 }]);
    }
}
