//! What is done to the daemons and the wire, and when: all of it follows from a seed, before anything has started.
//!
//! Does not know how a fault is made. Used by the soak.

use std::fmt;
use std::time::Duration;

/// The daemons, by their place in a run.
pub(super) const NODES: usize = 2;
/// As above.
pub(super) const BACKENDS: usize = 2;
/// The longest that anything is cut off or stopped.
const LENGTH_MAX: Duration = Duration::from_secs(10);
/// The most that one fault takes of a run.
const PART_MAX: u32 = 8;

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// SIGKILL to a node, which is started again after this time.
    KillNode(usize, Duration),
    /// SIGTERM to a node, which is started again at once.
    RestartNode(usize),
    /// SIGSTOP to a node, for this time.
    StallNode(usize, Duration),
    /// SIGSTOP to a backend, for this time.
    StallBackend(usize, Duration),
    /// The interface of the storage machine is down for this time.
    LinkDown(Duration),
    /// All frames in both directions are lost for this time.
    Cut(Duration),
    /// All frames that arrive at one machine are lost for this time: 0 the host, 1 the storage machine.
    CutOneWay(usize, Duration),
    /// Frames over 1500 bytes are lost for this time.
    Narrow(Duration),
    /// From now on this many of 1000 frames are lost in each direction.
    Loss(u32),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::KillNode(node, time) => write!(f, "node {node} is killed, and started after {time:?}"),
            Fault::RestartNode(node) => write!(f, "node {node} is ended by SIGTERM and started"),
            Fault::StallNode(node, time) => write!(f, "node {node} is stopped for {time:?}"),
            Fault::StallBackend(backend, time) => write!(f, "backend {backend} is stopped for {time:?}"),
            Fault::LinkDown(time) => write!(f, "the storage machine's interface is down for {time:?}"),
            Fault::Cut(time) => write!(f, "the wire is cut for {time:?}"),
            Fault::CutOneWay(0, time) => write!(f, "nothing arrives at the host for {time:?}"),
            Fault::CutOneWay(_, time) => write!(f, "nothing arrives at the storage machine for {time:?}"),
            Fault::Narrow(time) => write!(f, "frames over 1500 bytes are lost for {time:?}"),
            Fault::Loss(rate) => write!(f, "{rate} of 1000 frames are lost from now on"),
        }
    }
}

impl Fault {
    /// How long it takes by itself.
    pub(super) fn length(&self) -> Duration {
        match self {
            Fault::RestartNode(_) | Fault::Loss(_) => Duration::ZERO,
            Fault::KillNode(_, time)
            | Fault::StallNode(_, time)
            | Fault::StallBackend(_, time)
            | Fault::LinkDown(time)
            | Fault::Cut(time)
            | Fault::CutOneWay(_, time)
            | Fault::Narrow(time) => *time,
        }
    }
}

/// The faults of a run of this length, in order, each with the rest before it.
pub(super) fn schedule(seed: u64, time: Duration) -> Vec<(Duration, Fault)> {
    let mut random = fastrand::Rng::with_seed(seed);
    let longest = LENGTH_MAX.min(time / PART_MAX);
    let (mut faults, mut at) = (Vec::new(), Duration::ZERO);
    loop {
        let rest = Duration::from_millis(random.u64(100..2000));
        let fault = fault(&mut random, longest);
        at += rest + fault.length();
        if at > time {
            return faults;
        }
        faults.push((rest, fault));
    }
}

fn fault(random: &mut fastrand::Rng, longest: Duration) -> Fault {
    // From 0.1 s to the longest, short ones as often as long ones on a scale of powers.
    let span = (longest.as_secs_f64() / 0.1).max(1.0);
    let length = Duration::from_millis((100.0 * span.powf(random.f64())) as u64);
    match random.u32(0..12) {
        0..3 => Fault::KillNode(random.usize(..NODES), length.min(Duration::from_secs(2))),
        3 => Fault::RestartNode(random.usize(..NODES)),
        4 => Fault::StallNode(random.usize(..NODES), length),
        5 => Fault::StallBackend(random.usize(..BACKENDS), length),
        6 => Fault::LinkDown(length),
        7 => Fault::Cut(length),
        8 => Fault::CutOneWay(random.usize(..2), length),
        9 => Fault::Narrow(length),
        _ => Fault::Loss(*random.choice([0, 1, 10, 10, 50, 100].iter()).expect("not empty")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_schedule_that_fits_the_time() {
        let time = Duration::from_secs(600);
        let faults = schedule(7, time);
        assert_eq!(faults, schedule(7, time));
        assert_ne!(faults, schedule(8, time));
        let total: Duration = faults.iter().map(|(rest, fault)| *rest + fault.length()).sum();
        assert!(total <= time && total > time * 9 / 10, "{total:?}");
        assert!(faults.iter().all(|(_, fault)| fault.length() <= LENGTH_MAX));
    }
}
