//! Which worker has which volume, for all workers of the process: any of them may be asked.
//!
//! Knows names and numbers. Made by `server`; read in handshakes only.

use std::sync::atomic::{AtomicBool, Ordering};

use cirro_protocol::types::{Steer, VolumeName};

/// The volumes of a process.
#[derive(Debug)]
pub struct Directory {
    process: u16,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    name: VolumeName,
    worker: u16,
    served: AtomicBool,
}

impl Directory {
    /// The volumes in order, each with its worker, none served yet. `process` is the process's number on the interface.
    pub fn new(process: u16, volumes: impl IntoIterator<Item = (VolumeName, u16)>) -> Directory {
        let entry = |(name, worker)| Entry { name, worker, served: AtomicBool::new(false) };
        Directory { process, entries: volumes.into_iter().map(entry).collect() }
    }

    /// The worker that has the volume, once it is served.
    pub fn steer_of(&self, name: &VolumeName) -> Option<Steer> {
        let entry = self.entries.iter().find(|entry| entry.name == *name)?;
        entry.served.load(Ordering::Acquire).then(|| Steer::new(self.process, entry.worker))
    }

    /// True if the process has the volume, served or not yet.
    pub fn knows(&self, name: &VolumeName) -> bool {
        self.entries.iter().any(|entry| entry.name == *name)
    }

    pub(super) fn set_served(&self, name: &VolumeName) {
        if let Some(entry) = self.entries.iter().find(|entry| entry.name == *name) {
            entry.served.store(true, Ordering::Release);
        }
    }
}
