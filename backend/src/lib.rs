//! cirro-backend, the vhost-user-blk daemon: a guest's disk, carried over raw Ethernet.
//!
//! The vhost side (`server`, `device`, `ring`) talks to the VMM and sends commands through `mailbox`; a `worker` owns the link, the rings' contents and the
//! sessions of its disks. Nothing else is shared but counters.

pub mod attach;
pub mod config;
pub mod config_space;
pub mod device;
pub mod dirty_log;
pub mod disk;
pub mod guest_memory;
pub mod mailbox;
pub mod mapped;
pub mod memory_guard;
pub mod pending;
pub mod protection;
pub mod record;
pub mod relay;
pub mod replay;
pub mod report;
pub mod request;
pub mod ring;
pub mod server;
pub mod state;
pub mod stats;
pub mod trouble;
pub mod unflushed;
pub mod virtqueue;
pub mod worker;
