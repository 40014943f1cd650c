//! What a disk does when its volume is not open: it waits, or after a time its requests fail (`--on-trouble`). And the words for why.
//!
//! Knows time and causes; does not know requests or sessions. Called by `disk` once a turn, by `config` for the policy, by `report` for the words.

use std::fmt;
use std::str::FromStr;

use cirro_protocol::initiator::LossCause;
use cirro_protocol::op::Status;
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::VolumeName;
use cirro_protocol::wire::body::{CloseReason, VolumeInfo};

/// What happens to requests while the volume is not open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTrouble {
    /// They wait, however long.
    #[default]
    Wait,
    /// They fail when it has lasted so long, and at once from then on.
    EioAfter(Nanos),
}

/// A policy that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a policy: give wait, or eio-after=TIME with a TIME like 500ms, 30s, 5m or 1h")]
pub struct BadOnTrouble;

impl FromStr for OnTrouble {
    type Err = BadOnTrouble;

    fn from_str(text: &str) -> Result<OnTrouble, BadOnTrouble> {
        if text == "wait" {
            return Ok(OnTrouble::Wait);
        }
        let time = text.strip_prefix("eio-after").and_then(|rest| rest.strip_prefix(['=', ' ']));
        time.and_then(parse_time).map(OnTrouble::EioAfter).ok_or(BadOnTrouble)
    }
}

/// A number with its unit; not zero.
fn parse_time(text: &str) -> Option<Nanos> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let ms = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    let ns = number.parse::<u64>().ok()?.checked_mul(ms)?.checked_mul(1_000_000)?;
    // Longer than a century is a mistake, and would make later points in time overflow.
    (1..u64::MAX / 4).contains(&ns).then_some(Nanos(ns))
}

impl fmt::Display for OnTrouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OnTrouble::Wait => f.write_str("wait"),
            OnTrouble::EioAfter(time) if time.0.is_multiple_of(1_000_000_000) => {
                write!(f, "eio-after={}s", time.0 / 1_000_000_000)
            }
            OnTrouble::EioAfter(time) => write!(f, "eio-after={}ms", time.0 / 1_000_000),
        }
    }
}

/// A turn of things, to be acted on once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It has lasted too long: requests fail from now on.
    Fail,
    /// Requests are served again, or wait.
    Serve,
}

/// The trouble of one disk.
#[derive(Debug)]
pub struct Trouble {
    policy: OnTrouble,
    /// Since when the volume is not open; `None` while it is.
    since: Option<Instant>,
    cause: Option<LossCause>,
    failing: bool,
}

impl Trouble {
    /// None so far.
    pub fn new(policy: OnTrouble) -> Trouble {
        Trouble { policy, since: None, cause: None, failing: false }
    }

    /// The session was lost.
    pub fn lost(&mut self, cause: LossCause) {
        self.cause = Some(cause);
    }

    /// The policy.
    pub fn policy(&self) -> OnTrouble {
        self.policy
    }

    /// Why the last session was lost.
    pub fn cause(&self) -> Option<LossCause> {
        self.cause
    }

    /// True if requests fail.
    pub fn is_failing(&self) -> bool {
        self.failing
    }

    /// Takes note of whether the volume is open now, and whether it is another's for good: then nothing waits, whatever the policy.
    pub fn observe(&mut self, now: Instant, open: bool, fenced: bool) -> Option<Turn> {
        self.since = if open { None } else { self.since.or(Some(now)) };
        let too_long = match (self.policy, self.since) {
            (OnTrouble::EioAfter(time), Some(since)) => now >= since + time,
            (OnTrouble::EioAfter(_) | OnTrouble::Wait, _) => false,
        };
        let fail = too_long || (fenced && !open);
        let turn = if fail { Turn::Fail } else { Turn::Serve };
        (std::mem::replace(&mut self.failing, fail) != fail).then_some(turn)
    }

    /// When requests begin to fail, if nothing happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        match (self.policy, self.since) {
            (OnTrouble::EioAfter(time), Some(since)) if !self.failing => Some(since + time),
            (OnTrouble::EioAfter(_) | OnTrouble::Wait, _) => None,
        }
    }

    /// Says that requests fail or are served again.
    pub fn log(&self, volume: VolumeName, turn: Turn, refusal: Option<Status>, failed: usize) {
        let why = why(refusal, self.cause);
        match turn {
            Turn::Fail => log::error!(
                "volume {volume}: {why}; {failed} requests fail, and every other one until it is open again (--on-trouble {})",
                self.policy
            ),
            Turn::Serve => log::info!("volume {volume}: requests are served again"),
        }
    }
}

/// Why a volume is not open, in a few words.
pub fn why(refusal: Option<Status>, cause: Option<LossCause>) -> String {
    match (refusal, cause) {
        (Some(Status::Busy), _) => {
            "another attachment holds the volume; the node's log says which".to_owned()
        }
        (Some(Status::Fenced), _) => "another attachment took the volume over".to_owned(),
        (Some(status), _) => format!("the node answered {status:?}"),
        (None, None) => "no node has answered so far".to_owned(),
        (None, Some(LossCause::Dead | LossCause::Abandoned)) => "the node does not answer".to_owned(),
        (None, Some(LossCause::Reset | LossCause::Closed(CloseReason::Restart))) => {
            "the node has restarted".to_owned()
        }
        (None, Some(LossCause::Closed(reason))) => format!("the node closed the session ({reason:?})"),
        (None, Some(LossCause::NarrowPath | LossCause::WiderPath)) => "the path has changed".to_owned(),
    }
}

/// Says that the node said no.
pub fn log_refusal(volume: VolumeName, status: Status, info: &VolumeInfo) {
    match status {
        Status::Busy => log::warn!(
            "volume {volume}: another attachment holds it (epoch {}); waiting for it to let go. If it is gone for good, start with --take-over",
            info.vol_epoch
        ),
        Status::Fenced => log::error!(
            "volume {volume}: another attachment took it over; writes fail. Stop this disk, or take the volume back with --take-over"
        ),
        Status::Ok
        | Status::Io
        | Status::NoSpace
        | Status::Stale
        | Status::Retry
        | Status::Invalid
        | Status::ReadOnly
        | Status::Corrupt
        | Status::Access
        | Status::Unsupported => {
            log::warn!("volume {volume}: the node refuses it ({status:?}); asking again until it agrees");
        }
    }
}

/// Says that the session was lost, and how many requests are kept.
pub fn log_loss(volume: VolumeName, cause: LossCause, kept: usize) {
    match cause {
        LossCause::Dead => {
            log::warn!("volume {volume}: the node does not answer; {kept} requests wait for it");
        }
        LossCause::Reset
        | LossCause::Closed(_)
        | LossCause::NarrowPath
        | LossCause::WiderPath
        | LossCause::Abandoned => {
            log::info!("volume {volume}: session over ({cause:?}); {kept} requests go on in the next");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_as_it_is_written() {
        let good = [
            ("wait", OnTrouble::Wait),
            ("eio-after=30s", OnTrouble::EioAfter(Nanos::from_secs(30))),
            ("eio-after 30s", OnTrouble::EioAfter(Nanos::from_secs(30))),
            ("eio-after=1500ms", OnTrouble::EioAfter(Nanos::from_millis(1500))),
            ("eio-after=2m", OnTrouble::EioAfter(Nanos::from_secs(120))),
            ("eio-after=1h", OnTrouble::EioAfter(Nanos::from_secs(3600))),
        ];
        for (text, policy) in good {
            assert_eq!(text.parse(), Ok(policy), "{text}");
            assert_eq!(policy.to_string().parse(), Ok(policy), "{policy}");
        }
        for text in [
            "",
            "Wait",
            "eio-after",
            "eio-after=",
            "eio-after=30",
            "eio-after=0s",
            "eio-after30s",
            "eio-after=s",
        ] {
            assert_eq!(text.parse::<OnTrouble>(), Err(BadOnTrouble), "{text}");
        }
        assert!("eio-after=18446744073709551615h".parse::<OnTrouble>().is_err());
    }

    #[test]
    fn it_turns_once_each_way() {
        let mut trouble = Trouble::new(OnTrouble::EioAfter(Nanos(100)));
        assert_eq!(trouble.observe(Instant(1000), false, false), None);
        assert_eq!(trouble.next_deadline(), Some(Instant(1100)));
        assert_eq!(trouble.observe(Instant(1099), false, false), None);
        assert_eq!(trouble.observe(Instant(1100), false, false), Some(Turn::Fail));
        assert_eq!((trouble.observe(Instant(1200), false, false), trouble.next_deadline()), (None, None));
        assert_eq!(trouble.observe(Instant(1300), true, false), Some(Turn::Serve));
        assert_eq!(trouble.observe(Instant(1301), true, false), None);
        assert_eq!(trouble.observe(Instant(1400), false, false), None, "it begins anew");
        assert_eq!(trouble.next_deadline(), Some(Instant(1500)));
    }

    /// P-81
    #[test]
    fn who_is_fenced_does_not_wait() {
        let mut trouble = Trouble::new(OnTrouble::Wait);
        assert_eq!(trouble.observe(Instant(0), false, true), Some(Turn::Fail));
        assert_eq!(trouble.observe(Instant(1), false, true), None);
        assert_eq!(trouble.observe(Instant(2), true, false), Some(Turn::Serve));
    }

    #[test]
    fn who_waits_waits_for_ever() {
        let mut trouble = Trouble::new(OnTrouble::Wait);
        assert_eq!(trouble.observe(Instant(0), false, false), None);
        assert_eq!(trouble.observe(Instant(u64::MAX), false, false), None);
        assert_eq!(trouble.next_deadline(), None);
    }
}
