//! A VM host: the production backend with its disks, the guests behind them, and the VMM that stands between.
//!
//! Knows how a VMM starts, stops and reconnects; does not know the node. What survives `kill -9` of the backend is kept here and given to the next
//! process. Called by `world`.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use cirro_backend::attach::Attach;
use cirro_backend::disk::{Disk, DiskConfig};
use cirro_backend::guest_memory::Regions;
use cirro_backend::mailbox::{Answer, Awaited, Change, DiskId, Mailbox, mailbox};
use cirro_backend::mapped::Mapped;
use cirro_backend::protection::Protection;
use cirro_backend::record::Record;
use cirro_backend::replay::Replay;
use cirro_backend::stats::{DiskStats, WorkerStats};
use cirro_backend::trouble::OnTrouble;
use cirro_backend::worker::Worker;
use cirro_protocol::initiator::{Config, Initiator};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERTYPE_DEFAULT, Steer, Uuid};
use cirro_protocol::wire::Mode;
use fastrand::Rng;
use vm_memory::GuestAddress;

use crate::guest::{Belongings, Meddled, RING_BYTES, Ring, RingOptions};
use crate::keys;
use crate::machine::{Ended, Machine, drop_killed, ended};
use crate::oracle::{Oracle, Shared};
use crate::wire::{Port, SimLink};

/// Room for unflushed changes: little, so that it is full now and then.
const REPLAY_BYTES: u64 = 3 << 20;

/// A guest asks for 1 to 8 requests at a time, and rests after about every fourth time.
pub(crate) const REQUESTS_BETWEEN_RESTS: u64 = 18;

/// A disk of a host, as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskOptions {
    pub(crate) volume: usize,
    pub(crate) rings: Vec<RingOptions>,
    /// Requests of each ring in all.
    pub(crate) requests: usize,
    /// After about [`REQUESTS_BETWEEN_RESTS`] the guest asks for nothing for up to so long.
    pub(crate) rest_max: Nanos,
    /// The guest asks for write-through.
    pub(crate) write_through: bool,
    pub(crate) take_over: bool,
    pub(crate) on_trouble: OnTrouble,
}

/// Where a ring stands with the device.
enum Service {
    /// Not started, or the device died.
    Down,
    /// The guest is gone.
    Off,
    Up,
    /// A stop is awaited. Afterwards: begin anew, or go on as the same ring.
    Stopping {
        awaited: Awaited,
        anew: bool,
    },
}

struct GuestRing {
    ring: Ring,
    service: Service,
    left: usize,
    /// When the guest looks again by itself.
    next_look: Instant,
    /// Nothing is asked for before.
    rests_until: Instant,
}

/// A disk with its guest.
pub(crate) struct GuestDisk {
    pub(crate) options: DiskOptions,
    attachment: Uuid,
    starts: u64,
    memory: Regions,
    rings: Vec<GuestRing>,
    attach: Arc<Attach>,
    /// What is in flight: it outlives the process, not the host's power.
    record: Record,
    unflushed: Mapped,
    /// The VMM talks to the device.
    connected: bool,
    /// The VMM tries again then.
    reconnect_at: Instant,
}

/// A process.
struct Process {
    worker: Worker<SimLink>,
    mailbox: Mailbox,
    asleep: bool,
    kicked: bool,
}

/// The host.
pub(crate) struct Host {
    pub(crate) port: Rc<RefCell<Port>>,
    number: u16,
    process: Option<Process>,
    pub(crate) disks: Vec<GuestDisk>,
    meddled: Meddled,
    meddle_rng: Rc<RefCell<Rng>>,
    seed: u64,
    /// The guests ask for nothing more.
    pub(crate) quiet: bool,
    /// With keys: the seed they come from.
    keys: Option<u64>,
    /// Interrupted requests are found late: the guest is slow.
    pub(crate) think_max: Nanos,
    reconnect: Nanos,
}

/// What a host is made of.
pub(crate) struct HostParts {
    pub(crate) port: Rc<RefCell<Port>>,
    pub(crate) number: u16,
    pub(crate) disks: Vec<DiskOptions>,
    pub(crate) oracles: Vec<Rc<RefCell<Oracle>>>,
    pub(crate) court: Shared,
    pub(crate) volume_sectors: u64,
    pub(crate) think_max: Nanos,
    pub(crate) seed: u64,
    /// With keys: the seed they come from.
    pub(crate) keys: Option<u64>,
}

impl Host {
    pub(crate) fn new(parts: HostParts) -> Host {
        let meddled = Meddled::default();
        let attachment = |disk: usize| Uuid([(parts.number as u8 + 1) * 16 + disk as u8; 16]);
        let disks = parts.disks.iter().enumerate().map(|(index, options)| {
            let bytes = (RING_BYTES * options.rings.len() as u64) as usize;
            let memory = Regions::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory for a guest");
            let belongings = Belongings {
                memory: memory.clone(),
                attachment: attachment(index),
                oracle: Rc::clone(&parts.oracles[options.volume]),
                court: Rc::clone(&parts.court),
                meddled: Rc::clone(&meddled),
                volume_sectors: parts.volume_sectors,
            };
            let ring = |(at, ring): (usize, &RingOptions)| GuestRing {
                ring: Ring::new(at as u64, ring.clone(), &belongings),
                service: Service::Down,
                left: options.requests,
                next_look: Instant::default(),
                rests_until: Instant::default(),
            };
            GuestDisk {
                attachment: attachment(index),
                starts: 0,
                rings: options.rings.iter().enumerate().map(ring).collect(),
                memory,
                attach: Arc::default(),
                record: Record::in_memory(options.rings.len() as u16),
                unflushed: Mapped::in_memory(Replay::bytes(REPLAY_BYTES)),
                connected: false,
                reconnect_at: Instant::default(),
                options: options.clone(),
            }
        });
        Host {
            disks: disks.collect(),
            port: parts.port,
            number: parts.number,
            process: None,
            meddled,
            meddle_rng: Rc::new(RefCell::new(Rng::with_seed(parts.seed ^ 77))),
            seed: parts.seed,
            keys: parts.keys,
            quiet: false,
            think_max: parts.think_max,
            reconnect: Nanos::from_millis(10),
        }
    }

    /// True if this is the attachment of a disk that may take its volume from another.
    pub(crate) fn may_take_over(&self, attachment: Uuid) -> bool {
        self.disks.iter().any(|disk| disk.attachment == attachment && disk.options.take_over)
    }

    pub(crate) fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// Starts the backend.
    pub(crate) fn start(&mut self, now: Instant) {
        self.port.borrow_mut().clear();
        let (mailbox, inbox) = mailbox().expect("a mailbox");
        let steer = Steer::new(self.number + 10, 0);
        let (meddled, rng) = (Rc::clone(&self.meddled), Rc::clone(&self.meddle_rng));
        let meddle = move || scribble(&meddled, &mut rng.borrow_mut());
        let link = SimLink::new(&self.port, Some(Rc::new(meddle)));
        let mut worker = Worker::new(link, steer, inbox, Arc::new(WorkerStats::default()));
        let (address, mtu) = (self.port.borrow().address, self.port.borrow().mtu);
        for (index, disk) in self.disks.iter_mut().enumerate() {
            disk.starts += 1;
            disk.connected = false;
            disk.reconnect_at = now + self.reconnect;
            disk.attach = Arc::new(Attach::new(disk.attach.get().or(disk.attach.remembered())));
            let first = disk.starts == 1;
            let config = Config {
                volume: Machine::volume_name(disk.options.volume),
                mode: if self.keys.is_some() { Mode::Aead } else { Mode::Crc },
                attachment: disk.attachment,
                session_epoch: disk.starts << 32,
                address,
                ethertype: ETHERTYPE_DEFAULT,
                node_address: None,
                steer,
                cid_index: index as u16,
                mtu: mtu as u16,
                slots: 256,
                take_over: disk.options.take_over && first,
                ack_delay_max: Nanos::from_micros(50),
                random_seed: self.seed ^ (disk.starts << 8) ^ index as u64,
            };
            let made = Disk::new(DiskConfig {
                volume: config.volume,
                read_only: false,
                queues: disk.rings.len() as u16,
                initiator: Initiator::new(config, now),
                protection: Protection::new(
                    self.keys.map(|seed| keys::caller(seed, self.number, disk.starts << 8 | index as u64)),
                ),
                attach: Arc::clone(&disk.attach),
                record: disk.record.clone(),
                replay: Replay::new(disk.unflushed.clone(), 0, REPLAY_BYTES),
                on_trouble: disk.options.on_trouble,
                stats: Arc::new(DiskStats::default()),
            });
            worker.add(DiskId(index as u16), made);
        }
        self.process = Some(Process { worker, mailbox, asleep: false, kicked: false });
    }

    /// `kill -9` of the backend; the guests live.
    pub(crate) fn kill(&mut self) {
        drop_killed(self.process.take());
        self.port.borrow_mut().clear();
        for ring in self.disks.iter_mut().flat_map(|disk| &mut disk.rings) {
            match ring.service {
                Service::Stopping { anew: true, .. } => ring.ring.reset(),
                Service::Off => continue,
                Service::Stopping { .. } | Service::Up | Service::Down => {}
            }
            ring.service = Service::Down;
        }
    }

    /// SIGTERM of the backend: it lets go of its rings and of its volumes, and will be gone soon.
    pub(crate) fn stop(&mut self) {
        let Some(process) = &mut self.process else { return };
        for (index, disk) in self.disks.iter_mut().enumerate() {
            let id = DiskId(index as u16);
            disk.connected = false;
            disk.reconnect_at = Instant(u64::MAX);
            for (number, ring) in disk.rings.iter_mut().enumerate() {
                if matches!(ring.service, Service::Up) {
                    drop(process.mailbox.send(id, Change::Stop { ring: number as u16 }));
                    ring.service = Service::Down;
                }
            }
            drop(process.mailbox.send(id, Change::Close));
        }
        process.kicked = true;
    }

    /// The host loses power: guests and all.
    pub(crate) fn lose_power(&mut self) {
        self.kill();
        for disk in &mut self.disks {
            disk.record = Record::in_memory(disk.rings.len() as u16);
            disk.unflushed = Mapped::in_memory(Replay::bytes(REPLAY_BYTES));
            disk.rings.iter_mut().for_each(|ring| ring.ring.reset());
        }
    }

    /// The guest's driver of a disk begins anew (`anew`), or the VMM stops it and lets it go on.
    pub(crate) fn restart_rings(&mut self, disk: usize, anew: bool) {
        let Some(process) = &self.process else { return };
        let id = DiskId(disk as u16);
        let disk = &mut self.disks[disk];
        for (index, ring) in disk.rings.iter_mut().enumerate() {
            if matches!(ring.service, Service::Up) {
                let awaited = process.mailbox.send(id, Change::Stop { ring: index as u16 });
                ring.service = Service::Stopping { awaited, anew };
            }
        }
    }

    /// The guests do what is left without a rest.
    pub(crate) fn rest_no_more(&mut self) {
        for disk in &mut self.disks {
            disk.options.rest_max = Nanos(0);
            disk.rings.iter_mut().for_each(|ring| ring.rests_until = Instant::default());
        }
    }

    /// Ends the guests that still wait: their VMMs go away.
    pub(crate) fn shut_down_waiting(&mut self) {
        let Some(process) = &mut self.process else { return };
        for (index, disk) in self.disks.iter_mut().enumerate() {
            for (number, ring) in disk.rings.iter_mut().enumerate() {
                ring.left = 0;
                if ring.ring.in_flight() == 0 || !matches!(ring.service, Service::Up) {
                    continue;
                }
                let stop = Change::Stop { ring: number as u16 };
                drop(process.mailbox.send(DiskId(index as u16), stop));
                process.kicked = true;
                ring.ring.give_up();
                ring.service = Service::Off;
            }
        }
    }

    /// Nothing is in flight and nothing is left to be asked for.
    pub(crate) fn is_done(&self) -> bool {
        self.disks.iter().flat_map(|disk| &disk.rings).all(|ring| {
            ring.ring.in_flight() == 0
                && (self.quiet || ring.left == 0)
                && !matches!(ring.service, Service::Stopping { .. })
        })
    }

    /// One line on what is not done.
    pub(crate) fn report(&self) -> String {
        let rings = self
            .disks
            .iter()
            .enumerate()
            .flat_map(|(disk, of)| of.rings.iter().enumerate().map(move |ring| (disk, of, ring)));
        let line = |(disk, of, (index, ring)): (usize, &GuestDisk, (usize, &GuestRing))| {
            let service = match ring.service {
                Service::Down => "down",
                Service::Off => "off",
                Service::Up => "up",
                Service::Stopping { .. } => "stopping",
            };
            format!(
                "disk {disk} ring {index}: {service}, connected {}, {} in flight, {} left",
                of.connected,
                ring.ring.in_flight(),
                ring.left
            )
        };
        rings.map(line).collect::<Vec<_>>().join("; ")
    }

    /// The VMM and the guests do what is due. Says when they want to look again.
    pub(crate) fn live(&mut self, now: Instant, rng: &mut Rng) -> Option<Instant> {
        let mut next: Option<Instant> = None;
        let mut wake = |at: Instant| next = Some(next.map_or(at, |next: Instant| next.min(at)));
        let Some(process) = &mut self.process else { return None };
        for (index, disk) in self.disks.iter_mut().enumerate() {
            let id = DiskId(index as u16);
            if !disk.connected {
                if now < disk.reconnect_at {
                    wake(disk.reconnect_at);
                } else if disk.attach.get().or(disk.attach.remembered()).is_some() {
                    disk.connect(&process.mailbox, id);
                    process.kicked = true;
                } else {
                    disk.reconnect_at = now + Nanos::from_millis(5);
                    wake(disk.reconnect_at);
                }
            }
            for (number, ring) in disk.rings.iter_mut().enumerate() {
                if disk.connected {
                    ring.follow_stop(&process.mailbox, (id, number as u16));
                }
                if matches!(ring.service, Service::Off) {
                    continue;
                }
                let reaped = ring.ring.reap(false);
                if !matches!(ring.service, Service::Up) || self.quiet || ring.left == 0 {
                    continue;
                }
                if now >= ring.rests_until && (reaped > 0 || now >= ring.next_look) {
                    let before = ring.ring.in_flight();
                    let count = rng.usize(1..=8).min(ring.left);
                    process.kicked |= ring.ring.submit(rng, count);
                    ring.left -= ring.ring.in_flight() - before;
                    ring.next_look = now + Nanos(rng.u64(0..self.think_max.0.max(1)));
                    let rest_max = disk.options.rest_max.0;
                    if rest_max > 0 && rng.u8(0..4) == 0 {
                        ring.rests_until = now + Nanos(rng.u64(0..rest_max));
                    }
                }
                wake(ring.next_look.max(ring.rests_until).max(now + Nanos(1)));
            }
        }
        next
    }

    /// True if the process has a reason to take a turn.
    pub(crate) fn is_called(&self) -> bool {
        let Some(process) = &self.process else { return false };
        !process.asleep || process.kicked || self.port.borrow().has_frames()
    }

    /// One turn of the process.
    pub(crate) fn turn(&mut self, now: Instant) -> Ended {
        let Some(process) = &mut self.process else { return Ended::At(None) };
        (process.asleep, process.kicked) = (false, false);
        let worker = &mut process.worker;
        let turned = catch_unwind(AssertUnwindSafe(|| {
            let turn = worker.turn(now);
            worker.kick_changes().for_each(drop);
            let sleeps = !turn.busy && worker.may_sleep();
            (turn.wake_at, sleeps)
        }));
        match turned {
            Ok((wake_at, true)) => {
                process.asleep = true;
                Ended::At(wake_at)
            }
            Ok((_, false)) => Ended::At(Some(now)),
            Err(cause) => ended(cause.as_ref()),
        }
    }

    /// A command waits in the mailbox.
    pub(crate) fn ring_bell(&mut self) {
        if let Some(process) = &mut self.process {
            process.kicked = true;
        }
    }

    pub(crate) fn check_poison(&mut self) {
        self.disks.iter_mut().flat_map(|disk| &mut disk.rings).for_each(|ring| ring.ring.check_poison());
    }
}

impl GuestDisk {
    /// The handshake of a VMM: what the device needs to serve its rings.
    fn connect(&mut self, mailbox: &Mailbox, id: DiskId) {
        self.connected = true;
        drop(mailbox.send(id, Change::WriteThrough(self.options.write_through)));
        drop(mailbox.send(id, Change::Memory(self.memory.clone())));
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if !matches!(ring.service, Service::Off) {
                let base = ring.ring.used_index();
                ring.start(mailbox, (id, index as u16), base);
            }
        }
    }
}

impl GuestRing {
    fn start(&mut self, mailbox: &Mailbox, (disk, ring): (DiskId, u16), next_avail: u16) {
        let kick = std::fs::File::open("/dev/null").expect("/dev/null");
        let call = rustix::io::dup(&*self.ring.call).expect("a descriptor");
        let queue = self.ring.state(next_avail);
        drop(mailbox.send(disk, Change::Start { ring, queue, kick, call: Some(call.into()) }));
        self.service = Service::Up;
        // A guest that begins anew reads at once.
        self.rests_until = Instant::default();
    }

    /// A stop that has been answered: the same ring goes on, or the driver begins anew.
    fn follow_stop(&mut self, mailbox: &Mailbox, at: (DiskId, u16)) {
        let Service::Stopping { awaited, anew } = &self.service else { return };
        let Some(Answer::Stopped { next_avail, .. }) = awaited.look() else { return };
        self.ring.reap(true);
        if *anew {
            self.ring.reset();
            self.start(mailbox, at, 0);
        } else {
            self.start(mailbox, at, next_avail);
        }
    }
}

/// A guest changes what it writes while it is written.
fn scribble(meddled: &Meddled, rng: &mut Rng) {
    use vm_memory::Bytes;
    for (memory, at, len) in meddled.borrow().values() {
        let noise = rng.u8(..);
        memory.write_obj(noise, GuestAddress(at + u64::from(rng.u32(0..*len)))).expect("guest memory");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop_killed(self.process.take());
    }
}
