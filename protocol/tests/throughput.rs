//! Throughput of the core on virtual time, by loss and round-trip time: a checked-in table that tells when a change moved it.
//!
//! `UPDATE_SNAPSHOT=1 cargo test -p cirro-protocol --test throughput` writes it anew; read the difference before you commit it.

mod pair;

use std::fmt::Write;

use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::Nanos;
use pair::{CAPACITY, Pair, Wire};

const SNAPSHOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/throughput.txt");

/// Requests per second of virtual time: `count` of `bytes` each, `depth` in flight.
fn requests_per_s(op: Op, bytes: usize, depth: usize, count: usize, wire: Wire) -> u64 {
    let mut pair = Pair::new(42, wire);
    pair.submit(Op::Flush, 0, Vec::new());
    assert!(pair.run_until_idle(Nanos::from_secs(5)));
    let (start, mut left, mut done, mut next) = (pair.now, count, 0, 0);
    pair.done.clear();
    while done < count {
        while left > 0 && pair.guest.len() < depth {
            pair.submit(op, (next * bytes % CAPACITY) as u64, vec![1; bytes]).expect("a free slot");
            (next, left) = (next + 1, left - 1);
        }
        assert!(pair.step(start + Nanos::from_secs(600)));
        assert!(pair.done.drain(..).all(|(_, status, _)| {
            done += 1;
            status == Status::Ok
        }));
    }
    count as u64 * 1_000_000_000 / pair.now.since(start).0
}

#[test]
fn throughput_by_loss_and_round_trip_is_the_one_checked_in() {
    let mut table =
        String::from("requests per second of virtual time, wire of 5 GB/s, MTU 9000, store 5 us\n\n");
    writeln!(table, "{:<28}{:>10}{:>10}{:>10}{:>10}", "loss in 1/1000:", 0, 1, 10, 50).unwrap();
    for (name, op, bytes, depth, count) in [
        ("4 KiB read, depth 1", Op::Read, 4096, 1, 400),
        ("4 KiB read, depth 32", Op::Read, 4096, 32, 4_000),
        ("4 KiB write, depth 32", Op::Write, 4096, 32, 4_000),
        ("128 KiB read, depth 8", Op::Read, 131_072, 8, 500),
        ("128 KiB write, depth 8", Op::Write, 131_072, 8, 500),
    ] {
        for rtt_us in [20, 100, 1_000] {
            write!(table, "{:<28}", format!("{name}, {rtt_us} us")).unwrap();
            for loss in [0, 1, 10, 50] {
                let wire = Wire { loss, delay: Nanos::from_micros(rtt_us / 2), ..Wire::default() };
                write!(table, "{:>10}", requests_per_s(op, bytes, depth, count, wire)).unwrap();
            }
            writeln!(table).unwrap();
        }
    }
    if std::env::var_os("UPDATE_SNAPSHOT").is_some() {
        std::fs::write(SNAPSHOT, &table).unwrap();
    }
    let expected = std::fs::read_to_string(SNAPSHOT).unwrap_or_default();
    assert!(table == expected, "the table moved; it is now\n{table}\nand was\n{expected}");
}
