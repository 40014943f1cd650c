//! The layers on a worker's link, in their order: the tap nearest to the worker, the faults below it, the wire last. So a recording shows
//! what the worker sees and says, and a test sees what the faults made of it.
//!
//! Knows the order alone. Each layer is switched on and off while the worker runs and costs one branch per call when off; to record below the
//! faults as well, wrap the link in another [`Tap`] first.

use crate::faults::Faults;
use crate::tap::Tap;

/// A link with its layers, all off at first.
pub type Stack<L> = Tap<Faults<L>>;

/// Puts the layers on a link.
pub fn stack<L>(link: L) -> Stack<L> {
    Tap::new(Faults::new(link))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::{Chance, Options, Wire};
    use crate::tap::{FINISH_TIME, Limits, Recording};
    use crate::{FrameId, Link, memory};

    #[test]
    fn a_recording_shows_what_the_worker_said_though_the_wire_lost_it() {
        let (near, mut far) = memory::pair(1500);
        let mut link = stack(near);
        let folder = tempfile::tempdir().unwrap();
        let recording = Recording::create(&folder.path().join("a.pcap"), Limits::default()).unwrap();
        link.exchange(Some(recording));
        let sent = Wire { loss: Chance::percent(100), ..Wire::default() };
        link.inner_mut().set(Some(Options { seed: 1, sent, ..Options::default() }));
        link.frame().unwrap().head.extend_from_slice(&[7; 60]);
        link.commit(FrameId::default());
        link.flush(&mut Vec::new());
        assert!(far.receive().is_none());
        assert_eq!(link.exchange(None).unwrap().finish(FINISH_TIME).frames, 1);
        link.inner_mut().set(None);
        link.frame().unwrap().head.extend_from_slice(&[7; 60]);
        link.commit(FrameId::default());
        link.flush(&mut Vec::new());
        assert_eq!(far.receive().unwrap().bytes, [7; 60]);
    }
}
