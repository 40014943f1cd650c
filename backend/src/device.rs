//! The vhost-user device of one disk: control plane only.
//!
//! Says what the device is and passes on what the front-end decides; does not know rings' contents, requests or the wire. With an empty
//! [`VhostUserBackend::queues_per_thread`] the crate starts no thread and polls no kick. Called by vhost-user-backend, on the connection's thread.

use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;

use crate::config_space::{self, Identity, WRITEBACK_OFFSET};
use crate::dirty_log::{self, DirtyLog};
use crate::guest_memory::Regions;
use crate::mailbox::{Change, DiskId, Mailbox};
use crate::ring::{Ring, SharedMemory};

/// The device as one connection sees it.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

struct Inner {
    disk: DiskId,
    mailbox: Mailbox,
    identity: Identity,
    /// The rings, once the daemon has made them.
    rings: OnceLock<Vec<Ring>>,
    cache: Mutex<Cache>,
    /// The guest's memory, to switch its log.
    memory: Mutex<Regions>,
    /// Sectors, as the configuration has them.
    capacity: AtomicU64,
    /// Sectors, as the front-end has read them last; never so many before.
    capacity_read: AtomicU64,
}

/// What decides whether a write must be stable before it is answered (virtio 1.2, section 5.2.6.2).
#[derive(Clone, Copy, Debug)]
struct Cache {
    writeback: bool,
    features: u64,
}

impl Cache {
    fn is_write_through(self) -> bool {
        if self.features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0 {
            !self.writeback
        } else {
            self.features & 1 << VIRTIO_BLK_F_FLUSH == 0
        }
    }
}

impl Device {
    /// The device of `disk` for one connection.
    pub fn new(disk: DiskId, mailbox: Mailbox, identity: Identity) -> Device {
        let cache = Mutex::new(Cache { writeback: true, features: 0 });
        let capacity = AtomicU64::new(identity.volume.capacity_sectors);
        Device {
            inner: Arc::new(Inner {
                disk,
                mailbox,
                identity,
                rings: OnceLock::new(),
                cache,
                memory: Mutex::default(),
                capacity,
                capacity_read: AtomicU64::new(u64::MAX),
            }),
        }
    }

    /// Sectors that the configuration has.
    pub fn capacity(&self) -> u64 {
        self.inner.capacity.load(Ordering::Acquire)
    }

    /// The configuration has so many sectors from now on.
    pub fn set_capacity(&self, sectors: u64) {
        self.inner.capacity.store(sectors, Ordering::Release);
    }

    /// True if the front-end has read the capacity as it is now.
    pub fn is_capacity_read(&self) -> bool {
        self.inner.capacity_read.load(Ordering::Acquire) == self.capacity()
    }

    /// Hands the device its rings, once.
    pub fn set_rings(&self, rings: Vec<Ring>) {
        assert!(self.inner.rings.set(rings).is_ok(), "a device gets its rings once");
    }

    /// Stops every ring, all at the same time, and lets go of the guest's memory: after the front-end has gone.
    pub fn close(&self) {
        self.stop_rings();
        *self.inner.memory.lock().expect("no holder of this lock panics") = Regions::new();
        self.ask(Change::Memory(Regions::new()));
    }

    fn stop_rings(&self) {
        let rings = self.inner.rings.get().map_or(&[][..], Vec::as_slice);
        let stopping: Vec<_> = rings.iter().map(|ring| (ring, ring.begin_stop())).collect();
        for (ring, awaited) in stopping {
            if let Some(awaited) = awaited {
                ring.finish_stop(awaited);
            }
        }
    }

    fn ask(&self, change: Change) {
        if self.inner.mailbox.ask(self.inner.disk, change).is_none() {
            log::error!("disk {}: its worker does not answer", self.inner.disk.0);
        }
    }

    /// The reply to SET_FEATURES goes out after the worker has had a turn, so that nothing is written unmarked after it.
    fn switch_log(&self, on: bool) {
        for region in self.inner.memory.lock().expect("no holder of this lock panics").iter() {
            region.bitmap().switch(on);
        }
    }

    fn change_cache(&self, change: impl FnOnce(&mut Cache)) {
        let through = {
            let mut cache = self.inner.cache.lock().expect("no holder of this lock panics");
            change(&mut cache);
            cache.is_write_through()
        };
        self.ask(Change::WriteThrough(through));
    }
}

impl VhostUserBackend for Device {
    type Bitmap = DirtyLog;
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        usize::from(self.inner.identity.queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.inner.identity.queue_size_max)
    }

    fn features(&self) -> u64 {
        self.inner.identity.features()
    }

    fn acked_features(&self, features: u64) {
        self.switch_log(features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0);
        self.change_cache(|cache| cache.features = features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::LOG_SHMFD
    }

    fn reset_device(&self) {
        self.stop_rings();
        for ring in self.inner.rings.get().into_iter().flatten() {
            ring.reset();
        }
        self.switch_log(false);
        self.change_cache(|cache| *cache = Cache { writeback: true, features: 0 });
    }

    /// The crate tells the rings as well.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let writeback = self.inner.cache.lock().expect("no holder of this lock panics").writeback;
        let mut identity = self.inner.identity;
        identity.volume.capacity_sectors = self.capacity();
        if offset == 0 && size >= config_space::CAPACITY_BYTES {
            self.inner.capacity_read.store(identity.volume.capacity_sectors, Ordering::Release);
        }
        config_space::read(&identity.config(writeback), offset, size)
    }

    /// Only `writeback` may be written; QEMU writes just that byte, others the whole structure, so other bytes are let pass when they change nothing.
    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let mut wanted = self.get_config(0, config_space::CONFIG_BYTES as u32);
        let current = wanted.clone();
        let offset = offset as usize;
        let place = offset.checked_add(bytes.len()).and_then(|end| wanted.get_mut(offset..end));
        place.ok_or_else(refused)?.copy_from_slice(bytes);
        let others_same = (0..wanted.len()).all(|at| at == WRITEBACK_OFFSET || wanted[at] == current[at]);
        match wanted[WRITEBACK_OFFSET] {
            writeback @ 0..=1 if others_same => {
                self.change_cache(|cache| cache.writeback = writeback == 1);
                Ok(())
            }
            _ => Err(refused()),
        }
    }

    /// The reply to SET_MEM_TABLE or REM_MEM_REG goes out only after a turn of the worker has seen the change.
    fn update_memory(&self, memory: SharedMemory) -> io::Result<()> {
        let regions = memory.memory().deref().clone();
        {
            let mut known = self.inner.memory.lock().expect("no holder of this lock panics");
            dirty_log::go_on(&known, &regions);
            *known = regions.clone();
        }
        self.ask(Change::Memory(regions));
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    /// Never called: there is no thread to call it.
    fn handle_event(&self, _event: u16, _set: EventSet, _rings: &[Ring], _thread: usize) -> io::Result<()> {
        Ok(())
    }
}

fn refused() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "only the field writeback of the configuration can be written, with 0 or 1",
    )
}
