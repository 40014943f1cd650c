//! A layer that does to frames what a bad wire does: it loses, doubles, reorders, delays and damages them, each direction by itself.
//!
//! The same seed, options and frames give the same faults. Knows frames as bytes. Stands above any link, for tests and for trying out how the
//! rest bears it; when off it costs one branch per call.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};

use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERNET_BYTES, FRAME_BYTES_MAX, MacAddress};

use crate::{FrameId, Link, Received, TxFrame, clock};

/// Frames held back in one direction: 10 ms of 400,000 frames a second. What comes on top is lost, as in a full queue.
pub const HELD_MAX: usize = 4096;
/// How long a reordered frame waits for others to overtake it.
const OVERTAKE_TIME: Nanos = Nanos::from_millis(2);
/// Names a frame that its sender has been told is gone, or that it never sent.
const HELD: FrameId = FrameId { session: u32::MAX, pn: u64::MAX };

/// How likely something is, in millionths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chance(pub u32);

impl Chance {
    /// `percent` of 100.
    pub const fn percent(percent: u32) -> Chance {
        Chance(percent * 10_000)
    }
}

/// What happens to the frames of one direction. The default: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wire {
    /// A frame is lost.
    pub loss: Chance,
    /// A burst of losses begins.
    pub burst: Chance,
    /// Frames that a burst loses one after the other.
    pub burst_frames: u32,
    /// A frame comes twice.
    pub duplication: Chance,
    /// A frame is overtaken by the next `reorder_frames`.
    pub reordering: Chance,
    /// See above.
    pub reorder_frames: u32,
    /// A bit behind the Ethernet header is turned over.
    pub corruption: Chance,
    /// Every frame takes this long,
    pub delay: Nanos,
    /// and up to this much longer, evenly spread: frames overtake each other.
    pub jitter: Nanos,
}

/// Both directions, as this end sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Where chance begins.
    pub seed: u64,
    /// For frames that this end sends.
    pub sent: Wire,
    /// For frames that this end receives.
    pub received: Wire,
}

/// What happened in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames that came into the layer.
    pub frames: u64,
    /// Lost, alone or in bursts.
    pub lost: u64,
    /// Doubled.
    pub duplicated: u64,
    /// Held back for others to overtake.
    pub reordered: u64,
    /// With a bit turned over.
    pub corrupted: u64,
    /// Lost because [`HELD_MAX`] were held back.
    pub overflowed: u64,
}

/// The layer.
#[derive(Debug)]
pub struct Faults<L> {
    inner: L,
    active: Option<Box<Active>>,
    /// The time as last set; `None`: that of [`clock::now`].
    now: Option<Instant>,
}

#[derive(Debug)]
struct Active {
    sent: Lane,
    received: Lane,
    /// The frame that is being built.
    frame: TxFrame,
    /// The frame received last.
    current: Vec<u8>,
}

/// One direction.
#[derive(Debug)]
struct Lane {
    wire: Wire,
    random: Random,
    burst_left: u32,
    held: VecDeque<Held>,
    /// Frames that went on at once.
    passed: u64,
    counts: Counts,
}

#[derive(Debug)]
struct Held {
    bytes: Vec<u8>,
    /// It goes on when so many frames have passed, or at this time, whichever is first.
    after: u64,
    due: Instant,
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug)]
struct Fate {
    lost: bool,
    twice: bool,
    /// A random number that picks the bit to turn over.
    flip: Option<u64>,
    hold: Option<(u64, Instant)>,
}

impl<L> Faults<L> {
    /// The layer above `inner`, off.
    pub fn new(inner: L) -> Faults<L> {
        Faults { inner, active: None, now: None }
    }

    /// What is below.
    pub fn inner(&self) -> &L {
        &self.inner
    }

    /// What is below.
    pub fn inner_mut(&mut self) -> &mut L {
        &mut self.inner
    }

    /// Begins anew with `options`, or ends the faults. Frames held back are lost. Call it between two turns.
    pub fn set(&mut self, options: Option<Options>) {
        self.active = options.map(|Options { seed, sent, received }| {
            Box::new(Active {
                sent: Lane::new(sent, seed),
                received: Lane::new(received, !seed),
                frame: TxFrame::with_capacity(FRAME_BYTES_MAX),
                current: Vec::new(),
            })
        });
    }

    /// Sets the time, for a link that is not of this world; from now on the machine's clock is not looked at.
    pub fn set_now(&mut self, now: Instant) {
        self.now = Some(now);
    }

    /// What happened since [`Faults::set`]: to frames sent, and to frames received.
    pub fn counts(&self) -> (Counts, Counts) {
        self.active
            .as_ref()
            .map_or_else(Default::default, |active| (active.sent.counts, active.received.counts))
    }
}

impl Lane {
    fn new(wire: Wire, seed: u64) -> Lane {
        let random = Random(seed);
        Lane { wire, random, burst_left: 0, held: VecDeque::new(), passed: 0, counts: Counts::default() }
    }

    /// Decides on a frame. Always draws the same number of random numbers, so that one option does not change what another does.
    fn judge(&mut self, now: Instant) -> Fate {
        let Lane { wire, random, counts, .. } = self;
        counts.frames += 1;
        let (alone, burst) = (random.happens(wire.loss), random.happens(wire.burst));
        let (twice, overtaken) = (random.happens(wire.duplication), random.happens(wire.reordering));
        let (damaged, bit) = (random.happens(wire.corruption), random.next());
        let late = Nanos(wire.delay.0 + random.below(wire.jitter.0.saturating_add(1)));
        if burst && self.burst_left == 0 {
            self.burst_left = wire.burst_frames;
        }
        let lost = alone || self.burst_left > 0;
        self.burst_left = self.burst_left.saturating_sub(1);
        if lost {
            counts.lost += 1;
            return Fate { lost, twice: false, flip: None, hold: None };
        }
        counts.duplicated += u64::from(twice);
        counts.reordered += u64::from(overtaken);
        counts.corrupted += u64::from(damaged);
        let hold = if overtaken {
            Some((self.passed + u64::from(wire.reorder_frames), now + late + OVERTAKE_TIME))
        } else {
            (late > Nanos::ZERO).then(|| (u64::MAX, now + late))
        };
        Fate { lost, twice, flip: damaged.then_some(bit), hold }
    }

    /// Does what `fate` says to the bytes of a frame that is not lost; gives back those that go on at once.
    fn suffer(&mut self, fate: Fate, mut bytes: Vec<u8>, now: Instant) -> Option<Vec<u8>> {
        let bits = bytes.len().saturating_sub(ETHERNET_BYTES) as u64 * 8;
        if let Some(bit) = fate.flip.filter(|_| bits > 0).map(|number| number % bits) {
            bytes[ETHERNET_BYTES + (bit / 8) as usize] ^= 1 << (bit % 8);
        }
        if fate.twice {
            let (after, due) = fate.hold.unwrap_or((self.passed, now));
            self.hold(Held { bytes: bytes.clone(), after, due });
        }
        match fate.hold {
            Some((after, due)) => {
                self.hold(Held { bytes, after, due });
                None
            }
            None => {
                self.passed += 1;
                Some(bytes)
            }
        }
    }

    fn hold(&mut self, held: Held) {
        if self.held.len() < HELD_MAX {
            self.held.push_back(held);
        } else {
            self.counts.overflowed += 1;
        }
    }

    /// A held frame whose time has come: the one that was due first.
    fn release(&mut self, now: Instant) -> Option<Vec<u8>> {
        let ready = |held: &Held| held.after <= self.passed || held.due <= now;
        let ready = self.held.iter().enumerate().filter(|(_, held)| ready(held));
        let (place, _) = ready.min_by_key(|(_, held)| held.due)?;
        self.held.remove(place).map(|held| held.bytes)
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.held.iter().map(|held| held.due).min()
    }
}

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    fn happens(&mut self, chance: Chance) -> bool {
        self.below(1_000_000) < u64::from(chance.0)
    }
}

impl<L: Link> Faults<L> {
    fn time(&self) -> Instant {
        self.now.unwrap_or_else(clock::now)
    }

    /// Sends held frames whose time has come, as far as the link below has room.
    fn send_released(&mut self, now: Instant) {
        let Some(active) = &mut self.active else { return };
        while let Some(below) = self.inner.frame() {
            let Some(bytes) = active.sent.release(now) else { return };
            below.head.extend_from_slice(&bytes);
            self.inner.commit(HELD);
        }
    }
}

impl<L: AsFd> AsFd for Faults<L> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl<L: Link> Link for Faults<L> {
    fn mtu(&self) -> usize {
        self.inner.mtu()
    }

    fn address(&self) -> MacAddress {
        self.inner.address()
    }

    #[inline]
    fn receive(&mut self) -> Option<Received<'_>> {
        if self.active.is_none() {
            return self.inner.receive();
        }
        let now = self.time();
        let Active { received: lane, current, .. } = &mut **self.active.as_mut()?;
        let mut arrival = now;
        *current = loop {
            if let Some(bytes) = lane.release(now) {
                break bytes;
            }
            let received = self.inner.receive()?;
            let fate = lane.judge(now);
            if !fate.lost
                && let Some(bytes) = lane.suffer(fate, received.bytes.to_vec(), now)
            {
                arrival = received.arrival;
                break bytes;
            }
        };
        Some(Received { bytes: current, arrival })
    }

    #[inline]
    fn frame(&mut self) -> Option<&mut TxFrame> {
        let below = self.inner.frame()?;
        let Some(active) = &mut self.active else { return Some(below) };
        active.frame.clear();
        Some(&mut active.frame)
    }

    #[inline]
    fn commit(&mut self, id: FrameId) {
        let now = if self.active.is_some() { self.time() } else { Instant(0) };
        let Some(active) = &mut self.active else { return self.inner.commit(id) };
        let fate = active.sent.judge(now);
        if fate.lost {
            active.frame.clear();
            return;
        }
        let mut bytes = Vec::with_capacity(active.frame.len());
        active.frame.gather(&mut bytes);
        active.frame.clear();
        if let Some(bytes) = active.sent.suffer(fate, bytes, now) {
            let below = self.inner.frame().expect("there was room when this frame was asked for");
            below.head.extend_from_slice(&bytes);
            self.inner.commit(id);
            self.send_released(now);
        }
    }

    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        if self.active.is_none() {
            return self.inner.flush(refused);
        }
        self.send_released(self.time());
        self.inner.flush(refused);
        refused.retain(|id| *id != HELD);
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let lanes = self.active.iter().flat_map(|active| [&active.sent, &active.received]);
        self.inner.poll_timeout().into_iter().chain(lanes.filter_map(Lane::poll_timeout)).min()
    }

    fn take_changed(&mut self) -> bool {
        self.inner.take_changed()
    }
}
