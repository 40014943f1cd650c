//! A wire in memory between two links of one thread: for tests of what stands on a link. Nothing is lost and nothing takes time.
//!
//! Knows no kernel. The clock is an argument: [`MemoryLink::set_now`].

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use cirro_protocol::time::Instant;
use cirro_protocol::types::{ETHERNET_BYTES, MacAddress};

use crate::frame::FramePool;
use crate::{FrameId, Link, Received, TxFrame};

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
            if self.refuses || frame.frame_bytes() > self.mtu + ETHERNET_BYTES {
                refused.push(frame.id());
            } else {
                self.outgoing.borrow_mut().push_back(frame.gather());
            }
        }
        self.pool.clear();
    }
}
