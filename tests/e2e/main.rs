//! End-to-end tests: the real daemons on a real (veth) wire, driven by a front-end that others wrote. Run as root, one at a time:
//! `cargo test --profile checked -p cirro-tests --test e2e -- --test-threads=1`.
//!
//! Knows nothing of the daemons' insides. What a failed test shows are the daemons' own logs.

mod cloud_hypervisor;
mod crashes;
mod device;
mod fixture;
#[allow(dead_code, reason = "the backend's own tests use the rest")]
#[path = "../../backend/tests/rig/guest.rs"]
mod guest;
mod keys;
mod matrix;
mod messages;
mod ownership;
mod path;
mod power;
mod privilege;
mod resize;
mod rig;
mod sessions;
mod sharing;
mod soak;
mod storage;
mod tap;
mod trouble;
mod xdp;
