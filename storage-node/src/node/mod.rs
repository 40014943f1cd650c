//! One worker of the node: the sessions of a link, the volumes they use, and the turn that moves requests between them.
//!
//! Knows no thread, no clock and no kernel: `now` is an argument, the link and the store are traits, records are made durable by a
//! [`Keeper`]. Driven by `server`, and by tests and simulations, which run this very code.
//!
//! ```text
//! link --1 receive--> sessions --3 accept--> checks, range lock, buffers --> store --5 finish--> sessions --6 transmit--> link
//! ```

mod accept;
mod deadlines;
mod directory;
mod drops;
mod finish;
mod handshake;
mod jobs;
mod opening;
mod receive;
mod resize;
mod served;
mod session;
mod snapshot;
mod transmit;

use std::collections::VecDeque;
use std::sync::Arc;

use cirro_ctl::counter::WorkerMeter;
use cirro_link::{FrameId, Link};
use cirro_protocol::time::{Instant, Nanos, earliest};
use cirro_protocol::types::{FRAME_BYTES_MAX, MacAddress, Steer, Uuid, VolumeName};
use cirro_protocol::wire::body::CloseReason;
use cirro_protocol::{PayloadRef, Placement};
use cirro_seal::Identity;
use siphasher::sip::SipHasher13;

use crate::access::{AccessList, Client};
use crate::buffers::Pool;
use crate::owner::{Keeper, OwnerRecord};
use crate::state_dir::SECRET_BYTES;
use crate::store::{FILES_MAX, FileId, Store};
use crate::volume::{Told, Unfit, Volume};

pub use directory::Directory;
pub use drops::{DROP_NAMES, DROP_REASONS, DropReason};
pub use served::VOLUME_CHANGES_MAX;
pub use session::SESSIONS_MAX;
pub use snapshot::{Snapshot, report_waiting};

use handshake::Handshake;
use jobs::Jobs;
use served::Served;
use session::Sessions;

/// How long submitted requests are waited for when the node stops.
const STOP_PATIENCE: Nanos = Nanos::from_secs(2);
/// Write pool per worker unless configured: touched only as far as it is used.
pub const WRITE_POOL_BYTES_DEFAULT: usize = 256 << 20;
/// Read pool per worker unless configured.
pub const READ_POOL_BYTES_DEFAULT: usize = 128 << 20;

/// What a worker is made of.
#[derive(Clone)]
pub struct NodeConfig {
    /// The node's name for all time.
    pub node: Uuid,
    /// This start of it.
    pub incarnation: Uuid,
    /// The key of reset tokens.
    pub secret: [u8; SECRET_BYTES],
    /// The key of what must be random: cids and nonces.
    pub random_seed: [u8; 16],
    /// The EtherType.
    pub ethertype: u16,
    /// Which worker of which process this is.
    pub steer: Steer,
    /// How long an ack is held back.
    pub ack_delay_max: Nanos,
    /// Who the node is, where frames are protected by keys.
    pub identity: Option<Arc<Identity>>,
    /// Who may do what.
    pub access: Arc<AccessList>,
    /// Bytes of the pool for the data of writes.
    pub write_pool_bytes: usize,
    /// Bytes of the pool for the data of reads.
    pub read_pool_bytes: usize,
}

/// What a worker counts.
pub type Meter = WorkerMeter<DROP_REASONS>;

/// A worker over a link and a store.
pub struct NodeWorker<L, S> {
    link: L,
    node: Node<S>,
}

/// Everything of a worker but its link.
struct Node<S> {
    config: NodeConfig,
    address: MacAddress,
    mtu: u16,
    directory: Arc<Directory>,
    store: S,
    keeper: Box<dyn Keeper>,
    sessions: Sessions,
    volumes: Vec<Served>,
    jobs: Jobs,
    write_pool: Pool,
    read_pool: Pool,
    /// Write credit that sessions were given, in bytes.
    promised_bytes: usize,
    handshake: Handshake,
    random: Random,
    meter: Arc<Meter>,
    stop_at: Option<Instant>,
    closed: bool,
    /// A read buffer came back after waiting reads were looked at.
    buffers_came_back: bool,
    // Kept between turns so that a turn allocates nothing.
    fresh: receive::Fresh,
    placements: Vec<Placement>,
    payloads: Vec<PayloadRef>,
    /// A received frame as it was before it was encrypted, and the core's part of one that is to be.
    plain: Vec<u8>,
    head: Vec<u8>,
    startable: Vec<u32>,
    /// Sessions whose events wait for a place in the table of jobs.
    starved: Vec<u16>,
    refused: Vec<FrameId>,
}

/// When the next turn is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// At once: there is work left.
    Now,
    /// At this time at the latest, or when a descriptor is ready.
    At(Instant),
    /// When a descriptor is ready.
    Idle,
}

impl<L: Link, S: Store> NodeWorker<L, S> {
    /// A worker that serves nothing yet.
    pub fn new(
        config: NodeConfig,
        directory: Arc<Directory>,
        link: L,
        store: S,
        keeper: Box<dyn Keeper>,
    ) -> NodeWorker<L, S> {
        let node = Node {
            address: link.address(),
            mtu: link.mtu().min(usize::from(u16::MAX)) as u16,
            directory,
            store,
            keeper,
            sessions: Sessions::new(),
            volumes: Vec::new(),
            jobs: Jobs::new(),
            write_pool: Pool::new(config.write_pool_bytes),
            read_pool: Pool::new(config.read_pool_bytes),
            promised_bytes: 0,
            handshake: Handshake::new(config.secret, config.identity.clone()),
            random: Random::new(config.random_seed),
            meter: Arc::new(Meter::new(DROP_NAMES)),
            stop_at: None,
            closed: false,
            buffers_came_back: false,
            fresh: receive::Fresh::new(),
            placements: Vec::with_capacity(64),
            payloads: Vec::with_capacity(64),
            plain: Vec::new(),
            head: Vec::with_capacity(FRAME_BYTES_MAX),
            startable: Vec::with_capacity(jobs::JOBS_MAX),
            starved: Vec::with_capacity(SESSIONS_MAX),
            refused: Vec::with_capacity(64),
            config,
        };
        NodeWorker { link, node }
    }

    /// Serves a volume from now on: it is locked, its file is attached to the store, and `owner` is its record. Tells the segment.
    pub fn add_volume(&mut self, now: Instant, volume: Volume, file: FileId, owner: OwnerRecord) {
        let node = &mut self.node;
        assert!(node.volumes.len() < FILES_MAX, "a worker has at most {FILES_MAX} volumes");
        node.directory.set_served(&volume.name);
        node.volumes.push(Served::new(now, volume, file, owner));
        node.handshake.announce(now);
    }

    /// One pass over everything that can be done without waiting; says when the next is due.
    pub fn turn(&mut self, now: Instant) -> Wake {
        let NodeWorker { link, node } = self;
        node.meter.turns.add(1);
        if link.take_changed() {
            node.look_at_link(link.address(), link.mtu());
        }
        if receive::receive(link, node, now) {
            node.time_out(now);
        }
        node.accept(now);
        node.store.push();
        node.finish(now);
        transmit::transmit(link, node, now);
        node.next_wake(link.poll_timeout())
    }

    /// A client's right on a volume has changed: its sessions end at once, and it may ask for others.
    pub fn end_sessions_of(&mut self, volume: &VolumeName, client: &Client) {
        self.node.end_sessions_of(volume, client);
    }

    /// Serves a volume with another size from now on, if it may: its file has it already, or nobody uses it.
    ///
    /// # Errors
    /// [`Unfit`]; nothing is changed.
    pub fn resize(&mut self, volume: &VolumeName, capacity_sectors: u64) -> Result<Told, Unfit> {
        self.node.resize(volume, capacity_sectors)
    }

    /// Begins the end: no request is started any more; those in the store get two seconds, then every session is closed.
    pub fn stop(&mut self, now: Instant) {
        self.node.stop_at.get_or_insert(now + STOP_PATIENCE);
    }

    /// True when every session was closed after [`NodeWorker::stop`].
    pub fn has_stopped(&self) -> bool {
        self.node.closed && self.node.sessions.is_empty()
    }

    /// The link, to wait on and to layer.
    pub fn link_mut(&mut self) -> &mut L {
        &mut self.link
    }

    /// The store, to wait on and to attach files.
    pub fn store_mut(&mut self) -> &mut S {
        &mut self.node.store
    }

    /// The counters, which any thread may read.
    pub fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.node.meter)
    }

    /// Brings `snapshot` up to date.
    pub fn snapshot(&self, snapshot: &mut Snapshot) {
        self.node.fill(snapshot);
    }

    /// Bytes of both pools (write, read) that requests occupy.
    pub fn pool_bytes_used(&self) -> (usize, usize) {
        let used = |pool: &Pool| pool.bytes_total() - pool.bytes_free();
        (used(&self.node.write_pool), used(&self.node.read_pool))
    }
}

impl<S: Store> Node<S> {
    /// Timers that are due. Only after the link was found empty: what it holds may be the answer.
    fn time_out(&mut self, now: Instant) {
        self.handshake.time_out(now, &self.config, self.address);
        self.sessions.time_out(now);
        let deadline = self.stop_at.filter(|_| !self.closed);
        if deadline.is_some_and(|deadline| now >= deadline || self.jobs.is_empty()) {
            self.closed = true;
            self.close_all();
        }
    }

    fn end_sessions_of(&mut self, volume: &VolumeName, client: &Client) {
        for index in self.sessions.indexes() {
            let Some(session) = self.sessions.get(index) else { continue };
            let served = &self.volumes[usize::from(session.volume)].volume;
            if served.name != *volume || session.standing.client != *client {
                continue;
            }
            if session.target.is_confirmed() {
                session.close(CloseReason::Revoked);
                self.sessions.activate(index);
            } else {
                self.forget(index);
            }
        }
    }

    fn close_all(&mut self) {
        for index in self.sessions.indexes() {
            self.sessions.activate(index);
            match self.sessions.get(index) {
                Some(session) if session.target.is_confirmed() => session.close(CloseReason::Restart),
                Some(_) | None => self.forget(index),
            }
        }
    }

    /// An interface that was lost may come back as another: peers do not know its address, so all sessions are forgotten then.
    fn look_at_link(&mut self, address: MacAddress, mtu: usize) {
        let mtu = mtu.min(usize::from(u16::MAX)) as u16;
        if (address, mtu) == (self.address, self.mtu) {
            return;
        }
        log::info!("the link has address {address} and MTU {mtu} now; sessions begin anew");
        (self.address, self.mtu) = (address, mtu);
        for index in self.sessions.indexes() {
            self.forget(index);
        }
    }

    fn next_wake(&mut self, link: Option<Instant>) -> Wake {
        self.sessions.settle();
        let startable = self.jobs.has_ready() && self.store.room() > 0;
        let stopping = self.stop_at.is_some() && !self.closed && self.jobs.is_empty();
        let fed = !self.starved.is_empty() && self.jobs.has_room();
        let read_waits = std::mem::take(&mut self.buffers_came_back) && !self.jobs.reads.is_empty();
        let at_once = fed || startable || stopping || read_waits || self.store.wants_push();
        if self.sessions.has_active() || at_once || self.handshake.has_frames() {
            return Wake::Now;
        }
        let stop = self.stop_at.filter(|_| !self.closed);
        let times = [self.sessions.next_deadline(), self.handshake.poll_timeout(), stop, link];
        earliest(times).map_or(Wake::Idle, Wake::At)
    }
}

/// Numbers that nobody can guess who does not have the seed: SipHash of a counter.
#[derive(Debug)]
struct Random {
    key: [u8; 16],
    count: u64,
}

impl Random {
    fn new(key: [u8; 16]) -> Random {
        Random { key, count: 0 }
    }

    fn next(&mut self) -> u64 {
        self.count += 1;
        SipHasher13::new_with_key(&self.key).hash(&self.count.to_le_bytes())
    }
}

/// A queue that is filled up to `max` and then refuses.
fn push_bounded<T>(queue: &mut VecDeque<T>, max: usize, item: T) -> bool {
    let fits = queue.len() < max;
    if fits {
        queue.push_back(item);
    }
    fits
}
