//! Named scenarios: what was found once, and what must never be found. Each is a script over a quiet run, so that it stays what it is when the generator of runs
//! changes.

use cirro_backend::trouble::OnTrouble;
use cirro_protocol::time::Nanos;

use crate::disk::DiskTrouble;
use crate::guest::RingOptions;
use crate::host::DiskOptions;
use crate::options::{May, Options};
use crate::wire::Weather;
use crate::world::{Outcome, World};
use crate::{logger, quiet_kills};

const CUT: fn() -> Weather = || Weather { cut: true, ..Weather::default() };

fn ring(size: u16, depth: usize) -> RingOptions {
    RingOptions {
        size,
        depth,
        event_idx: true,
        garbage: 0,
        flushes: 8,
        big: 0,
        meddling: 0,
        discards: true,
        corner: 64,
    }
}

/// One host with one disk of one ring, one volume, and nothing that happens by itself.
fn plain(seed: u64) -> Options {
    let disk = DiskOptions {
        volume: 0,
        rings: vec![ring(64, 16)],
        requests: 400,
        rest_max: Nanos(0),
        write_through: false,
        take_over: false,
        on_trouble: OnTrouble::Wait,
    };
    Options {
        mtu: 9000,
        volumes: 1,
        write_through: false,
        hosts: vec![vec![disk]],
        think_max: Nanos::from_micros(200),
        may: May::default(),
        ..Options::quiet(seed)
    }
}

fn world(options: Options) -> World {
    logger::install(false);
    logger::begin();
    quiet_kills();
    World::new(options, false)
}

/// Runs a script over some seeds; each must end well.
fn play(options: impl Fn(u64) -> Options, script: impl Fn(&mut World)) {
    for seed in 1..=20 {
        let mut world = world(options(seed));
        script(&mut world);
        let Outcome { violation, requests, .. } = world.finish();
        assert!(violation.is_none(), "seed {seed}: {}", violation.expect("just looked"));
        assert!(requests > 100, "seed {seed}: the guest was served");
    }
}

fn millis(count: u64) -> Nanos {
    Nanos::from_millis(count)
}

#[test]
fn one_seed_is_one_run() {
    let run = || world(Options::of(5)).run();
    let (one, two) = (run(), run());
    assert_eq!((one.hash, one.requests, one.turns), (two.hash, two.requests, two.turns));
    assert_ne!(one.hash, world(Options::of(6)).run().hash);
}

#[test]
fn nothing_goes_wrong_where_nothing_happens() {
    play(plain, |world| world.run_for(millis(500)));
}

/// A driver that begins anew while its requests wait for a node that is away is not given the requests of before: P-95.
#[test]
fn a_reset_while_the_node_is_away_leaves_nothing_of_the_old_ring() {
    play(plain, |world| {
        world.run_for(millis(25));
        world.set_weather((0, 1), CUT());
        world.set_weather((1, 0), CUT());
        world.reset_rings(0, true);
        world.run_for(millis(2_100));
        // From now on a stop does not wait for the node.
        for _ in 0..20 {
            world.reset_rings(0, true);
            world.run_for(Nanos::from_micros(300));
        }
    });
}

/// P-75 P-84: a node that is killed under load is a pause.
#[test]
fn a_node_killed_under_load_is_a_pause() {
    play(plain, |world| {
        for _ in 0..10 {
            world.run_for(millis(15));
            world.kill(0, "by the script");
            world.run_for(millis(40));
        }
    });
}

/// P-89: what was completed and not flushed is there again after the storage machine lost power.
#[test]
fn a_power_cut_of_the_node_is_a_pause() {
    play(plain, |world| {
        for _ in 0..6 {
            world.run_for(millis(12));
            world.cut_power();
            world.run_for(millis(400));
        }
    });
}

/// P-86 P-89: a request whose write the node answered before it lost power, and whose flush afterwards, begins again from its write.
#[test]
fn a_flush_after_a_restart_says_nothing_of_a_write_before_it() {
    let options = |seed| {
        let mut options = plain(seed);
        options.hosts[0][0].write_through = true;
        options
    };
    play(options, |world| {
        for _ in 0..12 {
            world.run_for(Nanos::from_micros(3_300));
            world.cut_power();
            world.run_for(millis(400));
        }
    });
}

/// P-89 P-90: a backend that is killed leaves its copy to the next, which meets a node that has forgotten.
#[test]
fn a_backend_killed_before_it_could_write_again_leaves_that_to_the_next() {
    play(plain, |world| {
        for _ in 0..4 {
            world.run_for(millis(12));
            world.cut_power();
            world.kill(1, "by the script");
            world.run_for(millis(3_400));
        }
    });
}

/// P-89: what cannot be written again is tried again, and meanwhile the guest reads nothing that it has overwritten.
#[test]
fn a_disk_that_is_full_when_it_is_written_again_keeps_the_guest_waiting() {
    let options = |seed| {
        let mut options = plain(seed);
        // Errors are for the operator.
        options.may.disk_errors = 1;
        options.change_every = Nanos::from_secs(1_000);
        options
    };
    play(options, |world| {
        for _ in 0..4 {
            world.run_for(millis(12));
            world.cut_power();
            world.trouble_disks(&DiskTrouble { no_space: 600_000, ..DiskTrouble::default() });
            world.run_for(millis(3_400));
            world.trouble_disks(&DiskTrouble::default());
            world.run_for(millis(1_200));
        }
    });
}

/// Kills the backend, and stops the next one before, in and after each step of its way to the volume: handshake, OPEN to look, OPEN to write.
fn stop_on_the_way_to_the_volume(world: &mut World, trouble: impl Fn(&mut World)) {
    for step in 0..10 {
        world.run_for(millis(12));
        trouble(world);
        world.kill(1, "by the script");
        for path in [(0, 1), (1, 0)] {
            world.set_weather(path, Weather { delay: millis(4), ..Weather::default() });
        }
        while !world.is_up(1) {
            world.run_for(millis(1));
        }
        world.run_for(millis(14 + 4 * step));
        world.stop_host(0);
        world.run_for(millis(100));
        world.kill(1, "after its stop");
        for path in [(0, 1), (1, 0)] {
            world.set_weather(path, Weather::default());
        }
        world.run_for(millis(3_100));
    }
}

/// P-83 P-89: a disk that stops while it meets a node that has forgotten does not give the volume back before all is written again.
#[test]
fn a_stop_on_the_way_to_a_node_that_forgot_gives_back_nothing_too_early() {
    play(plain, |world| stop_on_the_way_to_the_volume(world, World::cut_power));
}

/// P-81 P-83: OPEN that is answered after a stop, and so let go of again, is not taken later for a volume that another had.
#[test]
fn an_open_that_meets_a_stop_does_not_fence() {
    let options = |seed| Options { write_through: true, ..plain(seed) };
    play(options, |world| stop_on_the_way_to_the_volume(world, |_| {}));
}

/// `--on-trouble eio-after`: requests fail while the volume is away, and what was promised before is there when it is back.
#[test]
fn a_disk_that_does_not_wait_loses_nothing_that_it_promised() {
    let options = |seed| {
        let mut options = plain(seed);
        options.hosts[0][0].on_trouble = OnTrouble::EioAfter(millis(300));
        options.hosts[0][0].requests = 4_000;
        options
    };
    play(options, |world| {
        // Once requests fail the guest soon has none left: all that counts is what it was promised before.
        world.run_for(millis(35));
        world.cut_power();
        world.set_weather((0, 1), CUT());
        // It takes a while until the session is given up; only then its time begins.
        world.run_for(millis(3_000));
        world.set_weather((0, 1), Weather::default());
        world.run_for(millis(600));
    });
}
