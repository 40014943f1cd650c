//! `cirroctl` as people and scripts run it: the built program against a control socket served here.
//!
//! The golden tables are what a reader sees; change them on purpose only.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use cirro_ctl::report::*;
use cirro_ctl::request::Request;
use cirro_ctl::server::Server;
use serde_json::{Value, json};

const SECOND_NS: u64 = 1_000_000_000;

struct Home(PathBuf);

impl Home {
    fn new() -> Home {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("cirroctl-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Home(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("s")
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn command(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cirroctl"));
    command.arg("--ctl-socket").arg(socket).args(arguments);
    command
}

fn cirroctl(socket: &Path, arguments: &[&str]) -> Output {
    command(socket, arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn process(program: &str) -> Process {
    let now_ns = 20_000 * SECOND_NS;
    Process {
        program: program.into(),
        version: "0.1.0".into(),
        pid: 4711,
        started_ns: now_ns - 11_520 * SECOND_NS,
        now_ns,
    }
}

/// A state since `age_s` seconds before the report.
fn state<N>(name: N, age_s: u64) -> State<N> {
    State::plain(name, (20_000 - age_s) * SECOND_NS)
}

fn link() -> Link {
    Link {
        interface: "eth1".into(),
        address: "02:00:5e:10:00:01".into(),
        mtu: 9000,
        state: state(LinkState::Up, 11_520),
        taps: vec!["/tmp/a.pcap".into()],
        counters: Some(LinkCounters { ring_drops: 3, refused: 2, rebuilds: 1 }),
    }
}

fn worker() -> Worker {
    let counters = WorkerCounters {
        frames_in: 1000,
        frames_out: 900,
        bytes_in: 4 << 20,
        bytes_out: 60_000,
        dropped: [("seal".to_owned(), 7), ("short".to_owned(), 1)].into(),
        turns: 500,
        wakeups: 400,
    };
    Worker { index: 0, sessions: 1, counters: Some(counters) }
}

fn session() -> Session {
    let counters = SessionCounters {
        frames_sent: 900,
        frames_received: 1000,
        payload_bytes_sent: 4096,
        payload_bytes_received: 4 << 20,
        frames_lost: 5,
        messages_resent: 6,
        spurious_losses: 1,
        probe_timeouts: 2,
        duplicate_frames: 3,
        duplicate_messages: 1,
        violations: 0,
        frames_refused: 0,
    };
    Session {
        peer: "02:00:5e:10:00:02".into(),
        attachment: "0123456789abcdef0123456789abcdef".into(),
        session_epoch: 4294967296,
        volume: Some("vm1".into()),
        worker: 0,
        state: state(SessionState::Open, 65),
        piece_bytes: 8192,
        rtt_ns_min: 41_000,
        rtt_ns_smoothed: 75_230,
        window_bytes: 1 << 20,
        in_flight_bytes: 4096,
        counters: Some(counters),
    }
}

fn ops() -> Ops {
    let latency = LatencySummary {
        count: 100,
        ns_mean: 81_000,
        ns_p50: 75_000,
        ns_p99: 210_000,
        ns_p99_9: 1_500_000,
        ns_max: 3_000_000_000,
    };
    let read = OpCounters { requests: 99, bytes: 99 * 4096, errors: 1, latency };
    Ops { read, ..Ops::default() }
}

fn node_report() -> Report {
    let volume = Volume {
        name: "vm1".into(),
        path: "/srv/vm1.raw".into(),
        size_bytes: 10 << 30,
        read_only: false,
        io: Io { mode: IoMode::Buffered, why: Some("tmpfs has no O_DIRECT".into()) },
        durability: Durability::WriteBack,
        state: state(VolumeState::Serving, 11_520),
        owner: Some(Owner { attachment: "0123456789abcdef0123456789abcdef".into(), vol_epoch: 12 }),
        sessions: 1,
        worker: 0,
        counters: Some(ops()),
    };
    Report::Node(NodeReport {
        process: process("cirro-node"),
        links: vec![link()],
        workers: vec![worker()],
        volumes: vec![volume],
        sessions: vec![session()],
    })
}

fn backend_report() -> Report {
    let mut reconnecting = state(DiskState::Reconnecting, 3);
    reconnecting.why = Some("no answer\x1b[31m".into());
    let disk = Disk {
        volume: "vm1".into(),
        socket: Some("/run/vm1.sock".into()),
        state: reconnecting,
        front_end_connected: true,
        read_only: false,
        size_bytes: 10 << 30,
        node: None,
        in_flight: 32,
        on_trouble: "wait".into(),
        unflushed_bytes: 3 << 20,
        worker: 0,
        session: None,
        counters: Some(DiskCounters { reconnects: 2, ops: ops() }),
    };
    Report::Backend(BackendReport {
        process: process("cirro-backend"),
        links: vec![],
        workers: vec![worker()],
        disks: vec![disk],
    })
}

/// A daemon that knows the tap: pushed, one file; popped, its count.
fn node(request: Request) -> Result<Value, String> {
    match request {
        Request::LinkTapPush(push) if push.path.exists() => Err(format!("{}: exists", push.path.display())),
        Request::LinkTapPush(push) => {
            Ok(json!({ "files": [push.path], "caps": [push.frame_bytes_max, push.file_bytes_max] }))
        }
        Request::LinkTapPop {} => {
            Ok(json!({ "files": [{ "path": "/tmp/a.pcap", "frames": 12, "frames_missed": 1 }] }))
        }
        Request::Status {} | Request::Stats {} => node_report().answer(&request),
        Request::VolumeGrant(grant) if grant.volume == "a" => {
            let open_to_all = false;
            Ok(
                json!({ "volume": "a", "open_to_all": open_to_all, "grants": [{ "client": grant.client, "right": grant.right }] }),
            )
        }
        Request::VolumeGrant(grant) => Err(format!("no volume {:?} is served here", grant.volume)),
        Request::VolumeRevoke(_) => Ok(json!({ "volume": "a", "open_to_all": false, "grants": [] })),
        Request::VolumeGrants { .. } => Ok(json!({ "volume": "a", "open_to_all": true, "grants": [] })),
        Request::VolumeResize(resize) => {
            Ok(json!({ "volume": "a", "bytes_before": 1 << 30, "bytes": resize.bytes, "sessions_told": 1 }))
        }
    }
}

#[test]
fn grants_are_given_taken_and_shown() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), node).unwrap();
    let key = "5".repeat(64);
    let said = |arguments: &[&str]| text(&cirroctl(&home.socket(), arguments).stdout).to_owned();
    assert_eq!(said(&["volume", "grant", "a", &key, "ro"]), format!("ro {key}\n"));
    assert_eq!(said(&["volume", "revoke", "a", &key]), "nobody may use volume a\n");
    assert!(said(&["volume", "grants", "a"]).starts_with("volume a is open to everybody"));
    let refused = cirroctl(&home.socket(), &["volume", "grant", "b", &key, "rw"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("no volume \"b\" is served here"));
    let refused = cirroctl(&home.socket(), &["volume", "grant", "a", &key, "none"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("volume revoke"));
}

#[test]
fn a_volume_is_resized_by_a_size_as_people_write_it() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), node).unwrap();
    let said = |arguments: &[&str]| text(&cirroctl(&home.socket(), arguments).stdout).to_owned();
    assert_eq!(said(&["volume", "resize", "a", "4G"]), "volume a has 4G now, not 1G; 1 session was told\n");
    assert_eq!(said(&["volume", "resize", "a", "1073741824"]), "volume a has 1G already\n");
    let json = said(&["volume", "resize", "a", "1536M", "--json"]);
    assert!(json.contains("\"bytes\":1610612736"), "{json}");
    for size in ["4GB", "-1", "", "99999999T"] {
        let refused = cirroctl(&home.socket(), &["volume", "resize", "a", size]);
        assert_eq!(refused.status.code(), Some(2), "{size:?}");
    }
}

#[test]
fn keys_are_made_shown_and_never_overwritten() {
    let home = Home::new();
    let path = home.socket().with_file_name("key");
    let made = cirroctl(&home.socket(), &["key", "new", &path.to_string_lossy()]);
    let public = text(&made.stdout).to_owned();
    assert_eq!((public.len(), made.status.code()), (65, Some(0)));
    let shown = cirroctl(&home.socket(), &["key", "show", &path.to_string_lossy()]);
    assert_eq!(text(&shown.stdout), public);
    let secret = std::fs::read_to_string(&path).unwrap();
    assert_ne!(secret, public);
    let again = cirroctl(&home.socket(), &["key", "new", &path.to_string_lossy()]);
    assert_eq!((again.status.code(), text(&again.stdout)), (Some(1), ""));
    assert!(text(&again.stderr).contains("exists"), "{}", text(&again.stderr));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), secret);
    let psk = home.socket().with_file_name("psk");
    let made = cirroctl(&home.socket(), &["key", "psk", &psk.to_string_lossy()]);
    assert_eq!((made.status.code(), text(&made.stdout)), (Some(0), ""));
    std::fs::set_permissions(&psk, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let open = cirroctl(&home.socket(), &["key", "show", &psk.to_string_lossy()]);
    assert_eq!(open.status.code(), Some(1));
    assert!(text(&open.stderr).contains("others can read it"), "{}", text(&open.stderr));
}

#[test]
fn a_node_status_reads_like_this() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), node).unwrap();
    let output = cirroctl(&home.socket(), &["status"]);
    assert_eq!(text(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stdout), include_str!("golden/node-status.txt"));
}

#[test]
fn a_node_stats_reads_like_this() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), node).unwrap();
    assert_eq!(text(&cirroctl(&home.socket(), &["stats"]).stdout), include_str!("golden/node-stats.txt"));
}

#[test]
fn a_backend_in_trouble_reads_like_this() {
    let home = Home::new();
    let _server =
        Server::start(&home.socket(), |request: Request| backend_report().answer(&request)).unwrap();
    assert_eq!(
        text(&cirroctl(&home.socket(), &["status"]).stdout),
        include_str!("golden/backend-status.txt")
    );
    assert_eq!(text(&cirroctl(&home.socket(), &["stats"]).stdout), include_str!("golden/backend-stats.txt"));
}

#[test]
fn json_is_one_line_with_the_socket_and_the_whole_report() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), node).unwrap();
    let stats = cirroctl(&home.socket(), &["stats", "--json"]).stdout;
    assert_eq!(stats.iter().filter(|&&byte| byte == b'\n').count(), 1);
    let line: Value = serde_json::from_slice(&stats).unwrap();
    assert_eq!(line["socket"], home.socket().to_str().unwrap());
    assert_eq!(serde_json::from_value::<Report>(line["ok"].clone()).unwrap(), node_report());
    let status: Value =
        serde_json::from_slice(&cirroctl(&home.socket(), &["--json", "status"]).stdout).unwrap();
    assert_eq!(status["ok"]["daemon"], "node");
    assert_eq!(status["ok"]["volumes"][0]["owner"]["vol_epoch"], 12);
    assert!(!status.to_string().contains("counters"), "status leaves the counters out");
}

#[test]
fn a_tap_is_pushed_with_an_absolute_path_and_popped_with_its_count() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), node).unwrap();
    let pushed =
        command(&home.socket(), &["link", "tap", "push", "a.pcap"]).current_dir(&home.0).output().unwrap();
    let expected = format!("tapping to {}\n", home.0.join("a.pcap").display());
    assert_eq!(text(&pushed.stdout), expected);
    let sized =
        ["link", "tap", "push", "/x/b", "--frame-bytes-max", "96", "--file-bytes-max", "4096", "--json"];
    let sized: Value = serde_json::from_slice(&cirroctl(&home.socket(), &sized).stdout).unwrap();
    assert_eq!(sized["ok"], json!({ "files": ["/x/b"], "caps": [96, 4096] }));
    let popped = cirroctl(&home.socket(), &["link", "tap", "pop"]);
    assert_eq!(text(&popped.stdout), "/tmp/a.pcap: 12 frames, 1 missed\n");
}

#[test]
fn a_refusal_is_one_line_and_exit_1() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), node).unwrap();
    let path = home.socket();
    let refused = cirroctl(&path, &["link", "tap", "push", path.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(text(&refused.stdout), "");
    assert_eq!(text(&refused.stderr), format!("cirroctl: {0}: {0}: exists\n", path.display()));
    let refused = cirroctl(&path, &["--json", "link", "tap", "push", path.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    let line: Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert!(line["error"].as_str().unwrap().ends_with("exists"));
}

#[test]
fn without_a_daemon_it_says_so_and_exits_1() {
    let home = Home::new();
    let absent = cirroctl(&home.socket(), &["status"]);
    assert_eq!(absent.status.code(), Some(1));
    assert!(text(&absent.stderr).contains("no daemon serves it"), "{}", text(&absent.stderr));
    drop(UnixListener::bind(home.socket()).unwrap());
    let dead = cirroctl(&home.socket(), &["status"]);
    assert_eq!(dead.status.code(), Some(1));
    assert!(text(&dead.stderr).contains("is gone"), "{}", text(&dead.stderr));
}

#[test]
fn a_daemon_of_another_version_is_named_not_guessed() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), |_: Request| Ok(json!({ "daemon": "moon" }))).unwrap();
    let output = cirroctl(&home.socket(), &["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("does not know"), "{}", text(&output.stderr));
}

#[test]
fn a_command_line_that_makes_no_sense_exits_2() {
    let home = Home::new();
    let senseless = [
        &["explode"][..],
        &[],
        &["status", "x"],
        &["link", "tap", "push"],
        &["link", "tap", "push", "a", "--frame-bytes-max", "0"],
    ];
    for arguments in senseless {
        let output = cirroctl(&home.socket(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert_eq!(text(&output.stdout), "", "{arguments:?}");
    }
}

#[test]
fn help_teaches_with_examples_and_exit_codes() {
    let help = Command::new(env!("CARGO_BIN_EXE_cirroctl")).arg("--help").output().unwrap();
    assert_eq!(help.status.code(), Some(0));
    for word in ["Examples:", "Exit status:", "/run/cirrostratus/node.sock", "link tap push", "--json"] {
        assert!(text(&help.stdout).contains(word), "{word}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let home = Home::new();
    let many = |request: Request| {
        let Report::Node(mut node) = node_report() else { panic!("a node's report") };
        node.sessions = vec![session(); 4000];
        Report::Node(node).answer(&request)
    };
    let _server = Server::start(&home.socket(), many).unwrap();
    let mut child =
        command(&home.socket(), &["stats"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 10];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
}
