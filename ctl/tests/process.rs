//! What `daemon` and `stop` promise about a whole process, seen from outside: the test program runs itself again in the role that
//! `CIRRO_CTL_TEST_ROLE` names.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::Context;
use cirro_ctl::daemon::{self, Usage};
use cirro_ctl::stop::Stop;

const ROLE: &str = "CIRRO_CTL_TEST_ROLE";

/// Ends this process in its role, if it has one.
fn play_role(body: impl FnOnce() -> anyhow::Result<()>) {
    if std::env::var_os(ROLE).is_some() {
        let code = daemon::run("cirro-test", body);
        // The harness owns main: leave with the code as main would.
        std::process::exit(if code == ExitCode::SUCCESS {
            0
        } else if code == ExitCode::from(2) {
            2
        } else {
            1
        });
    }
}

/// Runs `promise` again, with its role.
fn spawn(promise: &str, log: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", promise, "--nocapture", "--test-threads=1"])
        .env(ROLE, "daemon")
        .env("RUST_LOG", log)
        .env_remove("JOURNAL_STREAM")
        .env("RUST_BACKTRACE", "0")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The exit code and what it said.
fn end(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn wait_for_a_stop() -> anyhow::Result<()> {
    daemon::start_log(0);
    let stop = Stop::on_signals()?;
    log::info!(target: "cirro_test", "ready\nfor it");
    anyhow::ensure!(stop.wait_for(Duration::from_secs(20)), "nobody asked to stop");
    Ok(())
}

fn ends_cleanly_on(promise: &str, signal: &str) {
    let mut child = spawn(promise, "info");
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    log.read_line(&mut line).unwrap();
    assert!(line.contains("INFO  cirro_test: ready\\nfor it"), "one line with the break escaped: {line}");
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    assert_eq!(end(child).0, Some(0));
}

#[test]
fn sigterm_ends_the_daemon_cleanly() {
    play_role(wait_for_a_stop);
    ends_cleanly_on("sigterm_ends_the_daemon_cleanly", "-TERM");
}

#[test]
fn sigint_ends_the_daemon_cleanly() {
    play_role(wait_for_a_stop);
    ends_cleanly_on("sigint_ends_the_daemon_cleanly", "-INT");
}

#[test]
fn a_failure_is_one_line_with_its_causes_and_exit_1() {
    play_role(|| std::fs::read("/nonexistent").map(drop).context("open volume a (/nonexistent)"));
    let (code, said) = end(spawn("a_failure_is_one_line_with_its_causes_and_exit_1", "info"));
    assert_eq!(code, Some(1));
    assert_eq!(said, "cirro-test: open volume a (/nonexistent): No such file or directory (os error 2)\n");
}

#[test]
fn a_usage_mistake_is_one_line_and_exit_2() {
    play_role(|| Err(Usage::new("--volume a: expected NAME=PATH").into()));
    let (code, said) = end(spawn("a_usage_mistake_is_one_line_and_exit_2", "info"));
    assert_eq!((code, said.as_str()), (Some(2), "cirro-test: --volume a: expected NAME=PATH\n"));
}

#[test]
fn a_panic_on_any_thread_names_itself_as_a_bug() {
    play_role(|| {
        let worker =
            std::thread::Builder::new().name("worker-3".into()).spawn(|| panic!("slot 7 is lost"))?;
        anyhow::ensure!(worker.join().is_ok(), "the worker is gone");
        Ok(())
    });
    let (code, said) = end(spawn("a_panic_on_any_thread_names_itself_as_a_bug", "info"));
    assert_eq!(code, Some(1));
    let first = said.lines().next().unwrap();
    assert!(first.starts_with("cirro-test 0.1.0: this is a bug in cirro-test"), "{said}");
    assert!(first.contains("thread worker-3") && first.ends_with("slot 7 is lost"), "{said}");
}
