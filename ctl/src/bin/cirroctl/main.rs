//! `cirroctl`: looks into the daemons of this machine. Knows requests and reports only, never a daemon's inside. Started by people and scripts.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use cirro_ctl::client::ask;
use cirro_ctl::daemon;
use cirro_ctl::request::Request;

fn main() -> ExitCode {
    daemon::run("cirroctl", || {
        let path = std::env::args_os()
            .nth(1)
            .ok_or_else(|| daemon::Usage::new("give the path of a control socket"))?;
        let answer = ask(&PathBuf::from(path), &Request::Status {}, Duration::from_secs(5))?;
        println!("{answer:#}");
        Ok(())
    })
}
