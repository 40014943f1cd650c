//! Frames in and out of a machine: the only crate that knows how the kernel carries them.
//!
//! Knows whole Ethernet frames and what the kernel does with them; does not know what is in them, but for the two bytes that pick a worker.
//! Both daemons' workers drive a [`Link`]; layers (`tap`, `faults`) stand between with the same trait.

pub mod any;
mod claim;
pub mod clock;
mod drops;
mod facts;
pub mod faults;
mod frame;
pub mod inherited;
pub mod memory;
mod mmap;
mod open_error;
pub mod packet;
mod program;
pub mod random;
pub mod spin;
pub mod stack;
mod sys;
pub mod tap;
pub mod taps;
pub mod udp;
mod vectors;
pub mod wait;
pub mod xdp;

use cirro_protocol::time::Instant;
use cirro_protocol::types::MacAddress;

pub use drops::Drops;
pub use frame::{Cut, FRAMES_QUEUED_MAX, FramePool, Run, TxFrame};
pub use open_error::OpenError;

/// A frame that came in.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// The whole frame, Ethernet header included.
    pub bytes: &'a [u8],
    /// When it reached this machine: the kernel's time stamp, on the clock of [`clock::now`].
    pub arrival: Instant,
}

/// Names a queued frame to its sender: the session's index and the packet number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FrameId {
    /// Index of the session on its worker.
    pub session: u32,
    /// Packet number.
    pub pn: u64,
}

/// A way to send and receive whole Ethernet frames, header included. Belongs to one worker. Nothing in it blocks.
///
/// Order of calls in a turn: [`Link::receive`] until `None` or enough; then [`Link::frame`], fill, [`Link::commit`], again and again; then
/// one [`Link::flush`], also when nothing was committed (a layer may hold frames that are due).
pub trait Link {
    /// Bytes of a frame after the Ethernet header, 1500 to 65535. Can change while the link lives: see [`Link::take_changed`].
    fn mtu(&self) -> usize;

    /// Our address on the segment. Can change while the link lives: see [`Link::take_changed`].
    fn address(&self) -> MacAddress;

    /// The next frame that came. The one before it is given back.
    fn receive(&mut self) -> Option<Received<'_>>;

    /// An empty frame to fill; `None` when there is no room before the next [`Link::flush`]. Asked again without a commit, it gives the same
    /// frame, emptied.
    fn frame(&mut self) -> Option<&mut TxFrame>;

    /// The frame got last from [`Link::frame`] is complete: it is queued.
    fn commit(&mut self, id: FrameId);

    /// Hands everything queued to the kernel in one batch. What the kernel will not take now is forgotten and named in `refused`. Memory
    /// named by the frames is not read after this returns.
    fn flush(&mut self, refused: &mut Vec<FrameId>);

    /// When [`Link::receive`] and [`Link::flush`] must be called although no frame came, if ever: a lost interface is looked for then, or a
    /// frame that a layer held back is due, or frames wait in the link of which its descriptor does not tell.
    fn poll_timeout(&self) -> Option<Instant> {
        None
    }

    /// True once after the link was opened anew: address and MTU may be others now. Sessions that were made with another address or a larger
    /// MTU are at their end: peers drop frames from an address they do not know.
    fn take_changed(&mut self) -> bool {
        false
    }
}
