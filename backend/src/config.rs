//! The command line and the configuration file, made into a [`Config`] that cannot be wrong.
//!
//! Knows names, ranges and what goes with what; opens nothing. Called by `main`. A flag wins over the file.

use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use cirro_link::any::{BadSettings, Mode, Settings};
use cirro_link::packet::WORKERS_MAX;
use cirro_protocol::types::{BadPublicKey, MacAddress, PublicKey, VolumeName};
use clap::{ArgAction, Parser, ValueEnum};
use serde::Deserialize;

use crate::request::QUEUE_SIZE_MAX;
use crate::trouble::{BadOnTrouble, OnTrouble};

/// Queues a disk may offer: what a 64-bit mask of the front-end names.
pub const QUEUES_MAX: u16 = 64;
/// Queues offered unless told otherwise: QEMU takes one per vCPU and refuses a back-end that offers fewer.
pub const QUEUES_DEFAULT: u16 = 16;
/// Largest queue accepted unless told otherwise.
pub const QUEUE_SIZE_DEFAULT: u16 = 256;
/// Spinning before sleeping unless told otherwise, in µs: as good as ten times as much.
pub const POLL_US_DEFAULT: u32 = 20;
/// Most spinning, in µs: above this it is a busy loop, and a mistake.
pub const POLL_US_MAX: u32 = 1_000_000;
/// Where state is kept unless told otherwise.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/cirrostratus/backend";

/// Where the record of what is in flight is kept unless told otherwise: on tmpfs, where no store waits for a device.
pub const RUN_DIR_DEFAULT: &str = "/run/cirrostratus/backend";

/// What `--print-capabilities` says: QEMU's vhost-user back-end program conventions, block devices.
pub const CAPABILITIES: &str = "{\n  \"type\": \"block\",\n  \"features\": [\n    \"read-only\"\n  ]\n}";

/// A guest's disk over raw Ethernet: a vhost-user-blk device whose data lives on a storage node.
#[derive(Debug, Default, Parser)]
#[command(name = "cirro-backend", version, max_term_width = 120)]
pub struct Flags {
    /// Listen for the VMM on this unix socket.
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,
    /// Listen for the VMM on this file descriptor, a listening unix socket that was opened for us.
    #[arg(long, value_name = "N")]
    pub fd: Option<RawFd>,
    /// The mode of that socket, in octal: who may connect needs to write to it [default: as the umask says].
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    pub socket_mode: Option<u32>,
    /// The user who owns that socket: whom the VMM runs as.
    #[arg(long, value_name = "NAME")]
    pub socket_owner: Option<String>,
    /// The network interface that leads to the storage nodes.
    #[arg(long, value_name = "IF")]
    pub link: Option<String>,
    /// Use this file descriptor, a packet socket that was opened for us, instead of opening one (which needs CAP_NET_RAW).
    #[arg(long, value_name = "N")]
    pub link_fd: Option<RawFd>,
    /// How frames are carried [default: packet].
    #[arg(long, value_name = "packet|udp|xdp|xdp-copy")]
    pub link_mode: Option<Mode>,
    /// With --link-mode udp: the IPv4 address of a machine to ask who serves a volume. Can be given many times.
    #[arg(long = "udp-peer", value_name = "IPV4")]
    pub udp_peers: Vec<Ipv4Addr>,
    /// The volume behind the disk.
    #[arg(long, value_name = "NAME")]
    pub volume: Option<VolumeName>,
    /// The storage node's MAC address; without it the segment is asked who serves the volume.
    #[arg(long, value_name = "MAC")]
    pub node: Option<MacAddress>,
    /// Offer the disk for reading only.
    #[arg(long)]
    pub read_only: bool,
    /// Queues to offer (1 to 64) [default: 16].
    #[arg(long, value_name = "N")]
    pub queues: Option<u16>,
    /// Largest queue to accept (a power of two, 2 to 1024) [default: 256].
    #[arg(long, value_name = "N")]
    pub queue_size: Option<u16>,
    /// Read disks and settings from this TOML file; flags win over it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How frames are protected: keys, or none on a wire that you trust [default: keys].
    #[arg(long, value_name = "none|keys")]
    pub security: Option<Security>,
    /// The storage node's public key, which it logs when it starts.
    #[arg(long, value_name = "KEY")]
    pub node_key: Option<PublicKey>,
    /// The file of this machine's private key, made at the first start; its public key is logged [default: key in the state directory].
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// The file of a secret that is shared with the node, beside the keys (cirroctl key psk makes one).
    #[arg(long, value_name = "FILE")]
    pub psk: Option<PathBuf>,
    /// Worker threads; disks are dealt out to them in turn [default: 1].
    #[arg(long, value_name = "N")]
    pub workers: Option<u16>,
    /// Spin so long before sleeping, in microseconds [default: 20].
    #[arg(long, value_name = "N")]
    pub poll_us: Option<u32>,
    /// Take the volume from the attachment that holds it, once.
    #[arg(long)]
    pub take_over: bool,
    /// While a volume is not open: let requests wait, or let them fail after TIME (eio-after=30s) [default: wait].
    #[arg(long, value_name = "wait|eio-after=TIME")]
    pub on_trouble: Option<OnTrouble>,
    /// Keep each disk's identity here [default: /var/lib/cirrostratus/backend].
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Keep what outlives the process, but not the machine, here [default: /run/cirrostratus/backend].
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Serve cirroctl on this unix socket.
    #[arg(long, value_name = "PATH")]
    pub ctl_socket: Option<PathBuf>,
    /// Print what this back-end can do, as JSON, and exit.
    #[arg(long)]
    pub print_capabilities: bool,
    /// Become this user when everything is open, without any capability (with several workers CAP_NET_RAW is kept). The state directory is given
    /// to it.
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// Log more (-vv: still more).
    #[arg(short, action = ArgAction::Count)]
    pub verbose: u8,
}

/// How frames are protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Security {
    /// Checksums only: for a wire that is trusted.
    None,
    /// By keys.
    Keys,
}

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    link: Option<String>,
    link_fd: Option<RawFd>,
    link_mode: Option<String>,
    #[serde(default)]
    udp_peers: Vec<Ipv4Addr>,
    security: Option<Security>,
    socket_mode: Option<String>,
    socket_owner: Option<String>,
    key: Option<PathBuf>,
    node_key: Option<String>,
    psk: Option<PathBuf>,
    user: Option<String>,
    workers: Option<u16>,
    poll_us: Option<u32>,
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    ctl_socket: Option<PathBuf>,
    #[serde(default, rename = "disk")]
    disks: Vec<FileDisk>,
}

/// A `[[disk]]` of it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct FileDisk {
    volume: Option<String>,
    socket_path: Option<PathBuf>,
    fd: Option<RawFd>,
    node: Option<String>,
    node_key: Option<String>,
    psk: Option<PathBuf>,
    #[serde(default)]
    read_only: bool,
    queues: Option<u16>,
    queue_size: Option<u16>,
    on_trouble: Option<String>,
    #[serde(default)]
    take_over: bool,
}

/// What the process is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The interface.
    pub link: Settings,
    /// Mode and owner of the sockets that are made.
    pub socket_mode: Option<u32>,
    /// See `socket_mode`.
    pub socket_owner: Option<String>,
    /// Who to become.
    pub user: Option<String>,
    /// Spinning in µs.
    pub poll_us: u32,
    /// The file of our private key; `None`: security is none.
    pub key: Option<PathBuf>,
    /// Where state is kept.
    pub state_dir: PathBuf,
    /// Where the record of what is in flight is kept.
    pub run_dir: PathBuf,
    /// Where cirroctl finds us.
    pub ctl_socket: Option<PathBuf>,
    /// The disks, at least one.
    pub disks: Vec<DiskEntry>,
}

/// One disk of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskEntry {
    /// Its volume.
    pub volume: VolumeName,
    /// Where the VMM connects.
    pub socket: Socket,
    /// Its node, if known.
    pub node: Option<MacAddress>,
    /// With keys: the node's, and the file of the secret shared with it.
    pub node_key: Option<NodeKey>,
    /// Reading only.
    pub read_only: bool,
    /// Queues offered.
    pub queues: u16,
    /// Largest queue accepted.
    pub queue_size: u16,
    /// What happens to requests while the volume is not open.
    pub on_trouble: OnTrouble,
    /// Take the volume over.
    pub take_over: bool,
}

/// By which key a node is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeKey {
    /// Its public key.
    pub public: PublicKey,
    /// The file of a secret that is shared with it.
    pub psk: Option<PathBuf>,
}

/// Where a VMM connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    /// A path to listen on.
    Path(PathBuf),
    /// A descriptor that listens already.
    Fd(RawFd),
}

impl std::fmt::Display for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Socket::Path(path) => write!(f, "{}", path.display()),
            Socket::Fd(fd) => write!(f, "fd {fd}"),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag or setting is missing.
    #[error("{0} is missing: give it as a flag or in the file of --config")]
    Missing(&'static str),
    /// A value out of range.
    #[error("{name} is {value}: it must be {allowed}")]
    Range {
        /// The setting.
        name: &'static str,
        /// What it was.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// The link's settings do not go together.
    #[error(transparent)]
    Link(#[from] BadSettings),
    /// A key where there are none.
    #[error("{0} needs --security keys: leave one of the two out")]
    NoKeys(&'static str),
    /// The node cannot be known.
    #[error(
        "disk {disk} ({volume}): the node's public key is missing: give it with --node-key KEY (cirro-node logs it when it starts), or say --security none on a wire that you trust"
    )]
    NoNodeKey {
        /// Which disk, from 1.
        disk: usize,
        /// Its volume.
        volume: VolumeName,
    },
    /// The file is no TOML, or has settings that do not exist.
    #[error("cannot understand {path}: {cause}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        cause: Box<toml::de::Error>,
    },
    /// A name or address in the file.
    #[error("disk {disk}: {name}: {reason}")]
    Value {
        /// Which disk, from 1.
        disk: usize,
        /// Which setting.
        name: &'static str,
        /// What is wrong.
        reason: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A setting of the process in the file.
    #[error("{name}: {reason}")]
    Setting {
        /// Which.
        name: &'static str,
        /// What is wrong.
        reason: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A disk with no or two sockets.
    #[error("disk {disk} ({volume}): give either socket-path or fd")]
    OneSocket {
        /// Which disk, from 1.
        disk: usize,
        /// Its volume.
        volume: VolumeName,
    },
    /// A flag for one disk beside a file of several.
    #[error(
        "{flag} can name one disk only, and the file of --config has {disks}: change the file, or leave the flag out"
    )]
    SeveralDisks {
        /// The flag.
        flag: &'static str,
        /// Disks in the file.
        disks: usize,
    },
    /// Two disks that collide.
    #[error("two disks share {what} {value}: give each its own")]
    Shared {
        /// What they share.
        what: &'static str,
        /// Its value.
        value: String,
    },
}

impl Config {
    /// Puts flags and file together. `file` is the path and text of `--config`.
    ///
    /// # Errors
    /// The first thing that is missing or wrong.
    pub fn new(flags: &Flags, file: Option<(&Path, &str)>) -> Result<Config, Error> {
        let file = match file {
            None => File::default(),
            Some((path, text)) => toml::from_str(text)
                .map_err(|cause| Error::Syntax { path: path.to_owned(), cause: Box::new(cause) })?,
        };
        let by_key = flags.security.or(file.security).unwrap_or(Security::Keys) == Security::Keys;
        let keys = Keys::new(&file)?;
        let key = flags.key.clone().or(file.key);
        let disks = disks(flags, file.disks, &keys)?;
        for (index, disk) in disks.iter().enumerate() {
            for other in &disks[..index] {
                if other.socket == disk.socket {
                    return Err(Error::Shared { what: "the socket", value: disk.socket.to_string() });
                }
                if other.volume == disk.volume {
                    return Err(Error::Shared { what: "the volume", value: disk.volume.to_string() });
                }
            }
        }
        let link = flags.link.clone().or(file.link).ok_or(Error::Missing("--link IF"))?;
        let mode = (flags.link_mode, file.link_mode);
        let workers = flags.workers.or(file.workers).unwrap_or(1);
        in_range("workers", workers.into(), 1..=WORKERS_MAX.into(), "1 to 256")?;
        let link = Settings::new(
            link,
            mode,
            (&flags.udp_peers, file.udp_peers),
            flags.link_fd.or(file.link_fd),
            workers,
        )?;
        if let Some(fd) = link.fd.filter(|fd| disks.iter().any(|disk| disk.socket == Socket::Fd(*fd))) {
            let reason = format!("{fd} is the socket of a disk, too: give each its own").into();
            return Err(Error::Setting { name: "link-fd", reason });
        }
        if link.mode == Mode::Udp && link.udp_peers.is_empty() && disks.iter().any(|disk| disk.node.is_none())
        {
            return Err(Error::Missing("--udp-peer IPV4 (the storage machine's)"));
        }
        let poll_us = flags.poll_us.or(file.poll_us).unwrap_or(POLL_US_DEFAULT);
        in_range("poll-us", poll_us.into(), 0..=POLL_US_MAX.into(), "at most 1000000")?;
        check_keys(by_key, key.is_some(), &disks)?;
        let listed_mode = file.socket_mode.as_deref().map(parse_mode).transpose();
        let listed_mode =
            listed_mode.map_err(|reason| Error::Setting { name: "socket-mode", reason: reason.into() })?;
        let state_dir =
            flags.state_dir.clone().or(file.state_dir).unwrap_or_else(|| STATE_DIR_DEFAULT.into());
        Ok(Config {
            link,
            poll_us,
            user: flags.user.clone().or(file.user),
            socket_mode: flags.socket_mode.or(listed_mode),
            socket_owner: flags.socket_owner.clone().or(file.socket_owner),
            key: by_key.then(|| key.unwrap_or_else(|| state_dir.join("key"))),
            state_dir,
            run_dir: flags.run_dir.clone().or(file.run_dir).unwrap_or_else(|| RUN_DIR_DEFAULT.into()),
            ctl_socket: flags.ctl_socket.clone().or(file.ctl_socket),
            disks,
        })
    }
}

/// What the file says for all disks.
struct Keys {
    node_key: Option<PublicKey>,
    psk: Option<PathBuf>,
}

impl Keys {
    fn new(file: &File) -> Result<Keys, Error> {
        let of_file = parse_node_key(file.node_key.as_deref());
        let of_file = of_file.map_err(|e| Error::Setting { name: "node-key", reason: e.into() })?;
        Ok(Keys { node_key: of_file, psk: file.psk.clone() })
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| format!("not a mode: {text:?}; give it in octal, as in 0660"))
}

fn parse_node_key(text: Option<&str>) -> Result<Option<PublicKey>, BadPublicKey> {
    text.map(str::parse).transpose()
}

fn check_keys(by_key: bool, key: bool, disks: &[DiskEntry]) -> Result<(), Error> {
    if !by_key && key {
        return Err(Error::NoKeys("--key"));
    }
    for (index, disk) in disks.iter().enumerate() {
        match (by_key, disk.node_key.is_some()) {
            (true, false) => return Err(Error::NoNodeKey { disk: index + 1, volume: disk.volume }),
            (false, true) => return Err(Error::NoKeys("--node-key")),
            (true, true) | (false, false) => {}
        }
    }
    Ok(())
}

/// The file's disks, changed by the flags; the flags' disk when the file has none.
fn disks(flags: &Flags, mut listed: Vec<FileDisk>, keys: &Keys) -> Result<Vec<DiskEntry>, Error> {
    let count = listed.len();
    let single = [
        ("--volume", flags.volume.is_some()),
        ("--socket-path", flags.socket_path.is_some()),
        ("--fd", flags.fd.is_some()),
        ("--node", flags.node.is_some()),
    ];
    match single.into_iter().find(|(_, given)| *given) {
        Some((flag, _)) if count > 1 => return Err(Error::SeveralDisks { flag, disks: count }),
        Some(_) | None => {}
    }
    if count == 0 {
        listed.push(FileDisk::default());
    }
    listed.into_iter().enumerate().map(|(index, disk)| entry(flags, keys, index + 1, disk)).collect()
}

fn entry(flags: &Flags, keys: &Keys, number: usize, listed: FileDisk) -> Result<DiskEntry, Error> {
    let value = |name| move |reason| Error::Value { disk: number, name, reason };
    let listed_volume = listed.volume.map(|name| name.parse()).transpose();
    let listed_volume =
        listed_volume.map_err(|e: cirro_protocol::types::BadVolumeName| value("volume")(e.into()))?;
    let listed_node = listed.node.map(|mac| mac.parse()).transpose();
    let listed_node =
        listed_node.map_err(|e: cirro_protocol::types::BadMacAddress| value("node")(e.into()))?;
    let on_trouble = listed.on_trouble.map(|policy| policy.parse()).transpose();
    let on_trouble = on_trouble.map_err(|e: BadOnTrouble| value("on-trouble")(e.into()))?;
    let listed_key = parse_node_key(listed.node_key.as_deref()).map_err(|e| value("node-key")(e.into()))?;
    let node_key = flags.node_key.or(listed_key).or(keys.node_key);
    let psk = flags.psk.clone().or(listed.psk).or(keys.psk.clone());
    if node_key.is_none() && psk.is_some() {
        return Err(Error::Missing("--node-key KEY (there is a --psk)"));
    }
    let volume = flags.volume.or(listed_volume).ok_or(Error::Missing("--volume NAME"))?;
    let socket = match (&flags.socket_path, flags.fd) {
        (Some(path), _) => Some(Socket::Path(path.clone())),
        (None, Some(fd)) => Some(Socket::Fd(fd)),
        (None, None) => match (listed.socket_path, listed.fd) {
            (Some(path), None) => Some(Socket::Path(path)),
            (None, Some(fd)) => Some(Socket::Fd(fd)),
            (Some(_), Some(_)) => return Err(Error::OneSocket { disk: number, volume }),
            (None, None) => None,
        },
    };
    let queues = flags.queues.or(listed.queues).unwrap_or(QUEUES_DEFAULT);
    let queue_size = flags.queue_size.or(listed.queue_size).unwrap_or(QUEUE_SIZE_DEFAULT);
    in_range("queues", queues.into(), 1..=QUEUES_MAX.into(), "1 to 64")?;
    if !queue_size.is_power_of_two() || !(2..=QUEUE_SIZE_MAX).contains(&queue_size) {
        return Err(range("queue-size", queue_size.into(), "a power of two from 2 to 1024"));
    }
    if let Some(Socket::Fd(fd)) = socket {
        in_range(
            "fd",
            fd.max(0) as u64,
            3..=u64::from(u32::MAX >> 1),
            "3 or more: 0 to 2 are standard input, output and error",
        )?;
    }
    Ok(DiskEntry {
        volume,
        socket: socket.ok_or(Error::Missing("--socket-path PATH (or --fd N)"))?,
        node: flags.node.or(listed_node),
        node_key: node_key.map(|public| NodeKey { public, psk }),
        read_only: flags.read_only || listed.read_only,
        queues,
        queue_size,
        on_trouble: flags.on_trouble.or(on_trouble).unwrap_or_default(),
        take_over: flags.take_over || listed.take_over,
    })
}

fn in_range(
    name: &'static str,
    value: u64,
    range_allowed: std::ops::RangeInclusive<u64>,
    allowed: &'static str,
) -> Result<(), Error> {
    if range_allowed.contains(&value) { Ok(()) } else { Err(range(name, value, allowed)) }
}

fn range(name: &'static str, value: u64, allowed: &'static str) -> Error {
    Error::Range { name, value, allowed }
}

#[cfg(test)]
mod tests;
