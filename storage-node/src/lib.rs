//! cirro-node, the storage daemon: serves volumes, which are raw files and block devices, to backends across an Ethernet segment.
//!
//! `server` runs workers; each is a `node` over a link and a store. `docs/ARCHITECTURE.md` has the map.

pub mod access;
pub mod buffers;
pub mod config;
mod memory;
pub mod node;
pub mod owner;
pub mod range_lock;
pub mod server;
pub mod state_dir;
pub mod store;
pub mod volume;
