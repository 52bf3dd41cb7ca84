//! File descriptors over a Unix socket (SCM_RIGHTS).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// File descriptors in one message; the kernel's limit (SCM_MAX_FD) is 253.
const PER_MESSAGE: usize = 200;
const SPACE: usize = cmsg_space!(ScmRights(PER_MESSAGE));

/// Pause before the system is asked again to pass on what it refused.
const RETRY: Duration = Duration::from_millis(1);

/// Sends `fds` in as many messages as it takes, each with `text`.
///
/// The system lets a user have no more on their way than it may have open (unix(7), `ETOOMANYREFS`): then it waits until
/// some have arrived, or `is_over`.
pub(super) fn send_fds(
    stream: &UnixStream,
    text: &[u8],
    fds: &[impl AsFd],
    is_over: impl Fn() -> bool,
) -> rustix::io::Result<()> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    for fds in fds.chunks(PER_MESSAGE) {
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fits = control.push(SendAncillaryMessage::ScmRights(fds));
        debug_assert!(fits, "SPACE is computed for PER_MESSAGE");
        loop {
            match sendmsg(stream, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(Errno::TOOMANYREFS) if !is_over() => std::thread::sleep(RETRY),
                Err(errno) => return Err(errno),
            }
        }
    }
    Ok(())
}

/// Receives one message: its bytes into `text`, its file descriptors behind those in `fds`. Returns the number of
/// bytes; 0 means that the other side is gone.
pub(super) fn receive_fds(
    stream: &UnixStream,
    text: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(stream, &mut [IoSliceMut::new(text)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(received.bytes)
}
