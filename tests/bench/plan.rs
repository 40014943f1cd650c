//! What is measured: the workloads, what the wire is like meanwhile, which systems take part, and under which heading it is shown.
//!
//! Knows no daemon and no figure. One list of sections is the whole benchmark: `main` runs it, `table` and `plots` show it.

use cirro_tests::frontend::Op;
use cirro_tests::load::Load;

use crate::machine::Placement;
use crate::peers::{Peer, VOLUME_BYTES};

/// What is asked of a system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Workload {
    pub(crate) op: Op,
    pub(crate) bytes: usize,
    pub(crate) depth: usize,
}

impl Workload {
    const fn small(op: Op, depth: usize) -> Workload {
        Workload { op, bytes: 4096, depth }
    }

    const fn large(op: Op) -> Workload {
        Workload { op, bytes: 128 << 10, depth: 8 }
    }

    pub(crate) fn load(self) -> Load {
        let make = if self.is_stream() { Load::sequential } else { Load::random };
        make(self.op, self.bytes, VOLUME_BYTES)
    }

    /// Whether bytes a second say more than requests a second.
    pub(crate) fn is_stream(self) -> bool {
        self.bytes > 4096
    }

    pub(crate) fn name(self) -> String {
        let order = if self.is_stream() { "sequential" } else { "random" };
        let op = if self.op == Op::Read { "read" } else { "write" };
        format!("{} KiB {order} {op}, depth {}", self.bytes / 1024, self.depth)
    }
}

/// What it is done on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ground {
    pub(crate) placement: Placement,
    pub(crate) mtu: u32,
    /// Frames lost of 1000, in each direction, by a rule that looks at every frame, also when it is 0; `None`: no rule.
    pub(crate) lost_per_mille: Option<u32>,
}

impl Ground {
    const PINNED: Ground = Ground { placement: Placement::Pinned, mtu: 9000, lost_per_mille: None };
    const FREE: Ground = Ground { placement: Placement::Free, ..Ground::PINNED };
    const SMALL_FRAMES: Ground = Ground { mtu: 1500, ..Ground::PINNED };

    const fn losing(lost_per_mille: u32) -> Ground {
        Ground { lost_per_mille: Some(lost_per_mille), ..Ground::PINNED }
    }

    /// What is not as usual, for a heading.
    pub(crate) fn name(self) -> String {
        let mut name = String::new();
        if self.mtu != 9000 {
            name += &format!(", MTU {}", self.mtu);
        }
        match self.lost_per_mille {
            None => {}
            Some(rate) => name += &format!(", {} % loss", f64::from(rate) / 10.0),
        }
        name
    }
}

/// One row of a table: one system, measured once in each round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) peer: Peer,
    pub(crate) workload: Workload,
    pub(crate) ground: Ground,
}

impl Cell {
    pub(crate) fn name(&self) -> String {
        format!("{}{}", self.workload.name(), self.ground.name())
    }
}

/// One table: one workload on one ground, for some systems.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) workload: Workload,
    pub(crate) ground: Ground,
    pub(crate) peers: Vec<Peer>,
}

impl Group {
    pub(crate) fn cells(&self) -> impl Iterator<Item = Cell> + '_ {
        self.peers.iter().map(|peer| Cell { peer: *peer, workload: self.workload, ground: self.ground })
    }

    pub(crate) fn name(&self) -> String {
        format!("{}{}", self.workload.name(), self.ground.name())
    }
}

/// Some tables under one heading.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    /// Names it on the command line too.
    pub(crate) key: &'static str,
    pub(crate) title: &'static str,
    pub(crate) groups: Vec<Group>,
    /// One line for each group is enough.
    pub(crate) compact: bool,
}

impl Section {
    fn new(key: &'static str, title: &'static str, groups: Vec<Group>) -> Section {
        Section { key, title, groups, compact: false }
    }
}

pub(crate) const READ: Workload = Workload::small(Op::Read, 32);
pub(crate) const WRITE: Workload = Workload::small(Op::Write, 32);
pub(crate) const READ_ONE: Workload = Workload::small(Op::Read, 1);
pub(crate) const WRITE_ONE: Workload = Workload::small(Op::Write, 1);
pub(crate) const READ_LARGE: Workload = Workload::large(Op::Read);
pub(crate) const WRITE_LARGE: Workload = Workload::large(Op::Write);

/// Depths of the plot of latency against requests a second.
pub(crate) const DEPTHS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
/// Losses of the plot of requests a second against loss, per mille.
pub(crate) const LOSSES: [u32; 5] = [0, 1, 3, 10, 30];

pub(crate) const fn read_at(depth: usize) -> Workload {
    Workload::small(Op::Read, depth)
}

pub(crate) const fn pinned_with_loss(per_mille: u32) -> Ground {
    Ground::losing(per_mille)
}

pub(crate) const PINNED: Ground = Ground::PINNED;
pub(crate) const SMALL_FRAMES: Ground = Ground::SMALL_FRAMES;

/// Everything.
pub(crate) fn sections() -> Vec<Section> {
    let (all, rivals) = (Peer::ALL.to_vec(), vec![Peer::Ours, Peer::Nbd]);
    let each = |workloads: &[Workload], grounds: &[Ground], peers: &[Peer]| {
        let of = |ground: Ground| {
            workloads.iter().map(move |workload| Group { workload: *workload, ground, peers: peers.to_vec() })
        };
        grounds.iter().flat_map(|ground| of(*ground)).collect::<Vec<_>>()
    };
    let main = [READ_ONE, WRITE_ONE, READ, WRITE, READ_LARGE, WRITE_LARGE];
    let losses: Vec<Ground> = LOSSES.into_iter().map(Ground::losing).collect();
    let mut lossy = each(&[READ], &losses, &rivals);
    lossy.extend(each(&[WRITE], &[Ground::losing(0), Ground::losing(1), Ground::losing(10)], &rivals));
    lossy.extend(each(&[READ_ONE, WRITE_ONE], &[Ground::losing(1)], &rivals));
    let sleeping = [Peer::OursSleeping, Peer::Nbd];
    let compared = [Peer::Ours, Peer::Nbd, Peer::Local];
    let curve: Vec<Workload> = DEPTHS.into_iter().map(read_at).collect();
    vec![
        Section::new(
            "pinned",
            "Pinned: front-end and VM host's daemon on one processor, storage daemon on the other",
            each(&main, &[Ground::PINNED], &all),
        ),
        Section::new("free", "Not pinned", each(&main, &[Ground::FREE], &all)),
        Section::new(
            "sleeping",
            "Daemons that never spin (`--poll-us 0`), pinned",
            each(&[READ_ONE, WRITE_ONE], &[Ground::PINNED], &sleeping),
        ),
        Section::new("mtu1500", "MTU 1500, pinned", each(&[READ, WRITE], &[Ground::SMALL_FRAMES], &rivals)),
        Section {
            compact: true,
            ..Section::new("loss", "Frames lost at random in both directions, pinned", lossy)
        },
        Section {
            compact: true,
            ..Section::new("curve", "Depths, pinned", each(&curve, &[Ground::PINNED], &compared))
        },
    ]
}
