//! Any text as the backend's configuration file: a configuration within its limits, or an error that can be printed.
//!
//! Knows the promises of `config` only.
#![no_main]

use std::collections::HashSet;
use std::path::Path;

use cirro_backend::config::{Config, Flags, POLL_US_MAX, QUEUES_MAX};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let flags = Flags { link: Some("eth0".into()), ..Flags::default() };
    match Config::new(&flags, Some((Path::new("fuzzed.toml"), text))) {
        Ok(config) => {
            assert!(!config.disks.is_empty() && config.link.workers >= 1 && config.poll_us <= POLL_US_MAX);
            let volumes: HashSet<_> = config.disks.iter().map(|disk| disk.volume).collect();
            assert_eq!(volumes.len(), config.disks.len(), "each volume once");
            for disk in &config.disks {
                assert!((1..=QUEUES_MAX).contains(&disk.queues) && disk.queue_size.is_power_of_two());
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
