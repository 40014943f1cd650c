//! `cirro-node`: reads what it is to serve, opens what that needs, starts the threads and waits for the end.
//!
//! Knows the order of starting and stopping; everything else is in the library.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context;
use cirro_ctl::confine::{Needs, User, confine};
use cirro_ctl::daemon::{self, Usage};
use cirro_ctl::keyfile::{self, KeyFileError};
use cirro_ctl::publish::{Publisher, Reader};
use cirro_ctl::report::{self, NodeReport, Report};
use cirro_ctl::request::{
    GrantEntry, GrantRight, Grants, Request, Resized, TapFile, TapPopped, TapPush, TapPushed, VolumeGrant,
    VolumeResize, VolumeRevoke,
};
use cirro_ctl::server::Server;
use cirro_ctl::stop::Stop;
use cirro_link::any::{self, AnyLink, Reopens};
use cirro_link::stack::stack;
use cirro_link::tap::Limits;
use cirro_link::taps::{TapError, Taps, Way};
use cirro_link::{Drops, Link, clock, random};
use cirro_node::access::{AccessList, Client, Right};
use cirro_node::config::{Config, Flags};
use cirro_node::node::{Directory, Meter, NodeConfig, NodeWorker, Snapshot};
use cirro_node::owner::OwnerRecord;
use cirro_node::server::{
    Admission, Door, Place, Waiting, WaitingList, door, keeper, run_worker, serve_what_is_free,
    wait_for_locks,
};
use cirro_node::state_dir::StateDir;
use cirro_node::store::uring::UringStore;
use cirro_node::volume::{Unfit, Volume, refuse_same_file};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERTYPE_DEFAULT, SECTOR_BYTES, Steer, Uuid, VolumeName};
use cirro_seal::{Identity, os_entropy};
use clap::Parser;

const PROGRAM: &str = "cirro-node";

fn main() -> ExitCode {
    let flags = Flags::parse();
    daemon::run(PROGRAM, || run(&flags))
}

fn run(flags: &Flags) -> anyhow::Result<()> {
    daemon::start_log(flags.verbose);
    let config = read_config(flags)?;
    let started = clock::now();
    let stop = Stop::on_signals().context("cannot take over signals")?;
    let volumes = config.volumes.iter().map(Volume::open).collect::<Result<Vec<_>, _>>()?;
    refuse_same_file(&volumes)?;
    let state = Arc::new(StateDir::open(&config.state_dir, random::fill)?);
    let owner_of = |volume: &Volume| Ok(state.read_owner(&volume.name)?.found_by(volume.is_volatile()));
    let owners = volumes.iter().map(owner_of).collect::<anyhow::Result<Vec<OwnerRecord>>>()?;
    let (process, links) = any::open(&config.link, ETHERTYPE_DEFAULT)
        .with_context(|| format!("cannot open link {}", config.link.interface))?;
    let facts = link_facts(&config, &links, started);
    let security = open_security(&config, &state)?;
    give_up_privileges(&config)?;

    let worker_of = |index: usize| (index % usize::from(config.link.workers)) as u16;
    let names = volumes.iter().enumerate().map(|(index, volume)| (volume.name, worker_of(index)));
    let directory = Arc::new(Directory::new(process, names));
    let common = Common {
        config: &config,
        state: &state,
        directory: Arc::clone(&directory),
        security: &security,
        process,
        incarnation: random::uuid(),
        stop: &stop,
    };
    let workers = (0u16..)
        .zip(links)
        .map(|(index, link)| common.start_worker(index, link))
        .collect::<anyhow::Result<Vec<_>>>()?;

    let placed =
        volumes.iter().enumerate().map(|(index, volume)| (volume.clone(), worker_of(index))).collect();
    let waiting = volumes.into_iter().zip(owners).enumerate().map(|(index, (volume, owner))| {
        let worker = worker_of(index);
        let door = workers[usize::from(worker)].door.clone();
        Waiting { admission: Admission { volume, owner }, worker, door, since: clock::now() }
    });
    let waiting: WaitingList = Arc::new(Mutex::new(waiting.collect()));
    let views = workers.iter().map(|worker| worker.view.clone()).collect();
    let taps = Taps::new(workers.iter().map(|worker| way_to(&worker.door)).collect());
    let doors = workers.iter().map(|worker| worker.door.clone()).collect();
    let mut control = Control {
        started,
        link: facts,
        views,
        waiting: Arc::clone(&waiting),
        taps,
        volumes: placed,
        directory,
        access: Arc::clone(&security.access),
        by_key: security.identity.is_some(),
        doors,
    };
    let server = Server::start(&config.ctl_socket, move |request: Request| control.answer(&request))?;
    serve_what_is_free(&waiting);
    log::info!("node {} is ready on {} as process {process}", state.node, config.link.interface);

    wait_for_locks(&waiting, &stop);
    stop.wait();
    log::info!("ending: what was begun is finished first");
    workers.iter().for_each(|worker| worker.door.end());
    let ended = workers.into_iter().map(|worker| join(worker.thread)).collect::<Vec<_>>();
    drop(server);
    ended.into_iter().collect::<anyhow::Result<()>>()?;
    log::info!("ended");
    Ok(())
}

/// Everything is open: becomes who it is to be, with no more than it needs from now on.
fn give_up_privileges(config: &Config) -> anyhow::Result<()> {
    let user = config.user.as_deref().map(User::named).transpose()?;
    if let Some(user) = &user {
        user.take(&config.state_dir)?;
        user.take(&config.state_dir.join("owners"))?;
        user.take_folder_of(&config.ctl_socket)?;
    }
    let needs = match config.link.reopens() {
        Reopens::Nothing => Needs::Nothing,
        Reopens::PacketSockets => Needs::PacketSockets,
        Reopens::XdpSockets => Needs::XdpSockets,
    };
    confine(user.as_ref(), needs)?;
    Ok(())
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

fn link_facts(config: &Config, links: &[AnyLink], started: Instant) -> report::Link {
    report::Link {
        interface: config.link.interface.clone(),
        address: links.first().map_or(String::new(), |link| link.address().to_string()),
        mtu: links.first().map_or(0, |link| link.mtu() as u32),
        state: report::State::plain(report::LinkState::Up, started.0),
        taps: Vec::new(),
        counters: None,
    }
}

/// Who the node is, and who may do what.
struct Security {
    /// Where frames are protected by keys.
    identity: Option<Arc<Identity>>,
    access: Arc<AccessList>,
}

fn open_security(config: &Config, state: &Arc<StateDir>) -> anyhow::Result<Security> {
    let psks = config.psks.iter().map(|psk| Ok((psk.client, keyfile::read(&psk.path)?)));
    let psks = psks.collect::<Result<_, KeyFileError>>()?;
    let access = Arc::new(AccessList::new(config.key.is_none(), &config.grants, psks, state)?);
    let Some(path) = &config.key else {
        log::warn!(
            "security is none: frames on {} are neither secret nor signed; use it on a wire that you trust",
            config.link.interface
        );
        return Ok(Security { identity: None, access });
    };
    let (private, new) = keyfile::read_or_make(path)?;
    let identity = Identity::new(private, os_entropy());
    let made = if new { " (new)" } else { "" };
    log::info!("the node's key, for --node-key of its clients: {}{made}", identity.public());
    for volume in &config.volumes {
        if access.granted(&volume.name).is_empty() {
            log::warn!(
                "volume {}: granted to nobody; give it to a client with `cirroctl volume grant {} KEY rw`",
                volume.name,
                volume.name
            );
        }
    }
    Ok(Security { identity: Some(Arc::new(identity)), access })
}

/// What all workers have in common.
struct Common<'a> {
    config: &'a Config,
    state: &'a Arc<StateDir>,
    directory: Arc<Directory>,
    security: &'a Security,
    process: u16,
    incarnation: Uuid,
    stop: &'a Stop,
}

/// A worker that runs.
struct Running {
    door: Door,
    view: View,
    thread: JoinHandle<anyhow::Result<()>>,
}

/// What the control thread sees of a worker.
#[derive(Clone)]
struct View {
    index: u16,
    meter: Arc<Meter>,
    snapshot: Reader<Snapshot>,
    drops: Arc<Drops>,
}

impl Common<'_> {
    fn start_worker(&self, index: u16, link: AnyLink) -> anyhow::Result<Running> {
        let config = self.config;
        let mut random_seed = [0; 16];
        random::fill(&mut random_seed);
        let (keeper, ready) = keeper(self.state).context("cannot start the keeper of owner records")?;
        let store = UringStore::new()
            .context("cannot set up io_uring (is it disabled by kernel.io_uring_disabled?)")?;
        let node = NodeConfig {
            node: self.state.node,
            incarnation: self.incarnation,
            secret: self.state.secret,
            random_seed,
            ethertype: ETHERTYPE_DEFAULT,
            steer: Steer::new(self.process, index),
            // A worker that spins can ack soon without waking up for it.
            ack_delay_max: Nanos::from_micros(if config.poll_us > 0 { 50 } else { 200 }),
            identity: self.security.identity.clone(),
            access: Arc::clone(&self.security.access),
            write_pool_bytes: config.write_pool_bytes,
            read_pool_bytes: config.read_pool_bytes,
        };
        let drops = link.drops();
        let worker = NodeWorker::new(node, Arc::clone(&self.directory), stack(link), store, keeper);
        let (door, seat) = door().context("cannot make a worker's door")?;
        let (publisher, snapshot) = Publisher::new(Snapshot::default());
        let view = View { index, meter: worker.meter(), snapshot, drops };
        let place = Place { seat, keeper: ready, publisher, poll: Nanos::from_micros(config.poll_us.into()) };
        let stop = self.stop.clone();
        let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
            let ended =
                run_worker(worker, place).with_context(|| format!("worker {index} cannot wait for events"));
            stop.ask();
            ended
        });
        Ok(Running { door, view, thread: thread.context("cannot start a worker thread")? })
    }
}

fn join(thread: JoinHandle<anyhow::Result<()>>) -> anyhow::Result<()> {
    thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread ended by a bug; its message is above")))
}

fn way_to(door: &Door) -> Way {
    let door = door.clone();
    Box::new(move |exchange| door.exchange(exchange))
}

/// What the control socket answers from.
struct Control {
    started: Instant,
    link: report::Link,
    views: Vec<View>,
    waiting: WaitingList,
    taps: Taps,
    /// As they were opened, each with its worker.
    volumes: Vec<(Volume, u16)>,
    directory: Arc<Directory>,
    access: Arc<AccessList>,
    by_key: bool,
    doors: Vec<Door>,
}

impl Control {
    fn answer(&mut self, request: &Request) -> Result<serde_json::Value, String> {
        let answer = match request {
            Request::Status {} | Request::Stats {} => return Report::Node(self.report()).answer(request),
            Request::LinkTapPush(push) => {
                self.push_taps(push).map(serde_json::to_value).map_err(anyhow::Error::from)
            }
            Request::LinkTapPop {} => self.pop_taps().map(serde_json::to_value).map_err(anyhow::Error::from),
            Request::VolumeGrant(VolumeGrant { volume, client, right }) => {
                let right = match right {
                    GrantRight::Ro => Right::ReadOnly,
                    GrantRight::Rw => Right::ReadWrite,
                };
                self.set_right(volume, client, right).map(serde_json::to_value)
            }
            Request::VolumeRevoke(VolumeRevoke { volume, client }) => {
                self.set_right(volume, client, Right::None).map(serde_json::to_value)
            }
            Request::VolumeGrants { volume } => {
                self.volume(volume).map(|volume| serde_json::to_value(self.grants(&volume)))
            }
            Request::VolumeResize(resize) => self.resize(resize).map(serde_json::to_value),
        };
        let value = answer.map_err(|error| format!("{error:#}"))?;
        value.map_err(|error| format!("the answer cannot be written: {error}"))
    }

    fn push_taps(&mut self, push: &TapPush) -> Result<TapPushed, TapError> {
        let limits = Limits { frame_bytes_max: push.frame_bytes_max, file_bytes_max: push.file_bytes_max };
        self.taps.push(&push.path, limits).map(|files| TapPushed { files: files.to_vec() })
    }

    fn pop_taps(&mut self) -> Result<TapPopped, TapError> {
        let files = self.taps.pop()?.into_iter().map(|(path, recorded)| TapFile {
            path,
            frames: recorded.frames,
            frames_missed: recorded.left_out,
        });
        Ok(TapPopped { files: files.collect() })
    }

    fn volume(&self, name: &str) -> anyhow::Result<VolumeName> {
        self.placed(name).map(|(volume, _)| volume.name)
    }

    fn placed(&self, name: &str) -> anyhow::Result<&(Volume, u16)> {
        let known = self.volumes.iter().find(|(volume, _)| volume.name.as_str() == name);
        known.with_context(|| format!("no volume {name:?} is served here"))
    }

    fn resize(&self, VolumeResize { volume, bytes }: &VolumeResize) -> anyhow::Result<Resized> {
        let (volume, worker) = self.placed(volume)?;
        let served = self.directory.steer_of(&volume.name).is_some();
        anyhow::ensure!(served, "volume {}: keeps its size: {}", volume.name, Unfit::NotServed);
        let door = &self.doors[usize::from(*worker)];
        let told = volume.resize(*bytes, |sectors| door.resize(volume.name, sectors))?;
        Ok(Resized {
            volume: volume.name.to_string(),
            bytes_before: told.sectors_before * SECTOR_BYTES as u64,
            bytes: *bytes,
            sessions_told: told.sessions,
        })
    }

    fn set_right(&self, volume: &str, client: &str, right: Right) -> anyhow::Result<Grants> {
        let (volume, client) = (self.volume(volume)?, client.parse::<Client>()?);
        let (security, named) = if self.by_key { ("keys", "public key") } else { ("none", "MAC address") };
        let fits = matches!(client, Client::Key(_)) == self.by_key;
        anyhow::ensure!(fits, "{client}: security is {security}, so a client is named by its {named}");
        if self.access.set(volume, client, right)? {
            log::info!("volume {volume}: client {client} has the right {} now", right.name());
            self.doors.iter().for_each(|door| door.end_sessions_of(volume, client));
        }
        Ok(self.grants(&volume))
    }

    fn grants(&self, volume: &VolumeName) -> Grants {
        let grants = self.access.granted(volume).into_iter().filter_map(|(client, right)| {
            let right = match right {
                Right::ReadOnly => GrantRight::Ro,
                Right::ReadWrite => GrantRight::Rw,
                Right::None => return None,
            };
            Some(GrantEntry { client: client.to_string(), right })
        });
        Grants {
            volume: volume.to_string(),
            open_to_all: self.access.is_open(volume),
            grants: grants.collect(),
        }
    }

    fn report(&self) -> NodeReport {
        let (mut workers, mut volumes, mut sessions) = (Vec::new(), Vec::new(), Vec::new());
        for view in &self.views {
            let mut seen = view.snapshot.read();
            let count = seen.sessions.len() as u32;
            workers.push(report::Worker {
                index: view.index,
                sessions: count,
                counters: Some(view.meter.snapshot()),
            });
            volumes.append(&mut seen.volumes);
            sessions.append(&mut seen.sessions);
        }
        for waiting in self.waiting.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            volumes.push(cirro_node::node::report_waiting(
                &waiting.admission.volume,
                waiting.worker,
                waiting.since.0,
            ));
        }
        let process = report::Process {
            program: PROGRAM.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_ns: self.started.0,
            now_ns: clock::now().0,
        };
        let sum = |count: fn(&Drops) -> &AtomicU64| {
            self.views.iter().map(|v| count(&v.drops).load(Ordering::Relaxed)).sum()
        };
        let counters = report::LinkCounters {
            ring_drops: sum(|drops| &drops.ring_full),
            refused: sessions.iter().filter_map(|s| s.counters.as_ref()).map(|c| c.frames_refused).sum(),
            rebuilds: sum(|drops| &drops.reopened),
        };
        let taps = self.taps.files().to_vec();
        let link = report::Link { taps, counters: Some(counters), ..self.link.clone() };
        NodeReport { process, links: vec![link], workers, volumes, sessions }
    }
}
