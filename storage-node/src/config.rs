//! The command line and the configuration file, made into a [`Config`] that cannot be wrong.
//!
//! Knows names, ranges and what goes with what; opens nothing. Called by `main`. A flag wins over the file; volumes of both are served, and
//! a volume named on the command line hides one of the same name in the file.

use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use cirro_link::any::{BadSettings, Mode, Settings};
use cirro_link::packet::WORKERS_MAX;
use cirro_protocol::types::{PublicKey, REQUEST_BYTES_MAX, VolumeName};
use clap::{ArgAction, Parser, ValueEnum};
use serde::Deserialize;

use crate::access::{Client, Grant};
use crate::node::{READ_POOL_BYTES_DEFAULT, WRITE_POOL_BYTES_DEFAULT};
use crate::store::FILES_MAX;
use crate::volume::{BadVolumeSpec, Durability, IoMode, VolumeSpec};

/// Spinning before sleeping unless told otherwise, in µs: as good as ten times as much.
pub const POLL_US_DEFAULT: u32 = 20;
/// Most spinning, in µs: above this it is a busy loop, and a mistake.
pub const POLL_US_MAX: u32 = 1_000_000;
/// Where state is kept unless told otherwise.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/cirrostratus/node";
/// Where cirroctl is served unless told otherwise.
pub const CTL_SOCKET_DEFAULT: &str = "/run/cirrostratus/node.sock";
/// Largest pool of a worker, in MiB: 64 GiB, above which a typing mistake is likelier than a plan.
const POOL_MIB_MAX: u32 = 64 << 10;

/// A storage node: serves raw files and block devices as volumes over raw Ethernet.
#[derive(Debug, Default, Parser)]
#[command(name = "cirro-node", version, max_term_width = 120)]
pub struct Flags {
    /// The network interface that leads to the backends.
    #[arg(long, value_name = "IF")]
    pub link: Option<String>,
    /// Use this file descriptor, a packet socket that was opened for us, instead of opening one (which needs CAP_NET_RAW).
    #[arg(long, value_name = "N")]
    pub link_fd: Option<RawFd>,
    /// How frames are carried [default: packet].
    #[arg(long, value_name = "packet|udp|xdp|xdp-copy")]
    pub link_mode: Option<Mode>,
    /// With --link-mode udp: the IPv4 address of a machine to tell when this node has started. Can be given many times.
    #[arg(long = "udp-peer", value_name = "IPV4")]
    pub udp_peers: Vec<Ipv4Addr>,
    /// Serve a volume: NAME=PATH[,ro][,serial=S][,io=direct|buffered][,durability=write-through|write-back]; or NAME=ram:SIZE[,serial=S],
    /// which is memory that ends with the node, for scratch disks (SIZE as in 512M or 4G). Can be given many times.
    #[arg(long = "volume", value_name = "NAME=PATH[,OPTION]...")]
    pub volumes: Vec<VolumeSpec>,
    /// Read volumes and settings from this TOML file; flags win over it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How frames are protected: keys, or none on a wire that you trust [default: keys].
    #[arg(long, value_name = "none|keys")]
    pub security: Option<Security>,
    /// The file of the node's private key, made at the first start; its public key is logged [default: key in the state directory].
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Let a client use a volume: the client's public key, or with --security none its MAC address; rw unless said. Can be given many
    /// times. With --security none a volume that is granted to nobody is open to all.
    #[arg(long = "grant", value_name = "VOLUME=CLIENT[:ro|rw]")]
    pub grants: Vec<Grant>,
    /// A secret that is shared with a client, beside the keys (cirroctl key psk makes one). Can be given many times.
    #[arg(long = "psk", value_name = "CLIENT=FILE")]
    pub psks: Vec<PskFile>,
    /// Keep owners of volumes and the node's identity here [default: /var/lib/cirrostratus/node].
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Serve cirroctl on this unix socket [default: /run/cirrostratus/node.sock].
    #[arg(long, value_name = "PATH")]
    pub ctl_socket: Option<PathBuf>,
    /// Worker threads; volumes are dealt out to them in turn [default: 1].
    #[arg(long, value_name = "N")]
    pub workers: Option<u16>,
    /// Spin so long before sleeping, in microseconds [default: 20].
    #[arg(long, value_name = "N")]
    pub poll_us: Option<u32>,
    /// Memory per worker for the data of writes, in MiB, used as needed: 1 MiB at least for each session [default: 256].
    #[arg(long, value_name = "N")]
    pub write_pool_mib: Option<u32>,
    /// Memory per worker for the data of reads, in MiB, used as needed [default: 128].
    #[arg(long, value_name = "N")]
    pub read_pool_mib: Option<u32>,
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

/// The file of a secret that is shared with a client: `CLIENT=FILE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PskFile {
    /// The client's public key.
    pub client: PublicKey,
    /// The file.
    pub path: PathBuf,
}

/// Not of the form `CLIENT=FILE`.
#[derive(Debug, thiserror::Error)]
#[error(
    "not of the form CLIENT=FILE, with the client's public key (64 hexadecimal digits) and the secret's file"
)]
pub struct BadPskFile;

impl FromStr for PskFile {
    type Err = BadPskFile;

    fn from_str(text: &str) -> Result<PskFile, BadPskFile> {
        let (client, path) = text.split_once('=').filter(|(_, path)| !path.is_empty()).ok_or(BadPskFile)?;
        Ok(PskFile { client: client.parse().map_err(|_| BadPskFile)?, path: path.into() })
    }
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
    key: Option<PathBuf>,
    #[serde(default)]
    grants: Vec<String>,
    #[serde(default)]
    psks: Vec<String>,
    state_dir: Option<PathBuf>,
    ctl_socket: Option<PathBuf>,
    user: Option<String>,
    workers: Option<u16>,
    poll_us: Option<u32>,
    write_pool_mib: Option<u32>,
    read_pool_mib: Option<u32>,
    #[serde(default, rename = "volume")]
    volumes: Vec<FileVolume>,
}

/// A `[[volume]]` of it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct FileVolume {
    name: String,
    path: PathBuf,
    #[serde(default)]
    read_only: bool,
    serial: Option<String>,
    io: Option<IoMode>,
    #[serde(default)]
    durability: Durability,
}

/// What the process is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The interface.
    pub link: Settings,
    /// At least one, each name once.
    pub volumes: Vec<VolumeSpec>,
    /// The file of the node's private key; `None`: security is none.
    pub key: Option<PathBuf>,
    /// Who may use what.
    pub grants: Vec<Grant>,
    /// Secrets shared with clients.
    pub psks: Vec<PskFile>,
    /// Where owners and identity are kept.
    pub state_dir: PathBuf,
    /// Where cirroctl is served.
    pub ctl_socket: PathBuf,
    /// Who to become.
    pub user: Option<String>,
    /// Spinning in µs.
    pub poll_us: u32,
    /// Write pool per worker.
    pub write_pool_bytes: usize,
    /// Read pool per worker.
    pub read_pool_bytes: usize,
}

/// Why there is no [`Config`].
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not TOML, or has something that is not known.
    #[error("{}: {message}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the parser says, on one line.
        message: Box<str>,
    },
    /// A volume in the file is wrong.
    #[error("{}: volume {name:?}: {error}", .path.display())]
    Volume {
        /// The file.
        path: PathBuf,
        /// As it is written there.
        name: Box<str>,
        /// What is wrong.
        error: BadVolumeSpec,
    },
    /// No interface.
    #[error("no link: name the network interface with --link IF (or link = \"IF\" in the file)")]
    NoLink,
    /// No volumes.
    #[error("no volume: name at least one with --volume NAME=PATH (or [[volume]] in the file)")]
    NoVolume,
    /// One name twice.
    #[error("volume {name} is named twice; a name is one volume")]
    TwiceNamed {
        /// The name.
        name: VolumeName,
    },
    /// More volumes than a process serves.
    #[error("{count} volumes, but a node serves at most {FILES_MAX}")]
    TooMany {
        /// How many.
        count: usize,
    },
    /// The link's settings do not go together.
    #[error(transparent)]
    Link(#[from] BadSettings),
    /// A grant or a secret in the file is wrong.
    #[error("{}: {text:?}: {reason}", .path.display())]
    Grant {
        /// The file.
        path: PathBuf,
        /// As it is written there.
        text: Box<str>,
        /// What is wrong.
        reason: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A grant to a client that cannot be told apart in this mode.
    #[error("--grant {grant}: with --security {security} a client is named by its {named}")]
    WrongClient {
        /// The grant.
        grant: Box<str>,
        /// The mode.
        security: &'static str,
        /// By what.
        named: &'static str,
    },
    /// A grant of a volume that is not served.
    #[error("a grant names volume {volume}, which is not served here: correct the name, or add the volume")]
    GrantOfNothing {
        /// The volume.
        volume: VolumeName,
    },
    /// A key where there are none.
    #[error("{0} needs --security keys: leave one of the two out")]
    NoKeys(&'static str),
    /// A number outside its range.
    #[error("{option} is {value}, but must be from {min} to {max}")]
    Range {
        /// Which.
        option: &'static str,
        /// What it is.
        value: u64,
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
}

impl Config {
    /// Puts flags and file (its path and text) together.
    ///
    /// # Errors
    /// [`ConfigError`], in words for an operator.
    pub fn new(flags: &Flags, file: Option<(&Path, &str)>) -> Result<Config, ConfigError> {
        let (parsed, path) = match file {
            None => (File::default(), Path::new("")),
            Some((path, text)) => (parse_file(path, text)?, path),
        };
        let security = flags.security.or(parsed.security).unwrap_or(Security::Keys);
        let grants = join_parsed(&flags.grants, &parsed.grants, path)?;
        let psks = join_parsed(&flags.psks, &parsed.psks, path)?;
        let key = flags.key.clone().or(parsed.key);
        check_keys(security, key.is_some(), &grants, &psks)?;
        let volumes = join_volumes(&flags.volumes, parsed.volumes, path)?;
        let state_dir = flags.state_dir.clone().or(parsed.state_dir).unwrap_or(STATE_DIR_DEFAULT.into());
        let unserved = grants.iter().find(|grant| volumes.iter().all(|volume| volume.name != grant.volume));
        if let Some(grant) = unserved {
            return Err(ConfigError::GrantOfNothing { volume: grant.volume });
        }
        let link = flags.link.clone().or(parsed.link).filter(|link| !link.is_empty());
        let workers = flags.workers.or(parsed.workers).unwrap_or(1);
        let poll_us = flags.poll_us.or(parsed.poll_us).unwrap_or(POLL_US_DEFAULT);
        let write_mib = flags.write_pool_mib.or(parsed.write_pool_mib);
        let read_mib = flags.read_pool_mib.or(parsed.read_pool_mib);
        in_range("workers", workers.into(), 1, WORKERS_MAX.into())?;
        in_range("poll-us", poll_us.into(), 0, POLL_US_MAX.into())?;
        Ok(Config {
            link: Settings::new(
                link.ok_or(ConfigError::NoLink)?,
                (flags.link_mode, parsed.link_mode),
                (&flags.udp_peers, parsed.udp_peers),
                flags.link_fd.or(parsed.link_fd),
                workers,
            )?,
            volumes,
            key: (security == Security::Keys).then(|| key.unwrap_or_else(|| state_dir.join("key"))),
            grants,
            psks,
            state_dir,
            ctl_socket: flags.ctl_socket.clone().or(parsed.ctl_socket).unwrap_or(CTL_SOCKET_DEFAULT.into()),
            user: flags.user.clone().or(parsed.user),
            poll_us,
            write_pool_bytes: pool_bytes("write-pool-mib", write_mib, WRITE_POOL_BYTES_DEFAULT)?,
            read_pool_bytes: pool_bytes("read-pool-mib", read_mib, READ_POOL_BYTES_DEFAULT)?,
        })
    }
}

/// What the flags say, then what the file says.
fn join_parsed<T>(flags: &[T], file: &[String], path: &Path) -> Result<Vec<T>, ConfigError>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static> + Clone,
{
    let of_file = file.iter().map(|text| {
        text.parse().map_err(|error: T::Err| ConfigError::Grant {
            path: path.to_owned(),
            text: text.as_str().into(),
            reason: error.into(),
        })
    });
    // What is said last counts, so flags come last.
    let of_file = of_file.collect::<Result<Vec<T>, _>>()?;
    Ok(of_file.into_iter().chain(flags.iter().cloned()).collect())
}

fn check_keys(security: Security, key: bool, grants: &[Grant], psks: &[PskFile]) -> Result<(), ConfigError> {
    let by_key = security == Security::Keys;
    if !by_key && key {
        return Err(ConfigError::NoKeys("--key"));
    }
    if !by_key && !psks.is_empty() {
        return Err(ConfigError::NoKeys("--psk"));
    }
    let wrong = grants.iter().find(|grant| matches!(grant.client, Client::Key(_)) != by_key);
    wrong.map_or(Ok(()), |grant| {
        let (security, named) = if by_key {
            ("keys", "public key, which `cirroctl key show` prints")
        } else {
            ("none", "MAC address")
        };
        let grant = format!("{}={}", grant.volume, grant.client).into();
        Err(ConfigError::WrongClient { grant, security, named })
    })
}

fn in_range(option: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    let fits = (min..=max).contains(&value);
    if fits { Ok(()) } else { Err(ConfigError::Range { option, value, min, max }) }
}

fn pool_bytes(option: &'static str, mib: Option<u32>, default: usize) -> Result<usize, ConfigError> {
    let Some(mib) = mib else { return Ok(default) };
    // Four of the largest requests, so that one session's share is at least one of them.
    in_range(option, mib.into(), 4, POOL_MIB_MAX.into())?;
    Ok(mib as usize * REQUEST_BYTES_MAX)
}

fn parse_file(path: &Path, text: &str) -> Result<File, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| 1 + text[..span.start].matches('\n').count());
        let place = line.map_or(String::new(), |line| format!("line {line}: "));
        let message = format!("{place}{}", error.message().replace('\n', " ")).into();
        ConfigError::File { path: path.to_owned(), message }
    })
}

fn join_volumes(
    flags: &[VolumeSpec],
    file: Vec<FileVolume>,
    path: &Path,
) -> Result<Vec<VolumeSpec>, ConfigError> {
    let mut volumes = flags.to_vec();
    let of_file = file.into_iter().map(|entry| {
        let name = entry.name.clone().into_boxed_str();
        spec_of(entry).map_err(|error| ConfigError::Volume { path: path.to_owned(), name, error })
    });
    let of_file = of_file.collect::<Result<Vec<_>, _>>()?;
    refuse_twice(&volumes)?;
    refuse_twice(&of_file)?;
    volumes.extend(of_file.into_iter().filter(|spec| flags.iter().all(|flag| flag.name != spec.name)));
    match volumes.len() {
        0 => Err(ConfigError::NoVolume),
        1..=FILES_MAX => Ok(volumes),
        count => Err(ConfigError::TooMany { count }),
    }
}

fn refuse_twice(volumes: &[VolumeSpec]) -> Result<(), ConfigError> {
    let twice = volumes
        .iter()
        .enumerate()
        .find(|(index, spec)| volumes[..*index].iter().any(|v| v.name == spec.name));
    twice.map_or(Ok(()), |(_, spec)| Err(ConfigError::TwiceNamed { name: spec.name }))
}

fn spec_of(entry: FileVolume) -> Result<VolumeSpec, BadVolumeSpec> {
    if entry.path.as_os_str().is_empty() {
        return Err(BadVolumeSpec::Path);
    }
    let spec = VolumeSpec {
        name: entry.name.parse()?,
        path: entry.path,
        read_only: entry.read_only,
        serial: entry.serial.map(|serial| serial.parse()).transpose()?,
        io: entry.io,
        durability: entry.durability,
    };
    spec.check()?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(arguments: &[&str]) -> Flags {
        Flags::try_parse_from(std::iter::once(&"cirro-node").chain(arguments)).expect("legal flags")
    }

    fn refused(arguments: &[&str], file: &str) -> String {
        Config::new(&flags(arguments), Some((Path::new("n.toml"), file))).unwrap_err().to_string()
    }

    #[test]
    fn the_stable_command_line_is_understood() {
        let flags = flags(&[
            "--link",
            "eth1",
            "--volume",
            "a=/srv/a.img",
            "--volume",
            "b=/dev/sdb,ro,serial=S-1,io=buffered,durability=write-through",
            "--security",
            "none",
            "--state-dir",
            "/tmp/s",
            "--ctl-socket",
            "/tmp/c",
        ]);
        let config = Config::new(&flags, None).unwrap();
        assert_eq!((config.link.interface.as_str(), config.link.workers, config.poll_us), ("eth1", 1, 20));
        assert_eq!((config.state_dir, config.ctl_socket), ("/tmp/s".into(), "/tmp/c".into()));
        let [a, b] = &config.volumes[..] else { panic!("two volumes") };
        assert_eq!((a.name.as_str(), a.path.as_path()), ("a", Path::new("/srv/a.img")));
        assert_eq!((a.read_only, a.io, a.durability), (false, None, Durability::WriteBack));
        assert_eq!(
            (b.read_only, b.io, b.durability),
            (true, Some(IoMode::Buffered), Durability::WriteThrough)
        );
        assert_eq!(&b.serial.unwrap().0, b"S-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let file = "link = \"eth0\"\nworkers = 3\npoll-us = 0\nwrite-pool-mib = 8\n[[volume]]\nname = \"a\"\npath = \"/of/file\"\n\
                    read-only = true\n[[volume]]\nname = \"b\"\npath = \"/b,c\"\nio = \"direct\"\ndurability = \"write-through\"\n";
        let flags = flags(&["--link", "eth9", "--volume", "a=/of/flag"]);
        let config = Config::new(&flags, Some((Path::new("n.toml"), file))).unwrap();
        assert_eq!((config.link.interface.as_str(), config.link.workers, config.poll_us), ("eth9", 3, 0));
        assert_eq!((config.write_pool_bytes, config.read_pool_bytes), (8 << 20, 128 << 20));
        let paths: Vec<_> = config.volumes.iter().map(|v| v.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/of/flag", "/b,c"]);
        assert!(!config.volumes[0].read_only);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        assert!(refused(&[], "link = \"e\"").contains("--volume NAME=PATH"));
        assert!(refused(&["--volume", "a=/a"], "").contains("--link IF"));
        assert!(
            refused(&["--link", "e", "--volume", "a=/a", "--volume", "a=/b"], "")
                .contains("a is named twice")
        );
        assert!(refused(&["--link", "e", "--volume", "a=/a", "--workers", "0"], "").contains("workers is 0"));
        assert!(
            refused(&["--link", "e", "--volume", "a=/a", "--read-pool-mib", "1"], "").contains("from 4 to")
        );
        assert!(refused(&[], "x = 1").starts_with("n.toml: line 1: unknown field `x`"));
        assert!(
            refused(&[], "\n[[volume]]\nname = \"../x\"\npath = \"/p\"")
                .contains("volume \"../x\": not a volume name")
        );
        for bad in ["a", "=p", "a=", "a=/p,rw", "a=/p,serial=123456789012345678901", "a=/p,io=fast", "-a=/p"]
        {
            let parsed = Flags::try_parse_from(["cirro-node", "--volume", bad]);
            assert_eq!(parsed.expect_err(bad).exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn keys_are_the_default_and_clients_are_named_as_the_mode_says() {
        let (key, mac) = ("5".repeat(64), "02:00:00:00:00:07");
        let grant = format!("a={key}:ro");
        let psk = format!("{key}=/p");
        let by_key = flags(&["--link", "e", "--volume", "a=/a", "--grant", &grant, "--psk", &psk]);
        let config = Config::new(&by_key, None).unwrap();
        assert_eq!(config.key, Some(Path::new(STATE_DIR_DEFAULT).join("key")));
        assert_eq!((config.grants[0].right.name(), config.psks[0].path.as_path()), ("ro", Path::new("/p")));
        let file = format!("grants = [\"a={key}\", \"a={key}:ro\"]\npsks = [\"{key}=/p\"]\nkey = \"/k\"");
        let of_file = flags(&["--link", "e", "--volume", "a=/a", "--grant", &grant]);
        let config = Config::new(&of_file, Some((Path::new("n.toml"), &file))).unwrap();
        let rights: Vec<_> = config.grants.iter().map(|grant| grant.right.name()).collect();
        // The flag comes last, and the right that is said last counts.
        assert_eq!((config.key, rights), (Some("/k".into()), vec!["rw", "ro", "ro"]));

        let base = ["--link", "e", "--volume", "a=/a"];
        let with = |more: &[&str]| refused(&[&base, more].concat(), "");
        assert!(with(&["--grant", &format!("a={mac}")]).contains("named by its public key"));
        assert!(with(&["--security", "none", "--grant", &grant]).contains("named by its MAC address"));
        assert!(with(&["--grant", &format!("b={key}")]).contains("names volume b, which is not served"));
        assert!(with(&["--security", "none", "--key", "/k"]).contains("--key needs --security keys"));
        assert!(with(&["--security", "none", "--psk", &psk]).contains("--psk needs --security keys"));
        assert!(refused(&base, "grants = [\"a\"]").contains("n.toml: \"a\": not of the form"));
        let none =
            flags(&["--link", "e", "--volume", "a=/a", "--security", "none", "--grant", &format!("a={mac}")]);
        assert_eq!(Config::new(&none, None).unwrap().key, None);
    }
}
