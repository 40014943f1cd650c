//! A link with layers on it that come and go while a worker runs: the last one pushed is nearest to the worker.
//!
//! Knows which layers there are; does not know what they do. A worker owns it in place of its link; between two turns it pushes and pops what
//! the control plane asks for. Without layers a call costs one branch that is always taken the same way.

use std::os::fd::{AsFd, BorrowedFd};

use cirro_protocol::time::Instant;
use cirro_protocol::types::MacAddress;

use crate::clock::Source;
use crate::faults::{Counts, Faults, Plan};
use crate::tap::{Recorder, Tap};
use crate::{FrameId, Link, Received, TxFrame};

/// Layers on one link. More than a tap above and one below some mischief make no sense.
pub const LAYERS_MAX: usize = 8;

/// A link and its layers.
pub struct Stack<L> {
    /// Always there but within `push` and `pop`.
    top: Option<Node<L>>,
    layers: usize,
}

/// A layer to push.
#[derive(Debug)]
pub enum Layer {
    /// Records frames.
    Tap(Recorder),
    /// Does mischief.
    Faults(Plan),
}

/// What is left of a layer that was popped.
#[derive(Debug)]
pub enum Popped {
    /// A tap's recorder; dropping it closes the file.
    Tap(Recorder),
    /// What happened to frames sent, and to frames received.
    Faults(Counts, Counts),
}

/// Why a layer was not pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a link has at most {LAYERS_MAX} layers")]
pub struct TooManyLayers;

enum Node<L> {
    Bottom(L),
    Tap(Box<Tap<Node<L>>>),
    Faults(Box<Faults<Node<L>>>),
}

/// Calls the same method of whatever the node is.
macro_rules! whichever {
    ($node:expr, $link:ident => $call:expr) => {
        match $node {
            Node::Bottom($link) => $call,
            Node::Tap($link) => $call,
            Node::Faults($link) => $call,
        }
    };
}

impl<L: Link> Stack<L> {
    /// A link without layers.
    pub fn new(link: L) -> Stack<L> {
        Stack { top: Some(Node::Bottom(link)), layers: 0 }
    }

    /// Puts a layer on top. To be called between two turns: a frame that was committed and not flushed would not pass it. `clock` is that of
    /// the link's arrivals.
    ///
    /// # Errors
    /// [`TooManyLayers`].
    pub fn push(&mut self, layer: Layer, clock: Source) -> Result<(), TooManyLayers> {
        if self.layers == LAYERS_MAX {
            return Err(TooManyLayers);
        }
        self.top = self.top.take().map(|below| match layer {
            Layer::Tap(recorder) => Node::Tap(Box::new(Tap::new(below, recorder, clock))),
            Layer::Faults(plan) => Node::Faults(Box::new(Faults::new(below, plan, clock))),
        });
        self.layers += 1;
        Ok(())
    }

    /// Takes the top layer off; frames that it holds are lost. `None` when there is none.
    pub fn pop(&mut self) -> Option<Popped> {
        let (below, popped) = match self.top.take()? {
            Node::Bottom(link) => (Node::Bottom(link), None),
            Node::Tap(tap) => {
                let (below, recorder) = tap.into_parts();
                (below, Some(Popped::Tap(recorder)))
            }
            Node::Faults(faults) => {
                let (transmit, receive) = faults.counts();
                (faults.into_link(), Some(Popped::Faults(transmit, receive)))
            }
        };
        self.top = Some(below);
        self.layers -= usize::from(popped.is_some());
        popped
    }

    /// How many layers there are.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// The link under all layers.
    pub fn bottom(&self) -> &L {
        let mut node = self.node();
        loop {
            node = match node {
                Node::Bottom(link) => return link,
                Node::Tap(tap) => tap.below(),
                Node::Faults(faults) => faults.below(),
            };
        }
    }

    /// The link under all layers.
    pub fn bottom_mut(&mut self) -> &mut L {
        let mut node = self.node_mut();
        loop {
            node = match node {
                Node::Bottom(link) => return link,
                Node::Tap(tap) => tap.below_mut(),
                Node::Faults(faults) => faults.below_mut(),
            };
        }
    }

    fn node(&self) -> &Node<L> {
        self.top.as_ref().expect(TOP)
    }

    fn node_mut(&mut self) -> &mut Node<L> {
        self.top.as_mut().expect(TOP)
    }
}

const TOP: &str = "push and pop leave a top behind";

impl<L: Link> Link for Stack<L> {
    fn mtu(&self) -> usize {
        self.node().mtu()
    }

    fn address(&self) -> MacAddress {
        self.node().address()
    }

    fn receive(&mut self) -> Option<Received<'_>> {
        self.node_mut().receive()
    }

    fn frame(&mut self) -> Option<&mut TxFrame> {
        self.node_mut().frame()
    }

    fn commit(&mut self, id: FrameId) {
        self.node_mut().commit(id);
    }

    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        self.node_mut().flush(refused);
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.node().poll_timeout()
    }

    fn take_changed(&mut self) -> bool {
        self.node_mut().take_changed()
    }
}

impl<L: Link> Link for Node<L> {
    fn mtu(&self) -> usize {
        whichever!(self, link => link.mtu())
    }

    fn address(&self) -> MacAddress {
        whichever!(self, link => link.address())
    }

    fn receive(&mut self) -> Option<Received<'_>> {
        whichever!(self, link => link.receive())
    }

    fn frame(&mut self) -> Option<&mut TxFrame> {
        whichever!(self, link => link.frame())
    }

    fn commit(&mut self, id: FrameId) {
        whichever!(self, link => link.commit(id));
    }

    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        whichever!(self, link => link.flush(refused));
    }

    fn poll_timeout(&self) -> Option<Instant> {
        whichever!(self, link => link.poll_timeout())
    }

    fn take_changed(&mut self) -> bool {
        whichever!(self, link => link.take_changed())
    }
}

impl<L: Link + AsFd> AsFd for Stack<L> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bottom().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::faults::Mischief;
    use crate::memory::{self, MemoryLink};
    use crate::tap::Limits;

    fn send(link: &mut impl Link) {
        link.frame().unwrap().head.extend_from_slice(&[7; 60]);
        link.commit(FrameId::default());
        link.flush(&mut Vec::new());
    }

    fn received(link: &mut impl Link) -> usize {
        std::iter::from_fn(|| link.receive().map(|_| ())).count()
    }

    fn clock() -> Source {
        Box::new(clock::now)
    }

    fn tap() -> Layer {
        Layer::Tap(Recorder::new(Box::new(std::io::sink()), Limits::default(), 0).unwrap())
    }

    fn recorded(popped: Option<Popped>) -> u64 {
        match popped {
            Some(Popped::Tap(recorder)) => recorder.frames(),
            other => panic!("a tap was expected, not {other:?}"),
        }
    }

    #[test]
    fn layers_see_frames_in_the_order_in_which_they_stand() {
        let (near, mut far) = memory::pair(1500);
        let mut stack = Stack::new(near);
        send(&mut stack);
        stack.push(tap(), clock()).unwrap();
        let transmit = Mischief { loss_ppm: 1_000_000, ..Mischief::default() };
        let receive = Mischief { duplicate_ppm: 1_000_000, ..Mischief::default() };
        stack.push(Layer::Faults(Plan { seed: 1, transmit, receive }), clock()).unwrap();
        stack.push(tap(), clock()).unwrap();
        assert_eq!(stack.layers(), 3);
        send(&mut stack);
        send(&mut stack);
        send(&mut far);
        assert_eq!(received(&mut stack), 2, "one frame, twice");
        assert_eq!(received(&mut far), 1, "the first, before there was a layer");
        // Above the mischief: two sent, two received. Below: none sent, one received.
        assert_eq!(recorded(stack.pop()), 4);
        let Some(Popped::Faults(sent, came)) = stack.pop() else { panic!("mischief was expected") };
        assert_eq!((sent.frames, sent.lost, came.frames, came.duplicated), (2, 2, 1, 1));
        assert_eq!(recorded(stack.pop()), 1);
        assert!(stack.pop().is_none());
        send(&mut stack);
        assert_eq!((received(&mut far), stack.layers()), (1, 0));
    }

    #[test]
    fn a_stack_is_of_limited_height_and_its_bottom_stays_in_reach() {
        let (near, _far) = memory::pair(1500);
        let mut stack: Stack<MemoryLink> = Stack::new(near);
        for _ in 0..LAYERS_MAX {
            stack.push(tap(), clock()).unwrap();
        }
        assert_eq!(stack.push(tap(), clock()), Err(TooManyLayers));
        stack.bottom_mut().set_refuses(true);
        stack.frame().unwrap().head.push(1);
        stack.commit(FrameId { session: 1, pn: 4 });
        let mut refused = Vec::new();
        stack.flush(&mut refused);
        assert_eq!(refused, [FrameId { session: 1, pn: 4 }]);
        assert_eq!((stack.mtu(), stack.address()), (stack.bottom().mtu(), stack.bottom().address()));
    }
}
