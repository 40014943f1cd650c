//! A link of the kind that the operator chose: what both daemons hold, so that no worker knows which kind it drives.
//!
//! Knows the kinds by name and hands every call on; a branch a call is its whole cost. Used by both daemons' `main`.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::str::FromStr;
use std::sync::Arc;

use cirro_protocol::time::Instant;
use cirro_protocol::types::MacAddress;

use crate::inherited;
use crate::packet::{self, PacketLink};
use crate::udp::{self, UdpLink};
use crate::xdp::{self, XdpLink};
use crate::{Drops, FrameId, Link, OpenError, Received, TxFrame};

/// How frames are carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// By packet sockets: any Ethernet segment.
    #[default]
    Packet,
    /// As UDP datagrams over IPv4: across routers.
    Udp,
    /// By AF_XDP sockets: any Ethernet segment, before the kernel makes anything of a frame. The card uses our memory itself, if it can.
    Xdp,
    /// The same, and frames are copied whatever the card can do.
    XdpCopy,
}

/// A name that is no [`Mode`]'s.
#[derive(Debug, thiserror::Error)]
#[error("no such link mode; there are: {}", Mode::ALL.map(Mode::name).join(", "))]
pub struct BadMode;

impl Mode {
    /// Every mode.
    pub const ALL: [Mode; 4] = [Mode::Packet, Mode::Udp, Mode::Xdp, Mode::XdpCopy];

    /// Its name for operators.
    pub const fn name(self) -> &'static str {
        match self {
            Mode::Packet => "packet",
            Mode::Udp => "udp",
            Mode::Xdp => "xdp",
            Mode::XdpCopy => "xdp-copy",
        }
    }

    /// What may have to be opened again when the interface has been away.
    pub const fn reopens(self, workers: u16) -> Reopens {
        match self {
            Mode::Packet if workers > 1 => Reopens::PacketSockets,
            Mode::Packet | Mode::Udp => Reopens::Nothing,
            Mode::Xdp | Mode::XdpCopy => Reopens::XdpSockets,
        }
    }
}

impl FromStr for Mode {
    type Err = BadMode;

    fn from_str(name: &str) -> Result<Mode, BadMode> {
        Mode::ALL.into_iter().find(|mode| mode.name() == name).ok_or(BadMode)
    }
}

/// Sockets that are opened anew when an interface has been away, and so what a process must still be allowed to do when it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reopens {
    /// None: they are bound again, or bound to no interface.
    Nothing,
    /// Packet sockets, whose fan-out group has to be made anew.
    PacketSockets,
    /// AF_XDP sockets, with memory that is not moved, and the attachment of their program.
    XdpSockets,
}

/// The link of one worker, of any kind.
#[derive(Debug)]
pub enum AnyLink {
    /// [`Mode::Packet`].
    Packet(PacketLink),
    /// [`Mode::Udp`].
    Udp(UdpLink),
    /// [`Mode::Xdp`] and [`Mode::XdpCopy`].
    Xdp(XdpLink),
}

/// What an operator says of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The interface.
    pub interface: String,
    /// How frames are carried there.
    pub mode: Mode,
    /// With [`Mode::Udp`], the machines that get what is for all.
    pub udp_peers: Vec<Ipv4Addr>,
    /// With [`Mode::Packet`] and one worker, a socket that was opened for us.
    pub fd: Option<RawFd>,
    /// Threads that share the link.
    pub workers: u16,
}

/// Settings that do not go together.
#[derive(Debug, thiserror::Error)]
pub enum BadSettings {
    /// The file names a mode that there is not.
    #[error("link-mode: {0}")]
    Mode(#[from] BadMode),
    /// Peers were given to a link that needs none.
    #[error("--udp-peer needs --link-mode udp: on a segment everybody is asked")]
    PeersUnused,
    /// A descriptor was given to a link of another kind.
    #[error("--link-fd needs --link-mode packet: it is a packet socket")]
    FdUnused,
    /// A descriptor that is one of the standard streams.
    #[error("link-fd is {0}: it must be 3 or more: 0 to 2 are standard input, output and error")]
    FdLow(RawFd),
    /// A descriptor for several workers: their sockets are a fan-out group, which has to be made anew when the interface has been away.
    #[error("--link-fd needs --workers 1: several workers open sockets of their own")]
    FdShared,
}

impl Settings {
    /// What an operator says by flags and in a file; a flag wins.
    ///
    /// # Errors
    /// [`BadSettings`].
    pub fn new(
        interface: String,
        mode: (Option<Mode>, Option<String>),
        (flagged, listed): (&[Ipv4Addr], Vec<Ipv4Addr>),
        fd: Option<RawFd>,
        workers: u16,
    ) -> Result<Settings, BadSettings> {
        let listed_mode = mode.1.map(|name| name.parse()).transpose()?;
        let mode = mode.0.or(listed_mode).unwrap_or_default();
        let udp_peers = if flagged.is_empty() { listed } else { flagged.to_vec() };
        if mode != Mode::Udp && !udp_peers.is_empty() {
            return Err(BadSettings::PeersUnused);
        }
        match fd {
            Some(_) if mode != Mode::Packet => return Err(BadSettings::FdUnused),
            Some(_) if workers != 1 => return Err(BadSettings::FdShared),
            Some(fd @ ..=2) => return Err(BadSettings::FdLow(fd)),
            Some(_) | None => {}
        }
        Ok(Settings { interface, mode, udp_peers, fd, workers })
    }

    /// What may have to be opened again when the interface has been away.
    pub const fn reopens(&self) -> Reopens {
        self.mode.reopens(self.workers)
    }
}

/// Opens the links of a process's workers. Returns the process number, which with a worker's index makes its
/// [`Steer`](cirro_protocol::types::Steer), and a link for each worker. The number is held while one of the links lives.
///
/// # Errors
/// [`OpenError`], in words for an operator.
///
/// # Panics
/// If there are no workers or more than [`packet::WORKERS_MAX`].
pub fn open(settings: &Settings, ethertype: u16) -> Result<(u16, Vec<AnyLink>), OpenError> {
    let Settings { interface, mode, udp_peers, fd, workers } = settings;
    match mode {
        Mode::Packet => {
            let given = fd.map(inherited::packet_socket).transpose();
            let failed = |cause| OpenError::kernel("the socket of --link-fd", interface, cause);
            let (process, links) = packet::open_on(interface, ethertype, *workers, given.map_err(failed)?)?;
            Ok((process, links.into_iter().map(AnyLink::Packet).collect()))
        }
        Mode::Udp => {
            let (process, links) = udp::open(interface, ethertype, *workers, udp_peers)?;
            Ok((process, links.into_iter().map(AnyLink::Udp).collect()))
        }
        Mode::Xdp | Mode::XdpCopy => {
            let (process, links) = xdp::open(interface, ethertype, *workers, *mode == Mode::XdpCopy)?;
            Ok((process, links.into_iter().map(AnyLink::Xdp).collect()))
        }
    }
}

/// Runs one expression on the link inside, whichever it is.
macro_rules! each {
    ($any:expr, $link:ident => $call:expr) => {
        match $any {
            AnyLink::Packet($link) => $call,
            AnyLink::Udp($link) => $call,
            AnyLink::Xdp($link) => $call,
        }
    };
}

impl AnyLink {
    /// Counters to read from other threads.
    pub fn drops(&self) -> Arc<Drops> {
        each!(self, link => link.drops())
    }
}

/// Readable when a frame has come. Another descriptor when the interface goes and comes back: ask for it before each wait.
impl AsFd for AnyLink {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        each!(self, link => link.as_fd())
    }
}

impl Link for AnyLink {
    #[inline]
    fn mtu(&self) -> usize {
        each!(self, link => link.mtu())
    }

    #[inline]
    fn address(&self) -> MacAddress {
        each!(self, link => link.address())
    }

    #[inline]
    fn receive(&mut self) -> Option<Received<'_>> {
        each!(self, link => link.receive())
    }

    #[inline]
    fn frame(&mut self) -> Option<&mut TxFrame> {
        each!(self, link => link.frame())
    }

    #[inline]
    fn commit(&mut self, id: FrameId) {
        each!(self, link => link.commit(id));
    }

    #[inline]
    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        each!(self, link => link.flush(refused));
    }

    #[inline]
    fn poll_timeout(&self) -> Option<Instant> {
        each!(self, link => link.poll_timeout())
    }

    #[inline]
    fn take_changed(&mut self) -> bool {
        each!(self, link => link.take_changed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_is_known_by_its_name_and_another_name_is_refused_with_the_list() {
        for mode in Mode::ALL {
            assert_eq!(mode.name().parse::<Mode>().unwrap(), mode);
        }
        assert_eq!("packet".parse::<Mode>().unwrap(), Mode::default());
        let error = "pigeon".parse::<Mode>().unwrap_err().to_string();
        assert!(error.starts_with("no such link mode; there are: packet, udp, xdp, xdp-copy"), "{error}");
    }

    #[test]
    fn a_flag_wins_over_the_file_and_peers_need_udp() {
        let peer = Ipv4Addr::new(192, 0, 2, 1);
        let new = |flag, file: Option<&str>, peers: &[Ipv4Addr]| {
            Settings::new("eth0".into(), (flag, file.map(str::to_owned)), (peers, Vec::new()), None, 2)
        };
        assert_eq!(new(None, None, &[]).unwrap().mode, Mode::Packet);
        assert_eq!(new(None, Some("udp"), &[peer]).unwrap().udp_peers, [peer]);
        assert_eq!(new(Some(Mode::Packet), Some("udp"), &[]).unwrap().mode, Mode::Packet);
        assert!(new(None, Some("pigeon"), &[]).unwrap_err().to_string().starts_with("link-mode: no such"));
        for mode in [Mode::Packet, Mode::Xdp] {
            assert!(new(Some(mode), None, &[peer]).unwrap_err().to_string().contains("--link-mode udp"));
        }
    }

    #[test]
    fn a_descriptor_is_for_one_worker_with_packet_sockets() {
        let new =
            |mode, fd, workers| Settings::new("eth0".into(), (Some(mode), None), (&[], vec![]), fd, workers);
        let refused = |mode, fd, workers| new(mode, Some(fd), workers).unwrap_err().to_string();
        assert_eq!(new(Mode::Packet, Some(3), 1).unwrap().fd, Some(3));
        assert!(refused(Mode::Packet, 3, 2).contains("--workers 1"));
        assert!(refused(Mode::Packet, 2, 1).contains("link-fd is 2: it must be 3 or more"));
        assert!(refused(Mode::Udp, 3, 1).contains("--link-mode packet"));
        assert!(refused(Mode::Xdp, 3, 1).contains("--link-mode packet"));
    }

    #[test]
    fn only_what_has_to_be_opened_again_is_kept_for() {
        let reopens = Mode::ALL.map(|mode| [mode.reopens(1), mode.reopens(2)]);
        let (nothing, packet, xdp) = (Reopens::Nothing, Reopens::PacketSockets, Reopens::XdpSockets);
        assert_eq!(reopens, [[nothing, packet], [nothing, nothing], [xdp, xdp], [xdp, xdp]]);
    }
}
