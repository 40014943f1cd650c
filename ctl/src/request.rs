//! What can be asked over a control socket: one JSON object on one line, and the answer's envelope.
//!
//! Does not know sockets, nor how a daemon finds its answer. Read by [`crate::server`], written by [`crate::client`].
//! `{"cmd":"status"}` → `{"ok":…}` or `{"error":"…"}`; unknown commands and unknown fields are refused by name.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Bytes of a request line with its line break. The longest legal one holds a path of 4096 bytes, escaped: six times that.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// Bytes of a reply line that a client accepts: 4096 sessions of about 2 KiB each, and as much again.
pub const REPLY_BYTES_MAX: usize = 16 << 20;
/// Bytes of each frame that a tap keeps unless asked otherwise: a whole frame (`cirro_protocol::types::FRAME_BYTES_MAX`).
pub const TAP_FRAME_BYTES_DEFAULT: u32 = cirro_protocol::types::FRAME_BYTES_MAX as u32;
/// Bytes of a tap's file after which it stops writing, unless asked otherwise: 1 GiB.
pub const TAP_FILE_BYTES_DEFAULT: u64 = 1 << 30;

/// A request. A daemon answers the ones it has, and [`Request::not_supported`] to the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What is served, to or from whom, in which state, since when, and why. Answer: [`crate::report::Report`] without its counters.
    Status {},
    /// The same with every counter and latency.
    Stats {},
    /// Write the frames of the process's link to a pcap file from now on. Answer: [`TapPushed`].
    LinkTapPush(TapPush),
    /// End every tap and close the files. Answer: [`TapPopped`].
    LinkTapPop {},
    /// Say what a client may do with a volume from now on; its sessions on it end. Answer: [`Grants`].
    VolumeGrant(VolumeGrant),
    /// Take every right on a volume from a client; its sessions on it end. Answer: [`Grants`].
    VolumeRevoke(VolumeRevoke),
    /// Who may use a volume. Answer: [`Grants`].
    VolumeGrants {
        /// Its name.
        volume: String,
    },
    /// Give a volume another size while it is used. Answer: [`Resized`].
    VolumeResize(VolumeResize),
}

/// A right given to a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeGrant {
    /// The volume's name.
    pub volume: String,
    /// The client: its public key, or its MAC address where security is none.
    pub client: String,
    /// `ro` or `rw`.
    pub right: GrantRight,
}

/// What can be granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GrantRight {
    /// Read.
    Ro,
    /// Read and write.
    Rw,
}

/// A right taken away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRevoke {
    /// The volume's name.
    pub volume: String,
    /// The client, as in [`VolumeGrant`].
    pub client: String,
}

/// The size that a volume is to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeResize {
    /// The volume's name.
    pub volume: String,
    /// Its size from now on.
    pub bytes: u64,
}

/// Answer to [`Request::VolumeResize`]: it is done, and stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resized {
    /// The volume's name.
    pub volume: String,
    /// What was served before.
    pub bytes_before: u64,
    /// What is served now.
    pub bytes: u64,
    /// Sessions that have it open and were told.
    pub sessions_told: u32,
}

/// Who may use a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    /// The volume's name.
    pub volume: String,
    /// True where security is none and nobody was ever named: everybody may.
    pub open_to_all: bool,
    /// In the order of the clients.
    pub grants: Vec<GrantEntry>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantEntry {
    /// The client.
    pub client: String,
    /// Its right.
    pub right: GrantRight,
}

/// Where and how much a tap writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapPush {
    /// The file, absolute; the daemon makes it new and refuses one that exists. With several workers each writes `<path>.<worker>`.
    pub path: PathBuf,
    /// Bytes of each frame to keep, from its start.
    #[serde(default = "tap_frame_bytes_default")]
    pub frame_bytes_max: u32,
    /// Bytes of a file after which its tap stops writing.
    #[serde(default = "tap_file_bytes_default")]
    pub file_bytes_max: u64,
}

/// Answer to [`Request::LinkTapPush`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapPushed {
    /// The files being written, one per worker.
    pub files: Vec<PathBuf>,
}

/// Answer to [`Request::LinkTapPop`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapPopped {
    /// The files that were closed.
    pub files: Vec<TapFile>,
}

/// A file that a tap has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapFile {
    /// Where it is.
    pub path: PathBuf,
    /// Frames in it.
    pub frames: u64,
    /// Frames that passed but are not in it: the file was full or could not be written.
    pub frames_missed: u64,
}

/// A reply line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// The answer.
    Ok(Value),
    /// Why there is none, in one sentence for the operator.
    Error(String),
}

fn tap_frame_bytes_default() -> u32 {
    TAP_FRAME_BYTES_DEFAULT
}

fn tap_file_bytes_default() -> u64 {
    TAP_FILE_BYTES_DEFAULT
}

impl Request {
    /// Reads a request from a line, with or without its line break.
    ///
    /// # Errors
    /// A sentence for the client: not JSON, not a request, an unknown command or field.
    pub fn parse(line: &[u8]) -> Result<Request, String> {
        serde_json::from_slice(line).map_err(|error| format!("not a request: {error}"))
    }

    /// The word after `cmd`.
    pub fn name(&self) -> &'static str {
        match self {
            Request::Status {} => "status",
            Request::Stats {} => "stats",
            Request::LinkTapPush(_) => "link-tap-push",
            Request::LinkTapPop {} => "link-tap-pop",
            Request::VolumeGrant(_) => "volume-grant",
            Request::VolumeRevoke(_) => "volume-revoke",
            Request::VolumeGrants { .. } => "volume-grants",
            Request::VolumeResize(_) => "volume-resize",
        }
    }

    /// The answer of a daemon that has no answer to this request.
    ///
    /// # Errors
    /// Always.
    pub fn not_supported(&self, program: &str) -> Result<Value, String> {
        Err(format!("{}: not supported by {program} {}", self.name(), env!("CARGO_PKG_VERSION")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_lines_the_manual_shows() {
        assert_eq!(Request::parse(b"{\"cmd\":\"status\"}\n"), Ok(Request::Status {}));
        assert_eq!(Request::parse(b" {\"cmd\": \"link-tap-pop\"}\r\n"), Ok(Request::LinkTapPop {}));
        let push = Request::parse(br#"{"cmd":"link-tap-push","path":"/tmp/a.pcap"}"#).unwrap();
        let expected =
            TapPush { path: "/tmp/a.pcap".into(), frame_bytes_max: 65549, file_bytes_max: 1073741824 };
        assert_eq!(push, Request::LinkTapPush(expected));
    }

    #[test]
    fn every_request_is_read_back_and_named_as_written() {
        let push = TapPush { path: "/a".into(), frame_bytes_max: 96, file_bytes_max: 7 };
        let (volume, client) = ("v".to_owned(), "c".to_owned());
        let revoke = VolumeRevoke { volume: volume.clone(), client: client.clone() };
        let grant = VolumeGrant { volume: volume.clone(), client, right: GrantRight::Ro };
        for request in [
            Request::Status {},
            Request::Stats {},
            Request::LinkTapPush(push),
            Request::LinkTapPop {},
            Request::VolumeGrant(grant),
            Request::VolumeRevoke(revoke),
            Request::VolumeResize(VolumeResize { volume: volume.clone(), bytes: u64::MAX }),
            Request::VolumeGrants { volume },
        ] {
            let value = serde_json::to_value(&request).unwrap();
            assert_eq!(value["cmd"], request.name());
            assert_eq!(Request::parse(value.to_string().as_bytes()), Ok(request));
        }
    }

    #[test]
    fn what_is_no_request_is_refused_by_name() {
        let refused = |line: &[u8]| Request::parse(line).unwrap_err();
        assert!(refused(br#"{"cmd":"explode"}"#).contains("unknown variant `explode`"));
        assert!(refused(br#"{"cmd":"status","x":1}"#).contains("unknown field `x`"));
        assert!(refused(br#"{"cmd":"link-tap-push","path":"/a","x":1}"#).contains("unknown field `x`"));
        assert!(refused(br#"{"cmd":"link-tap-push"}"#).contains("missing field `path`"));
        assert!(refused(br#"{"cmd":"status"} {"cmd":"status"}"#).contains("trailing"));
        for line in [&b""[..], b"[]", b"7", b"\xff\xfe", b"\"status\"", b"{}", b"null"] {
            refused(line);
        }
        refused("[".repeat(60_000).as_bytes());
    }

    #[test]
    fn a_reply_is_ok_or_error() {
        assert_eq!(serde_json::to_string(&Reply::Ok(Value::from(7))).unwrap(), r#"{"ok":7}"#);
        assert_eq!(serde_json::to_string(&Reply::Error("no".into())).unwrap(), r#"{"error":"no"}"#);
    }
}
