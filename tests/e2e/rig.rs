//! What most end-to-end tests begin with: two machines, a node, a backend, one disk and its judge.
//!
//! Knows no promise of the system. Used by the tests beside it.

use std::path::PathBuf;
use std::time::Duration;

use cirro_ctl::report::{Disk, Session};
use cirro_tests::daemons::{Daemon, Launch, Scratch};
use cirro_tests::frontend::{Failure, FrontEnd, Outcome, Shape};
use cirro_tests::netns::Lab;
use cirro_tests::verify::{Mix, Size, Verifier};

/// The size of a test's disk.
pub(crate) const DISK_BYTES: u64 = 256 << 20;

/// A node with the volume `disk` and a backend for it.
pub(crate) struct Rig {
    // The daemons end before the machines they run on.
    pub(crate) backend: Daemon,
    pub(crate) node: Daemon,
    pub(crate) scratch: Scratch,
    pub(crate) lab: Lab,
}

impl Rig {
    pub(crate) fn new(mtu: u32) -> Rig {
        Rig::on(Lab::pair(mtu))
    }

    pub(crate) fn on(lab: Lab) -> Rig {
        let scratch = Scratch::new();
        let path = scratch.volume("disk.img", DISK_BYTES);
        let node = Launch::new("node").node(lab.store(), &scratch, &[volume("disk", &path)]);
        let backend = start_backend(&lab, &scratch);
        Rig { backend, node, scratch, lab }
    }

    pub(crate) fn connect(&self, queues: usize, depth: usize, bytes_max: usize) -> FrontEnd {
        connect(&self.scratch, "backend", Shape { queues, depth, bytes_max, poll: false })
    }

    /// The one disk of the backend, as it reports it.
    pub(crate) fn disk(&self) -> Disk {
        disk(&self.backend)
    }

    /// The disk's session, as the backend reports it.
    pub(crate) fn session(&self) -> Session {
        self.disk().session.expect("the disk has a session")
    }

    /// Ends both daemons by SIGTERM.
    pub(crate) fn stop(self) {
        self.stop_keeping(|| ());
    }

    /// The same, then does something before the volume goes.
    pub(crate) fn stop_keeping(self, then: impl FnOnce()) {
        let Rig { backend, node, scratch, lab } = self;
        backend.stop();
        node.stop();
        then();
        drop((scratch, lab));
    }
}

pub(crate) fn start_node(lab: &Lab, scratch: &Scratch) -> Daemon {
    Launch::new("node").node(lab.store(), scratch, &[volume("disk", &scratch.path("disk.img"))])
}

pub(crate) fn start_backend(lab: &Lab, scratch: &Scratch) -> Daemon {
    let launch = Launch::new("backend").with(&["--queues", "4", "--queue-size", "1024"]);
    launch.backend(lab.host(), scratch, "disk")
}

/// The value of `--volume` at the node.
pub(crate) fn volume(name: &str, path: &std::path::Path) -> String {
    format!("{name}={}", path.display())
}

pub(crate) fn disk(backend: &Daemon) -> Disk {
    backend.backend_report().disks.into_iter().next().expect("the backend has a disk")
}

pub(crate) fn connect(scratch: &Scratch, backend: &str, shape: Shape) -> FrontEnd {
    let socket: PathBuf = scratch.path(&format!("{backend}.sock"));
    FrontEnd::connect(&socket, shape).unwrap_or_else(|error| panic!("no connection to {backend}: {error}"))
}

/// Runs the judge, and fails the test with its sentence.
pub(crate) fn judge(
    verifier: &mut Verifier,
    front_end: &mut FrontEnd,
    size: Size,
    mix: Mix,
    time: Duration,
) -> Outcome {
    must(verifier.run(front_end, size, mix, time))
}

pub(crate) fn must(result: Result<Outcome, Failure>) -> Outcome {
    result.unwrap_or_else(|failure| panic!("{failure}"))
}

/// The one that a storage machine's daemon has to itself, where cost is measured: all others are on the first.
pub(crate) fn last_processor() -> u32 {
    std::thread::available_parallelism().map_or(1, usize::from) as u32 - 1
}
