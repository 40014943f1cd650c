//! What every daemon's `main` does the same way: log to stderr, end with one line that says why, exit codes, and panics that name themselves as bugs.
//!
//! Does not know the daemons, their flags or their threads. Called by `main.rs` of `cirro-node` and `cirro-backend`, once, before any thread is started.
//! Stopping on a signal is in [`crate::stop`]. SIGPIPE needs nothing: the Rust runtime ignores it, so a closed pipe is a write error, and the
//! writes to stderr below ignore write errors: a daemon outlives its log.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::Write;
use std::panic::PanicHookInfo;
use std::process::ExitCode;

/// Exit status when the work failed.
pub const EXIT_WORK: u8 = 1;
/// Exit status when the command line or the configuration makes no sense; clap uses the same.
pub const EXIT_USAGE: u8 = 2;

/// The operator asked for something that makes no sense: the process ends with [`EXIT_USAGE`]. Wrap it in an `anyhow::Error` anywhere in the chain.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(String);

impl Usage {
    /// The mistake in one sentence: what is wrong, with what, and what to write instead.
    pub fn new(sentence: impl Into<String>) -> Usage {
        Usage(sentence.into())
    }
}

/// Runs the body of a program's `main`: sets the panic message, and turns an error into one line on stderr and an exit status.
pub fn run(program: &'static str, body: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    name_panics_as_bugs(program);
    match body() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("{program}: {}", one_line(&error)));
            ExitCode::from(exit_status(&error))
        }
    }
}

/// Starts the log on stderr. `RUST_LOG` decides the level when it is set; else 0 is info, 1 (`-v`) debug and more (`-vv`) trace for our own crates,
/// and warnings for those of others. Under systemd lines carry the priority the journal reads, and no time, which it adds.
///
/// # Panics
/// When a logger was set before: call it once.
pub fn start_log(verbosity: u8) {
    let own = match verbosity {
        0 => "warn,cirro=info",
        1 => "warn,cirro=debug",
        _ => "info,cirro=trace",
    };
    let mut builder = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(own));
    let for_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    builder.format(move |out, record| {
        let text = escape_controls(&record.args().to_string());
        if for_journal {
            writeln!(out, "<{}>{}: {text}", priority(record.level()), record.target())
        } else {
            writeln!(out, "{} {:5} {}: {text}", out.timestamp_millis(), record.level(), record.target())
        }
    });
    builder.init();
}

/// The error with its causes on one line, safe for a terminal: control characters that came from outside are escaped.
pub fn one_line(error: &anyhow::Error) -> String {
    escape_controls(&format!("{error:#}"))
}

/// The text with every control character (a line break, a terminal escape) written as a visible escape.
pub fn escape_controls(text: &str) -> String {
    if !text.contains(char::is_control) {
        return text.to_owned();
    }
    text.chars().fold(String::with_capacity(text.len() + 8), |mut out, c| {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
        out
    })
}

/// The exit status for an error: [`EXIT_USAGE`] when a [`Usage`] is in its chain.
pub fn exit_status(error: &anyhow::Error) -> u8 {
    if error.chain().any(|cause| cause.is::<Usage>()) { EXIT_USAGE } else { EXIT_WORK }
}

/// The priority that the journal and syslog give a level (`sd-daemon(3)`).
fn priority(level: log::Level) -> u8 {
    match level {
        log::Level::Error => 3,
        log::Level::Warn => 4,
        log::Level::Info => 6,
        log::Level::Debug | log::Level::Trace => 7,
    }
}

/// Replaces the panic message by one line that a user can act on; a backtrace follows when `RUST_BACKTRACE` asks for one.
fn name_panics_as_bugs(program: &'static str) {
    std::panic::set_hook(Box::new(move |panic: &PanicHookInfo<'_>| {
        let thread = std::thread::current();
        let place = panic.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
        say(&bug_line(program, thread.name().unwrap_or("unnamed"), &place, panic.payload()));
        let trace = Backtrace::capture();
        if trace.status() == BacktraceStatus::Captured {
            say(&trace.to_string());
        }
    }));
}

/// The line a panic prints.
fn bug_line(program: &str, thread: &str, place: &str, payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let text = escape_controls(text.unwrap_or("no message"));
    format!(
        "{program} {}: this is a bug in {program}, please report this line: thread {thread} panicked at {place}: {text}",
        env!("CARGO_PKG_VERSION")
    )
}

/// Writes a line to stderr; a stderr that is gone is no reason to fail.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn an_error_is_one_line_with_its_causes() {
        let error = anyhow::Error::from(std::io::Error::from_raw_os_error(2)).context("open volume a\nb");
        assert_eq!(one_line(&error), "open volume a\\nb: No such file or directory (os error 2)");
        assert_eq!(exit_status(&error), 1);
    }

    #[test]
    fn a_usage_mistake_anywhere_in_the_chain_exits_with_2() {
        let error = Err::<(), _>(Usage::new("--volume needs NAME=PATH"))
            .context("read the command line")
            .unwrap_err();
        assert_eq!(exit_status(&error), 2);
    }

    #[test]
    fn a_panic_names_itself_as_a_bug_on_one_line() {
        let line = bug_line("cirro-node", "worker-0", "src/a.rs:1:2", &"left\nright");
        assert!(line.contains("this is a bug in cirro-node"), "{line}");
        assert!(line.ends_with("thread worker-0 panicked at src/a.rs:1:2: left\\nright"), "{line}");
    }
}
