//! Where the vhost side waits for a disk's volume: it can say nothing of the device before a node has described the volume.
//!
//! Knows nothing of either side. The worker writes it when a volume was opened, which is rare; `server` waits on it. What an earlier process was told is
//! enough for a front-end that comes back while no node is there: it would wait in the handshake, and its guest with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use cirro_protocol::wire::body::VolumeInfo;
use rustix::event::{EventfdFlags, eventfd};

/// The volume of a disk, once it is known.
#[derive(Debug, Default)]
pub struct Attach {
    info: Mutex<Option<VolumeInfo>>,
    changed: Condvar,
    remembered: Option<VolumeInfo>,
    bell: std::sync::OnceLock<OwnedFd>,
}

impl Attach {
    /// Nothing was heard of the volume yet, but an earlier process may have known it.
    pub fn new(remembered: Option<VolumeInfo>) -> Attach {
        Attach { remembered, ..Attach::default() }
    }

    /// The volume as an earlier process offered it to a front-end.
    pub fn remembered(&self) -> Option<VolumeInfo> {
        self.remembered
    }

    /// A node serves the volume, and this is what it is.
    pub fn set(&self, info: VolumeInfo) {
        *self.lock() = Some(info);
        self.changed.notify_all();
        if let Some(bell) = self.bell.get() {
            // A counter that is full has rung already.
            let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
        }
    }

    /// Becomes readable when the volume is described anew, from now on.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn bell(&self) -> io::Result<BorrowedFd<'_>> {
        if self.bell.get().is_none() {
            // Whoever was faster has made one as good.
            let _ = self.bell.set(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        }
        Ok(self.bell.get().expect("there is one").as_fd())
    }

    /// Takes the ring out of the bell.
    pub fn hush(&self) {
        if let Some(bell) = self.bell.get() {
            // Nothing to read: it is quiet already.
            let _ = rustix::io::read(bell, &mut [0; 8]);
        }
    }

    /// The volume as it was last described.
    pub fn get(&self) -> Option<VolumeInfo> {
        *self.lock()
    }

    /// Waits until the volume is known, at most `limit`.
    pub fn wait(&self, limit: Duration) -> Option<VolumeInfo> {
        let waited = self.changed.wait_timeout_while(self.lock(), limit, |info| info.is_none());
        *waited.expect("no holder of this lock panics").0
    }

    fn lock(&self) -> MutexGuard<'_, Option<VolumeInfo>> {
        self.info.lock().expect("no holder of this lock panics")
    }
}
