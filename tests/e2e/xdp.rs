//! AF_XDP under the real daemons: whose an interface is, and what is left of a daemon that was killed.
//!
//! Runs in every mode but UDP with daemons of `--link-mode xdp`; the other tests run over it with `CIRRO_LINK_MODE=xdp`.

use std::process::Output;
use std::time::Duration;

use cirro_ctl::confine::{Needs, confine};
use cirro_link::any::Mode;
use cirro_link::{OpenError, xdp};
use cirro_tests::daemons::{Launch, Scratch, binaries, link_mode};
use cirro_tests::frontend::Shape;
use cirro_tests::netns::{INTERFACE, Lab, Machine};
use cirro_tests::verify::{Mix, Size, Verifier};
use cirro_tests::wire::ETHERTYPE;

use crate::rig::{connect, judge, must, volume};

const DISK_BYTES: u64 = 64 << 20;
const SHAPE: Shape = Shape { queues: 1, depth: 8, bytes_max: 128 << 10, poll: false };

/// The arguments that make a daemon of the tests one on AF_XDP.
fn arguments() -> &'static [&'static str] {
    if link_mode() == Mode::Packet { &["--link-mode", "xdp"] } else { &[] }
}

fn has_program(machine: &Machine) -> bool {
    machine.namespace().shell(&format!("ip -d link show dev {INTERFACE}")).contains("prog/xdp")
}

/// A node with nothing to say but why it does not start.
fn refused(machine: &Machine, scratch: &Scratch, more: &[&str]) -> Output {
    let mut command = machine.namespace().command(binaries().join("cirro-node"));
    command.args(["--link", INTERFACE, "--security", "none", "--volume", "scratch=ram:1M"]).args(more);
    command.arg("--state-dir").arg(scratch.path("refused.state"));
    command.arg("--ctl-socket").arg(scratch.path("refused.ctl"));
    command.output().expect("it can be started")
}

#[test]
fn a_killed_daemon_leaves_no_program_and_the_next_one_serves_at_once() {
    if link_mode() == Mode::Udp {
        return println!("over UDP there is no program");
    }
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let path = scratch.volume("disk", DISK_BYTES);
    let start =
        || Launch::new("node").with(arguments()).node(lab.store(), &scratch, &[volume("disk", &path)]);
    let node = start();
    let backend = Launch::new("backend").with(arguments()).backend(lab.host(), &scratch, "disk");
    assert!(has_program(lab.store()) && has_program(lab.host()));
    let mut verifier = Verifier::new(DISK_BYTES, 5);
    let mut front_end = connect(&scratch, "backend", SHAPE);
    let time = Duration::from_millis(500);
    judge(&mut verifier, &mut front_end, Size::UpTo(64 << 10), Mix::Everything, time);
    node.kill();
    assert!(!has_program(lab.store()) && has_program(lab.host()));
    let node = start();
    judge(&mut verifier, &mut front_end, Size::UpTo(64 << 10), Mix::Everything, time);
    must(verifier.check_all(&mut front_end));
    drop(front_end);
    backend.stop();
    node.stop();
    assert!(!has_program(lab.store()) && !has_program(lab.host()));
}

#[test]
fn a_second_daemon_on_the_interface_and_one_with_too_many_workers_say_what_to_do_in_one_line() {
    let (lab, scratch) = (Lab::pair(1500), Scratch::new());
    let first = lab.store().namespace().enter(|| xdp::open(INTERFACE, ETHERTYPE, 1, false));
    let first = first.expect("nobody else is there");
    let too_many = ["--link-mode", "xdp", "--workers", "3"];
    let refusals: [(&Machine, &[&str], &str); 3] = [
        (lab.store(), &["--link-mode", "xdp"], "another daemon uses interface wire0"),
        (lab.store(), &[], "none shares it with one of --link-mode xdp"),
        (lab.host(), &too_many, "wire0 has 1 receive queues, too few for 3 workers: --workers 1, or"),
    ];
    for (machine, more, expected) in refusals {
        let output = refused(machine, &scratch, more);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(expected) && said.lines().count() == 1, "{said}");
    }
    assert!(has_program(lab.store()) && !has_program(lab.host()));
    drop(first);
}

/// What a daemon keeps is enough for using its program (`privilege` shows that), and not for loading one. On a thread of its own: what that
/// gives up stays given up.
#[test]
fn a_confined_daemon_loads_no_other_program() {
    let lab = Lab::pair(1500);
    let refused = lab.store().namespace().enter(|| {
        confine(None, Needs::XdpSockets).expect("root may");
        xdp::open(INTERFACE, ETHERTYPE, 1, false).map(|_| ()).expect_err("bpf(2) is filtered")
    });
    let OpenError::Kernel { step, cause, .. } = &refused else { panic!("{refused}") };
    assert!(step.starts_with("XDP program"), "{refused}");
    assert_eq!(cause.kind(), std::io::ErrorKind::PermissionDenied);
}
