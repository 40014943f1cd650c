//! Any bytes as each control payload: what parses is within its limits and is written again as it was.
//!
//! Knows the parsers' promises only.
#![no_main]

use cirro_protocol::wire::body::{ACK_RANGES_MAX, OpenRequest, VolumeInfo, parse_ack_ranges};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(open) = OpenRequest::parse(bytes) {
        let mut again = Vec::new();
        open.emit(&mut again);
        assert_eq!(OpenRequest::parse(&again), Ok(open));
    }
    if let Ok(info) = VolumeInfo::parse(bytes) {
        assert!((512..=4096).contains(&info.block_bytes) && info.block_bytes.is_power_of_two());
        assert!(info.capacity_sectors.checked_mul(512).is_some());
        let mut again = Vec::new();
        info.emit(&mut again);
        assert_eq!(VolumeInfo::parse(&again), Ok(info));
    }
    if let Ok(ranges) = parse_ack_ranges(bytes) {
        let ranges: Vec<_> = ranges.collect();
        assert!(
            ranges.len() <= ACK_RANGES_MAX && ranges.iter().all(|(first, last)| 0 < *first && first <= last)
        );
    }
});
