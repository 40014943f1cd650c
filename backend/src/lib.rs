//! cirro-backend, the vhost-user-blk daemon.
