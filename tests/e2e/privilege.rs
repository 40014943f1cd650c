//! What the daemons may do: what they give up, and how little they can be started with.
//!
//! Knows what the kernel tells of a process, and how a descriptor is handed over. Promises: docs/THREAT_MODEL.md, docs/OPERATING.md.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use cirro_ctl::report::DiskState;
use cirro_link::any::{Mode, Reopens};
use cirro_tests::daemons::{Daemon, Launch, Scratch, knows_its_volumes, link_mode};
use cirro_tests::frontend::{FrontEnd, Shape};
use cirro_tests::netns::{Lab, Machine};
use cirro_tests::verify::{Mix, Size, Verifier};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketType, socket};

use crate::rig::{connect, disk, judge, must, volume};

const DISK_BYTES: u64 = 64 << 20;
const SHAPE: Shape = Shape { queues: 1, depth: 32, bytes_max: 128 << 10, poll: false };
/// The user and the group `nobody` of Debian.
const NOBODY: u32 = 65_534;

/// What every thread of a process may do: its users, effective capabilities, whether it may gain any, and its filter.
fn standing(daemon: &Daemon) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("the process lives");
    let told = tasks.map(|task| {
        let text =
            std::fs::read_to_string(task.expect("a thread").path().join("status")).expect("a thread lives");
        let wanted = ["Uid:", "Gid:", "Groups:", "CapPrm:", "CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:"];
        let lines = text.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name)));
        lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") + "\n").collect::<String>()
    });
    let mut told: Vec<String> = told.collect();
    told.dedup();
    told
}

/// What all threads of a process may do alike.
fn standing_of_all(daemon: &Daemon) -> String {
    let mut told = standing(daemon);
    assert_eq!(told.len(), 1, "threads differ: {told:?}");
    told.remove(0)
}

fn assert_stands(daemon: &Daemon, capabilities: &str) {
    let told = standing_of_all(daemon);
    println!("{told}");
    let capabilities = ["CapEff", "CapPrm", "CapBnd"].map(|set| format!("{set}: {capabilities}\n"));
    for line in ["NoNewPrivs: 1\n", "Seccomp: 2\n"].into_iter().chain(capabilities.iter().map(String::as_str))
    {
        assert!(told.contains(line), "{line}");
    }
    assert!(!told.contains("Uid: 0") && !told.contains("Gid: 0"));
}

const NOTHING: &str = "0000000000000000";
/// CAP_NET_RAW is capability 13.
const NET_RAW: &str = "0000000000002000";
/// And CAP_IPC_LOCK is 14.
const NET_RAW_AND_IPC_LOCK: &str = "0000000000006000";

/// What a daemon keeps that has so many workers.
fn kept_with(workers: &str) -> &'static str {
    match link_mode().reopens(workers.parse().expect("a number")) {
        Reopens::Nothing => NOTHING,
        Reopens::PacketSockets => NET_RAW,
        Reopens::XdpSockets => NET_RAW_AND_IPC_LOCK,
    }
}

/// Workers of a daemon that is to have several: over AF_XDP each needs a queue of the interface, and a machine's has one.
fn several() -> &'static str {
    if matches!(link_mode(), Mode::Xdp | Mode::XdpCopy) { "1" } else { "2" }
}

/// Works, takes the interface away and gives it back, and works on.
fn work_across_a_loss_of_the_interface(lab: &Lab, backend: &mut Daemon, front_end: &mut FrontEnd) {
    let mut verifier = Verifier::new(DISK_BYTES, 6);
    let time = Duration::from_millis(500);
    judge(&mut verifier, front_end, Size::UpTo(64 << 10), Mix::Everything, time);
    for round in 0..3 {
        let sessions = disk(backend).counters.expect("stats were asked for").reconnects;
        lab.replace_wire(9000);
        backend.wait_until(&format!("had another session after loss {round}"), |backend| {
            let disk = disk(backend);
            disk.state.name == DiskState::Healthy
                && disk.counters.is_some_and(|counters| counters.reconnects > sessions)
        });
        judge(&mut verifier, front_end, Size::UpTo(64 << 10), Mix::Everything, time);
    }
    must(verifier.check_all(front_end));
}

fn open_to_all(scratch: &Scratch) {
    let everybody = PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(scratch.path(""), everybody).expect("the folder is ours");
}

/// With `--user`: an ordinary user, in every thread, without any capability if it has one worker; and that is enough, also when the interface has
/// gone and come back. Without: no new privileges and the filter all the same.
#[test]
fn daemons_give_up_what_they_do_not_need() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    open_to_all(&scratch);
    let path = scratch.volume("disk", DISK_BYTES);
    let as_nobody = ["--user", "nobody"];
    let launch = Launch::new("node").with_keys(true).with(&as_nobody).with(&["--workers", several()]);
    let mut node = launch.node(lab.store(), &scratch, &[volume("disk", &path)]);
    let sockets = ["--socket-owner", "nobody", "--socket-mode", "0600"];
    let launch = Launch::new("backend").with_keys(true).with(&as_nobody).with(&sockets);
    let mut backend = launch.backend(lab.host(), &scratch, "disk");
    assert_stands(&node, kept_with(several()));
    assert_stands(&backend, kept_with("1"));
    let facts = std::fs::metadata(scratch.path("backend.sock")).expect("the socket is there");
    assert_eq!((facts.mode() & 0o777, facts.uid()), (0o600, NOBODY));

    let mut front_end = connect(&scratch, "backend", SHAPE);
    work_across_a_loss_of_the_interface(&lab, &mut backend, &mut front_end);
    drop(front_end);
    // The owner's record could be written by that user.
    backend.stop();
    node.wait_until("let go of the volume", |node| node.node_report().volumes[0].owner.is_none());
    node.stop();
    let path = scratch.volume("other", DISK_BYTES);
    let node = Launch::new("rootly").with_keys(true).node(lab.store(), &scratch, &[volume("other", &path)]);
    let told = standing_of_all(&node);
    assert!(told.contains("NoNewPrivs: 1") && told.contains("Seccomp: 2"));
    node.stop();
}

/// A packet socket on which nothing comes yet, of a machine's network namespace.
fn packet_socket(machine: &Machine) -> OwnedFd {
    let open = || socket(AddressFamily::PACKET, SocketType::RAW, None);
    machine.namespace().enter(open).expect("root may open a packet socket")
}

/// Lets processes that are started from now on have a descriptor, under its number.
fn handed_over(fd: &OwnedFd) -> String {
    fcntl_setfd(fd, FdFlags::empty()).expect("the descriptor is open");
    fd.as_raw_fd().to_string()
}

fn give_to_nobody(path: &Path) {
    chown(path, Some(NOBODY), Some(NOBODY)).expect("the file is ours");
}

/// Started by an ordinary user without any privilege, with sockets that somebody else has opened.
#[test]
fn daemons_with_sockets_that_were_opened_for_them_need_no_privilege() {
    if link_mode() != Mode::Packet {
        return println!("only packet sockets are handed over");
    }
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    open_to_all(&scratch);
    let path = scratch.volume("disk", DISK_BYTES);
    for file in [&path, &scratch.key("node").0, &scratch.key("backend").0] {
        give_to_nobody(file);
    }
    let listener = UnixListener::bind(scratch.path("backend.sock")).expect("a socket can be made");
    let links = [lab.store(), lab.host()].map(packet_socket);
    let (listener, [store, host]) = (OwnedFd::from(listener), &links);
    let launch = Launch::new("node").with_keys(true).by_nobody_with("-all");
    let launch = launch.with(&["--link-fd", &handed_over(store)]);
    let node = launch.node(lab.store(), &scratch, &[volume("disk", &path)]);
    let launch = Launch::new("backend").with_keys(true).by_nobody_with("-all");
    let given = ["--link-fd", &handed_over(host), "--fd", &handed_over(&listener), "--volume", "disk"];
    let mut backend = launch.with(&given).backend_as_told(lab.host(), &scratch);
    backend.wait_until("knew its volume", knows_its_volumes);
    for daemon in [&node, &backend] {
        assert_stands(daemon, NOTHING);
    }
    let mut front_end = connect(&scratch, "backend", SHAPE);
    work_across_a_loss_of_the_interface(&lab, &mut backend, &mut front_end);
    drop(front_end);
    backend.stop();
    node.stop();
}

/// As a unit with `User=` and `AmbientCapabilities=` starts it: the capabilities are for opening, and what opening again does not need is gone then.
#[test]
fn a_daemon_that_was_started_with_capabilities_gives_them_up() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    open_to_all(&scratch);
    let path = scratch.volume("disk", DISK_BYTES);
    for file in [&path, &scratch.key("node").0] {
        give_to_nobody(file);
    }
    let started = |workers| {
        let launch = Launch::new("node").with_keys(true).by_nobody_with(match link_mode() {
            Mode::Packet | Mode::Udp => "-all,+net_raw",
            Mode::Xdp | Mode::XdpCopy => "-all,+net_raw,+net_admin,+bpf,+ipc_lock",
        });
        launch.with(&["--workers", workers]).node(lab.store(), &scratch, &[volume("disk", &path)])
    };
    let effective = |node: &Daemon| {
        let told = standing_of_all(node);
        assert!(told.contains("NoNewPrivs: 1\n") && !told.contains("Uid: 0"), "{told}");
        told.lines()
            .find_map(|line| line.strip_prefix("CapEff: ").map(str::to_owned))
            .expect("proc(5) has it")
    };
    for workers in ["1", several()] {
        let node = started(workers);
        assert_eq!(effective(&node), kept_with(workers));
        node.stop();
    }
}
