//! The process's threads: workers that turn and wait, and one that waits for locks of volumes.
//!
//! Knows descriptors and time; what a turn does is `node`'s. Called by `main`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cirro_ctl::publish::Publisher;
use cirro_ctl::stop::Stop;
use cirro_link::spin::Spin;
use cirro_link::tap::{Exchange, Tap};
use cirro_link::wait::Waiter;
use cirro_link::{Link, clock};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::VolumeName;
use log::{debug, error, info, warn};
use rustix::event::{EventfdFlags, eventfd};

use crate::access::Client;
use crate::node::{NodeWorker, Snapshot, Wake};
use crate::owner::{FileKeeper, OwnerRecord};
use crate::store::uring::UringStore;
use crate::volume::{Told, Unfit, Volume};

/// How often the lock of a volume is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(50);
/// How long a worker may go on after its sessions were closed, so that the frames that say so leave.
const CLOSE_PATIENCE: Nanos = Nanos::from_millis(2_500);

/// A volume that a worker serves from now on: its lock is ours.
#[derive(Debug)]
pub struct Admission {
    /// The volume.
    pub volume: Volume,
    /// Its record.
    pub owner: OwnerRecord,
}

/// What a worker is told.
#[derive(Debug)]
enum Order {
    Serve(Admission),
    Tap(Exchange),
    EndSessions(VolumeName, Client),
    Resize(VolumeName, u64, Sender<Result<Told, Unfit>>),
}

/// The door to a worker: volumes go in, what its tap is to record into, and the wish to end.
#[derive(Clone, Debug)]
pub struct Door {
    orders: Sender<Order>,
    bell: Arc<Bell>,
}

/// The worker's side of it.
#[derive(Debug)]
pub struct Seat {
    orders: Receiver<Order>,
    bell: Arc<Bell>,
}

#[derive(Debug)]
struct Bell {
    fd: OwnedFd,
    rung: AtomicBool,
    ending: AtomicBool,
}

/// Both sides of a door.
///
/// # Errors
/// No descriptor is left.
pub fn door() -> io::Result<(Door, Seat)> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let bell = Arc::new(Bell { fd, rung: AtomicBool::new(false), ending: AtomicBool::new(false) });
    let (sender, receiver) = channel();
    Ok((Door { orders: sender, bell: Arc::clone(&bell) }, Seat { orders: receiver, bell }))
}

impl Door {
    /// Gives the worker a volume.
    pub fn admit(&self, admission: Admission) {
        // A worker that has ended needs no volumes.
        let _ = self.orders.send(Order::Serve(admission));
        self.ring();
    }

    /// Gives the worker's tap what it is to record into.
    pub fn exchange(&self, exchange: Exchange) {
        // A worker that has ended drops it, and so answers that it is gone.
        let _ = self.orders.send(Order::Tap(exchange));
        self.ring();
    }

    /// Has the worker end a client's sessions on a volume: its right has changed.
    pub fn end_sessions_of(&self, volume: VolumeName, client: Client) {
        // A worker that has ended has no sessions.
        let _ = self.orders.send(Order::EndSessions(volume, client));
        self.ring();
    }

    /// Has the worker serve a volume with another size, and waits for its answer.
    ///
    /// # Errors
    /// [`Unfit`].
    pub fn resize(&self, volume: VolumeName, capacity_sectors: u64) -> Result<Told, Unfit> {
        let (sender, answer) = channel();
        // A worker that has ended drops what its answer would come by.
        let _ = self.orders.send(Order::Resize(volume, capacity_sectors, sender));
        self.ring();
        answer.recv().unwrap_or(Err(Unfit::Ending))
    }

    /// Asks the worker to end.
    pub fn end(&self) {
        self.bell.ending.store(true, Ordering::Release);
        self.ring();
    }

    fn ring(&self) {
        self.bell.rung.store(true, Ordering::Release);
        // An eventfd counter that is full has rung already.
        let _ = rustix::io::write(&self.bell.fd, &1u64.to_ne_bytes());
    }
}

/// What a worker's thread runs on.
pub struct Place {
    /// Its side of the door.
    pub seat: Seat,
    /// The descriptor that its keeper rings.
    pub keeper: Arc<OwnedFd>,
    /// Where it shows what it does.
    pub publisher: Publisher<Snapshot>,
    /// How long it spins before it sleeps.
    pub poll: Nanos,
}

/// Why a worker sleeps no more: its tokens at the waiter.
const TOKEN_STORE: u64 = 0;
const TOKEN_KEEPER: u64 = 1;
const TOKEN_BELL: u64 = 2;

/// Turns until the door says to end and every session was told.
///
/// # Errors
/// The descriptors cannot be waited for.
pub fn run_worker<L: Link + AsFd>(
    mut worker: NodeWorker<Tap<L>, UringStore>,
    mut place: Place,
) -> io::Result<()> {
    let mut waiter = Waiter::new()?;
    waiter.add(worker.store_mut().as_fd(), TOKEN_STORE)?;
    waiter.add(place.keeper.as_fd(), TOKEN_KEEPER)?;
    waiter.add(place.seat.bell.fd.as_fd(), TOKEN_BELL)?;
    let meter = worker.meter();
    let (mut ready, mut frames, mut spin) = (Vec::with_capacity(4), 0, Spin::new(place.poll, clock::now()));
    let mut end_by = None;
    loop {
        let now = clock::now();
        if place.seat.bell.rung.swap(false, Ordering::AcqRel) {
            answer_door(&mut worker, &place.seat, now);
            if place.seat.bell.ending.load(Ordering::Acquire) {
                worker.stop(now);
                end_by.get_or_insert(now + CLOSE_PATIENCE);
            }
        }
        let wake = worker.turn(now);
        place.publisher.turn(now, |snapshot| worker.snapshot(snapshot));
        if end_by.is_some_and(|end| worker.has_stopped() || now >= end) {
            return Ok(());
        }
        let done = meter.frames_in.get() + meter.frames_out.get();
        if done != frames || wake == Wake::Now {
            frames = done;
            spin.moved(now);
        }
        if wake == Wake::Now || spin.again(now) {
            continue;
        }
        let due = match wake {
            Wake::At(due) => Some(due),
            Wake::Now | Wake::Idle => None,
        };
        let due = due.into_iter().chain(place.publisher.poll_timeout()).chain(end_by).min();
        ready.clear();
        waiter.wait_beside(worker.link_mut().as_fd(), due.map(|due| due.since(now)), &mut ready)?;
        spin.slept(now, clock::now());
        meter.wakeups.add(1);
        quiet(&place, &ready);
    }
}

fn answer_door(worker: &mut NodeWorker<Tap<impl Link>, UringStore>, seat: &Seat, now: Instant) {
    while let Ok(order) = seat.orders.try_recv() {
        match order {
            Order::Serve(admission) => serve(worker, admission, now),
            Order::Tap(exchange) => exchange.carry_out(worker.link_mut()),
            Order::EndSessions(volume, client) => worker.end_sessions_of(&volume, &client),
            Order::Resize(volume, sectors, answer) => {
                // Whoever asked waits for it.
                let _ = answer.send(worker.resize(&volume, sectors));
            }
        }
    }
}

fn serve(worker: &mut NodeWorker<impl Link, UringStore>, admission: Admission, now: Instant) {
    let Admission { volume, owner } = admission;
    let file = worker.store_mut().attach(volume.store_file());
    let holder = owner.holder.map_or("nobody".to_owned(), |holder| holder.to_string());
    info!(
        "volume {}: {} ({} MiB) is served, {:?} I/O{}, {:?}; epoch {}, held by {holder}",
        volume.name,
        volume.path.display(),
        volume.capacity_sectors / 2048,
        volume.io,
        volume.io_note.map_or(String::new(), |why| format!(" ({why})")),
        volume.durability,
        owner.vol_epoch
    );
    worker.add_volume(now, volume, file, owner);
}

/// Takes the count out of the eventfds that woke us.
fn quiet(place: &Place, ready: &[u64]) {
    let mut count = [0; 8];
    for token in ready {
        let fd = match *token {
            TOKEN_KEEPER => &*place.keeper,
            TOKEN_BELL => &place.seat.bell.fd,
            _ => continue,
        };
        // Nothing to read: it is quiet already.
        let _ = rustix::io::read(fd, &mut count);
    }
}

/// A volume whose lock another process has.
#[derive(Debug)]
pub struct Waiting {
    /// The volume and its record.
    pub admission: Admission,
    /// Its worker's number and door.
    pub worker: u16,
    /// See `worker`.
    pub door: Door,
    /// Since when it waits.
    pub since: Instant,
}

/// The volumes that are not served yet, for reports.
pub type WaitingList = Arc<Mutex<Vec<Waiting>>>;

/// Gives each volume to its worker: at once when its lock is free, else when it becomes free. Ends when all are served, or `stop` is asked.
pub fn wait_for_locks(list: &WaitingList, stop: &Stop) {
    let lock = || list.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        lock().retain_mut(|waiting| !try_serve(waiting));
        if lock().is_empty() || stop.wait_for(LOCK_RETRY) {
            return;
        }
    }
}

/// Serves the volume if its lock can be had; true also when it never can.
fn try_serve(waiting: &mut Waiting) -> bool {
    let volume = &mut waiting.admission.volume;
    match volume.try_lock() {
        Ok(true) => {}
        Ok(false) => return false,
        Err(e) => {
            error!(
                "volume {}: {}: cannot lock it: {e}; it is not served",
                volume.name,
                volume.path.display()
            );
            return true;
        }
    }
    if let Err(e) = volume.measure() {
        error!("{e}; it is not served");
        return true;
    }
    let waited = clock::now().since(waiting.since);
    debug!("volume {}: locked after {} ms", volume.name, waited.as_micros() / 1_000);
    let admission = Admission { volume: volume.clone(), owner: waiting.admission.owner };
    waiting.door.admit(admission);
    true
}

/// Serves at once what can be, and says of the rest by name what it waits for.
pub fn serve_what_is_free(list: &WaitingList) {
    let mut waiting = list.lock().unwrap_or_else(PoisonError::into_inner);
    waiting.retain_mut(|waiting| !try_serve(waiting));
    for waiting in waiting.iter() {
        let volume = &waiting.admission.volume;
        warn!(
            "volume {}: {} is locked by another process, or by one that was killed and has writes in the kernel; it is served when the lock is free",
            volume.name,
            volume.path.display()
        );
    }
}

/// A keeper for a worker and the descriptor it rings.
///
/// # Errors
/// No thread or descriptor can be had.
pub fn keeper(state: &Arc<crate::state_dir::StateDir>) -> io::Result<(Box<FileKeeper>, Arc<OwnedFd>)> {
    let keeper = FileKeeper::start(Arc::clone(state))?;
    let ready = keeper.ready_fd();
    Ok((Box::new(keeper), ready))
}

#[cfg(test)]
mod tests {
    use cirro_link::memory::pair;
    use cirro_link::tap::Limits;
    use cirro_link::taps::Taps;
    use cirro_protocol::types::{ETHERTYPE_DEFAULT, Steer, Uuid};

    use super::*;
    use crate::access::AccessList;
    use crate::node::{Directory, NodeConfig};
    use crate::owner::MemoryKeeper;

    /// A node tells the segment of a volume that it begins to serve; so a frame leaves without a request.
    #[test]
    fn a_recording_comes_in_by_the_door_and_has_what_left_until_it_was_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let (image, path) = (folder.path().join("v.img"), folder.path().join("a.pcap"));
        std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let config = NodeConfig {
            node: Uuid([1; 16]),
            incarnation: Uuid([2; 16]),
            secret: [3; 16],
            random_seed: [4; 16],
            ethertype: ETHERTYPE_DEFAULT,
            steer: Steer::new(2, 0),
            ack_delay_max: Nanos::from_micros(50),
            identity: None,
            access: Arc::new(AccessList::fixed(true, &[])),
            write_pool_bytes: 1 << 20,
            read_pool_bytes: 1 << 20,
        };
        let directory = Arc::new(Directory::new(2, [("v".parse().unwrap(), 0)]));
        let (link, mut far) = pair(1500);
        let keeper = Box::new(MemoryKeeper::default());
        let mut worker =
            NodeWorker::new(config, directory, Tap::new(link), UringStore::new().unwrap(), keeper);
        let (door, seat) = door().unwrap();
        let way = door.clone();
        let mut taps = Taps::new(vec![Box::new(move |exchange| way.exchange(exchange))]);
        let control = std::thread::spawn(move || {
            taps.push(&path, Limits::default()).unwrap();
            let volume = Volume::open(&format!("v={}", image.display()).parse().unwrap()).unwrap();
            door.admit(Admission { volume, owner: OwnerRecord::default() });
            std::thread::sleep(Duration::from_millis(100));
            taps.pop().unwrap().remove(0)
        });
        let mut sent = 0;
        while !control.is_finished() {
            let now = clock::now();
            if seat.bell.rung.swap(false, Ordering::AcqRel) {
                answer_door(&mut worker, &seat, now);
            }
            worker.turn(now);
            sent += std::iter::from_fn(|| far.receive().map(|_| ())).count() as u64;
        }
        let (file, recorded) = control.join().unwrap();
        assert!((1..=sent).contains(&recorded.frames), "{recorded:?}, {sent} frames left");
        assert_eq!(recorded.left_out, 0);
        // An IHAVE has 204 bytes (docs/PROTOCOL.md), a record's header 16 and the file's 24.
        assert_eq!(std::fs::metadata(file).unwrap().len(), 24 + recorded.frames * (16 + 204));
    }
}
