//! Daemons under test: built, started in a machine, watched, ended; their logs are shown when a test fails.
//!
//! Knows command lines and control sockets, and `qemu-storage-daemon` as a back-end that others wrote. Used by every end-to-end test and the benchmark.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Once, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use cirro_ctl::report::{BackendReport, NodeReport, Report, WorkerCounters};
use cirro_ctl::request::Request;
use cirro_ctl::{client, keyfile};
use cirro_link::any::Mode;
use cirro_protocol::types::PublicKey;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};
use tempfile::TempDir;

use crate::netns::{ADDRESSES, INTERFACE, Machine, Namespace, PREFIX, left_over, output};

/// Where folders for tests lie: in memory.
const SHARED_MEMORY: &str = "/dev/shm";
/// How long a daemon may take until it serves.
const START_MAX: Duration = Duration::from_secs(20);
/// How long a daemon may take to end after SIGTERM.
const STOP_MAX: Duration = Duration::from_secs(10);
/// How long a daemon may take to answer on its control socket.
const ANSWER_MAX: Duration = Duration::from_secs(5);
const MILLIS_PER_DAY: u128 = 24 * 60 * 60 * 1000;
/// Lines of a log that a failure shows.
const LOG_LINES_SHOWN: usize = 60;

/// The folder of `cirro-node`, `cirro-backend` and `cirroctl`: `CIRRO_BIN_DIR`, or else they are built, optimised, once per process.
///
/// # Panics
/// They are not there, or cannot be built.
pub fn binaries() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::var_os("CIRRO_BIN_DIR").map_or_else(build, PathBuf::from);
        for name in ["cirro-node", "cirro-backend", "cirroctl"] {
            let path = folder.join(name);
            assert!(path.is_file(), "{} is not there (CIRRO_BIN_DIR names the folder)", path.display());
        }
        folder
    })
}

/// Builds beside the program that runs, so that nothing is built twice that `cargo` has already.
fn build() -> PathBuf {
    let here = std::env::current_exe().expect("a program has a path");
    let profile =
        here.ancestors().find(|path| ["debug", "release", "checked"].iter().any(|name| path.ends_with(name)));
    let target = profile.and_then(Path::parent).expect("a test lies in a profile of target").to_owned();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the work tree");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root).args(["build", "--release", "--locked", "--quiet", "--bins"]);
    cargo.args(["-p", "cirro-node", "-p", "cirro-backend", "-p", "cirro-ctl"]);
    output(cargo.arg("--target-dir").arg(&target), "cargo build --release of the daemons");
    target.join("release")
}

/// A folder in memory for sockets, logs, state and volumes, that ends with this value.
#[derive(Debug)]
pub struct Scratch {
    folder: TempDir,
}

impl Scratch {
    /// A new, empty one.
    ///
    /// # Panics
    /// There is no /dev/shm.
    #[allow(clippy::new_without_default, reason = "it makes a folder")]
    pub fn new() -> Scratch {
        static LEFT_OVER: Once = Once::new();
        LEFT_OVER.call_once(|| {
            for path in left_over(SHARED_MEMORY) {
                let _ = std::fs::remove_dir_all(path);
            }
        });
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let folder = tempfile::Builder::new().prefix(&prefix).tempdir_in(SHARED_MEMORY);
        Scratch { folder: folder.expect("/dev/shm is there") }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The key file `NAME.key`, made if it is not there, and its public key.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn key(&self, name: &str) -> (PathBuf, PublicKey) {
        let path = self.path(&format!("{name}.key"));
        let (secret, _) = keyfile::read_or_make(&path).expect("a key can be made");
        (path, keyfile::public_of(&secret))
    }

    /// Makes an empty sparse file.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn volume(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create_new(&path).and_then(|file| file.set_len(bytes)).expect("a volume can be made");
        path
    }
}

/// A running process. When it is dropped it is killed, and its log is shown if the test failed.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
    control: PathBuf,
    ended: bool,
}

impl Daemon {
    /// Starts `command`, made by [`Namespace::command`], with what it prints going to `NAME.log`.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(scratch: &Scratch, name: &str, command: &mut Command) -> Daemon {
        let log = scratch.path(&format!("{name}.log"));
        let file = File::options().append(true).create(true).open(&log).expect("a log can be opened");
        let copy = file.try_clone().expect("a descriptor can be copied");
        let child = command.stdin(Stdio::null()).stdout(copy).stderr(file).spawn();
        let child = child.unwrap_or_else(|error| panic!("{name} cannot be started: {error}"));
        Daemon {
            name: name.to_owned(),
            child,
            log,
            control: scratch.path(&format!("{name}.ctl")),
            ended: false,
        }
    }

    /// Waits until `ready`.
    ///
    /// # Panics
    /// The daemon ended, or took too long.
    pub fn wait_until(&mut self, what: &str, mut ready: impl FnMut(&Daemon) -> bool) {
        let start = Instant::now();
        while !ready(self) {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                self.ended = true;
                panic!("{} ended ({status}) before it {what}:\n{}", self.name, self.log_tail());
            }
            assert!(
                start.elapsed() < START_MAX,
                "{} did not come to this in {START_MAX:?}: {what}",
                self.name
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it printed last.
    pub fn log_tail(&self) -> String {
        let text = self.log_text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
    }

    fn log_text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it at once, as a power cut would.
    pub fn kill(mut self) {
        self.end();
    }

    /// Kills it without waiting for its end: what it has in the kernel may keep it for long.
    pub fn kill_now(&self) {
        self.signal(Signal::KILL);
    }

    /// Stops it where it stands, until [`Daemon::resume`].
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// How often it printed a line with `text` in it.
    pub fn times_said(&self, text: &str) -> usize {
        self.log_text().lines().filter(|line| line.contains(text)).count()
    }

    /// When it printed the last line with `text` in it, by the clock of its log.
    ///
    /// # Panics
    /// It never did.
    pub fn said_at(&self, text: &str) -> Instant {
        let log = self.log_text();
        let line = log.lines().rfind(|line| line.contains(text));
        let line = line.unwrap_or_else(|| panic!("{} never said '{text}':\n{}", self.name, self.log_tail()));
        let (now, clock) = (Instant::now(), SystemTime::now());
        let clock = clock.duration_since(SystemTime::UNIX_EPOCH).expect("it is past 1970");
        let said = time_of_day(line).expect("a line begins with its time");
        let passed = (clock.as_millis() % MILLIS_PER_DAY + MILLIS_PER_DAY - said) % MILLIS_PER_DAY;
        now - Duration::from_millis(u64::try_from(passed).expect("less than a day"))
    }

    /// Asks it to end and gives its exit status.
    ///
    /// # Panics
    /// It does not end in time.
    pub fn terminate(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                self.ended = true;
                return status;
            }
            assert!(start.elapsed() < STOP_MAX, "{} did not end {STOP_MAX:?} after SIGTERM", self.name);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it by SIGTERM, which must give exit status 0.
    ///
    /// # Panics
    /// It ends in another way.
    pub fn stop(self) {
        let name = self.name.clone();
        let log = self.log_tail();
        let status = self.terminate();
        assert_eq!(status.code(), Some(0), "{name} after SIGTERM: {status}\n{log}");
    }

    /// Time on processors so far, of all its threads.
    ///
    /// # Panics
    /// The process is gone.
    pub fn cpu_time(&self) -> Duration {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("the process lives");
        let times = threads.flatten().map(|thread| std::fs::read_to_string(thread.path().join("schedstat")));
        let nanos = times
            .flatten()
            .filter_map(|text| text.split(' ').next().and_then(|word| word.parse::<u64>().ok()));
        Duration::from_nanos(nanos.sum())
    }

    /// Memory that is in use, in KiB (`VmRSS` of proc_pid_status(5)).
    ///
    /// # Panics
    /// The process is gone.
    pub fn memory_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(path).expect("the process lives");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
        line.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("a number of KiB")
    }

    /// The daemon's report with counters, once it answers.
    ///
    /// # Errors
    /// Why it does not.
    pub fn report(&self) -> Result<Report, String> {
        let value =
            client::ask(&self.control, &Request::Stats {}, ANSWER_MAX).map_err(|error| error.to_string())?;
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    /// Asks it something else.
    ///
    /// # Errors
    /// What it says instead of doing it, or why it does not answer.
    pub fn ask(&self, request: &Request) -> Result<serde_json::Value, String> {
        client::ask(&self.control, request, ANSWER_MAX).map_err(|error| error.to_string())
    }

    /// The report of a node.
    ///
    /// # Panics
    /// This is not one, or it does not answer.
    pub fn node_report(&self) -> NodeReport {
        match self.report() {
            Ok(Report::Node(report)) => report,
            other => panic!("{}: not a node's report: {other:?}", self.name),
        }
    }

    /// The report of a backend.
    ///
    /// # Panics
    /// This is not one, or it does not answer.
    pub fn backend_report(&self) -> BackendReport {
        match self.report() {
            Ok(Report::Backend(report)) => report,
            other => panic!("{}: not a backend's report: {other:?}", self.name),
        }
    }

    /// What each of its workers counted, whichever daemon it is.
    ///
    /// # Panics
    /// It does not answer.
    pub fn workers(&self) -> Vec<WorkerCounters> {
        let workers = match self.report() {
            Ok(Report::Node(report)) => report.workers,
            Ok(Report::Backend(report)) => report.workers,
            Err(error) => panic!("{}: {error}", self.name),
        };
        workers.into_iter().filter_map(|worker| worker.counters).collect()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a child has an id");
        let _ = kill_process(pid, signal);
    }

    fn end(&mut self) {
        if !self.ended {
            self.ended = true;
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let by_itself = if self.ended { None } else { self.child.try_wait().unwrap_or_default() };
        self.end();
        if std::thread::panicking() {
            let end =
                by_itself.map_or_else(String::new, |status| format!(", which ended by itself: {status}"));
            eprintln!(
                "--- last lines of {}\n{}\n--- end of {}{end}",
                self.log.display(),
                self.log_tail(),
                self.name
            );
        }
    }
}

/// Milliseconds since midnight, of a log line that begins `2026-11-23T06:02:03.123Z`.
fn time_of_day(line: &str) -> Option<u128> {
    let number = |range: std::ops::Range<usize>| line.get(range)?.parse::<u128>().ok();
    let seconds = (number(11..13)? * 60 + number(14..16)?) * 60 + number(17..19)?;
    Some(seconds * 1000 + number(20..23)?)
}

/// What carries frames in the tests: `CIRRO_LINK_MODE`, packet sockets unless it says something else.
///
/// # Panics
/// There is no such mode.
pub fn link_mode() -> Mode {
    match std::env::var("CIRRO_LINK_MODE") {
        Err(_) => Mode::default(),
        Ok(name) => name.parse().unwrap_or_else(|error| panic!("CIRRO_LINK_MODE is {name:?}: {error}")),
    }
}

/// How frames are protected in tests that do not say: `CIRRO_SECURITY`, none unless it is `keys`.
fn security_is_keys() -> bool {
    match std::env::var("CIRRO_SECURITY").as_deref() {
        Err(_) | Ok("none") => false,
        Ok("keys") => true,
        Ok(other) => panic!("CIRRO_SECURITY is {other:?}: none or keys"),
    }
}

/// How a daemon of ours is started.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// Names its log, its state and its sockets.
    pub name: &'a str,
    /// Arguments besides those that every daemon here gets.
    pub arguments: Vec<OsString>,
    /// The processor it may run on.
    pub cpu: Option<u32>,
    /// The folder of another build, instead of [`binaries`].
    pub build: Option<&'a Path>,
    /// With keys: those of all nodes, and of all backends, of a [`Scratch`], unless `arguments` name others.
    pub keys: bool,
    /// Without being root, with these capabilities only (setpriv(1)).
    pub capabilities: Option<&'a str>,
}

impl<'a> Launch<'a> {
    /// With no more arguments.
    pub fn new(name: &'a str) -> Launch<'a> {
        Launch {
            name,
            arguments: Vec::new(),
            cpu: None,
            build: None,
            keys: security_is_keys(),
            capabilities: None,
        }
    }

    /// Protected by keys, or not.
    #[must_use]
    pub fn with_keys(mut self, keys: bool) -> Launch<'a> {
        self.keys = keys;
        self
    }

    /// Started by the user `nobody` instead of root, with `capabilities` only, as setpriv(1) writes them: `-all` is none.
    #[must_use]
    pub fn by_nobody_with(mut self, capabilities: &'a str) -> Launch<'a> {
        self.capabilities = Some(capabilities);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn with(mut self, arguments: &[&str]) -> Launch<'a> {
        self.arguments.extend(arguments.iter().map(OsString::from));
        self
    }

    /// Keeps it on one processor.
    #[must_use]
    pub fn on(mut self, cpu: Option<u32>) -> Launch<'a> {
        self.cpu = cpu;
        self
    }

    /// Takes the program of another build.
    #[must_use]
    pub fn of_build(mut self, folder: Option<&'a Path>) -> Launch<'a> {
        self.build = folder;
        self
    }

    /// The program in a namespace, with what has to be said before it.
    fn command(&self, namespace: &Namespace, program: &str) -> Command {
        let mut words: Vec<OsString> = Vec::new();
        if let Some(cpu) = self.cpu {
            words.extend(["taskset".into(), "--cpu-list".into(), cpu.to_string().into()]);
        }
        if let Some(capabilities) = self.capabilities {
            let nobody = ["--reuid", "nobody", "--regid", "nogroup", "--clear-groups"];
            words.push("setpriv".into());
            words.extend(nobody.map(OsString::from));
            for set in ["--inh-caps", "--ambient-caps", "--bounding-set"] {
                words.extend([set.into(), capabilities.into()]);
            }
        }
        words.push(self.build.unwrap_or_else(|| binaries()).join(program).into());
        let mut command = namespace.command(&words[0]);
        command.args(&words[1..]);
        command
    }

    fn start(self, program: &str, machine: &Machine, scratch: &Scratch) -> Daemon {
        let mut command = self.command(machine.namespace(), program);
        command.args(["--link", INTERFACE, "--security", if self.keys { "keys" } else { "none" }]);
        let names_keys = self.arguments.iter().any(|argument| argument == "--key");
        if self.keys && !names_keys {
            let node = program == "cirro-node";
            let (path, _) = scratch.key(if node { "node" } else { "backend" });
            command.arg("--key").arg(path);
            if !node {
                command.args(["--node-key", &scratch.key("node").1.to_string()]);
            }
        }
        if link_mode() != Mode::default() {
            command.args(["--link-mode", link_mode().name()]);
        }
        if link_mode() == Mode::Udp {
            let others = ADDRESSES.iter().filter(|address| **address != machine.address());
            others.for_each(|address| _ = command.args(["--udp-peer", address]));
        }
        command.arg("--state-dir").arg(scratch.path(&format!("{}.state", self.name)));
        command.arg("--ctl-socket").arg(scratch.path(&format!("{}.ctl", self.name)));
        if program == "cirro-backend" {
            command.arg("--run-dir").arg(scratch.path(&format!("{}.run", self.name)));
        }
        Daemon::start(scratch, self.name, command.args(self.arguments))
    }

    /// Starts a node that serves `volumes`, each `NAME=PATH[,…]`, and waits until it does.
    pub fn node(mut self, machine: &Machine, scratch: &Scratch, volumes: &[String]) -> Daemon {
        for volume in volumes {
            if let (true, Some((name, _))) = (self.keys, volume.split_once('=')) {
                let grant = format!("{name}={}", scratch.key("backend").1);
                self.arguments.extend(["--grant".into(), grant.into()]);
            }
            self.arguments.extend(["--volume".into(), volume.into()]);
        }
        let mut daemon = self.start("cirro-node", machine, scratch);
        daemon.wait_until("answered as a node", |daemon| matches!(daemon.report(), Ok(Report::Node(_))));
        daemon
    }

    /// Starts a backend for one volume on the socket `NAME.sock`, and waits until that is there and the volume is known.
    pub fn backend(self, machine: &Machine, scratch: &Scratch, volume: &str) -> Daemon {
        let socket = scratch.path(&format!("{}.sock", self.name));
        let mut daemon = self.backend_alone(machine, scratch, volume);
        daemon.wait_until("offered its disk", |daemon| socket.exists() && knows_its_volumes(daemon));
        daemon
    }

    /// The same, but waits only until it answers: its node may never let it in.
    pub fn backend_alone(self, machine: &Machine, scratch: &Scratch, volume: &str) -> Daemon {
        let socket = scratch.path(&format!("{}.sock", self.name));
        let told = ["--volume", volume, "--socket-path", &socket.to_string_lossy()];
        self.with(&told).backend_as_told(machine, scratch)
    }

    /// The same, with the arguments that it was given and no more.
    pub fn backend_as_told(self, machine: &Machine, scratch: &Scratch) -> Daemon {
        let mut daemon = self.start("cirro-backend", machine, scratch);
        daemon
            .wait_until("answered as a backend", |daemon| matches!(daemon.report(), Ok(Report::Backend(_))));
        daemon
    }

    /// Starts one backend for several disks, each a volume on the socket `VOLUME.sock` and further lines of its configuration, and waits until all volumes are
    /// known.
    pub fn backends(self, machine: &Machine, scratch: &Scratch, disks: &[(&str, &str)]) -> Daemon {
        let mut file = String::new();
        for (name, more) in disks {
            let socket = scratch.path(&format!("{name}.sock"));
            let _ = writeln!(
                file,
                "[[disk]]\nvolume = \"{name}\"\nsocket-path = \"{}\"\n{more}",
                socket.display()
            );
        }
        let path = scratch.path(&format!("{}.toml", self.name));
        std::fs::write(&path, file).expect("a file can be written");
        let launch = self.with(&["--config", &path.to_string_lossy()]);
        let mut daemon = launch.start("cirro-backend", machine, scratch);
        daemon.wait_until("offered its disks", knows_its_volumes);
        daemon
    }
}

/// True if a node has described every disk of a backend.
pub fn knows_its_volumes(daemon: &Daemon) -> bool {
    match daemon.report() {
        Ok(Report::Backend(report)) => {
            !report.disks.is_empty() && report.disks.iter().all(|disk| disk.size_bytes > 0)
        }
        _ => false,
    }
}

/// Keeps the calling thread on a processor, and the threads that it starts.
///
/// # Panics
/// There is no such processor.
pub fn run_on_processor(cpu: u32) {
    let mut set = CpuSet::new();
    set.set(cpu as usize);
    sched_setaffinity(None, &set).expect("a thread can be kept on a processor");
}

/// Starts `qemu-storage-daemon` with a vhost-user-blk export `NAME.sock` of the block node that `blockdev` describes (its `node-name` must be `disk`),
/// on the I/O thread `io` if the command makes one.
pub fn qemu_storage_daemon(scratch: &Scratch, name: &str, blockdev: &str, mut command: Command) -> Daemon {
    let socket = scratch.path(&format!("{name}.sock"));
    let iothread = command.get_args().any(|argument| argument == "iothread,id=io");
    command.args(["--blockdev", blockdev, "--export"]);
    command.arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues=4{}",
        socket.display(),
        if iothread { ",iothread=io" } else { "" }
    ));
    let mut daemon = Daemon::start(scratch, name, &mut command);
    daemon.wait_until("made its socket", |_| socket.exists());
    daemon
}
