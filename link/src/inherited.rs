//! A socket that whoever started us has opened, given by its number: `--link-fd N`, and a backend's `--fd N`.
//!
//! Knows how a number becomes an owner, and kinds of sockets; does not know what the socket is for. Called once for each, at the start.
#![allow(unsafe_code, reason = "a file descriptor given by number can be owned in no other way")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use socket2::{Domain, Socket, Type};

fn refused(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}

/// Takes descriptor `fd` over, if it is a socket. An error says what it is instead; so it is below.
fn socket(fd: RawFd) -> io::Result<Socket> {
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).map_err(|_| refused("it is not open"))?;
    if !target.to_string_lossy().starts_with("socket:") {
        return Err(refused("it is no socket"));
    }
    // SAFETY: the descriptor is open (checked above). It is ours by the meaning of the option that names it, and nothing in this process opened
    // it: the configuration allows 3 and above only, names each once, and it is taken before any other descriptor of that number could have
    // been closed.
    Ok(Socket::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Takes descriptor `fd` over, if it is a unix socket that listens.
///
/// # Errors
/// What it is instead.
pub fn listener(fd: RawFd) -> io::Result<UnixListener> {
    let socket = socket(fd)?;
    if socket.domain()? != Domain::UNIX {
        return Err(refused("it is no unix socket"));
    }
    if !socket.is_listener()? {
        return Err(refused("it does not listen"));
    }
    Ok(UnixListener::from(OwnedFd::from(socket)))
}

/// Takes descriptor `fd` over, if it is a packet socket that gives whole frames (packet(7), SOCK_RAW).
pub(crate) fn packet_socket(fd: RawFd) -> io::Result<OwnedFd> {
    let socket = socket(fd)?;
    if socket.domain()? != Domain::PACKET || socket.r#type()? != Type::from(libc::SOCK_RAW) {
        return Err(refused("it is no packet socket of type SOCK_RAW"));
    }
    socket.set_nonblocking(true)?;
    Ok(OwnedFd::from(socket))
}
