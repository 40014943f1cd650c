//! What the processes of a run say: errors are kept, the rest is shown when a run is traced.
//!
//! Knows log levels and the run's time; one run a thread. Called by the `log` crate.

use std::cell::{Cell, RefCell};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::world::virtual_now;

thread_local! {
    static FIRST_ERROR: RefCell<Option<String>> = const { RefCell::new(None) };
    static SHOWN: Cell<bool> = const { Cell::new(false) };
}

struct Logger;

static LOGGER: Logger = Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() == Level::Error || SHOWN.get()
    }

    fn log(&self, record: &Record<'_>) {
        if record.level() == Level::Error {
            FIRST_ERROR.with_borrow_mut(|first| {
                first.get_or_insert_with(|| record.args().to_string());
            });
        }
        if SHOWN.get() {
            eprintln!(
                "{:>12} us {} {}: {}",
                virtual_now().0 / 1_000 - 1_000_000,
                record.level(),
                record.target(),
                record.args()
            );
        }
    }

    fn flush(&self) {}
}

/// Takes the place of the process's logger. Traced runs show everything.
pub(crate) fn install(show: bool) {
    SHOWN.set(show);
    // Set already: by another thread of ours.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(if show { LevelFilter::Debug } else { LevelFilter::Error });
}

/// A run begins on this thread.
pub(crate) fn begin() {
    FIRST_ERROR.set(None);
}

/// The first error of the run on this thread.
pub(crate) fn first_error() -> Option<String> {
    FIRST_ERROR.with_borrow(Clone::clone)
}
