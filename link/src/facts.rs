//! What an interface is like, as far as sockets that are bound to it care.
//!
//! Knows how the kernel is asked; does not know what is bound. Used by the links whose sockets are of one interface.

use std::os::fd::AsFd;

use cirro_protocol::types::MacAddress;

use crate::sys;

/// What a socket is made for. When one of these changes it is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) index: u32,
    pub(crate) address: MacAddress,
    pub(crate) mtu: usize,
}

impl Facts {
    /// What the interface of this name is like now, in the network namespace of the socket `fd`; `None` if there is none or it is down.
    pub(crate) fn look(fd: impl AsFd, name: &str) -> Option<Facts> {
        let fd = fd.as_fd();
        let index = sys::interface_index(fd, name).ok()?;
        let up = sys::interface_is_up(fd, name).ok()?;
        let mtu = sys::interface_mtu(fd, name).ok()?;
        let address = sys::interface_address(fd, name).ok()?;
        up.then_some(Facts { index, address, mtu })
    }
}
