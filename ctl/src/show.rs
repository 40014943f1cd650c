//! Reports as text for people: `cirroctl status` and `cirroctl stats` without `--json`.
//!
//! Does not know sockets or flags. Called by `cirroctl`; what it prints is for eyes and may change, scripts use the JSON.

use std::fmt::Write;

use serde::Serialize;

use crate::report::{
    Disk, IoMode, LatencySummary, Link, OpCounters, Ops, Process, Report, Session, State, Volume, Worker,
};
use crate::table::{Table, age, bytes, latency};

/// What is served, to or from whom, in which state, since when and why.
pub fn status(report: &Report) -> String {
    let now_ns = report.process().now_ns;
    let mut out = heading(report.process());
    show_links(&mut out, report.links_and_workers().0, now_ns);
    match report {
        Report::Node(node) => {
            show_volumes(&mut out, &node.volumes, now_ns);
            show_sessions(&mut out, node.sessions.iter(), now_ns);
        }
        Report::Backend(backend) => {
            show_disks(&mut out, &backend.disks, now_ns);
            show_sessions(&mut out, backend.disks.iter().filter_map(|disk| disk.session.as_ref()), now_ns);
        }
    }
    out
}

/// Every counter and latency that is not zero throughout.
pub fn stats(report: &Report) -> String {
    let mut out = heading(report.process());
    let (links, workers) = report.links_and_workers();
    show_link_counters(&mut out, links);
    show_worker_counters(&mut out, workers);
    match report {
        Report::Node(node) => {
            show_session_counters(&mut out, node.sessions.iter());
            let volumes = node.volumes.iter().filter_map(|v| Some((v.name.as_str(), v.counters.as_ref()?)));
            show_ops(
                &mut out,
                &[
                    "VOLUME",
                    "OPERATION",
                    ">REQUESTS",
                    ">ERRORS",
                    ">DATA",
                    ">MEAN",
                    ">P50",
                    ">P99",
                    ">P99.9",
                    ">MAX",
                ],
                volumes,
            );
        }
        Report::Backend(backend) => {
            show_session_counters(&mut out, backend.disks.iter().filter_map(|disk| disk.session.as_ref()));
            let disks =
                backend.disks.iter().filter_map(|d| Some((d.volume.as_str(), &d.counters.as_ref()?.ops)));
            show_ops(
                &mut out,
                &[
                    "DISK",
                    "OPERATION",
                    ">REQUESTS",
                    ">ERRORS",
                    ">DATA",
                    ">MEAN",
                    ">P50",
                    ">P99",
                    ">P99.9",
                    ">MAX",
                ],
                disks,
            );
            show_reconnects(&mut out, &backend.disks);
        }
    }
    out
}

fn heading(process: &Process) -> String {
    let up = age(process.now_ns.saturating_sub(process.started_ns));
    format!("{} {}, pid {}, up {up}\n", process.program, process.version, process.pid)
}

fn show_links(out: &mut String, links: &[Link], now_ns: u64) {
    let mut table = Table::new(&["LINK", "ADDRESS", ">MTU", "STATE", "FOR", "WHY"]);
    for link in links {
        let [state, since, why] = state_cells(&link.state, now_ns);
        table.row([link.interface.clone(), link.address.clone(), link.mtu.to_string(), state, since, why]);
    }
    table.write_to(out);
    for tap in links.iter().flat_map(|link| link.taps.iter().map(move |tap| (link, tap))) {
        let path = crate::daemon::escape_controls(&tap.1.to_string_lossy());
        writeln!(out, "{} is being tapped to {path}", tap.0.interface).expect("a String can be written");
    }
}

fn show_volumes(out: &mut String, volumes: &[Volume], now_ns: u64) {
    let columns = &[
        "VOLUME",
        "STATE",
        "FOR",
        "WHY",
        ">SIZE",
        "ACCESS",
        "I/O",
        "DURABILITY",
        ">SESSIONS",
        "OWNER",
        ">VOL_EPOCH",
        "PATH",
    ];
    let mut table = Table::new(columns);
    for volume in volumes {
        let [state, since, why] = state_cells(&volume.state, now_ns);
        let owner = volume.owner.as_ref();
        table.row([
            volume.name.clone(),
            state,
            since,
            why,
            bytes(volume.size_bytes),
            access(volume.read_only),
            io(volume),
            word(&volume.durability),
            volume.sessions.to_string(),
            owner.map(|owner| short(&owner.attachment)).unwrap_or_default(),
            owner.map(|owner| owner.vol_epoch.to_string()).unwrap_or_default(),
            volume.path.to_string_lossy().into_owned(),
        ]);
    }
    table.write_to(out);
}

fn show_disks(out: &mut String, disks: &[Disk], now_ns: u64) {
    let columns = &[
        "DISK",
        "STATE",
        "FOR",
        "WHY",
        ">SIZE",
        "ACCESS",
        "VMM",
        ">IN FLIGHT",
        ">UNFLUSHED",
        "ON TROUBLE",
        "NODE",
        "SOCKET",
    ];
    let mut table = Table::new(columns);
    for disk in disks {
        let [state, since, why] = state_cells(&disk.state, now_ns);
        table.row([
            disk.volume.clone(),
            state,
            since,
            why,
            if disk.size_bytes == 0 { String::new() } else { bytes(disk.size_bytes) },
            access(disk.read_only),
            if disk.front_end_connected { "connected".into() } else { "absent".into() },
            disk.in_flight.to_string(),
            bytes(disk.unflushed_bytes),
            disk.on_trouble.clone(),
            disk.node.clone().unwrap_or_default(),
            disk.socket.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
        ]);
    }
    table.write_to(out);
}

fn show_sessions<'a>(out: &mut String, sessions: impl Iterator<Item = &'a Session>, now_ns: u64) {
    let columns = &[
        "SESSION WITH",
        "VOLUME",
        "ATTACHMENT",
        "STATE",
        "FOR",
        "WHY",
        ">RTT MIN",
        ">RTT",
        ">WINDOW",
        ">IN FLIGHT",
        ">PIECE",
        ">WORKER",
    ];
    let mut table = Table::new(columns);
    for session in sessions {
        let [state, since, why] = state_cells(&session.state, now_ns);
        table.row([
            session.peer.clone(),
            session.volume.clone().unwrap_or_default(),
            short(&session.attachment),
            state,
            since,
            why,
            latency(session.rtt_ns_min),
            latency(session.rtt_ns_smoothed),
            bytes(session.window_bytes),
            bytes(session.in_flight_bytes),
            if session.piece_bytes == 0 { String::new() } else { bytes(session.piece_bytes.into()) },
            session.worker.to_string(),
        ]);
    }
    table.write_to(out);
}

fn show_link_counters(out: &mut String, links: &[Link]) {
    let mut table = Table::new(&["LINK", ">RING DROPS", ">REFUSED", ">REBUILDS"]);
    for (link, counters) in links.iter().filter_map(|link| Some((link, link.counters.as_ref()?))) {
        let [drops, refused, rebuilds] =
            [counters.ring_drops, counters.refused, counters.rebuilds].map(|n| n.to_string());
        table.row([link.interface.clone(), drops, refused, rebuilds]);
    }
    table.write_to(out);
}

fn show_worker_counters(out: &mut String, workers: &[Worker]) {
    let columns = &[
        "WORKER",
        ">SESSIONS",
        ">FRAMES IN",
        ">FRAMES OUT",
        ">BYTES IN",
        ">BYTES OUT",
        ">TURNS",
        ">WAKE-UPS",
        "DROPPED",
    ];
    let mut table = Table::new(columns);
    for (worker, counters) in workers.iter().filter_map(|worker| Some((worker, worker.counters.as_ref()?))) {
        let dropped: Vec<String> =
            counters.dropped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        table.row([
            worker.index.to_string(),
            worker.sessions.to_string(),
            counters.frames_in.to_string(),
            counters.frames_out.to_string(),
            bytes(counters.bytes_in),
            bytes(counters.bytes_out),
            counters.turns.to_string(),
            counters.wakeups.to_string(),
            dropped.join(", "),
        ]);
    }
    table.write_to(out);
}

fn show_session_counters<'a>(out: &mut String, sessions: impl Iterator<Item = &'a Session>) {
    let columns = &[
        "SESSION WITH",
        "VOLUME",
        ">SENT",
        ">RECEIVED",
        ">LOST",
        ">RESENT",
        ">SPURIOUS",
        ">PROBES",
        ">DUPLICATES",
        ">VIOLATIONS",
        ">REFUSED",
        ">DATA SENT",
        ">DATA RECEIVED",
    ];
    let mut table = Table::new(columns);
    for (session, c) in sessions.filter_map(|session| Some((session, session.counters.as_ref()?))) {
        table.row([
            session.peer.clone(),
            session.volume.clone().unwrap_or_default(),
            c.frames_sent.to_string(),
            c.frames_received.to_string(),
            c.frames_lost.to_string(),
            c.messages_resent.to_string(),
            c.spurious_losses.to_string(),
            c.probe_timeouts.to_string(),
            (c.duplicate_frames + c.duplicate_messages).to_string(),
            c.violations.to_string(),
            c.frames_refused.to_string(),
            bytes(c.payload_bytes_sent),
            bytes(c.payload_bytes_received),
        ]);
    }
    table.write_to(out);
}

fn show_ops<'a>(
    out: &mut String,
    columns: &'static [&'static str; 10],
    all: impl Iterator<Item = (&'a str, &'a Ops)>,
) {
    let mut table = Table::new(columns);
    for (name, ops) in all {
        let by_name = [
            ("read", &ops.read),
            ("write", &ops.write),
            ("flush", &ops.flush),
            ("discard", &ops.discard),
            ("write-zeroes", &ops.write_zeroes),
        ];
        for (op, counters) in by_name.into_iter().filter(|(_, counters)| counters.latency.count > 0) {
            table.row(op_cells(name, op, counters));
        }
    }
    table.write_to(out);
}

fn op_cells(name: &str, op: &str, counters: &OpCounters) -> [String; 10] {
    let LatencySummary { ns_mean, ns_p50, ns_p99, ns_p99_9, ns_max, count: _ } = counters.latency;
    let [mean, p50, p99, p99_9, max] = [ns_mean, ns_p50, ns_p99, ns_p99_9, ns_max].map(latency);
    let (requests, errors) = (counters.requests.to_string(), counters.errors.to_string());
    [name.to_owned(), op.to_owned(), requests, errors, bytes(counters.bytes), mean, p50, p99, p99_9, max]
}

fn show_reconnects(out: &mut String, disks: &[Disk]) {
    let mut table = Table::new(&["DISK", ">RECONNECTS", ">IN FLIGHT"]);
    for (disk, counters) in disks.iter().filter_map(|disk| Some((disk, disk.counters.as_ref()?))) {
        table.row([disk.volume.clone(), counters.reconnects.to_string(), disk.in_flight.to_string()]);
    }
    table.write_to(out);
}

/// State, age and reason.
fn state_cells<N: Serialize>(state: &State<N>, now_ns: u64) -> [String; 3] {
    [word(&state.name), age(now_ns.saturating_sub(state.since_ns)), state.why.clone().unwrap_or_default()]
}

/// The word that the JSON has for it.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(error) => error.to_string(),
    }
}

fn access(read_only: bool) -> String {
    if read_only { "ro".into() } else { "rw".into() }
}

fn io(volume: &Volume) -> String {
    let mode = match volume.io.mode {
        IoMode::Direct => "direct",
        IoMode::Buffered => "buffered",
    };
    volume.io.why.as_ref().map_or_else(|| mode.to_owned(), |why| format!("{mode} ({why})"))
}

/// The first eight digits of an identifier: enough to tell a few apart.
fn short(id: &str) -> String {
    id.chars().take(8).collect()
}
