//! The real device on a unix socket with its worker on a thread, a node on a link in memory behind it, and the front-end of the `vhost` crate.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::guest::{DATA, Ring, SIZE, Used};
use super::node::Node;
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
use cirro_link::tap::Tap;
use cirro_link::{FrameId, Link, Received, TxFrame, clock};
use cirro_protocol::initiator::{Config, Initiator};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::{ETHERTYPE_DEFAULT, MacAddress, Steer, Uuid};
use cirro_protocol::wire::Mode;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const MEMORY_BYTES: usize = 8 << 20;
pub(crate) const IMAGE_BYTES: usize = 4 << 20;
/// Where the front-end pretends to have the guest's memory.
const FRONT_END_ADDRESS: u64 = 0x7f00_0000_0000;

/// The backend's end of the link; the node behind it takes its turns whenever the backend looks for frames.
struct NodeLink {
    link: MemoryLink,
    node: Node,
    silent: Arc<AtomicBool>,
    /// Bytes of the volume.
    size: Arc<AtomicUsize>,
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
        let bytes = self.size.load(Ordering::Relaxed);
        if self.node.image.len() != bytes {
            self.node.resize(bytes);
        }
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

fn worker_of(
    inbox: Inbox,
    attach: Arc<Attach>,
    (silent, size): (Arc<AtomicBool>, Arc<AtomicUsize>),
) -> Worker<Tap<NodeLink>> {
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
    let link = NodeLink { link: here, node, silent, size, quiet: UnixStream::pair().unwrap() };
    let mut worker = Worker::new(Tap::new(link), Steer::new(0, 0), inbox, Arc::default());
    worker.add(DiskId(0), disk);
    worker
}

/// A backend with one disk on a socket.
pub(crate) struct Backend {
    pub(crate) path: PathBuf,
    stop: Stop,
    ended: Arc<AtomicBool>,
    pub(crate) silent: Arc<AtomicBool>,
    size: Arc<AtomicUsize>,
    pub(crate) mailbox: Mailbox,
    attach: Arc<Attach>,
    /// Another one goes on with its state.
    pub(crate) keeps_state: bool,
    threads: Vec<JoinHandle<()>>,
}

impl Backend {
    pub(crate) fn start(name: &str) -> Backend {
        Backend::start_with(name, false)
    }

    /// With a node that says something, or with a `silent` one.
    pub(crate) fn start_with(name: &str, silent: bool) -> Backend {
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
        let size = Arc::new(AtomicUsize::new(IMAGE_BYTES));
        let known = Arc::clone(&attach);
        let (worker_ended, node) = (Arc::clone(&ended), (Arc::clone(&silent), Arc::clone(&size)));
        let worker = std::thread::spawn(move || {
            run_worker(worker_of(inbox, attach, node), &worker_ended, Nanos::from_micros(20)).unwrap();
        });
        let disk = std::thread::spawn(move || server.run(&listening).unwrap());
        Backend {
            path,
            stop,
            ended,
            silent,
            size,
            mailbox,
            attach: known,
            keeps_state: false,
            threads: vec![disk, worker],
        }
    }

    /// The volume has `bytes` from now on; returns when the disk has them.
    pub(crate) fn resize(&self, bytes: usize) {
        self.size.store(bytes, Ordering::Relaxed);
        let end = Instant::now() + Duration::from_secs(20);
        while self.attach.get().is_none_or(|info| info.capacity_sectors != bytes as u64 / 512) {
            assert!(Instant::now() < end, "the disk never has {bytes} bytes");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn session(&self) -> cirro_backend::stats::SessionReport {
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
pub(crate) struct Guest {
    pub(crate) frontend: Frontend,
    pub(crate) ring: Ring,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) file: File,
    pub(crate) features: u64,
}

impl Guest {
    pub(crate) fn connect(backend: &Backend, memory: Option<(File, Regions)>) -> Guest {
        let mut frontend = Frontend::connect(&backend.path, 2).unwrap();
        // A log is asked for when there is one.
        let features = frontend.get_features().unwrap() & !VhostUserVirtioFeatures::LOG_ALL.bits();
        frontend.set_owner().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::LOG_SHMFD;
        assert_eq!(protocol & wanted, wanted);
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(frontend.get_queue_num().unwrap(), 2);
        let (file, regions) = memory.unwrap_or_else(|| new_memory(&backend.path));
        let ring = Ring::new(&regions, 0, true);
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Guest { frontend, ring, kick: event(), call: event(), file, features }
    }

    /// Gives the back-end a channel to speak first on; this is the front-end's end of it.
    pub(crate) fn open_channel(&mut self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        self.frontend.set_backend_request_fd(&theirs).unwrap();
        ours
    }

    /// Sectors, as the configuration has them.
    pub(crate) fn capacity(&mut self) -> u64 {
        let config = self.frontend.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap().1;
        u64::from_le_bytes(config[..8].try_into().unwrap())
    }

    /// What QEMU does at DRIVER_OK.
    pub(crate) fn start(&mut self, base: u16) {
        self.frontend.set_features(self.features).unwrap();
        self.give_memory();
        let frontend = &mut self.frontend;
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

    pub(crate) fn give_memory(&self) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: FRONT_END_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).unwrap();
    }

    pub(crate) fn wait(&mut self, count: usize) -> Vec<Used> {
        let end = Instant::now() + Duration::from_secs(20);
        let mut used = Vec::new();
        while used.len() < count {
            assert!(Instant::now() < end, "{count} requests came back, {} did", used.len());
            used.extend(self.ring.used());
            std::thread::sleep(Duration::from_micros(100));
        }
        used
    }

    pub(crate) fn one(&mut self, kind: u32, sector: u64, len: u32) -> Used {
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
