//! What a session counts: plain numbers, owned by its worker, published by the daemon.
//!
//! Knows no clock and no sharing.

/// Counters of one session's end since it began, and gauges of now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Frames sent, bare acks included.
    pub frames_sent: u64,
    /// Frames received whose seal was right, duplicates included.
    pub frames_received: u64,
    /// Bytes of payload sent, repeats included.
    pub payload_bytes_sent: u64,
    /// Bytes of payload received and used.
    pub payload_bytes_received: u64,
    /// Frames taken for lost by acks or time.
    pub frames_lost: u64,
    /// Messages sent again.
    pub messages_resent: u64,
    /// Frames acked after they had been taken for lost.
    pub spurious_losses: u64,
    /// Probe timeouts.
    pub probe_timeouts: u64,
    /// Frames that came twice.
    pub duplicate_frames: u64,
    /// Messages of a slot whose request was already known.
    pub duplicate_messages: u64,
    /// Messages that broke the protocol and were ignored.
    pub violations: u64,
    /// Frames the link would not take.
    pub frames_refused: u64,
    /// Sessions begun (initiator).
    pub sessions: u64,
    /// Smallest round trip of the last ten seconds, ns.
    pub rtt_ns_min: u64,
    /// Smoothed round trip, ns.
    pub rtt_ns_smoothed: u64,
    /// Congestion window, bytes.
    pub window_bytes: u64,
    /// Bytes in flight.
    pub in_flight_bytes: u64,
    /// Piece size of the session, bytes; 0 without one.
    pub piece_bytes: u32,
}
