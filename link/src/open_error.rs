//! Why a link could not be opened, in words for an operator. The same for every kind of link.
//!
//! Knows what can go wrong; does not know what a kind of link tries. Shown by both daemons' `main`.

use std::io;

use cirro_protocol::types::{MTU_MAX, MTU_MIN};

/// Why a link could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such interface.
    #[error("no interface named {interface}: {cause}")]
    NoInterface {
        /// Its name.
        interface: String,
        /// What the kernel says.
        cause: io::Error,
    },
    /// Its MTU is outside what the protocol carries.
    #[error(
        "interface {interface} has MTU {mtu}; {least} to {MTU_MAX} is needed (ip link set {interface} mtu 9000)"
    )]
    Mtu {
        /// Its name.
        interface: String,
        /// Its MTU.
        mtu: usize,
        /// The smallest that will do.
        least: usize,
    },
    /// It is down.
    #[error("interface {interface} is down (ip link set {interface} up)")]
    Down {
        /// Its name.
        interface: String,
    },
    /// As many processes as can share the interface do so already, or another one took our number on an interface that came back.
    #[error(
        "no process number is free on interface {interface}: at most {most} daemons share one, and none shares it with one of --link-mode xdp"
    )]
    NoProcessNumber {
        /// Its name.
        interface: String,
        /// How many there are.
        most: u16,
    },
    /// It has no IPv4 address.
    #[error("interface {interface} has no IPv4 address (ip address add ADDRESS/BITS dev {interface})")]
    NoAddress {
        /// Its name.
        interface: String,
    },
    /// AF_XDP takes every frame of ours, and another daemon is there.
    #[error(
        "another daemon uses interface {interface} (`ss -xap | grep cirro-` names it), and with --link-mode xdp one has it to itself: stop that one, \
         serve everything by one, or use --link-mode packet"
    )]
    Shared {
        /// Its name.
        interface: String,
    },
    /// Somebody else has an XDP program there.
    #[error(
        "interface {interface} has the XDP program of somebody else (`ip -d link show dev {interface}` names it): end who attached it, or use \
         --link-mode packet"
    )]
    Programmed {
        /// Its name.
        interface: String,
    },
    /// A queue for each worker is needed.
    #[error(
        "interface {interface} has {queues} receive queues, too few for {workers} workers: --workers {queues}, or `ethtool -L {interface} combined {workers}`"
    )]
    Queues {
        /// Its name.
        interface: String,
        /// How many it has.
        queues: u32,
        /// How many workers want one.
        workers: u16,
    },
    /// The kernel refused a step.
    #[error("{step} on interface {interface}: {cause}")]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// The interface.
        interface: String,
        /// What the kernel says.
        cause: io::Error,
    },
}

impl OpenError {
    /// `header_bytes` of an interface's MTU are not ours: those of the layers between it and our frames.
    pub(crate) fn mtu(interface: &str, mtu: usize, header_bytes: usize) -> OpenError {
        OpenError::Mtu { interface: interface.to_owned(), mtu, least: MTU_MIN + header_bytes }
    }

    pub(crate) fn kernel(step: &'static str, interface: &str, cause: io::Error) -> OpenError {
        OpenError::Kernel { step, interface: interface.to_owned(), cause }
    }
}
