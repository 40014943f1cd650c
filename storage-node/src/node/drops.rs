//! Why a worker drops a frame: the names that reports show.
//!
//! Knows no frame. Counted by `receive` and `handshake`.

/// How many reasons there are.
pub const DROP_REASONS: usize = 14;
/// Their names, by number.
pub const DROP_NAMES: [&str; DROP_REASONS] = [
    "malformed",
    "not-for-us",
    "unknown-session",
    "other-source",
    "other-mode",
    "tag",
    "payload-crc",
    "no-buffer",
    "long-malformed",
    "long-limit",
    "long-ignored",
    "key-phase",
    "long-other-mode",
    "repeated",
];

/// A reason; its number indexes [`DROP_NAMES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// The layout is wrong.
    Malformed = 0,
    /// Another station or worker is meant.
    NotForUs = 1,
    /// No session has the cid.
    UnknownSession = 2,
    /// It does not come from the session's peer.
    OtherSource = 3,
    /// The session does not use this sealing mode.
    OtherMode = 4,
    /// The tag is wrong: damage, or a frame of an older session.
    Tag = 5,
    /// A payload's checksum is wrong.
    PayloadCrc = 6,
    /// There is no buffer for a write in it.
    NoBuffer = 7,
    /// A LONG frame's layout or tag is wrong.
    LongMalformed = 8,
    /// More LONG frames than a turn takes.
    LongLimit = 9,
    /// A LONG frame that asks nothing of us.
    LongIgnored = 10,
    /// A key phase that is not near the session's.
    KeyPhase = 11,
    /// A LONG frame without keys where they are asked for, or with keys where there are none.
    LongOtherMode = 12,
    /// With keys: a frame of this number came before.
    Repeated = 13,
}

const _: () = assert!(DropReason::Repeated as usize + 1 == DROP_REASONS);
