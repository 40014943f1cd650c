//! Process numbers: what tells apart the daemons that share an interface or an address.
//!
//! Knows how a number is held for as long as a process lives: by an abstract unix socket of its network namespace, which nobody has to clean
//! up. Does not know what a number is part of. Used when a link is opened.

use std::io;
use std::ops::Range;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Takes the first free number of `candidates` in the set that `family` names; `None` if all are taken. It is held until the socket is closed.
pub(crate) fn claim(family: &str, candidates: Range<u16>) -> io::Result<Option<(u16, UnixDatagram)>> {
    for process in candidates {
        let address = SocketAddr::from_abstract_name(format!("cirro-{family}-{process}"))?;
        match UnixDatagram::bind_addr(&address) {
            Ok(held) => return Ok(Some((process, held))),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
