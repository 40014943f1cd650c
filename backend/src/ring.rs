//! Our `VringT`: turns what vhost-user-backend tells a ring into commands for the worker that owns it.
//!
//! Knows when a ring starts and stops; does not know what is in it. The crate reads a ring's state back (kick, ready, addresses), and
//! `VringState` can only be made by its own `VringMutex`: so a ring keeps one as the *record* of what was said, and the worker gets copies. The crate
//! calls it under its handler's mutex, which the worker never takes; no lock of ours is held while the worker is waited for.
//! See docs/decisions/0002-vhost-user-backend-without-its-threads.md.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::GuestMemoryAtomic;

use crate::guest_memory::Regions;
use crate::mailbox::{Answer, Awaited, Change, DiskId, Mailbox};

/// The guest's memory as the crate shares it.
pub type SharedMemory = GuestMemoryAtomic<Regions>;
type Record = VringMutex<SharedMemory>;

/// A ring as the vhost-user side sees it. Clones are the same ring.
#[derive(Clone)]
pub struct Ring {
    record: Record,
    port: Arc<Port>,
}

/// How a ring reaches its worker.
struct Port {
    disk: DiskId,
    index: u16,
    mailbox: Mailbox,
    /// The worker serves the ring. Changed by the one thread that handles the connection.
    started: AtomicBool,
    /// The descriptors given last, for the worker's copies: the record hides its call.
    descriptors: std::sync::Mutex<Descriptors>,
}

#[derive(Default)]
struct Descriptors {
    kick: Option<File>,
    call: Option<File>,
}

/// What a ring made on this thread belongs to.
struct Birth {
    disk: DiskId,
    mailbox: Mailbox,
    born: Vec<Ring>,
}

thread_local! {
    /// `VringT::new` is told neither the device nor the index; the crate makes all rings of a daemon in order, on the calling thread.
    static BIRTH: RefCell<Option<Birth>> = const { RefCell::new(None) };
}

/// Runs `make`, which makes a daemon; the rings it makes are of `disk`, numbered from 0.
pub fn born_for<T>(disk: DiskId, mailbox: &Mailbox, make: impl FnOnce() -> T) -> (T, Vec<Ring>) {
    let birth = Birth { disk, mailbox: mailbox.clone(), born: Vec::new() };
    BIRTH.with_borrow_mut(|place| {
        assert!(place.replace(birth).is_none(), "one daemon at a time is made on a thread")
    });
    let made = make();
    let born = BIRTH.with_borrow_mut(Option::take).expect("put there above").born;
    (made, born)
}

impl Ring {
    /// Asks the worker to stop the ring, if it serves it. The ring counts as stopped from now on.
    pub fn begin_stop(&self) -> Option<Awaited> {
        let was_started = self.port.started.swap(false, Ordering::Relaxed);
        was_started.then(|| self.send(Change::Stop { ring: self.port.index }))
    }

    /// Waits for the end of a stop and writes down where the ring stands, for `GET_VRING_BASE` to answer.
    pub fn finish_stop(&self, awaited: Awaited) {
        match awaited.wait() {
            Some(Answer::Stopped { next_avail, unfinished }) => {
                self.record.set_queue_next_avail(next_avail);
                if unfinished > 0 {
                    log::warn!(
                        "disk {}: ring {} stopped with {unfinished} requests unfinished: no answer from the node in time; they are issued \
                         again when the ring starts again",
                        self.port.disk.0,
                        self.port.index
                    );
                }
            }
            Some(Answer::Done | Answer::Session(_)) | None => {
                log::error!("disk {}: its worker did not stop ring {}", self.port.disk.0, self.port.index);
            }
        }
    }

    /// Takes back everything the front-end said, as RESET_DEVICE asks: the ring starts again only with new descriptors.
    pub fn reset(&self) {
        self.record.set_queue_ready(false);
        self.record.set_kick(None);
        self.record.set_call(None);
        *self.descriptors() = Descriptors::default();
    }

    fn send(&self, change: Change) -> Awaited {
        self.port.mailbox.send(self.port.disk, change)
    }

    fn ask(&self, change: Change) {
        if self.send(change).wait().is_none() {
            log::error!("disk {}: its worker does not answer for ring {}", self.port.disk.0, self.port.index);
        }
    }

    fn descriptors(&self) -> std::sync::MutexGuard<'_, Descriptors> {
        self.port.descriptors.lock().expect("no holder of this lock panics")
    }

    fn is_started(&self) -> bool {
        self.port.started.load(Ordering::Relaxed)
    }

    /// Starts the ring if it is ready and enabled and is not served yet.
    fn start_if_ready(&self) {
        let queue = {
            let state = self.record.get_ref();
            if self.is_started() || !state.is_enabled() || !state.get_queue().ready() {
                return;
            }
            state.get_queue().state()
        };
        let copies = {
            let descriptors = self.descriptors();
            (copy(descriptors.kick.as_ref()), copy(descriptors.call.as_ref()))
        };
        let (Some(kick), call) = copies else { return };
        self.port.started.store(true, Ordering::Relaxed);
        self.ask(Change::Start { ring: self.port.index, queue, kick, call });
    }
}

/// A second descriptor for the same file; `None` when there is none, or the process has no more to give.
fn copy(file: Option<&File>) -> Option<File> {
    let file = file?;
    file.try_clone()
        .inspect_err(|error| log::error!("cannot duplicate descriptor {}: {error}", file.as_raw_fd()))
        .ok()
}

impl<'a> VringStateGuard<'a, SharedMemory> for Ring {
    type G = <Record as VringStateGuard<'a, SharedMemory>>::G;
}

impl<'a> VringStateMutGuard<'a, SharedMemory> for Ring {
    type G = <Record as VringStateMutGuard<'a, SharedMemory>>::G;
}

impl VringT<SharedMemory> for Ring {
    fn new(memory: SharedMemory, queue_size_max: u16) -> Result<Ring, QueueError> {
        let record = Record::new(memory, queue_size_max)?;
        BIRTH.with_borrow_mut(|birth| {
            let birth = birth.as_mut().expect("rings are made inside of `born_for`");
            let port = Port {
                disk: birth.disk,
                index: birth.born.len() as u16,
                mailbox: birth.mailbox.clone(),
                started: AtomicBool::new(false),
                descriptors: std::sync::Mutex::default(),
            };
            let ring = Ring { record, port: Arc::new(port) };
            birth.born.push(ring.clone());
            Ok(ring)
        })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, SharedMemory>>::G {
        self.record.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, SharedMemory>>::G {
        self.record.get_mut()
    }

    fn add_used(&self, head: u16, len: u32) -> Result<(), QueueError> {
        self.record.add_used(head, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.record.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.record.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.record.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.record.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.record.set_enabled(enabled);
        if self.is_started() {
            self.ask(Change::Enable { ring: self.port.index, enabled });
        } else {
            self.start_if_ready();
        }
    }

    fn set_queue_info(&self, descriptors: u64, avail: u64, used: u64) -> Result<(), QueueError> {
        self.record.set_queue_info(descriptors, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.record.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.record.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.record.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.record.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.record.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.record.set_queue_event_idx(enabled);
    }

    /// Called with `true` when a kick is there, and with `false` by `GET_VRING_BASE`, which reads the next index right after.
    fn set_queue_ready(&self, ready: bool) {
        self.record.set_queue_ready(ready);
        if ready {
            self.start_if_ready();
        } else if let Some(awaited) = self.begin_stop() {
            self.finish_stop(awaited);
        }
    }

    fn set_kick(&self, file: Option<File>) {
        let kept = copy(file.as_ref());
        let for_worker = copy(kept.as_ref());
        self.descriptors().kick = kept;
        self.record.set_kick(file);
        if let (true, Some(kick)) = (self.is_started(), for_worker) {
            self.ask(Change::Kick { ring: self.port.index, kick });
        }
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.record.read_kick()
    }

    fn set_call(&self, file: Option<File>) {
        let kept = copy(file.as_ref());
        let call = copy(kept.as_ref());
        self.descriptors().call = kept;
        self.record.set_call(file);
        if self.is_started() {
            self.ask(Change::Call { ring: self.port.index, call });
        }
    }

    fn set_err(&self, file: Option<File>) {
        self.record.set_err(file);
    }
}
