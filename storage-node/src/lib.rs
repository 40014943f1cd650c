//! cirro-node, the storage daemon.
