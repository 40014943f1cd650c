//! A listening socket that whoever started us has opened: `--fd N`.
//!
//! Knows only how a number becomes an owner, which is why it is a file of its own. Called by `server`, once per disk.
#![allow(unsafe_code, reason = "a file descriptor given by number can be owned in no other way")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

/// Takes descriptor `fd` over, if it is a unix socket that listens.
///
/// # Errors
/// What it is instead.
pub fn listener(fd: RawFd) -> io::Result<UnixListener> {
    let refused = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).map_err(|_| refused("it is not open"))?;
    if !target.to_string_lossy().starts_with("socket:") {
        return Err(refused("it is no socket"));
    }
    // SAFETY: the descriptor is open (checked above). It is ours by the meaning of `--fd`, and nothing in this process opened it: the configuration allows 3
    // and above only, names each once, and it is taken before any other descriptor of that number could have been closed.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    let stream = UnixStream::from(owned);
    stream.local_addr().map_err(|_| refused("it is no unix socket"))?;
    if stream.peer_addr().is_ok() {
        return Err(refused("it is connected already; give a socket that listens"));
    }
    Ok(UnixListener::from(OwnedFd::from(stream)))
}
