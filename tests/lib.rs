//! What the tests and the benchmark that see the whole system share: machines made of network namespaces, daemons in them, a front-end in place of a VM.
//!
//! Knows the daemons by their command lines and control sockets alone, never by their code. Used by `e2e/`, `bench/` and the soak's program. Needs root.

pub mod daemons;
pub mod frontend;
pub mod load;
pub mod loss;
pub mod netns;
pub mod soak;
pub mod sys;
pub mod verify;
pub mod wire;
