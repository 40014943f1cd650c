//! The real device on a unix socket, driven by the front-end of the `vhost` crate; the worker has its own thread, with the node on a link in memory.
//!
//! It is also the proof behind docs/decisions/0002: the crate starts no thread of its own and polls no kick.

mod rig;

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cirro_backend::attach::Attach;
use cirro_backend::config::{DiskEntry, Socket};
use cirro_backend::disk::{Disk, DiskConfig};
use cirro_backend::guest_memory::Regions;
use cirro_backend::mailbox::{Answer, Change, DiskId, Inbox, Mailbox, mailbox};
use cirro_backend::protection::Protection;
use cirro_backend::record::Record;
use cirro_backend::replay::Replay;
use cirro_backend::server::{DiskServer, Listening, run_worker};
use cirro_backend::state::State;
use cirro_backend::worker::Worker;
use cirro_ctl::stop::Stop;
use cirro_link::memory::{MemoryLink, pair};
use cirro_link::tap::{Limits, Tap};
use cirro_link::taps::Taps;
use cirro_link::{FrameId, Link, Received, TxFrame, clock};
use cirro_protocol::initiator::{Config, Initiator};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::{ETHERTYPE_DEFAULT, MacAddress, Steer, Uuid};
use cirro_protocol::wire::Mode;
use rig::guest::{DATA, Ring, SIZE, Used, pattern};
use rig::node::Node;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY_BYTES: usize = 8 << 20;
const IMAGE_BYTES: usize = 4 << 20;
/// Where the front-end pretends to have the guest's memory.
const FRONT_END_ADDRESS: u64 = 0x7f00_0000_0000;

/// The backend's end of the link; the node behind it takes its turns whenever the backend looks for frames.
struct NodeLink {
    link: MemoryLink,
    node: Node,
    silent: Arc<AtomicBool>,
    /// Never readable.
    quiet: (UnixStream, UnixStream),
}

impl Link for NodeLink {
    fn mtu(&self) -> usize {
        self.link.mtu()
    }

    fn address(&self) -> MacAddress {
        self.link.address()
    }

    fn receive(&mut self) -> Option<Received<'_>> {
        let now = clock::now();
        self.link.set_now(now);
        self.node.silent = self.silent.load(Ordering::Relaxed);
        self.node.step(now);
        self.link.receive()
    }

    fn frame(&mut self) -> Option<&mut TxFrame> {
        self.link.frame()
    }

    fn commit(&mut self, id: FrameId) {
        self.link.commit(id);
    }

    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        self.link.flush(refused);
    }

    /// The node has nobody else to wake it up.
    fn poll_timeout(&self) -> Option<cirro_protocol::time::Instant> {
        Some(clock::now() + Nanos::from_millis(1))
    }
}

impl AsFd for NodeLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.quiet.0.as_fd()
    }
}

fn worker_of(inbox: Inbox, attach: Arc<Attach>, silent: Arc<AtomicBool>) -> Worker<Tap<NodeLink>> {
    let (here, there) = pair(9000);
    let config = Config {
        volume: "vol".parse().unwrap(),
        mode: Mode::Crc,
        attachment: Uuid([1; 16]),
        session_epoch: 1 << 32,
        address: here.address(),
        ethertype: ETHERTYPE_DEFAULT,
        node_address: None,
        steer: Steer::new(0, 0),
        cid_index: 0,
        mtu: 9000,
        slots: 256,
        take_over: false,
        ack_delay_max: Nanos::from_micros(50),
        random_seed: 9,
    };
    let disk = Disk::new(DiskConfig {
        volume: config.volume,
        read_only: false,
        queues: 2,
        initiator: Initiator::new(config, clock::now()),
        protection: Protection::new(None),
        attach,
        record: Record::in_memory(2),
        replay: Replay::in_memory(2 << 20),
        on_trouble: Default::default(),
        stats: Arc::default(),
    });
    let node = Node::new(there, IMAGE_BYTES);
    let link = NodeLink { link: here, node, silent, quiet: UnixStream::pair().unwrap() };
    let mut worker = Worker::new(Tap::new(link), Steer::new(0, 0), inbox, Arc::default());
    worker.add(DiskId(0), disk);
    worker
}

/// A backend with one disk on a socket.
struct Backend {
    path: PathBuf,
    stop: Stop,
    ended: Arc<AtomicBool>,
    silent: Arc<AtomicBool>,
    mailbox: Mailbox,
    /// Another one goes on with its state.
    keeps_state: bool,
    threads: Vec<JoinHandle<()>>,
}

impl Backend {
    fn start(name: &str) -> Backend {
        Backend::start_with(name, false)
    }

    /// With a node that says something, or with a `silent` one.
    fn start_with(name: &str, silent: bool) -> Backend {
        let path = std::env::temp_dir().join(format!("cirro-vhost-{}-{name}", std::process::id()));
        let (mailbox, inbox) = mailbox().unwrap();
        let state =
            State::open(&path.with_extension("state"), "vol".parse().unwrap(), Uuid([1; 16])).unwrap();
        let (attach, stop) = (Arc::new(Attach::new(state.volume())), Stop::new().unwrap());
        let (ended, silent) = (Arc::<AtomicBool>::default(), Arc::new(AtomicBool::new(silent)));
        let listening = Listening::open(&Socket::Path(path.clone())).unwrap();
        let server = DiskServer {
            id: DiskId(0),
            entry: DiskEntry {
                volume: "vol".parse().unwrap(),
                socket: Socket::Path(path.clone()),
                node: None,
                node_key: None,
                read_only: false,
                queues: 2,
                queue_size: SIZE,
                on_trouble: Default::default(),
                take_over: false,
            },
            link: "memory".into(),
            mailbox: mailbox.clone(),
            attach: Arc::clone(&attach),
            state: Arc::new(state),
            stop: stop.clone(),
            connected: Arc::default(),
        };
        let (worker_ended, worker_silent) = (Arc::clone(&ended), Arc::clone(&silent));
        let worker = std::thread::spawn(move || {
            run_worker(worker_of(inbox, attach, worker_silent), &worker_ended, Nanos::from_micros(20))
                .unwrap();
        });
        let disk = std::thread::spawn(move || server.run(&listening).unwrap());
        Backend { path, stop, ended, silent, mailbox, keeps_state: false, threads: vec![disk, worker] }
    }

    fn session(&self) -> cirro_backend::stats::SessionReport {
        match self.mailbox.ask(DiskId(0), Change::Report) {
            Some(Answer::Session(report)) => *report,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.ask();
        let worker = self.threads.pop().unwrap();
        let disk = self.threads.pop().unwrap().join();
        self.ended.store(true, Ordering::Relaxed);
        let _ = self.mailbox.send(DiskId(0), Change::Report);
        let worker = worker.join();
        if !std::thread::panicking() {
            assert!(disk.is_ok() && worker.is_ok(), "the backend's threads end cleanly");
            assert!(!self.path.exists(), "the socket is removed");
        }
        if !self.keeps_state {
            let _ = std::fs::remove_dir_all(self.path.with_extension("state"));
        }
    }
}

/// A front-end and its guest with one ring.
struct Guest {
    frontend: Frontend,
    ring: Ring,
    kick: EventFd,
    call: EventFd,
    _file: File,
    features: u64,
}

impl Guest {
    fn connect(backend: &Backend, memory: Option<(File, Regions)>) -> Guest {
        let mut frontend = Frontend::connect(&backend.path, 2).unwrap();
        let features = frontend.get_features().unwrap();
        frontend.set_owner().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE;
        assert_eq!(protocol & wanted, wanted);
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(frontend.get_queue_num().unwrap(), 2);
        let (file, regions) = memory.unwrap_or_else(|| new_memory(&backend.path));
        let ring = Ring::new(&regions, 0, true);
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Guest { frontend, ring, kick: event(), call: event(), _file: file, features }
    }

    /// What QEMU does at DRIVER_OK.
    fn start(&mut self, base: u16) {
        let frontend = &mut self.frontend;
        frontend.set_features(self.features).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: FRONT_END_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self._file.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).unwrap();
        let state = self.ring.state();
        frontend.set_vring_num(0, state.size).unwrap();
        frontend.set_vring_base(0, base).unwrap();
        let addresses = VringConfigData {
            queue_max_size: SIZE,
            queue_size: state.size,
            flags: 0,
            desc_table_addr: FRONT_END_ADDRESS + state.desc_table,
            used_ring_addr: FRONT_END_ADDRESS + state.used_ring,
            avail_ring_addr: FRONT_END_ADDRESS + state.avail_ring,
            log_addr: None,
        };
        frontend.set_vring_addr(0, &addresses).unwrap();
        frontend.set_vring_call(0, &self.call).unwrap();
        frontend.set_vring_kick(0, &self.kick).unwrap();
        frontend.set_vring_enable(0, true).unwrap();
    }

    fn wait(&mut self, count: usize) -> Vec<Used> {
        let end = Instant::now() + Duration::from_secs(20);
        let mut used = Vec::new();
        while used.len() < count {
            assert!(Instant::now() < end, "{count} requests came back, {} did", used.len());
            used.extend(self.ring.used());
            std::thread::sleep(Duration::from_micros(100));
        }
        used
    }

    fn one(&mut self, kind: u32, sector: u64, len: u32) -> Used {
        self.ring.add(kind, sector, DATA, len);
        self.kick.write(1).unwrap();
        self.wait(1)[0]
    }
}

fn new_memory(beside: &std::path::Path) -> (File, Regions) {
    let path = beside.with_extension("memory");
    let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(MEMORY_BYTES as u64).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let regions = Regions::from_ranges_with_files([(GuestAddress(0), MEMORY_BYTES, Some(offset))]).unwrap();
    (file, regions)
}

fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok()).collect()
}

#[test]
fn a_guest_works_on_its_disk_and_the_crate_starts_no_thread_for_it() {
    let backend = Backend::start("works");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    assert!(threads().iter().all(|name| !name.starts_with("vring_worker")), "{:?}", threads());
    guest.call.read().expect("the guest is signalled when a ring starts");
    let bytes = pattern(1, 65_536);
    guest.ring.write(DATA, &bytes);
    assert_eq!(guest.one(1, 8, 65_536).status, 0);
    guest.ring.write(DATA, &[0; 65_536]);
    let read = guest.one(0, 8, 65_536);
    assert_eq!((read.status, read.len), (0, 65_537));
    assert!(guest.ring.read(DATA, 65_536) == bytes);
    guest.call.read().expect("the guest is signalled when its request is done");
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 2);
}

/// Virtio 1.2, section 2.7, allows any power of two; a driver may put header and data, or data and status, into one descriptor.
#[test]
fn a_ring_of_two_holds_a_request() {
    let backend = Backend::start("two");
    let mut guest = Guest::connect(&backend, None);
    guest.ring = Ring::of_size(&guest.ring.memory, 0, true, 2);
    guest.start(0);
    let status = |guest: &mut Guest, kind, bytes| {
        let at = guest.ring.add_in_two(kind, 8, bytes);
        guest.kick.write(1).unwrap();
        let used = guest.wait(1)[0];
        (guest.ring.read(at, 1)[0], used.len)
    };
    // More than the ring has places, so that its indices come round.
    for turn in 0..5 {
        guest.ring.write(DATA + 16, &pattern(turn, 8192));
        assert_eq!(status(&mut guest, 1, 8192), (0, 1));
        guest.ring.write(DATA + 16, &[0; 8192]);
        assert_eq!(status(&mut guest, 0, 8192), (0, 8193));
        assert!(guest.ring.read(DATA + 16, 8192) == pattern(turn, 8192));
    }
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 10);
}

#[test]
fn the_configuration_is_read_whole_and_writeback_is_written() {
    let backend = Backend::start("config");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    for size in [57u32, 60] {
        let (_, config) = guest
            .frontend
            .get_config(0, size, VhostUserConfigFlags::WRITABLE, &vec![0; size as usize])
            .unwrap();
        assert_eq!(config.len(), size as usize);
        assert_eq!(config[..8], (IMAGE_BYTES as u64 / 512).to_le_bytes(), "capacity");
        assert_eq!((config[32], config[34]), (1, 2), "writeback, num_queues");
    }
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    let (_, config) = guest.frontend.get_config(32, 1, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    assert_eq!(config, [0]);
    assert_eq!(guest.one(1, 0, 512).status, 0, "a write-through write");
}

#[test]
fn a_front_end_that_comes_back_finds_the_same_disk() {
    let backend = Backend::start("again");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    guest.ring.write(DATA, &pattern(4, 4096));
    assert_eq!(guest.one(1, 0, 4096).status, 0);
    let Guest { frontend, ring, _file: file, features, .. } = guest;
    drop(frontend);
    // QEMU's base after a reconnect is the used index.
    let base = ring.state().next_used;
    let mut again = Guest::connect(&backend, Some((file, ring.memory.clone())));
    assert_eq!(again.features, features);
    again.ring = ring;
    again.start(base);
    again.ring.write(DATA, &[0; 4096]);
    assert_eq!(again.one(0, 0, 4096).status, 0);
    assert_eq!(again.ring.read(DATA, 4096), pattern(4, 4096));
}

/// P-94: the ring is looked at when it starts.
#[test]
fn a_backend_that_starts_before_its_node_offers_the_disk_it_offered_before() {
    let mut backend = Backend::start("before");
    backend.keeps_state = true;
    let mut guest = Guest::connect(&backend, None);
    let config = |guest: &mut Guest| {
        guest.frontend.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap().1
    };
    let (features, told) = (guest.features, config(&mut guest));
    drop((guest, backend));

    let backend = Backend::start_with("before", true);
    let mut guest = Guest::connect(&backend, None);
    assert_eq!((guest.features, config(&mut guest)), (features, told));
    guest.start(0);
    guest.ring.write(DATA, &pattern(4, 4096));
    guest.ring.add(1, 0, DATA, 4096);
    guest.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.ring.used().is_empty(), "no node is there");
    backend.silent.store(false, Ordering::Relaxed);
    assert_eq!(guest.wait(1)[0].status, 0);
}

#[test]
fn requests_made_available_before_the_start_need_no_kick() {
    let backend = Backend::start("early");
    let mut guest = Guest::connect(&backend, None);
    guest.ring.add(0, 0, DATA, 4096);
    guest.start(0);
    assert_eq!(guest.wait(1)[0].status, 0);
}

#[test]
fn a_disabled_ring_is_not_served_and_goes_on_when_it_is_enabled() {
    let backend = Backend::start("enable");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    assert_eq!(guest.one(0, 0, 512).status, 0);
    guest.frontend.set_vring_enable(0, false).unwrap();
    guest.ring.add(0, 0, DATA, 512);
    guest.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.ring.used().is_empty());
    guest.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.wait(1)[0].status, 0);
}

/// P-95: the same, seen by the front-end.
#[test]
fn a_stop_with_a_silent_node_is_answered_in_about_two_seconds() {
    let backend = Backend::start("stop");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    assert_eq!(guest.one(0, 0, 512).status, 0);
    backend.silent.store(true, Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(5));
    guest.ring.add(0, 0, DATA, 4096);
    guest.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let asked = Instant::now();
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 2, "used index 1 and one request in flight");
    assert!((1900..2800).contains(&asked.elapsed().as_millis()), "{:?}", asked.elapsed());
    assert_eq!(backend.session().rings, 0);
    backend.silent.store(false, Ordering::Relaxed);
    guest.start(2);
    assert_eq!(guest.wait(1)[0].status, 0, "the request is issued again");
}

#[test]
fn a_reset_device_starts_afresh_on_the_same_connection() {
    let backend = Backend::start("reset");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    assert_eq!(guest.one(0, 0, 512).status, 0);
    guest.frontend.reset_device().unwrap();
    assert_eq!(backend.session().rings, 0);
    let memory = guest.ring.memory.clone();
    guest.ring = Ring::new(&memory, 1, true);
    guest.start(0);
    assert_eq!(guest.one(0, 0, 512).status, 0);
    assert_eq!(backend.session().rings, 1);
}

#[test]
fn frames_are_recorded_while_a_guest_works_and_the_guest_sees_nothing_of_it() {
    let backend = Backend::start("tap");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    let mailbox = backend.mailbox.clone();
    let mut taps = Taps::new(vec![Box::new(move |exchange| mailbox.exchange(exchange))]);
    let path = backend.path.with_extension("pcap");
    assert_eq!(guest.one(0, 0, 512).status, 0);
    let seen = |backend: &Backend| {
        let stats = backend.session().stats;
        stats.frames_sent + stats.frames_received
    };
    let before = seen(&backend);
    taps.push(&path, Limits::default()).unwrap();
    for sector in 0..20u32 {
        assert_eq!(guest.one(sector % 2, sector.into(), 4096).status, 0);
    }
    let ended = taps.pop().unwrap();
    let during = seen(&backend) - before;
    assert_eq!(guest.one(1, 0, 512).status, 0);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    // 20 requests and their answers at least, and nothing that the session does not know of but what came just before and after.
    let (file, recorded) = &ended[0];
    assert_eq!((file, recorded.left_out), (&path, 0));
    assert!((40..=during).contains(&recorded.frames), "{recorded:?}, {during} frames sent and received");
    let data: usize = 20 * 4096;
    assert!(bytes.len() > data + 24 && bytes.len() < 2 * data, "{} bytes in the file", bytes.len());
}

#[test]
fn a_front_end_that_talks_nonsense_loses_its_connection_and_nobody_else_does() {
    use std::io::Write;
    let backend = Backend::start("nonsense");
    for nonsense in [&[0xff; 64][..], &[1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = std::os::unix::net::UnixStream::connect(&backend.path).unwrap();
        stream.write_all(nonsense).unwrap();
    }
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    assert_eq!(guest.one(0, 0, 512).status, 0);
    assert_ne!(guest.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), 0);
}
