//! Any text as the node's configuration file: a configuration within its limits, or an error that can be printed.
//!
//! Knows the promises of `config` only.
#![no_main]

use std::collections::HashSet;
use std::path::Path;

use cirro_node::config::{Config, Flags, POLL_US_MAX};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let flags = Flags { link: Some("eth0".into()), ..Flags::default() };
    match Config::new(&flags, Some((Path::new("fuzzed.toml"), text))) {
        Ok(config) => {
            assert!(!config.volumes.is_empty() && config.link.workers >= 1 && config.poll_us <= POLL_US_MAX);
            let names: HashSet<_> = config.volumes.iter().map(|volume| volume.name).collect();
            assert_eq!(names.len(), config.volumes.len(), "each volume once");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
