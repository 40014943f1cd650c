//! The storage machine: the production node on a simulated link, store and keeper; how it dies and comes back.
//!
//! Knows one node and its volumes; does not know guests. Called by `world`.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use cirro_node::access::AccessList;
use cirro_node::node::{Directory, NodeConfig, NodeWorker, Wake};
use cirro_node::volume::{Durability, Volume, VolumeSpec};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERTYPE_DEFAULT, Steer, Uuid, VolumeName};
use fastrand::Rng;

use crate::disk::{Kernel, SimKeeper, SimStore};
use crate::keys;
use crate::wire::{Killed, Port, SimLink};

type Worker = NodeWorker<SimLink, SimStore>;

/// How a turn of a process ended.
pub(crate) enum Ended {
    /// The next is due then; `None`: when something comes.
    At(Option<Instant>),
    /// The process was killed in the middle.
    Killed,
    /// The process died of itself.
    Panicked(String),
}

/// The machine.
pub(crate) struct Machine {
    pub(crate) port: Rc<RefCell<Port>>,
    pub(crate) kernel: Rc<RefCell<Kernel>>,
    pub(crate) keeper: SimKeeper,
    volumes: Vec<Volume>,
    worker: Option<Worker>,
    /// Volumes that wait for their lock.
    locked: Vec<usize>,
    incarnation: u32,
    pools: (usize, usize),
    seed: u64,
    /// With keys: how many hosts have some.
    hosts_with_keys: Option<usize>,
}

/// Opens a file that stands for every volume: the store never looks into it.
pub(crate) fn open_volume(folder: &std::path::Path, bytes: usize, durability: Durability) -> Volume {
    let path = folder.join(format!("{bytes}"));
    let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    file.and_then(|file| file.set_len(bytes as u64)).expect("a file in memory");
    let spec =
        VolumeSpec { durability, ..format!("v={}", path.display()).parse().expect("a legal description") };
    Volume::open(&spec).expect("a volume")
}

impl Machine {
    pub(crate) fn new(
        port: Rc<RefCell<Port>>,
        kernel: Rc<RefCell<Kernel>>,
        volumes: Vec<Volume>,
        pools: (usize, usize),
        (seed, hosts_with_keys): (u64, Option<usize>),
    ) -> Machine {
        let keeper = SimKeeper::default();
        Machine {
            port,
            kernel,
            keeper,
            volumes,
            worker: None,
            locked: Vec::new(),
            incarnation: 0,
            pools,
            seed,
            hosts_with_keys,
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.worker.is_some()
    }

    pub(crate) fn volume_name(index: usize) -> VolumeName {
        format!("v{index}").parse().expect("a legal name")
    }

    /// Starts the process.
    pub(crate) fn start(&mut self) {
        self.incarnation += 1;
        let process = self.incarnation;
        self.port.borrow_mut().clear();
        self.kernel.borrow_mut().process = process;
        let key = (self.seed ^ u64::from(process).wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes();
        let names: Vec<_> = (0..self.volumes.len()).map(Machine::volume_name).collect();
        let config = NodeConfig {
            node: Uuid([0x11; 16]),
            incarnation: Uuid(std::array::from_fn(|at| key[at % 8] ^ (at / 8) as u8)),
            secret: [5; 16],
            random_seed: std::array::from_fn(|at| key[at % 8] ^ 0x55),
            ethertype: ETHERTYPE_DEFAULT,
            steer: Steer::new(2, 0),
            ack_delay_max: Nanos::from_micros(50),
            identity: self.hosts_with_keys.map(|_| keys::node(self.seed, process.into())),
            access: Arc::new(match self.hosts_with_keys {
                Some(hosts) => keys::access(self.seed, hosts, &names),
                None => AccessList::fixed(true, &[]),
            }),
            write_pool_bytes: self.pools.0,
            read_pool_bytes: self.pools.1,
        };
        let directory = Arc::new(Directory::new(2, names.iter().map(|name| (*name, 0))));
        let link = SimLink::new(&self.port, None);
        let store = SimStore::new(&self.kernel);
        self.worker = Some(NodeWorker::new(config, directory, link, store, Box::new(self.keeper.clone())));
        self.locked = (0..self.volumes.len()).collect();
    }

    /// `kill -9`: requests in the kernel go on without it.
    pub(crate) fn kill(&mut self, rng: &mut Rng) {
        drop_killed(self.worker.take());
        self.port.borrow_mut().clear();
        // Nobody's process: what is in the kernel has lost its own.
        self.kernel.borrow_mut().process = 0;
        self.keeper.crash(rng);
    }

    /// The machine loses power.
    pub(crate) fn lose_power(&mut self, rng: &mut Rng) {
        self.kill(rng);
        self.kernel.borrow_mut().lose_power();
    }

    /// SIGTERM.
    pub(crate) fn stop(&mut self, now: Instant) {
        if let Some(worker) = &mut self.worker {
            worker.stop(now);
        }
    }

    pub(crate) fn has_stopped(&self) -> bool {
        self.worker.as_ref().is_some_and(Worker::has_stopped)
    }

    /// When something of the kernel's is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        [self.kernel.borrow().next_due(), self.keeper.next_due()].into_iter().flatten().min()
    }

    /// The kernel's side of things: time passes for requests whose process is gone.
    pub(crate) fn look(&mut self, now: Instant) {
        let mut kernel = self.kernel.borrow_mut();
        kernel.now = now;
        kernel.finish_orphans();
        self.keeper.lock().now = now;
        drop(kernel);
        let Some(worker) = &mut self.worker else { return };
        let kernel = &self.kernel;
        let (keeper, volumes) = (&self.keeper, &self.volumes);
        self.locked.retain(|index| {
            if kernel.borrow().is_locked(*index) {
                return true;
            }
            let name = Machine::volume_name(*index);
            let file = worker.store_mut().attach(*index);
            let mut volume = volumes[*index].clone();
            volume.name = name;
            worker.add_volume(now, volume, file, keeper.record(&name));
            false
        });
    }

    /// One turn of the process.
    pub(crate) fn turn(&mut self, now: Instant) -> Ended {
        let Some(worker) = &mut self.worker else { return Ended::At(None) };
        let waits_for_lock = !self.locked.is_empty();
        match catch_unwind(AssertUnwindSafe(|| worker.turn(now))) {
            Ok(Wake::Now) => Ended::At(Some(now)),
            Ok(Wake::At(at)) => Ended::At(Some(at)),
            Ok(Wake::Idle) if waits_for_lock => Ended::At(Some(now + Nanos::from_millis(1))),
            Ok(Wake::Idle) => Ended::At(None),
            Err(cause) => ended(cause.as_ref()),
        }
    }

    /// Messages that broke the protocol, as the node counts them.
    pub(crate) fn violations(&self) -> u64 {
        let mut snapshot = cirro_node::node::Snapshot::default();
        let Some(worker) = &self.worker else { return 0 };
        worker.snapshot(&mut snapshot);
        snapshot.sessions.iter().filter_map(|session| session.counters.as_ref()).map(|c| c.violations).sum()
    }
}

/// What a panic that came through a turn means.
pub(crate) fn ended(cause: &(dyn std::any::Any + Send)) -> Ended {
    if cause.is::<Killed>() {
        return Ended::Killed;
    }
    let text = cause.downcast_ref::<String>().map(String::as_str).or(cause.downcast_ref::<&str>().copied());
    Ended::Panicked(text.unwrap_or("an unknown panic").to_owned())
}

/// Drops a process as the kernel would: nothing in it may object.
pub(crate) fn drop_killed<T>(process: Option<T>) {
    let Some(process) = process else { return };
    let killed = catch_unwind(AssertUnwindSafe(move || {
        let _process = process;
        std::panic::panic_any(Killed);
    }));
    drop(killed);
}
