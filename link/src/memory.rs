//! A wire in memory between two links of one thread: for tests of what stands on a link. Nothing takes time, and nothing is lost before
//! [`FRAMES_WAITING_MAX`] frames wait.
//!
//! Knows no kernel. The clock is an argument: [`MemoryLink::set_now`].

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use cirro_protocol::time::Instant;
use cirro_protocol::types::{ETHERNET_BYTES, MacAddress};

use crate::frame::FramePool;
use crate::{FrameId, Link, Received, TxFrame};

/// Frames that wait in one direction; what comes on top is lost, as in a full ring of the kernel's.
pub const FRAMES_WAITING_MAX: usize = 8192;

type Queue = Rc<RefCell<VecDeque<Vec<u8>>>>;

/// One end.
#[derive(Debug)]
pub struct MemoryLink {
    address: MacAddress,
    mtu: usize,
    incoming: Queue,
    outgoing: Queue,
    current: Vec<u8>,
    pool: FramePool,
    now: Cell<Instant>,
    refuses: bool,
}

/// Two ends: 02:00:00:00:00:01 and :02.
pub fn pair(mtu: usize) -> (MemoryLink, MemoryLink) {
    let (a, b) = (Queue::default(), Queue::default());
    let end = |number, incoming: &Queue, outgoing: &Queue| MemoryLink {
        address: MacAddress([2, 0, 0, 0, 0, number]),
        mtu,
        incoming: Rc::clone(incoming),
        outgoing: Rc::clone(outgoing),
        current: Vec::new(),
        pool: FramePool::new(mtu + ETHERNET_BYTES),
        now: Cell::new(Instant(0)),
        refuses: false,
    };
    (end(1, &a, &b), end(2, &b, &a))
}

impl MemoryLink {
    /// What frames received from now on have as their arrival.
    pub fn set_now(&self, now: Instant) {
        self.now.set(now);
    }

    /// Makes every flush refuse its frames, as a link that is down does.
    pub fn set_refuses(&mut self, refuses: bool) {
        self.refuses = refuses;
    }

    /// True if frames wait to be received.
    pub fn has_frames(&self) -> bool {
        !self.incoming.borrow().is_empty()
    }

    /// Puts bytes on the wire towards this end, as a stranger on the segment would.
    pub fn inject(&self, frame: Vec<u8>) {
        self.incoming.borrow_mut().push_back(frame);
    }
}

impl Link for MemoryLink {
    fn mtu(&self) -> usize {
        self.mtu
    }

    fn address(&self) -> MacAddress {
        self.address
    }

    fn receive(&mut self) -> Option<Received<'_>> {
        self.current = self.incoming.borrow_mut().pop_front()?;
        Some(Received { bytes: &self.current, arrival: self.now.get() })
    }

    fn frame(&mut self) -> Option<&mut TxFrame> {
        self.pool.next_free()
    }

    fn commit(&mut self, id: FrameId) {
        self.pool.commit(id);
    }

    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        for frame in self.pool.queued() {
            if self.refuses || frame.len() > self.mtu + ETHERNET_BYTES {
                refused.push(frame.id());
            } else if self.outgoing.borrow().len() < FRAMES_WAITING_MAX {
                let mut bytes = Vec::new();
                frame.gather(&mut bytes);
                self.outgoing.borrow_mut().push_back(bytes);
            }
        }
        self.pool.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FRAMES_QUEUED_MAX, Run};

    fn send(link: &mut MemoryLink, bytes: &[u8], pn: u64) {
        link.frame().unwrap().head.extend_from_slice(bytes);
        link.commit(FrameId { session: 1, pn });
    }

    #[test]
    fn frames_arrive_in_order_at_the_other_end_with_the_time_that_was_set() {
        let (mut a, mut b) = pair(1500);
        let frame = a.frame().unwrap();
        frame.head.extend_from_slice(b"headtail");
        frame.push_cut(4, Run::of_static(b"payload"));
        a.commit(FrameId::default());
        send(&mut a, b"second", 2);
        assert!(b.receive().is_none(), "nothing leaves before the flush");
        let mut refused = Vec::new();
        a.flush(&mut refused);
        b.set_now(Instant(77));
        let first = b.receive().unwrap();
        assert_eq!((first.bytes, first.arrival), (&b"headpayloadtail"[..], Instant(77)));
        assert_eq!(b.receive().unwrap().bytes, b"second");
        assert!(b.receive().is_none() && a.receive().is_none() && refused.is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name_and_room_comes_back() {
        let (mut a, mut b) = pair(1500);
        send(&mut a, &[0; 1514], 1);
        send(&mut a, &[0; 1515], 2);
        for pn in 3..=FRAMES_QUEUED_MAX as u64 {
            send(&mut a, b"x", pn);
        }
        assert!(a.frame().is_none());
        let mut refused = Vec::new();
        a.flush(&mut refused);
        assert_eq!(refused, [FrameId { session: 1, pn: 2 }]);
        assert_eq!(std::iter::from_fn(|| b.receive().map(|_| ())).count(), FRAMES_QUEUED_MAX - 1);
        a.set_refuses(true);
        send(&mut a, b"x", 9);
        a.flush(&mut refused);
        assert_eq!(refused.last(), Some(&FrameId { session: 1, pn: 9 }));
        assert!(b.receive().is_none());
    }

    #[test]
    fn a_full_wire_loses_the_newest() {
        let (mut a, mut b) = pair(1500);
        let mut refused = Vec::new();
        for pn in 0..FRAMES_WAITING_MAX as u64 + 10 {
            send(&mut a, &pn.to_le_bytes(), pn);
            a.flush(&mut refused);
        }
        let last = std::iter::from_fn(|| b.receive().map(|frame| frame.bytes.to_vec())).last();
        assert_eq!(last, Some((FRAMES_WAITING_MAX as u64 - 1).to_le_bytes().to_vec()));
        assert!(refused.is_empty());
    }
}
