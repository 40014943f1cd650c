//! `cirro-backend`: reads what it is to do, opens what that needs, starts the threads and waits for the end.
//!
//! Knows the order of starting and stopping; everything else is in the library.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::Context;
use cirro_backend::attach::Attach;
use cirro_backend::config::{CAPABILITIES, Config, DiskEntry, Flags};
use cirro_backend::disk::{Disk, DiskConfig};
use cirro_backend::mailbox::{Change, DiskId, Mailbox, mailbox};
use cirro_backend::server::{DiskServer, Listening, run_worker};
use cirro_backend::state::State;
use cirro_backend::stats::{DiskStats, WorkerStats};
use cirro_backend::worker::Worker;
use cirro_ctl::daemon::{self, Usage};
use cirro_ctl::stop::Stop;
use cirro_link::packet::{self, PacketLink};
use cirro_link::{Link, clock, random};
use cirro_protocol::initiator::{self, Initiator};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::{ETHERTYPE_DEFAULT, SLOTS_MAX, Steer};
use clap::Parser;

const PROGRAM: &str = "cirro-backend";

fn main() -> ExitCode {
    let flags = Flags::parse();
    if flags.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    daemon::run(PROGRAM, || run(&flags))
}

fn run(flags: &Flags) -> anyhow::Result<()> {
    daemon::start_log(flags.verbose);
    let config = read_config(flags)?;
    let stop = Stop::on_signals().context("cannot take over signals")?;
    let listening =
        config.disks.iter().map(|disk| Listening::open(&disk.socket)).collect::<Result<Vec<_>, _>>()?;
    let states = config
        .disks
        .iter()
        .map(|disk| State::open(&config.state_dir, disk.volume, random::uuid()))
        .collect::<Result<Vec<_>, _>>()?;
    let (process, links) = packet::open(&config.link, ETHERTYPE_DEFAULT, config.workers)
        .with_context(|| format!("cannot open link {}", config.link))?;
    log::warn!(
        "security is none: frames on {} are neither secret nor signed; use it on a wire that you trust",
        config.link
    );

    let ended = Arc::new(AtomicBool::new(false));
    let mut workers = Vec::new();
    let mut disk_threads = Vec::new();
    let mut listening: Vec<_> = listening.into_iter().map(Some).collect();
    for (index, link) in links.into_iter().enumerate() {
        let (mailbox, inbox) = mailbox().context("cannot make a mailbox")?;
        let steer = Steer::new(process, index as u16);
        let mut worker = Worker::new(link, steer, inbox, Arc::new(WorkerStats::default()));
        let own = (0..config.disks.len()).filter(|disk| disk % usize::from(config.workers) == index);
        for (cid_index, number) in own.enumerate() {
            let attach = Arc::new(Attach::default());
            let entry = &config.disks[number];
            let place =
                Place { steer, cid_index: cid_index as u16, state: &states[number], poll_us: config.poll_us };
            let disk = make_disk(entry, &place, worker.link(), Arc::clone(&attach));
            let id = DiskId(number as u16);
            worker.add(id, disk);
            let server = DiskServer {
                id,
                entry: entry.clone(),
                link: config.link.clone(),
                mailbox: mailbox.clone(),
                attach,
                stop: stop.clone(),
                connected: Arc::default(),
            };
            disk_threads.push((server, listening[number].take().expect("each disk is on one worker")));
        }
        workers.push(start_worker(
            index,
            worker,
            mailbox,
            &ended,
            Nanos::from_micros(config.poll_us.into()),
        )?);
    }
    let disk_threads = disk_threads.into_iter().map(start_disk).collect::<anyhow::Result<Vec<_>>>()?;
    let served = disk_threads.into_iter().try_for_each(join);
    ended.store(true, Ordering::Relaxed);
    let stopped = workers.into_iter().try_for_each(|(mailbox, thread)| {
        // Any command rings the bell, and the worker sees the end.
        drop(mailbox.send(DiskId(0), Change::Report));
        join(thread)
    });
    log::info!("ended");
    served.and(stopped)
}

fn read_config(flags: &Flags) -> anyhow::Result<Config> {
    let text = match &flags.config {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| {
                Usage::new(format!("cannot read the file of --config, {}: {error}", path.display()))
            })?;
            Some((path.as_path(), text))
        }
    };
    let file = text.as_ref().map(|(path, text)| (*path, text.as_str()));
    Ok(Config::new(flags, file).map_err(|error| Usage::new(error.to_string()))?)
}

/// Where a disk lives.
struct Place<'a> {
    steer: Steer,
    cid_index: u16,
    state: &'a State,
    poll_us: u32,
}

fn make_disk(entry: &DiskEntry, place: &Place<'_>, link: &PacketLink, attach: Arc<Attach>) -> Disk {
    let initiator = initiator::Config {
        volume: entry.volume,
        attachment: place.state.attachment,
        session_epoch: place.state.session_epoch(),
        address: link.address(),
        ethertype: ETHERTYPE_DEFAULT,
        node_address: entry.node,
        steer: place.steer,
        cid_index: place.cid_index,
        mtu: link.mtu() as u16,
        slots: SLOTS_MAX as u16,
        take_over: entry.take_over,
        // A worker that spins can ack soon without waking up for it.
        ack_delay_max: Nanos::from_micros(if place.poll_us > 0 { 50 } else { 200 }),
        random_seed: random::u64(),
    };
    Disk::new(DiskConfig {
        volume: entry.volume,
        read_only: entry.read_only,
        queues: entry.queues,
        initiator: Initiator::new(initiator, clock::now()),
        attach,
        stats: Arc::new(DiskStats::default()),
    })
}

type Thread = JoinHandle<anyhow::Result<()>>;

fn start_worker(
    index: usize,
    worker: Worker<PacketLink>,
    mailbox: Mailbox,
    ended: &Arc<AtomicBool>,
    poll: Nanos,
) -> anyhow::Result<(Mailbox, Thread)> {
    let ended = Arc::clone(ended);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || {
            run_worker(worker, &ended, poll).with_context(|| format!("worker {index} cannot wait for events"))
        })
        .context("cannot start a worker thread")?;
    Ok((mailbox, thread))
}

fn start_disk((server, listening): (DiskServer, Listening)) -> anyhow::Result<Thread> {
    let volume = server.entry.volume;
    std::thread::Builder::new()
        .name(format!("disk-{volume}"))
        .spawn(move || {
            server.run(&listening).with_context(|| format!("volume {volume}: cannot wait for a front-end"))
        })
        .context("cannot start a disk's thread")
}

fn join(thread: Thread) -> anyhow::Result<()> {
    thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread ended by a bug; its message is above")))
}
