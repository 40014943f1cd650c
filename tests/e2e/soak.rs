//! A minute of random faults with a seed that stays the same. `make soak` does it for longer and with others.

use std::time::Duration;

use cirro_tests::soak::{Options, run};

#[test]
fn a_minute_of_kills_cuts_losses_and_stalls_loses_nothing() {
    run(Options { seed: 20_261_123, time: Duration::from_secs(60) });
}
