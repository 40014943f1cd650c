//! Recordings of both daemons' frames, made by `cirroctl link tap` while they serve, and read by tshark with our dissector.
//!
//! The wire is cut until both record, so that both files hold the handshake and every tag can be checked. Needs tshark (`tests/install.sh`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cirro_ctl::report::{Link, Report};
use cirro_tests::daemons::{Daemon, Launch, Scratch, binaries};
use cirro_tests::frontend::{FrontEnd, Shape};
use cirro_tests::loss::{self, Drop as Dropped};
use cirro_tests::netns::Lab;
use cirro_tests::verify::{Mix, Size, Verifier};

use crate::rig::{connect, judge, must, start_backend, volume};

/// Small, so that all of it is soon read after the recordings.
const DISK_BYTES: u64 = 16 << 20;
/// The largest request of the test.
const LARGE: usize = 64 << 10;
/// How long daemons may take until their control sockets answer.
const START_MAX: Duration = Duration::from_secs(15);
/// Kinds of messages and types of LONG frames by their names in docs/PROTOCOL.md.
const KINDS: [(&str, &str); 4] = [("1", "REQ"), ("2", "WDATA"), ("3", "RESP"), ("4", "RDATA")];
const TYPES: [(&str, &str); 4] = [("1", "HELLO"), ("2", "HELLO_REPLY"), ("6", "WHOHAS"), ("7", "IHAVE")];
/// Operations.
const READ: &str = "1";
const WRITE: &str = "2";

/// Runs `cirroctl link tap …` against a daemon; what it printed, or its complaint.
fn tap(scratch: &Scratch, daemon: &str, words: &[&str]) -> Result<String, String> {
    let mut cirroctl = Command::new(binaries().join("cirroctl"));
    cirroctl.arg("--ctl-socket").arg(scratch.path(&format!("{daemon}.ctl"))).args(["link", "tap"]);
    let output = cirroctl.args(words).output().expect("cirroctl can be started");
    let text = |bytes| String::from_utf8(bytes).expect("cirroctl prints text");
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

fn file(scratch: &Scratch, daemon: &str) -> PathBuf {
    scratch.path(&format!("{daemon}.pcap"))
}

fn push(scratch: &Scratch, daemon: &str) -> Result<String, String> {
    tap(scratch, daemon, &["push", &file(scratch, daemon).to_string_lossy()])
}

/// Begins the recording as soon as the daemon listens.
fn push_when_it_starts(scratch: &Scratch, daemon: &str) {
    let began = Instant::now();
    while let Err(complaint) = push(scratch, daemon) {
        assert!(began.elapsed() < START_MAX, "{daemon}: {complaint}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ends the recording; how many frames are in it.
fn pop(scratch: &Scratch, daemon: &str) -> usize {
    let line = tap(scratch, daemon, &["pop"]).expect("the recording ends");
    let told = line.strip_prefix(&format!("{}: ", file(scratch, daemon).display()));
    let frames = told.and_then(|told| told.strip_suffix(" frames, 0 missed\n"));
    frames.and_then(|frames| frames.parse().ok()).unwrap_or_else(|| panic!("cirroctl said {line:?}"))
}

fn links(daemon: &Daemon) -> Vec<Link> {
    match daemon.report().expect("the daemon answers") {
        Report::Node(report) => report.links,
        Report::Backend(report) => report.links,
    }
}

/// A recording as tshark shows it: a row for each frame, the occurrences of a field joined by commas.
struct Shown(Vec<Vec<String>>);

impl Shown {
    const COLUMNS: [&str; 8] = [
        "cirro.tag_state",
        "_ws.expert.message",
        "cirro.long_header.type",
        "cirro.message.kind",
        "cirro.operation",
        "cirro.message.mlen",
        "frame.protocols",
        "_ws.malformed",
    ];

    fn read(path: &Path) -> Shown {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cirrostratus.lua");
        let mut tshark = Command::new("tshark");
        tshark.arg("-X").arg(format!("lua_script:{}", script.display())).arg("-r").arg(path);
        tshark.args(["-T", "fields", "-E", "separator=|", "-E", "aggregator=,", "-E", "occurrence=a"]);
        tshark.args(Shown::COLUMNS.iter().flat_map(|column| ["-e", column]));
        let output = tshark.output().expect("tshark runs; tests/install.sh installs it");
        let complaint = String::from_utf8_lossy(&output.stderr);
        let fine = output.status.success() && !complaint.contains("Lua:") && !complaint.contains("cut short");
        assert!(fine, "tshark: {complaint}");
        let text = String::from_utf8(output.stdout).expect("tshark prints text");
        Shown(text.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect())
    }

    /// Every frame is one of ours, whole, and has the right tag.
    fn check_frames(&self, daemon: &str) {
        for (number, row) in (1..).zip(&self.0) {
            assert_eq!(row.len(), Shown::COLUMNS.len(), "{daemon}, frame {number}: {row:?}");
            assert!(row[6].ends_with(":cirro"), "{daemon}, frame {number}: {row:?}");
            assert_eq!((&*row[0], &*row[1], &*row[7]), ("good", "", ""), "{daemon}, frame {number}: {row:?}");
        }
    }

    fn values(&self, column: usize) -> BTreeSet<&str> {
        self.0.iter().flat_map(|row| row[column].split(',')).filter(|value| !value.is_empty()).collect()
    }

    fn check_variety(&self, daemon: &str) {
        let (types, kinds) = (self.values(2), self.values(3));
        for (number, name) in TYPES {
            assert!(types.contains(number), "{daemon}: no {name} among {types:?}");
        }
        for (number, name) in KINDS {
            assert!(kinds.contains(number), "{daemon}: no {name} among {kinds:?}");
        }
    }

    /// Requests of `operation` for [`LARGE`] bytes.
    fn large_requests(&self, operation: &str) -> usize {
        let large = LARGE.to_string();
        let in_frame = |row: &Vec<String>| {
            // Only REQ and WDATA have an operation.
            let mut operations = row[4].split(',');
            let messages = row[3].split(',').zip(row[5].split(',')).map(|(kind, length)| {
                let of = if matches!(kind, "1" | "2") { operations.next() } else { None };
                kind == "1" && of == Some(operation) && length == large
            });
            messages.filter(|fits| *fits).count()
        };
        self.0.iter().map(in_frame).sum()
    }
}

/// Some hundreds of requests: small ones, of any size, and large ones.
fn work(verifier: &mut Verifier, front_end: &mut FrontEnd) {
    let shapes = [
        (Size::Fixed(512), Mix::ReadWrite),
        (Size::UpTo(LARGE), Mix::Everything),
        (Size::Fixed(LARGE), Mix::ReadWrite),
    ];
    for (size, mix) in shapes {
        let mut requests = 0;
        while requests < 100 {
            requests += judge(verifier, front_end, size, mix, Duration::from_millis(10)).requests;
        }
        println!("{size:?}: {requests} requests");
    }
}

#[test]
fn both_daemons_record_what_they_say_and_tshark_finds_every_frame_right() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let cut = [Dropped::LongerThan(0)];
    lab.machines().iter().for_each(|machine| loss::set(machine, &cut));
    let path = scratch.volume("disk.img", DISK_BYTES);
    let node = Launch::new("node").node(lab.store(), &scratch, &[volume("disk", &path)]);
    push_when_it_starts(&scratch, "node");
    // A daemon ends with the thread that started it, so this thread starts the backend and waits until it knows its volume.
    let backend = std::thread::scope(|scope| {
        scope.spawn(|| {
            push_when_it_starts(&scratch, "backend");
            lab.machines().iter().for_each(|machine| loss::set(machine, &[]));
        });
        start_backend(&lab, &scratch)
    });
    for (name, daemon) in [("node", &node), ("backend", &backend)] {
        assert_eq!(links(daemon)[0].taps, [file(&scratch, name)], "{name}");
        let complaint = push(&scratch, name).expect_err("there is a recording already");
        assert!(complaint.contains("already"), "{complaint}");
    }

    let mut verifier = Verifier::new(DISK_BYTES, 41);
    let shape = Shape { queues: 1, depth: 4, bytes_max: 128 << 10, poll: false };
    let mut front_end = connect(&scratch, "backend", shape);
    work(&mut verifier, &mut front_end);

    for (name, daemon) in [("node", &node), ("backend", &backend)] {
        let frames = pop(&scratch, name);
        assert!(links(daemon)[0].taps.is_empty(), "{name}");
        assert_eq!(tap(&scratch, name, &["pop"]), Ok("no tap was pushed\n".to_owned()));
        let complaint = push(&scratch, name).expect_err("the file exists");
        assert!(complaint.contains("File exists"), "{complaint}");
        let shown = Shown::read(&file(&scratch, name));
        assert_eq!(shown.0.len(), frames, "{name}: frames in the file, and as it was told");
        shown.check_frames(name);
        shown.check_variety(name);
        let large = (shown.large_requests(READ), shown.large_requests(WRITE));
        println!("{name}: {frames} frames; requests of {LARGE} bytes: {large:?}");
        assert!(large.0 > 0 && large.1 > 0, "{name}: {large:?}");
    }
    must(verifier.check_all(&mut front_end));
    drop(front_end);
    backend.stop();
    node.stop();
}
