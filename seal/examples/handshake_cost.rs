//! What a handshake with keys costs either end, and what is checked before it: `cargo run --release -p cirro-seal --example handshake_cost`.
//!
//! Knows no link: frames go from hand to hand. Medians of 1000, one after another.

use std::sync::Arc;
use std::time::Instant;

use cirro_protocol::op::Status;
use cirro_protocol::types::{Cid, MacAddress, Steer, Uuid};
use cirro_protocol::wire::long::{Body, Hello, HelloReply, LongFrame};
use cirro_seal::{Answerer, Caller, Identity, Secret, new_private, os_entropy};

const ROUNDS: u64 = 1_000;

/// Times of one step, in nanoseconds.
struct Times(&'static str, Vec<u128>);

impl Times {
    fn of<T>(&mut self, step: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = step();
        self.1.push(start.elapsed().as_nanos());
        done
    }

    fn tell(mut self) {
        self.1.sort_unstable();
        println!("{:8.1} µs  {}", self.1[self.1.len() / 2] as f64 / 1_000.0, self.0);
    }
}

fn main() {
    let identity = || Arc::new(Identity::new(new_private(&os_entropy()), os_entropy()));
    let (node, psk) = (identity(), Secret::default());
    let mut caller = Caller::new(identity(), node.public(), psk.clone());
    let answerer = Answerer::new(node);
    let (here, there) = (MacAddress([2, 0, 0, 0, 0, 1]), MacAddress([2, 0, 0, 0, 0, 2]));
    let mut times = [
        Times("backend: HELLO is made", Vec::new()),
        Times("node: the mark of a frame is checked", Vec::new()),
        Times("node: HELLO is read", Vec::new()),
        Times("node: the answer is made, and keys", Vec::new()),
        Times("backend: the answer is read, and keys", Vec::new()),
    ];
    for session_epoch in 0..ROUNDS {
        let [make, check, read, answer, finish] = &mut times;
        let hello = Hello {
            volume: "vm1".parse().expect("a name"),
            node: Uuid([7; 16]),
            attachment: Uuid([9; 16]),
            session_epoch,
            nonce: session_epoch,
            cid: Cid(1),
            steer: Steer(0),
            mtu: 9000,
            slots: 256,
            piece_bytes_max: u32::MAX,
        };
        let reply = HelloReply {
            session_epoch,
            initiator_nonce: session_epoch,
            status: Status::Ok,
            node: hello.node,
            incarnation: Uuid([8; 16]),
            nonce: 6,
            token: 7,
            cid: Cid(3),
            steer: Steer(0),
            mtu: 9000,
            slots: 256,
            piece_bytes: 8192,
            request_bytes_max: 1 << 20,
            credit_sectors: 8192,
        };
        let mut frame = Vec::new();
        LongFrame::new(here, there, Steer(0), Body::Hello(hello)).emit(&mut frame);
        make.of(|| caller.seal(&mut frame, (Cid(1), Steer(0))));
        let marked = check.of(|| answerer.check(&frame)).expect("the mark is right");
        let (_, pending) = read.of(|| answerer.read_hello(&marked)).expect("it was made for this node");
        let said = LongFrame::new(there, here, Steer(0), Body::HelloReply(reply));
        let (frame, _) = answer.of(|| answerer.answer(pending, &psk, &said)).expect("it can be answered");
        finish.of(|| caller.open_answer(&frame)).expect("it opens");
    }
    times.into_iter().for_each(Times::tell);
}
