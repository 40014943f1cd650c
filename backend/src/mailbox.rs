//! The one door between the threads that talk vhost-user or to `cirroctl` and the worker that owns the rings and the link.
//!
//! A command goes in with a place for its answer; the sender waits, the worker never does. Does not know what a command does. The vhost side
//! (`ring`, `device`, `server`) and the control thread hold [`Mailbox`], the worker [`Inbox`].

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use cirro_link::tap::Exchange;
use virtio_queue::QueueState;

use crate::guest_memory::Regions;
use crate::stats::SessionReport;

/// Commands that may wait: every ring of sixteen disks at once. More senders sleep until there is room.
pub const COMMANDS_MAX: usize = 256;
/// How long a sender waits for an answer: the stop deadline of 2 s, and a second for a worker that is busy.
pub const ANSWER_TIME: Duration = Duration::from_secs(3);

/// A disk of the process, counted from 0 in the order of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskId(pub u16);

/// What is asked of a disk.
#[derive(Debug)]
pub enum Change {
    /// The ring has all it needs and is enabled: serve it.
    Start {
        /// Which ring.
        ring: u16,
        /// Its addresses, indices and features.
        queue: QueueState,
        /// Readable when the guest says that something is there.
        kick: File,
        /// Written to when something was used; `None`: the guest polls.
        call: Option<File>,
    },
    /// Take nothing more from the ring, or go on.
    Enable {
        /// Which ring.
        ring: u16,
        /// Whether it may be served.
        enabled: bool,
    },
    /// Another call descriptor for a ring that is served.
    Call {
        /// Which ring.
        ring: u16,
        /// Its new descriptor.
        call: Option<File>,
    },
    /// Another kick descriptor for a ring that is served.
    Kick {
        /// Which ring.
        ring: u16,
        /// Its new descriptor.
        kick: File,
    },
    /// Finish what is in flight and forget the ring; answered by [`Answer::Stopped`] within the deadline.
    Stop {
        /// Which ring.
        ring: u16,
    },
    /// The guest's memory is now this.
    Memory(Regions),
    /// Every write is to be stable before it is answered, or not.
    WriteThrough(bool),
    /// How is the session? Answered by [`Answer::Session`].
    Report,
    /// The process ends: close the disk's session.
    Close,
}

/// A worker's answer.
#[derive(Debug)]
pub enum Answer {
    /// It is done.
    Done,
    /// The ring has stopped; nothing of the guest is touched on its behalf any more.
    Stopped {
        /// The next entry of the available ring that was not taken.
        next_avail: u16,
        /// Requests taken from it that could not be finished in time.
        unfinished: u16,
    },
    /// How the session is.
    Session(Box<SessionReport>),
}

/// A command on its way.
#[derive(Debug)]
pub enum Command {
    /// For a disk.
    Disk(DiskCommand),
    /// For the tap of the worker's link.
    Tap(Exchange),
}

/// A command for a disk.
#[derive(Debug)]
pub struct DiskCommand {
    /// Which disk.
    pub disk: DiskId,
    /// What is asked.
    pub change: Change,
    /// Where the answer goes.
    pub reply: Reply,
}

/// The place for one answer. Answering never blocks, and a sender that gave up is no error.
#[derive(Debug)]
pub struct Reply(SyncSender<Answer>);

impl Reply {
    /// Gives the answer.
    pub fn give(self, answer: Answer) {
        // The one place of the channel is free: a Reply answers once. The sender may have gone after its deadline.
        let _ = self.0.try_send(answer);
    }
}

/// The sender's side of a worker's mailbox.
#[derive(Clone, Debug)]
pub struct Mailbox {
    commands: SyncSender<Command>,
    bell: Arc<UnixStream>,
}

/// The worker's side.
#[derive(Debug)]
pub struct Inbox {
    commands: Receiver<Command>,
    bell: UnixStream,
}

/// An answer that is awaited.
#[derive(Debug)]
pub struct Awaited(Receiver<Answer>);

impl Awaited {
    /// The answer; `None` when the worker does not answer in time.
    pub fn wait(self) -> Option<Answer> {
        self.0.recv_timeout(ANSWER_TIME).ok()
    }

    /// The answer, if it is there already: for who takes the worker's turns itself.
    pub fn look(&self) -> Option<Answer> {
        self.0.try_recv().ok()
    }
}

/// A new mailbox.
///
/// # Errors
/// No file descriptor is left.
pub fn mailbox() -> io::Result<(Mailbox, Inbox)> {
    let (sender, commands) = sync_channel(COMMANDS_MAX);
    let (rope, bell) = UnixStream::pair()?;
    rope.set_nonblocking(true)?;
    bell.set_nonblocking(true)?;
    Ok((Mailbox { commands: sender, bell: Arc::new(rope) }, Inbox { commands, bell }))
}

impl Mailbox {
    /// Sends a command and rings; the answer can be awaited.
    pub fn send(&self, disk: DiskId, change: Change) -> Awaited {
        let (reply, answer) = sync_channel(1);
        let command = DiskCommand { disk, change, reply: Reply(reply) };
        self.put(Command::Disk(command));
        Awaited(answer)
    }

    /// Sends what the tap is to record into, and rings.
    pub fn exchange(&self, exchange: Exchange) {
        self.put(Command::Tap(exchange));
    }

    /// Sends a command and waits until it took effect.
    pub fn ask(&self, disk: DiskId, change: Change) -> Option<Answer> {
        self.send(disk, change).wait()
    }

    fn put(&self, command: Command) {
        // A worker that is gone drops the command and with it the reply: the wait ends at once, without an answer.
        let _ = self.commands.send(command);
        // A full socket rings already, a closed one has nobody behind it.
        let _ = (&*self.bell).write(&[1]);
    }
}

impl Inbox {
    /// The next command; never blocks.
    pub fn take(&self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    /// Readable when there may be commands; [`Inbox::hush`] makes it unreadable.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Takes the ringing back. Look for commands afterwards.
    pub fn hush(&self) {
        let mut bytes = [0; 64];
        while (&self.bell).read(&mut bytes).is_ok_and(|read| read == bytes.len()) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(inbox: &Inbox) -> DiskCommand {
        match inbox.take() {
            Some(Command::Disk(command)) => command,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_command_is_answered_and_the_bell_falls_silent() {
        let (mailbox, inbox) = mailbox().unwrap();
        let awaited = mailbox.send(DiskId(3), Change::Enable { ring: 1, enabled: true });
        let command = take(&inbox);
        assert_eq!(command.disk, DiskId(3));
        assert!(inbox.take().is_none());
        command.reply.give(Answer::Stopped { next_avail: 9, unfinished: 0 });
        assert!(matches!(awaited.wait(), Some(Answer::Stopped { next_avail: 9, .. })));
        inbox.hush();
        let mut byte = [0];
        assert_eq!((&inbox.bell).read(&mut byte).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_worker_that_is_gone_is_no_endless_wait() {
        let (mailbox, inbox) = mailbox().unwrap();
        let awaited = mailbox.send(DiskId(0), Change::Report);
        drop(inbox);
        assert!(awaited.wait().is_none());
        assert!(mailbox.ask(DiskId(0), Change::Report).is_none());
    }

    #[test]
    fn ringing_without_end_neither_blocks_nor_fails() {
        let (mailbox, inbox) = mailbox().unwrap();
        for _ in 0..10_000 {
            let awaited = mailbox.send(DiskId(0), Change::Report);
            take(&inbox).reply.give(Answer::Done);
            assert!(matches!(awaited.wait(), Some(Answer::Done)));
        }
        inbox.hush();
    }
}
