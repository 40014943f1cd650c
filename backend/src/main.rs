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
use cirro_backend::mapped::{self, Mapped};
use cirro_backend::protection::Protection;
use cirro_backend::record::Record;
use cirro_backend::replay::{self, Replay};
use cirro_backend::report::{DiskView, View};
use cirro_backend::server::{DiskServer, Listening, run_worker};
use cirro_backend::state::State;
use cirro_backend::stats::{DiskStats, WorkerStats};
use cirro_backend::worker::Worker;
use cirro_ctl::confine::{Needs, User, confine};
use cirro_ctl::daemon::{self, Usage};
use cirro_ctl::keyfile;
use cirro_ctl::server::Server;
use cirro_ctl::stop::Stop;
use cirro_link::any::{self, AnyLink, Reopens};
use cirro_link::stack::{Stack, stack};
use cirro_link::taps::{Taps, Way};
use cirro_link::{Link, clock, random};
use cirro_protocol::initiator::{self, Initiator};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::{ETHERTYPE_DEFAULT, SLOTS_MAX, Steer};
use cirro_protocol::wire::Mode;
use cirro_seal::{Caller, Identity, os_entropy};
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
    let owner = config.socket_owner.as_deref().map(User::named).transpose()?;
    listening.iter().try_for_each(|socket| socket.admit(owner.as_ref(), config.socket_mode))?;
    let states = config
        .disks
        .iter()
        .map(|disk| State::open(&config.state_dir, disk.volume, random::uuid()).map(Arc::new))
        .collect::<Result<Vec<_>, _>>()?;
    let remains = open_remains(&config, &states)?;
    let (process, links) = any::open(&config.link, ETHERTYPE_DEFAULT)
        .with_context(|| format!("cannot open link {}", config.link.interface))?;
    let identity = open_identity(&config)?;
    let user = config.user.as_deref().map(User::named).transpose()?;
    if let Some(user) = &user {
        user.take(&config.state_dir)?;
        user.take(&config.run_dir)?;
        config.ctl_socket.iter().try_for_each(|path| user.take_folder_of(path))?;
    }
    let needs = match config.link.reopens() {
        Reopens::Nothing => Needs::Nothing,
        Reopens::PacketSockets => Needs::PacketSockets,
        Reopens::XdpSockets => Needs::XdpSockets,
    };
    confine(user.as_ref(), needs)?;

    let kept = states.into_iter().zip(remains).collect();
    let crew = Crew::new(&config, identity.as_ref(), kept, (process, links), &stop)?;
    let Crew { workers, disks, mut view } = crew;
    let _control = match &config.ctl_socket {
        Some(path) => Some(Server::start(path, move |request| view.answer(&request))?),
        None => None,
    };
    let ended = Arc::new(AtomicBool::new(false));
    let poll = Nanos::from_micros(config.poll_us.into());
    let workers = workers
        .into_iter()
        .map(|(mailbox, worker)| Ok((mailbox, start_worker(worker, &ended, poll)?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let disks = disks.into_iter().zip(listening).map(start_disk).collect::<anyhow::Result<Vec<_>>>()?;
    let served = disks.into_iter().try_for_each(join);
    ended.store(true, Ordering::Relaxed);
    let stopped = workers.into_iter().try_for_each(|(mailbox, thread)| {
        // Any command rings the bell, and the worker sees the end.
        drop(mailbox.send(DiskId(0), Change::Report));
        join(thread)
    });
    log::info!("ended");
    served.and(stopped)
}

/// Who we are, where frames are protected by keys.
fn open_identity(config: &Config) -> anyhow::Result<Option<Arc<Identity>>> {
    let Some(path) = &config.key else {
        log::warn!(
            "security is none: frames on {} are neither secret nor signed; use it on a wire that you trust",
            config.link.interface
        );
        return Ok(None);
    };
    let (private, new) = keyfile::read_or_make(path)?;
    let identity = Identity::new(private, os_entropy());
    let made = if new { " (new)" } else { "" };
    log::info!("our key, for `cirroctl volume grant` on the node: {}{made}", identity.public());
    Ok(Some(Arc::new(identity)))
}

fn protection(entry: &DiskEntry, identity: Option<&Arc<Identity>>) -> anyhow::Result<Protection> {
    let caller = match (identity, &entry.node_key) {
        (Some(identity), Some(node)) => {
            let psk = node.psk.as_ref().map_or(Ok(keyfile::Secret::default()), |path| keyfile::read(path))?;
            Some(Caller::new(Arc::clone(identity), node.public, psk))
        }
        (Some(_) | None, _) => None,
    };
    Ok(Protection::new(caller))
}

/// What a disk keeps over restarts.
type Kept = (Arc<State>, Remains);

/// What the end of a process leaves of a disk to the next.
struct Remains {
    record: Record,
    replay: Replay,
}

/// The remains of each disk, named for its attachment: several backends may share the directory.
fn open_remains(config: &Config, states: &[Arc<State>]) -> anyhow::Result<Vec<Remains>> {
    let boot = mapped::boot_id()?;
    let open = |name: String, bytes, reserved| -> anyhow::Result<Mapped> {
        let path = config.run_dir.join(name);
        let memory = Mapped::open(&path, bytes)?;
        memory.reserve(0, reserved).with_context(|| {
            format!("no space for {}; give a directory on tmpfs with room with --run-dir", path.display())
        })?;
        Ok(memory)
    };
    let remains = config.disks.iter().zip(states).map(|(disk, state)| {
        let bytes = Record::bytes(disk.queues);
        let record = open(format!("{}.inflight", state.attachment), bytes, bytes)?;
        let unflushed = format!("{}.unflushed", state.attachment);
        let replay = open(unflushed, Replay::bytes(replay::BYTES_DEFAULT), replay::HEADER_BYTES)?;
        let replay = Replay::new(replay, boot, replay::BYTES_DEFAULT);
        if replay.was_damaged() {
            log::error!(
                "volume {}: the copy of what was not flushed ({}/{}.unflushed) is damaged and cannot be used; check the guest's file system",
                disk.volume,
                config.run_dir.display(),
                state.attachment
            );
        }
        Ok(Remains { record: Record::new(record, boot), replay })
    });
    remains.collect()
}

/// What the threads will own, and what can be seen of it.
struct Crew {
    workers: Vec<(Mailbox, Worker<Stack<AnyLink>>)>,
    /// In the order of the configuration.
    disks: Vec<DiskServer>,
    view: View,
}

impl Crew {
    /// Deals the disks out to the workers in turn.
    fn new(
        config: &Config,
        identity: Option<&Arc<Identity>>,
        kept: Vec<Kept>,
        (process, links): (u16, Vec<AnyLink>),
        stop: &Stop,
    ) -> anyhow::Result<Crew> {
        let view = View {
            started_ns: clock::now().0,
            interface: config.link.interface.clone(),
            address: links[0].address(),
            mtu: links[0].mtu() as u32,
            workers: Vec::new(),
            drops: links.iter().map(AnyLink::drops).collect(),
            disks: Vec::new(),
            taps: Taps::new(Vec::new()),
        };
        let mut crew = Crew { workers: Vec::new(), disks: Vec::new(), view };
        for (index, link) in (0u16..).zip(links) {
            let (mailbox, inbox) = mailbox().context("cannot make a mailbox")?;
            let stats = Arc::new(WorkerStats::default());
            crew.view.workers.push(Arc::clone(&stats));
            let worker = Worker::new(stack(link), Steer::new(process, index), inbox, stats);
            crew.workers.push((mailbox, worker));
        }
        crew.view.taps = Taps::new(crew.workers.iter().map(|(mailbox, _)| way_to(mailbox)).collect());
        for (number, (entry, kept)) in config.disks.iter().zip(kept).enumerate() {
            let place = Place {
                worker: number as u16 % config.link.workers,
                cid_index: number as u16 / config.link.workers,
                process,
                poll_us: config.poll_us,
            };
            let protection = protection(entry, identity)?;
            let id = DiskId(number as u16);
            crew.add_disk(id, (entry, kept, protection), &place, (&config.link.interface, stop));
        }
        Ok(crew)
    }

    fn add_disk(
        &mut self,
        id: DiskId,
        (entry, (state, remains), protection): (&DiskEntry, Kept, Protection),
        place: &Place,
        (link, stop): (&str, &Stop),
    ) {
        let (mailbox, worker) = &mut self.workers[usize::from(place.worker)];
        let attach = Arc::new(Attach::new(state.volume()));
        let (stats, connected) = (Arc::<DiskStats>::default(), Arc::default());
        let shared = (Arc::clone(&attach), Arc::clone(&stats), remains);
        worker_disk(worker, id, (entry, &state, place), protection, shared);
        self.view.disks.push(DiskView {
            id,
            entry: entry.clone(),
            worker: place.worker,
            attachment: state.attachment,
            session_epoch: state.session_epoch(),
            mailbox: mailbox.clone(),
            attach: Arc::clone(&attach),
            stats,
            connected: Arc::clone(&connected),
        });
        self.disks.push(DiskServer {
            id,
            entry: entry.clone(),
            link: link.to_owned(),
            mailbox: mailbox.clone(),
            attach,
            state,
            stop: stop.clone(),
            connected,
        });
    }
}

fn way_to(mailbox: &Mailbox) -> Way {
    let mailbox = mailbox.clone();
    Box::new(move |exchange| mailbox.exchange(exchange))
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
struct Place {
    worker: u16,
    /// Its number among the disks of its worker.
    cid_index: u16,
    process: u16,
    poll_us: u32,
}

fn worker_disk(
    worker: &mut Worker<Stack<AnyLink>>,
    id: DiskId,
    (entry, state, place): (&DiskEntry, &State, &Place),
    protection: Protection,
    (attach, stats, remains): (Arc<Attach>, Arc<DiskStats>, Remains),
) {
    let link = worker.link();
    let initiator = initiator::Config {
        volume: entry.volume,
        mode: if protection.is_by_keys() { Mode::Aead } else { Mode::Crc },
        attachment: state.attachment,
        session_epoch: state.session_epoch(),
        address: link.address(),
        ethertype: ETHERTYPE_DEFAULT,
        node_address: entry.node,
        steer: Steer::new(place.process, place.worker),
        cid_index: place.cid_index,
        mtu: link.mtu() as u16,
        slots: SLOTS_MAX as u16,
        take_over: entry.take_over,
        // A worker that spins can ack soon without waking up for it.
        ack_delay_max: Nanos::from_micros(if place.poll_us > 0 { 50 } else { 200 }),
        random_seed: random::u64(),
    };
    let disk = Disk::new(DiskConfig {
        volume: entry.volume,
        read_only: entry.read_only,
        queues: entry.queues,
        initiator: Initiator::new(initiator, clock::now()),
        protection,
        attach,
        record: remains.record,
        replay: remains.replay,
        on_trouble: entry.on_trouble,
        stats,
    });
    worker.add(id, disk);
}

type Thread = JoinHandle<anyhow::Result<()>>;

fn start_worker(
    worker: Worker<Stack<AnyLink>>,
    ended: &Arc<AtomicBool>,
    poll: Nanos,
) -> anyhow::Result<Thread> {
    let ended = Arc::clone(ended);
    std::thread::Builder::new()
        .name("worker".to_owned())
        .spawn(move || run_worker(worker, &ended, poll).context("a worker cannot wait for events"))
        .context("cannot start a worker thread")
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
