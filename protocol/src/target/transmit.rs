//! What the target says: answers, read data, news of the volume, and again what was lost.
//!
//! Knows the order in which a frame is filled; the state that it reads and advances is its parent's.

use alloc::vec::Vec;

use super::{GoneCause, State, Target};
use crate::connected::probe_plen;
use crate::op::{Op, Status};
use crate::send_window::{Record, What};
use crate::session::{FrameWriter, PayloadRef, Transmit};
use crate::time::Instant;
use crate::types::{CONTROL_SLOT, Slot};
use crate::wire::body::VOLUME_INFO_BYTES;
use crate::wire::message::MESSAGE_BYTES;
use crate::wire::{Kind, Message};

impl Target {
    /// Writes the next frame into `head` (all but CRC trailer and tag) and names its payloads; `None` when there is nothing to send now.
    pub fn poll_transmit(
        &mut self,
        now: Instant,
        head: &mut Vec<u8>,
        payloads: &mut Vec<PayloadRef>,
    ) -> Option<Transmit> {
        if self.gone || !self.confirmed || !self.session.can_send(now) {
            return None;
        }
        if let Some(reason) = self.closing.take() {
            let mut writer = self.session.begin(now, self.credit, head, payloads);
            writer.push(Message { code: reason as u8, ..Message::bare(Kind::Close) }, &[]);
            let transmit = self.session.finish(now, writer, &mut self.stats);
            self.end(GoneCause::ClosedHere(reason));
            return Some(transmit);
        }
        if let Some(ping) = self.session.transmit_ping(now, self.credit, head, payloads, &mut self.stats) {
            return Some(ping);
        }
        if let Some(plen) = self.echo.take() {
            return Some(self.transmit_echo(now, plen, head, payloads));
        }
        let waits = !self.resend.is_empty() || !self.answers.is_empty() || self.event.is_some();
        if !waits && !self.session.must_send(now) {
            return None;
        }
        let mut writer = self.session.begin(now, self.credit, head, payloads);
        self.session.push_ranges(&mut writer);
        // What is lost may be news, which is told again as it is now.
        self.transmit_lost(&mut writer);
        self.transmit_event(&mut writer);
        self.transmit_answers(&mut writer);
        if writer.is_empty() && !self.session.must_send(now) {
            head.clear();
            return None;
        }
        Some(self.session.finish(now, writer, &mut self.stats))
    }

    fn transmit_echo(
        &mut self,
        now: Instant,
        plen: u16,
        head: &mut Vec<u8>,
        payloads: &mut Vec<PayloadRef>,
    ) -> Transmit {
        let mut writer = self.session.begin(now, self.credit, head, payloads);
        let longest = probe_plen(usize::from(self.config.mtu), self.config.mode);
        let filler = alloc::vec![0; usize::from(plen).min(longest)];
        writer.push(Message { code: 1, ..Message::bare(Kind::Probe) }, &filler);
        self.session.finish(now, writer, &mut self.stats)
    }

    fn transmit_event(&mut self, writer: &mut FrameWriter<'_>) {
        if let Some(info) = self.event.filter(|_| writer.fits(MESSAGE_BYTES, VOLUME_INFO_BYTES)) {
            self.event = None;
            let mut body = Vec::with_capacity(VOLUME_INFO_BYTES);
            info.emit(&mut body);
            writer.push(Message::bare(Kind::Event), &body);
            self.event_sent = Some(info);
            self.session.remember(
                writer,
                Record { slot: CONTROL_SLOT, sseq: 0, piece: 0, what: What::Event, losses: 0 },
            );
        }
    }

    fn transmit_lost(&mut self, writer: &mut FrameWriter<'_>) {
        while let Some(record) = self.resend.front().copied() {
            let slot = &self.slots[record.slot.index()];
            let current = slot.last == record.sseq && matches!(slot.state, State::Answering(_));
            let sent = match record.what {
                What::Event => {
                    self.event = self.event.or(self.event_sent);
                    true
                }
                What::ReadData if current && slot.op == Op::Read && !slot.pieces.contains(record.piece) => {
                    self.stats.messages_resent += 1;
                    self.push_read_data(writer, record.slot, record.piece, record.losses)
                }
                What::Response if current => {
                    self.stats.messages_resent += 1;
                    self.push_response(writer, record.slot, record.losses)
                }
                What::ReadData | What::Response | What::Request | What::WriteData => true,
            };
            if !sent {
                return;
            }
            self.resend.pop_front();
        }
    }

    fn transmit_answers(&mut self, writer: &mut FrameWriter<'_>) {
        while let Some(slot) = self.answers.front().copied() {
            let state = &self.slots[slot.index()];
            if state.op == Op::Read && state.state == State::Answering(Status::Ok) {
                let (piece, count) = (state.next_piece, self.session.grid().count(state.len));
                if !self.push_read_data(writer, slot, piece, 0) {
                    return;
                }
                self.slots[slot.index()].next_piece = piece + 1;
                if piece + 1 < count {
                    continue;
                }
            } else if !self.push_response(writer, slot, 0) {
                return;
            }
            self.answers.pop_front();
        }
    }

    fn push_read_data(&mut self, writer: &mut FrameWriter<'_>, slot: Slot, piece: u16, losses: u8) -> bool {
        let state = &self.slots[slot.index()];
        let (offset, plen) = self.session.grid().range(piece, state.len);
        if !writer.fits(MESSAGE_BYTES, plen as usize) || !self.session.may_send_data() {
            return false;
        }
        let message = Message {
            slot,
            sseq: state.last,
            code: Status::Ok as u8,
            mlen: state.len,
            ..Message::bare(Kind::ReadData)
        };
        writer.push_data(message, offset, plen, losses);
        self.session.remember(writer, Record { slot, sseq: state.last, piece, what: What::ReadData, losses });
        true
    }

    fn push_response(&mut self, writer: &mut FrameWriter<'_>, slot: Slot, losses: u8) -> bool {
        let state = &self.slots[slot.index()];
        let State::Answering(status) = state.state else { return true };
        let mut body = Vec::new();
        if let Some(info) = &state.info {
            info.emit(&mut body);
        }
        if !writer.fits(MESSAGE_BYTES, body.len()) {
            return false;
        }
        writer.push(
            Message { slot, sseq: state.last, code: status as u8, ..Message::bare(Kind::Response) },
            &body,
        );
        self.session
            .remember(writer, Record { slot, sseq: state.last, piece: 0, what: What::Response, losses });
        true
    }
}
