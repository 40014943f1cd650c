//! The command line of `cirroctl`: one definition gives the parser and the help.
//!
//! Knows no sockets. Used by `main.rs`.

use std::path::PathBuf;

use cirro_ctl::request::{TAP_FILE_BYTES_DEFAULT, TAP_FRAME_BYTES_DEFAULT};
use clap::{Args, Parser, Subcommand};

const EXAMPLES: &str = "\
Examples:
  cirroctl status                      what runs here, for whom, in which state, since when and why
  cirroctl stats --json | jq .ok       every counter, for scripts: one line of JSON per daemon
  cirroctl --ctl-socket /run/a.sock link tap push /tmp/a.pcap
                                       watch the wire of one daemon; open the file in Wireshark
  cirroctl --ctl-socket /run/a.sock link tap pop

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
