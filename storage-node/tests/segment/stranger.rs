//! A backend that keeps to no rule: frames made by hand, well sealed or not, for what an initiator would never send.
//!
//! Knows the wire; keeps no state but packet numbers. Used by the tests beside it.

use cirro_protocol::op::Op;
use cirro_protocol::time::Nanos;
use cirro_protocol::types::{CONTROL_SLOT, MacAddress, Slot, Steer, Uuid};
use cirro_protocol::wire::body::{Access, OpenRequest};
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::header::Header;
use cirro_protocol::wire::long::{Body, Hello, LongFrame};
use cirro_protocol::wire::message::{Kind, Message, RequestBody};
use cirro_seal::{Nonces, append_payload_crcs, seal_crc, seal_long};

use super::Segment;
pub(crate) use super::hello::hello;

pub(crate) fn long_to_node(segment: &mut Segment, body: Body) {
    let (to, from) = (segment.node_address(), MacAddress([2, 0, 0, 0, 9, 9]));
    let mut head = Vec::new();
    LongFrame::new(from, to, Steer::new(2, 0), body).emit(&mut head);
    seal_long(&mut head);
    segment.send_raw(&head);
}

/// A backend that keeps to no rule: what it sends is made by hand.
pub(crate) struct Stranger {
    pub(crate) to: Ethernet,
    pub(crate) header: Header,
    pub(crate) nonces: Nonces,
    pub(crate) handle: u32,
    /// Data bytes that writes claim to have, when that is not what they bring.
    pub(crate) mlen: Option<u32>,
}

impl Stranger {
    /// Says HELLO.
    pub(crate) fn greeted(segment: &mut Segment, attachment: u8) -> Stranger {
        segment.long.clear();
        let hello = Hello { attachment: Uuid([attachment; 16]), ..hello("v", 1, 77) };
        long_to_node(segment, Body::Hello(hello));
        segment.run_for(Nanos::from_millis(1));
        let reply =
            segment.long.iter().find_map(|f| if let Body::HelloReply(r) = f.body { Some(r) } else { None });
        let reply = reply.expect("an answer");
        let to = Ethernet {
            destination: segment.node_address(),
            source: MacAddress([2, 0, 0, 0, 9, 9]),
            ethertype: 0x88b5,
        };
        let header = Header { steer: reply.steer, cid: reply.cid, ..Header::default() };
        // The first handle of a volume is 1.
        let nonces = Nonces { sender: 77, receiver: reply.nonce };
        Stranger { to, header, nonces, handle: 1, mlen: None }
    }

    /// Says HELLO and opens the volume for writing.
    pub(crate) fn opened(segment: &mut Segment) -> Stranger {
        let mut stranger = Stranger::greeted(segment, 9);
        let mut open = Vec::new();
        OpenRequest { access: Access::ReadWrite, take_over: None }.emit(&mut open);
        stranger.send(segment, &[(Op::Open, CONTROL_SLOT, 1, 0, open)]);
        stranger
    }

    pub(crate) fn close(&mut self, segment: &mut Segment) {
        self.header.pn += 1;
        let mut head = Vec::new();
        self.to.emit(&mut head);
        self.header.emit(&mut head);
        Message::bare(Kind::Close).emit(&mut head);
        seal_crc(self.nonces, &mut head);
        segment.send_raw(&head);
    }

    /// Sends requests (operation, slot, sequence, offset, payload) in one frame.
    pub(crate) fn send(&mut self, segment: &mut Segment, requests: &[(Op, Slot, u16, u64, Vec<u8>)]) {
        self.header.pn += 1;
        let (mut head, mut data) = (Vec::new(), Vec::new());
        self.to.emit(&mut head);
        self.header.emit(&mut head);
        for (op, slot, sseq, offset, payload) in requests {
            let body = RequestBody {
                offset: *offset,
                vol_epoch: 1,
                vol_handle: self.handle,
                ..RequestBody::default()
            };
            let is_write = *op == Op::Write;
            let message = Message {
                slot: *slot,
                sseq: *sseq,
                plen: payload.len() as u16,
                code: *op as u8,
                mlen: if is_write { self.mlen.unwrap_or(payload.len() as u32) } else { 0 },
                request: Some(body),
                ..Message::bare(Kind::Request)
            };
            message.emit(&mut head);
            if is_write {
                data.push((head.len(), payload));
            } else {
                head.extend_from_slice(payload);
            }
        }
        data.iter().for_each(|(_, payload)| append_payload_crcs(&mut head, payload));
        seal_crc(self.nonces, &mut head);
        data.into_iter().rev().for_each(|(at, payload)| drop(head.splice(at..at, payload.iter().copied())));
        segment.send_raw(&head);
        segment.run_for(Nanos::from_millis(1));
    }
}
