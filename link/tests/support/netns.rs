//! Network namespaces and veth pairs for tests that need a wire: made by `ip`, removed when dropped.
//!
//! Does not know what is sent over them. Names carry the process id and a counter, so that tests of several processes run side by side.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A network namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// A new, empty one.
    ///
    /// # Panics
    /// If it cannot be made: the tests need root.
    pub(crate) fn new() -> Namespace {
        let name = format!("cirrolink-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        succeed(Command::new("ip").args(["netns", "add", &name]));
        let namespace = Namespace { name };
        // No router solicitations and the like on the wire.
        namespace.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
        namespace
    }

    /// What `ip netns` calls it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs a command line (split at spaces) inside.
    ///
    /// # Panics
    /// If it fails.
    pub(crate) fn run(&self, line: &str) -> Output {
        succeed(Command::new("ip").args(["netns", "exec", &self.name]).args(line.split(' ')))
    }

    /// A command that will run inside.
    #[must_use]
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Runs `body` on a thread of its own that is inside, and gives what it returns.
    ///
    /// # Panics
    /// If the namespace cannot be entered, or `body` panics.
    pub(crate) fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter_here();
                body()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread inside, for good.
    ///
    /// # Panics
    /// If that is not allowed.
    pub(crate) fn enter_here(&self) {
        let file = File::open(format!("/run/netns/{}", self.name)).expect("the namespace was made");
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).expect("root may enter");
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The veth devices inside go with it.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// Two namespaces joined by a wire: interface `wire0` in each, up.
#[derive(Debug)]
pub(crate) struct VethPair {
    /// One end.
    pub(crate) a: Namespace,
    /// The other.
    pub(crate) b: Namespace,
    mtu: usize,
    queues: usize,
}

/// The interface's name in both namespaces.
pub(crate) const INTERFACE: &str = "wire0";

impl VethPair {
    /// A new pair.
    ///
    /// # Panics
    /// If it cannot be made: the tests need root.
    pub(crate) fn new(mtu: usize) -> VethPair {
        VethPair::with_queues(mtu, 1)
    }

    /// A pair whose ends have so many queues in both directions: what leaves on one comes on the same.
    pub(crate) fn with_queues(mtu: usize, queues: usize) -> VethPair {
        let pair = VethPair { a: Namespace::new(), b: Namespace::new(), mtu, queues };
        pair.connect();
        pair
    }

    /// Makes the wire, after [`VethPair::cut`] again: with other indices and addresses than before.
    ///
    /// # Panics
    /// If it cannot be made.
    pub(crate) fn connect(&self) {
        let VethPair { a, b, mtu, queues } = self;
        let end = format!("{INTERFACE} mtu {mtu} numtxqueues {queues} numrxqueues {queues}");
        a.run(&format!("ip link add {end} type veth peer {end} netns {}", b.name));
        for end in [a, b] {
            end.run(&format!("ip link set {INTERFACE} up"));
        }
    }

    /// What the next [`VethPair::connect`] makes.
    pub(crate) fn set_mtu(&mut self, mtu: usize) {
        self.mtu = mtu;
    }

    /// Takes the wire away.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn cut(&self) {
        self.a.run(&format!("ip link del {INTERFACE}"));
    }
}

fn succeed(command: &mut Command) -> Output {
    let output = command.output().expect("the program is installed");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}
