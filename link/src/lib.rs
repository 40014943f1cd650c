//! Frames in and out of a machine: the only crate that knows AF_PACKET.
//!
//! Knows Ethernet frames as bytes and runs of foreign memory; does not know what is in them. The workers of both daemons call a [`Link`]:
//! [`packet::PacketLink`] in production, [`memory::MemoryLink`] in tests, with the layers of [`stack`] in between.

pub mod clock;
mod frame;
pub mod random;
mod sys;
pub mod wait;

pub use frame::{CUTS_MAX, Cut, FRAMES_QUEUED_MAX, FrameId, Received, Run, TxFrame};

use cirro_protocol::time::Instant;
use cirro_protocol::types::MacAddress;

/// A way to send and receive whole Ethernet frames, header included. Belongs to one worker.
///
/// A turn: [`receive`](Link::receive) until `None`; then, while there is something to send, [`frame`](Link::frame), fill it,
/// [`commit`](Link::commit); at its end [`flush`](Link::flush), also when nothing was committed. No call blocks.
pub trait Link {
    /// Bytes that a frame may have after its Ethernet header, 1500..=65535. Can change while the link lives (see the implementation).
    fn mtu(&self) -> usize;

    /// The address frames are sent from and received at. Can change while the link lives (see the implementation).
    fn address(&self) -> MacAddress;

    /// The next received frame, if there is one. The frame before it is given back by this call.
    fn receive(&mut self) -> Option<Received<'_>>;

    /// A cleared frame to fill, or `None` when there is no room before the next flush. Asked again without a commit, the same frame comes,
    /// cleared.
    fn frame(&mut self) -> Option<&mut TxFrame>;

    /// The frame that [`frame`](Link::frame) gave is complete and queued.
    fn commit(&mut self, id: FrameId);

    /// Gives what is queued to the kernel in one batch. What it would not take is appended to `refused` and forgotten; the queue is empty
    /// afterwards, and no run of memory is read any more.
    fn flush(&mut self, refused: &mut Vec<FrameId>);

    /// When the link wants to be called again although no file descriptor of it became ready: frames that a layer holds back, an interface
    /// that is gone and looked for. A worker that sleeps counts this among its timers.
    fn wake_at(&self) -> Option<Instant> {
        None
    }
}
