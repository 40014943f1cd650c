//! The threads: one per worker, which sleeps when its turns find nothing, and one per disk, which talks to the VMM.
//!
//! Knows waiting and connections; does not know rings' contents or frames. Called by `main`.

use std::fs::{File, Permissions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, lchown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cirro_ctl::confine::User;
use cirro_ctl::stop::Stop;
use cirro_link::inherited;
use cirro_link::spin::Spin;
use cirro_link::tap::Tap;
use cirro_link::wait::Waiter;
use cirro_link::{Link, clock};
use cirro_protocol::initiator::StateName;
use cirro_protocol::time::Nanos;
use cirro_protocol::wire::body::VolumeInfo;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::GuestMemoryAtomic;

use crate::attach::Attach;
use crate::config::{DiskEntry, Socket};
use crate::config_space::Identity;
use crate::device::Device;
use crate::disk::KickChange;
use crate::guest_memory::Regions;
use crate::mailbox::{Answer, Change, DiskId, Mailbox};
use crate::relay::{self, Broken, End, Relay, Turn};
use crate::ring::born_for;
use crate::state::State;
use crate::worker::Worker;

/// Tokens of what a worker waits for; kicks come after them.
const TOKEN_BELL: u64 = 0;
const TOKEN_KICKS: u64 = 1;
/// How often a thread that waits for a volume looks whether the process is to end.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often it has looked before it makes do with what an earlier process was told: a node that is there answers sooner.
const LOOKS_BEFORE_MEMORY: u32 = 2;
/// How often it says that it still waits.
const SAY_EVERY: u32 = 600;
/// How long the end of the process waits for the node to take a volume back.
const RELEASE_TIME: Duration = Duration::from_millis(500);

/// Runs a worker's turns until `ended` is set and its bell rings. Looks again for `poll` and longer ([`Spin`]) before it sleeps.
///
/// # Errors
/// The kernel has no descriptors or memory left for waiting.
pub fn run_worker<L: Link + AsFd>(
    mut worker: Worker<Tap<L>>,
    ended: &AtomicBool,
    poll: Nanos,
) -> io::Result<()> {
    let mut waits = Waits::new(&mut worker)?;
    let mut spin = Spin::new(poll, clock::now());
    while !ended.load(Ordering::Relaxed) {
        let now = clock::now();
        let turn = worker.turn(now);
        worker.tend_tap();
        waits.follow(&mut worker)?;
        if turn.busy || turn.active {
            spin.moved(now);
            continue;
        }
        if spin.again(now) || !worker.may_sleep() {
            continue;
        }
        worker.slept();
        let from = clock::now();
        waits.sleep(&mut worker, turn.wake_at.map(|at| at.since(from)))?;
        spin.slept(from, clock::now());
    }
    Ok(())
}

/// What a worker waits for.
struct Waits {
    waiter: Waiter,
    kicks: Vec<(u64, File)>,
    ready: Vec<u64>,
}

impl Waits {
    fn new<L: Link + AsFd>(worker: &mut Worker<L>) -> io::Result<Waits> {
        let waiter = Waiter::new()?;
        waiter.add(worker.inbox().bell(), TOKEN_BELL)?;
        Ok(Waits { waiter, kicks: Vec::new(), ready: Vec::new() })
    }

    /// Waits for other kicks when a turn changed them.
    fn follow<L: Link + AsFd>(&mut self, worker: &mut Worker<L>) -> io::Result<()> {
        let Waits { waiter, kicks, .. } = self;
        for (disk, change) in worker.kick_changes() {
            let token = |ring: u16| TOKEN_KICKS + (u64::from(disk.0) << 16 | u64::from(ring));
            let (KickChange::Watch(ring, _) | KickChange::Forget(ring)) = &change;
            let token = token(*ring);
            if let Some(place) = kicks.iter().position(|(of, _)| *of == token) {
                let (_, old) = kicks.swap_remove(place);
                waiter.remove(old.as_fd())?;
            }
            if let KickChange::Watch(_, kick) = change {
                // What cannot be waited for is no eventfd: its ring is served when the worker is awake anyway.
                match waiter.add(kick.as_fd(), token) {
                    Ok(()) => kicks.push((token, kick)),
                    Err(error) => log::error!("disk {}: cannot wait for a ring's kick: {error}", disk.0),
                }
            }
        }
        Ok(())
    }

    fn sleep<L: Link + AsFd>(&mut self, worker: &mut Worker<L>, timeout: Option<Nanos>) -> io::Result<()> {
        self.waiter.wait_beside(worker.link().as_fd(), timeout, &mut self.ready)?;
        for token in &self.ready {
            match *token {
                TOKEN_BELL => worker.inbox().hush(),
                kick => {
                    if let Some((_, file)) = self.kicks.iter().find(|(of, _)| *of == kick) {
                        // It was readable a moment ago, and we are its only reader: this does not block.
                        let _ = (&mut &*file).read(&mut [0; 8]);
                    }
                }
            }
        }
        Ok(())
    }
}

/// A disk as its thread serves it.
pub struct DiskServer {
    /// Which disk.
    pub id: DiskId,
    /// Its configuration.
    pub entry: DiskEntry,
    /// The interface, for messages.
    pub link: String,
    /// Its worker's mailbox.
    pub mailbox: Mailbox,
    /// Where its volume becomes known.
    pub attach: Arc<Attach>,
    /// Where what a front-end is told is kept.
    pub state: Arc<State>,
    /// The wish to end.
    pub stop: Stop,
    /// Whether a front-end is connected, for whoever asks.
    pub connected: Arc<AtomicBool>,
}

impl DiskServer {
    /// Accepts one front-end after another until the process is to end.
    ///
    /// # Errors
    /// The socket cannot be waited for any more.
    pub fn run(&self, listening: &Listening) -> io::Result<()> {
        let result = self.accept_all(listening);
        self.stop.ask();
        self.release();
        result
    }

    fn accept_all(&self, listening: &Listening) -> io::Result<()> {
        // Before anything is said of the volume: what changes after that is heard.
        self.attach.bell()?;
        let mut waiter = Waiter::new()?;
        waiter.add(listening.listener.as_fd(), 0)?;
        waiter.add(self.stop.as_fd(), 1)?;
        let mut ready = Vec::new();
        while self.wait_for_volume() {
            waiter.wait(None, &mut ready)?;
            if self.stop.is_asked() {
                break;
            }
            if ready.contains(&0) {
                self.serve_connection(&listening.listener);
            }
        }
        Ok(())
    }

    /// A front-end that connects meanwhile waits in the socket's queue. False: the process is to end.
    fn wait_for_volume(&self) -> bool {
        for look in 0u32.. {
            if self.stop.is_asked() {
                return false;
            }
            if self.attach.wait(LOOK_EVERY).is_some() {
                break;
            }
            if look % SAY_EVERY == 0 {
                log::info!("waiting for a node that serves volume {} on {}", self.entry.volume, self.link);
            }
            if look + 1 >= LOOKS_BEFORE_MEMORY && self.attach.remembered().is_some() {
                break;
            }
        }
        !self.stop.is_asked()
    }

    /// One connection from its start to its end. Whatever a front-end does ends its connection at worst.
    fn serve_connection(&self, listener: &UnixListener) {
        let volume = self.entry.volume;
        self.attach.hush();
        let identity = Identity {
            volume: self.describe(),
            read_only: self.entry.read_only,
            queues: self.entry.queues,
            queue_size_max: self.entry.queue_size,
        };
        let device = Device::new(self.id, self.mailbox.clone(), identity);
        let memory = GuestMemoryAtomic::new(Regions::new());
        let name = format!("vhost-{volume}");
        let (daemon, rings) =
            born_for(self.id, &self.mailbox, || VhostUserDaemon::new(name, device.clone(), memory));
        device.set_rings(rings);
        let mut daemon = match daemon {
            Ok(daemon) => daemon,
            Err(error) => return log::error!("volume {volume}: cannot make the device: {error}"),
        };
        let mut relay = match accept(listener, &mut daemon) {
            Ok(relay) => relay,
            Err(error) => {
                return log::error!(
                    "volume {volume}: cannot accept a front-end on {}: {error}",
                    self.entry.socket
                );
            }
        };
        log::info!("volume {volume}: front-end connected");
        self.connected.store(true, Ordering::Relaxed);
        let ended = self.pass_on(&mut relay, &device);
        // The crate sees the end of its connection.
        drop(relay);
        let crate_ended = daemon.wait();
        // An end in the middle of a message, a refused message, a reset: whatever it was, the next connection starts afresh.
        match (ended, crate_ended) {
            (Ok(End::Device), Err(error)) => log::warn!("volume {volume}: front-end dropped: {error}"),
            (Ok(End::Device | End::FrontEnd), _) => log::info!("volume {volume}: front-end disconnected"),
            (Err(broken), _) => log::warn!("volume {volume}: front-end dropped: {broken}"),
        }
        device.close();
        self.connected.store(false, Ordering::Relaxed);
    }

    /// Passes messages on until the connection ends, or the process is to end; tells the front-end of another size meanwhile.
    fn pass_on(&self, relay: &mut Relay, device: &Device) -> Result<End, Broken> {
        // A front-end takes no news of a device that has not started. So it is told once more at the start, of a capacity that it has not read.
        let mut told_at_start = None;
        loop {
            let ready = relay.wait([self.stop.as_fd(), self.attach.bell()?])?;
            let [stops, is_changed] = ready.others;
            // Before the end: what was heard of the volume is there for the next process.
            if is_changed {
                self.attach.hush();
                self.follow_capacity(relay, device);
            }
            if stops {
                return Ok(End::FrontEnd);
            }
            if !ready.messages {
                continue;
            }
            match relay.turn()? {
                Turn::Goes => {}
                Turn::RingStarts => {
                    if !device.is_capacity_read()
                        && told_at_start.replace(device.capacity()) != Some(device.capacity())
                    {
                        relay.tell_config_changed();
                    }
                }
                Turn::Ended(end) => return Ok(end),
            }
        }
    }

    /// The volume may have another size: it is remembered before the front-end reads it, so that the device is the same after a restart.
    fn follow_capacity(&self, relay: &mut Relay, device: &Device) {
        let volume = self.entry.volume;
        let (Some(info), was) = (self.attach.get(), device.capacity()) else { return };
        if info.capacity_sectors == was {
            return;
        }
        self.remember(&info);
        device.set_capacity(info.capacity_sectors);
        let told = if relay.tell_config_changed() {
            "the front-end is told"
        } else {
            "the front-end takes no news of it: restart its guest"
        };
        log::info!("volume {volume}: the disk has {} sectors now, not {was}; {told}", info.capacity_sectors);
    }

    fn remember(&self, info: &VolumeInfo) {
        if let Err(error) = self.state.remember(info) {
            log::error!(
                "volume {}: a backend that starts while no node is there will have to wait for one: {error}",
                self.entry.volume
            );
        }
    }

    /// The volume for a front-end: as a node says, or, while none is there, as the last front-end was told.
    fn describe(&self) -> VolumeInfo {
        match self.attach.get() {
            Some(info) => {
                self.remember(&info);
                info
            }
            None => {
                log::info!(
                    "volume {}: no node is there; the front-end gets the volume as it was, and its requests wait",
                    self.entry.volume
                );
                self.attach.remembered().unwrap_or_default()
            }
        }
    }

    /// Gives the volume back, and waits a moment for the node to hear of it.
    fn release(&self) {
        let mut looks_left = RELEASE_TIME.as_millis() / 5;
        self.mailbox.ask(self.id, Change::Close);
        while let Some(Answer::Session(report)) = self.mailbox.ask(self.id, Change::Report) {
            let busy = matches!(report.state, StateName::Opening | StateName::Probing);
            if !(busy || report.unflushed_bytes > 0) || looks_left == 0 {
                break;
            }
            looks_left -= 1;
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Takes the front-end that waits, and gives the crate the other end of a connection of our own.
fn accept(listener: &UnixListener, daemon: &mut VhostUserDaemon<Device>) -> io::Result<Relay> {
    let (frontend, _) = listener.accept()?;
    let (inner, meets) = relay::meeting()?;
    daemon.start(&mut Listener::from(meets)).map_err(|error| io::Error::other(error.to_string()))?;
    Relay::new(frontend, inner)
}

/// A socket that listens for a front-end; its path is removed at the end.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    path: Option<PathBuf>,
}

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody listens there.
    #[error("somebody listens on {0} already: end that process, or choose another --socket-path")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is no socket: remove it, or choose another --socket-path")]
    NoSocket(PathBuf),
    /// The system refused.
    #[error("cannot listen on {path}: {cause}; is its directory there and writable?")]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The descriptor is unfit.
    #[error("cannot use --fd {fd}: {cause}")]
    Descriptor {
        /// Its number.
        fd: i32,
        /// What it is.
        cause: io::Error,
    },
}

impl Listening {
    /// Listens on a path, where a socket that nobody listens on any more is replaced, or on a descriptor.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn open(socket: &Socket) -> Result<Listening, ListenError> {
        match socket {
            Socket::Fd(fd) => inherited::listener(*fd)
                .map(|listener| Listening { listener, path: None })
                .map_err(|cause| ListenError::Descriptor { fd: *fd, cause }),
            Socket::Path(path) => {
                remove_stale(path)?;
                let listener = UnixListener::bind(path);
                let listener = listener.map_err(|cause| ListenError::Io { path: path.clone(), cause })?;
                Ok(Listening { listener, path: Some(path.clone()) })
            }
        }
    }
}

impl Listening {
    /// Says who may connect. A descriptor that was opened for us stays as it is.
    ///
    /// # Errors
    /// [`ListenError::Io`].
    pub fn admit(&self, owner: Option<&User>, mode: Option<u32>) -> Result<(), ListenError> {
        let Some(path) = &self.path else { return Ok(()) };
        let owned = owner.map_or(Ok(()), |owner| lchown(path, Some(owner.uid), Some(owner.gid)));
        let admitted = owned.and_then(|()| {
            mode.map_or(Ok(()), |mode| std::fs::set_permissions(path, Permissions::from_mode(mode)))
        });
        admitted.map_err(|cause| ListenError::Io { path: path.clone(), cause })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Gone already, or its directory is: as it should be.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |cause| ListenError::Io { path: path.to_owned(), cause };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NoSocket(path.to_owned())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ListenError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("cirro-listen-{}-{name}", std::process::id()))
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let path = path("stale");
        drop(UnixListener::bind(&path).unwrap());
        let live = Listening::open(&Socket::Path(path.clone())).unwrap();
        assert!(matches!(Listening::open(&Socket::Path(path.clone())), Err(ListenError::InUse(_))));
        drop(live);
        assert!(!path.exists(), "the path is removed at the end");
    }

    #[test]
    fn a_file_is_never_removed() {
        let path = path("file");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(Listening::open(&Socket::Path(path.clone())), Err(ListenError::NoSocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_descriptor_must_be_a_socket_that_listens() {
        use std::os::fd::{AsRawFd, IntoRawFd};
        let path = path("fd");
        let listening = UnixListener::bind(&path).unwrap();
        let (stream, _other) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        let network = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let refused = |fd| inherited::listener(fd).unwrap_err().to_string();
        assert!(refused(file.as_raw_fd()).contains("no socket"));
        assert!(refused(stream.into_raw_fd()).contains("does not listen"));
        assert!(refused(network.into_raw_fd()).contains("no unix socket"));
        assert!(refused(1 << 20).contains("not open"));
        let taken = inherited::listener(listening.into_raw_fd()).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert!(taken.accept().is_ok());
        std::fs::remove_file(&path).unwrap();
    }
}
