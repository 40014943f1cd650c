//! `cirroctl`: looks into the daemons of this machine and steers them.
//!
//! Knows flags, requests and reports only, never a daemon's inside. Started by people and scripts. Exit 0: done; 1: a daemon said no or could not be
//! asked; 2: the command line makes no sense. A reader that closes the pipe early (`| head`) is no error.

mod flags;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use cirro_ctl::client::{AskError, ask};
use cirro_ctl::daemon::{self, Usage, escape_controls};
use cirro_ctl::report::Report;
use cirro_ctl::request::{
    GrantRight, Grants, Request, Resized, TapPopped, TapPush, TapPushed, VolumeGrant, VolumeResize,
    VolumeRevoke,
};
use cirro_ctl::{keyfile, show, size};
use clap::Parser;
use serde_json::{Value, json};

use flags::{Cli, Command, KeyCommand, LinkCommand, TapCommand, VolumeCommand};

/// Where the daemons put their sockets unless told otherwise.
const SOCKETS_DEFAULT: [&str; 2] = ["/run/cirrostratus/node.sock", "/run/cirrostratus/backend.sock"];
/// Longest wait for an answer: a daemon that is alive answers in milliseconds.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);
/// A new size is stable before it is answered, and so is what was written before it: the node may have much of that in its page cache.
const RESIZE_TIME_MAX: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    daemon::run("cirroctl", || match run(&Cli::parse()) {
        Err(error) if is_closed_pipe(&error) => Ok(()),
        other => other,
    })
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let Some(request) = request(&cli.command)? else { return Ok(()) };
    let asks_one = !matches!(request, Request::Status {} | Request::Stats {});
    let sockets = match &cli.ctl_socket {
        Some(path) => vec![path.clone()],
        None => sockets_here(defaults_for(&request), asks_one)?,
    };
    let mut failed = None;
    for (index, path) in sockets.iter().enumerate() {
        let answer = ask(path, &request, time_max(&request));
        let text = if cli.json { json_line(path, &answer) } else { text(path, &request, &answer, index)? };
        write_out(&text)?;
        if let Err(error) = answer {
            // The other daemon is still shown. `main` prints the last failure; one before it is printed here.
            if let Some(earlier) = failed.replace(anyhow::Error::from(error)) {
                let _ = writeln!(io::stderr(), "cirroctl: {}", daemon::one_line(&earlier));
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

/// What waits for a disk may take its time.
fn time_max(request: &Request) -> Duration {
    if matches!(request, Request::VolumeResize(_)) { RESIZE_TIME_MAX } else { ANSWER_TIME_MAX }
}

/// Does what a key command says.
fn key(command: &KeyCommand) -> anyhow::Result<()> {
    match command {
        KeyCommand::New { file } => write_out(&format!("{}\n", keyfile::public_of(&keyfile::make(file)?))),
        KeyCommand::Show { file } => write_out(&format!("{}\n", keyfile::public_of(&keyfile::read(file)?))),
        KeyCommand::Psk { file } => Ok(keyfile::make(file).map(drop)?),
    }
}

/// The request for a command, unless it is done without a daemon. A tap's path is made absolute, because the daemon has another working
/// directory.
fn request(command: &Command) -> anyhow::Result<Option<Request>> {
    Ok(Some(match command {
        Command::Key(command) => {
            key(command)?;
            return Ok(None);
        }
        Command::Volume(VolumeCommand::Grant { volume, client, right }) => {
            Request::VolumeGrant(VolumeGrant {
                volume: volume.clone(),
                client: client.clone(),
                right: *right,
            })
        }
        Command::Volume(VolumeCommand::Revoke { volume, client }) => {
            Request::VolumeRevoke(VolumeRevoke { volume: volume.clone(), client: client.clone() })
        }
        Command::Volume(VolumeCommand::Resize { volume, bytes }) => {
            Request::VolumeResize(VolumeResize { volume: volume.clone(), bytes: *bytes })
        }
        Command::Volume(VolumeCommand::Grants { volume }) => Request::VolumeGrants { volume: volume.clone() },
        Command::Status => Request::Status {},
        Command::Stats => Request::Stats {},
        Command::Link(LinkCommand::Tap(TapCommand::Pop)) => Request::LinkTapPop {},
        Command::Link(LinkCommand::Tap(TapCommand::Push(push))) => {
            let path = std::path::absolute(&push.file).context("find the working directory")?;
            if path.to_str().is_none() {
                return Err(Usage::new(
                    "the tap's FILE must be UTF-8, because requests are JSON; choose another name",
                )
                .into());
            }
            Request::LinkTapPush(TapPush {
                path,
                frame_bytes_max: push.frame_bytes_max,
                file_bytes_max: push.file_bytes_max,
            })
        }
    }))
}

/// The default sockets of the daemons that a request is for: who may use a volume, and how large it is, is the node's to say.
fn defaults_for(request: &Request) -> &'static [&'static str] {
    match request {
        Request::VolumeGrant(_)
        | Request::VolumeRevoke(_)
        | Request::VolumeGrants { .. }
        | Request::VolumeResize(_) => &SOCKETS_DEFAULT[..1],
        Request::Status {} | Request::Stats {} | Request::LinkTapPush(_) | Request::LinkTapPop {} => {
            &SOCKETS_DEFAULT
        }
    }
}

/// The default sockets that exist; exactly one when the command steers.
fn sockets_here(defaults: &[&str], asks_one: bool) -> anyhow::Result<Vec<PathBuf>> {
    let here: Vec<PathBuf> = defaults.iter().map(PathBuf::from).filter(|path| path.exists()).collect();
    let (names, programs) = match defaults {
        [node] => (format!("{node} does not exist"), "cirro-node"),
        _ => (format!("neither {} exists", defaults.join(" nor ")), "cirro-node or cirro-backend"),
    };
    anyhow::ensure!(
        !here.is_empty(),
        "no daemon found: {names}; start {programs}, or name a socket with --ctl-socket"
    );
    if asks_one && here.len() > 1 {
        return Err(Usage::new("a node and a backend run here: say which one with --ctl-socket").into());
    }
    Ok(here)
}

/// One line of JSON for one daemon: its socket, and its answer or the reason why there is none.
fn json_line(path: &Path, answer: &Result<Value, AskError>) -> String {
    let socket = path.display().to_string();
    let line = match answer {
        Ok(value) => json!({ "socket": socket, "ok": value }),
        Err(error) => json!({ "socket": socket, "error": error.to_string() }),
    };
    format!("{line}\n")
}

/// The answer for people; nothing when there is none.
fn text(
    path: &Path,
    request: &Request,
    answer: &Result<Value, AskError>,
    index: usize,
) -> anyhow::Result<String> {
    let Ok(value) = answer else { return Ok(String::new()) };
    let strange = || {
        format!(
            "{}: an answer that this cirroctl does not know; use the one of the daemon's version, or --json",
            path.display()
        )
    };
    let text = match request {
        Request::Status {} => {
            show::status(&serde_json::from_value::<Report>(value.clone()).with_context(strange)?)
        }
        Request::Stats {} => {
            show::stats(&serde_json::from_value::<Report>(value.clone()).with_context(strange)?)
        }
        Request::LinkTapPush(_) => {
            let pushed: TapPushed = serde_json::from_value(value.clone()).with_context(strange)?;
            let lines = pushed.files.iter().map(|path| format!("tapping to {}\n", printable(path)));
            lines.collect()
        }
        Request::LinkTapPop {} => {
            let popped: TapPopped = serde_json::from_value(value.clone()).with_context(strange)?;
            let lines = popped.files.iter().map(|file| {
                format!("{}: {} frames, {} missed\n", printable(&file.path), file.frames, file.frames_missed)
            });
            if popped.files.is_empty() { "no tap was pushed\n".to_owned() } else { lines.collect() }
        }
        Request::VolumeGrant(_) | Request::VolumeRevoke(_) | Request::VolumeGrants { .. } => {
            let grants: Grants = serde_json::from_value(value.clone()).with_context(strange)?;
            show_grants(&grants)
        }
        Request::VolumeResize(_) => {
            show_resized(&serde_json::from_value(value.clone()).with_context(strange)?)
        }
    };
    Ok(if index > 0 { format!("\n{text}") } else { text })
}

fn show_grants(grants: &Grants) -> String {
    let volume = escape_controls(&grants.volume);
    if grants.open_to_all {
        return format!(
            "volume {volume} is open to everybody on the segment: security is none, and nobody was named\n"
        );
    }
    if grants.grants.is_empty() {
        return format!("nobody may use volume {volume}\n");
    }
    let lines = grants.grants.iter().map(|grant| {
        let right = match grant.right {
            GrantRight::Ro => "ro",
            GrantRight::Rw => "rw",
        };
        format!("{right} {}\n", escape_controls(&grant.client))
    });
    lines.collect()
}

fn show_resized(resized: &Resized) -> String {
    let (volume, told) = (escape_controls(&resized.volume), resized.sessions_told);
    let (before, now) = (size::show(resized.bytes_before), size::show(resized.bytes));
    if before == now {
        return format!("volume {volume} has {now} already\n");
    }
    let sessions = if told == 1 { "session was" } else { "sessions were" };
    format!("volume {volume} has {now} now, not {before}; {told} {sessions} told\n")
}

fn printable(path: &Path) -> String {
    escape_controls(&path.to_string_lossy())
}

fn write_out(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("write to standard output")
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let is_closed = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    // The kernel's word about our own output, never about a daemon's socket: those errors are AskError.
    error.root_cause().downcast_ref::<io::Error>().is_some_and(is_closed) && !error.is::<AskError>()
}
