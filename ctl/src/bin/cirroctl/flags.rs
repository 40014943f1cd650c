//! The command line of `cirroctl`: one definition gives the parser and the help.
//!
//! Knows no sockets. Used by `main.rs`.

use std::path::PathBuf;

use cirro_ctl::request::{GrantRight, TAP_FILE_BYTES_DEFAULT, TAP_FRAME_BYTES_DEFAULT};
use cirro_ctl::size;
use clap::{Args, Parser, Subcommand};

const EXAMPLES: &str = "\
Examples:
  cirroctl status                      what runs here, for whom, in which state, since when and why
  cirroctl stats --json | jq .ok       every counter, for scripts: one line of JSON per daemon
  cirroctl --ctl-socket /run/a.sock link tap push /tmp/a.pcap
                                       watch the wire of one daemon; open the file in Wireshark
  cirroctl --ctl-socket /run/a.sock link tap pop
  cirroctl key show /var/lib/cirrostratus/backend/key
                                       by which key this machine's backend is known
  cirroctl volume grant vm1 KEY rw     let the owner of that key have the volume (on the storage machine)
  cirroctl volume revoke vm1 KEY       take it away, at once
  cirroctl volume resize vm1 20G       make it larger while its guest runs; then grow the file system in the guest

Without --ctl-socket the daemons at /run/cirrostratus/node.sock and /run/cirrostratus/backend.sock are asked, whichever run.
The sockets belong to the daemons' user: run cirroctl as that user, most often root.

Exit status: 0 done; 1 a daemon said no or could not be asked; 2 the command line makes no sense.";

/// Look into the Cirrostratus daemons of this machine, and steer them
#[derive(Debug, Parser)]
#[command(name = "cirroctl", version, after_help = EXAMPLES, subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// The control socket of the daemon to ask (its own --ctl-socket)
    #[arg(long, value_name = "PATH", global = true)]
    pub(crate) ctl_socket: Option<PathBuf>,

    /// Print one line of JSON per daemon: {"socket":…,"ok":…} or {"socket":…,"error":…}
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show volumes, disks, sessions and links: their state, since when, and why
    Status,
    /// Show every counter, and the latency of requests by kind
    Stats,
    /// Steer a daemon's link
    #[command(subcommand)]
    Link(LinkCommand),
    /// Say who may use a volume and how large it is; for the node that serves it
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Make and show keys; asks no daemon
    #[command(subcommand)]
    Key(KeyCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Give a client a right, instead of the one it has; its sessions on the volume end and begin anew
    Grant {
        /// The volume
        #[arg(value_name = "VOLUME")]
        volume: String,
        /// The client: its public key, or its MAC address where security is none
        #[arg(value_name = "CLIENT")]
        client: String,
        /// Read, or read and write
        #[arg(value_name = "ro|rw", value_parser = right)]
        right: GrantRight,
    },
    /// Take every right from a client; its sessions on the volume end at once
    Revoke {
        /// The volume
        #[arg(value_name = "VOLUME")]
        volume: String,
        /// The client, as in `grant`
        #[arg(value_name = "CLIENT")]
        client: String,
    },
    /// Give a volume another size while guests use it: they see it at once
    ///
    /// A file is made longer. A block device is grown by its own tools first; SIZE is what it has then. A volume becomes smaller only
    /// while nobody has it, and only where it holds no data.
    Resize {
        /// The volume
        #[arg(value_name = "VOLUME")]
        volume: String,
        /// Its size from now on: bytes, or a number with K, M, G or T behind it (powers of 1024)
        #[arg(value_name = "SIZE", value_parser = bytes)]
        bytes: u64,
    },
    /// Show who may use a volume
    Grants {
        /// The volume
        #[arg(value_name = "VOLUME")]
        volume: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Make a private key in a new file that only its owner can read, and print its public key
    New {
        /// The file to make
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Print the public key of a private key
    Show {
        /// The file of the private key
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Make a secret for one client and one node to share, beside their keys, in a new file
    Psk {
        /// The file to make; copy it to the other machine by a way you trust
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

fn bytes(text: &str) -> Result<u64, String> {
    size::parse(text)
        .ok_or_else(|| "give a number of bytes, or one with K, M, G or T behind it, as 4G".to_owned())
}

fn right(text: &str) -> Result<GrantRight, String> {
    match text {
        "ro" => Ok(GrantRight::Ro),
        "rw" => Ok(GrantRight::Rw),
        _ => Err("give ro or rw; to take every right away use `volume revoke`".to_owned()),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum LinkCommand {
    /// Record the frames of a running daemon
    #[command(subcommand)]
    Tap(TapCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum TapCommand {
    /// Start to write the frames in both directions to a pcap file
    Push(TapPushFlags),
    /// Stop, close the files, and say what is in them
    Pop,
}

#[derive(Debug, Args)]
pub(crate) struct TapPushFlags {
    /// The file to make (it must not exist); with several workers each writes FILE.<worker>
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    /// Keep only the first BYTES of each frame; 96 keeps the headers and leaves the data out
    #[arg(long, value_name = "BYTES", default_value_t = TAP_FRAME_BYTES_DEFAULT, value_parser = clap::value_parser!(u32).range(14..))]
    pub(crate) frame_bytes_max: u32,

    /// Stop writing when a file has BYTES
    #[arg(long, value_name = "BYTES", default_value_t = TAP_FILE_BYTES_DEFAULT, value_parser = clap::value_parser!(u64).range(1024..))]
    pub(crate) file_bytes_max: u64,
}
