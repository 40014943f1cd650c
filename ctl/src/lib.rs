//! The control plane that both daemons share: what `main` does, the control socket, counters, latencies, and the shapes of what they report.
//!
//! Does not know the daemons: they depend on it. Nothing here is on the data path but the counters, which a
//! worker adds to without locks, allocation or system calls.
#![forbid(unsafe_code)]

pub mod client;
pub mod confine;
mod connection;
pub mod counter;
pub mod daemon;
pub mod keyfile;
pub mod latency;
pub mod publish;
pub mod report;
pub mod request;
pub mod server;
pub mod show;
pub mod size;
mod socket;
pub mod stop;
mod table;
