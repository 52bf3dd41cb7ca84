//! The system calls of a tracer as safe functions: the only unsafe file of this test.

use std::mem::MaybeUninit;
use std::ptr;

use libc::{pid_t, user_regs_struct};

/// What waiting for traced threads found, with the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    Exited(pid_t, i32),
    Killed(pid_t),
    /// It enters or leaves a system call.
    AtCall(pid_t),
    /// It is about to get a signal.
    Stopped(pid_t, i32),
    /// It started a thread or process.
    Other(pid_t),
}

/// Makes the parent the tracer of this thread and of those that it starts, and stops until it comes.
pub(crate) fn be_traced() {
    // SAFETY: PTRACE_TRACEME takes no pointer; the null arguments are ignored.
    let traced =
        unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, ptr::null_mut::<u8>(), ptr::null_mut::<u8>()) };
    assert_eq!(traced, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: raise takes no pointer; SIGSTOP has no handler that could run.
    let stopped = unsafe { libc::raise(libc::SIGSTOP) };
    assert_eq!(stopped, 0, "{}", std::io::Error::last_os_error());
}

/// Traces whatever a stopped thread starts, too, and kills all of it with the tracer.
pub(crate) fn follow(thread: pid_t) {
    let options = libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_EXITKILL;
    // SAFETY: PTRACE_SETOPTIONS takes its options by value in the last argument and ignores the address. It fails
    // harmlessly if the thread has died.
    unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, thread, ptr::null_mut::<u8>(), i64::from(options)) };
}

/// Lets a stopped thread run to its next system call or signal. It fails if the thread has died; waiting tells that.
pub(crate) fn resume(thread: pid_t, signal: i32) {
    // SAFETY: PTRACE_SYSCALL takes the signal by value in the last argument and ignores the address.
    unsafe { libc::ptrace(libc::PTRACE_SYSCALL, thread, ptr::null_mut::<u8>(), i64::from(signal)) };
}

/// The registers of a stopped thread; `None` if it has died.
pub(crate) fn registers(thread: pid_t) -> Option<user_regs_struct> {
    let mut registers = MaybeUninit::<user_regs_struct>::uninit();
    // SAFETY: PTRACE_GETREGS writes one `user_regs_struct` to the last argument, which has room for it.
    let got =
        unsafe { libc::ptrace(libc::PTRACE_GETREGS, thread, ptr::null_mut::<u8>(), registers.as_mut_ptr()) };
    // SAFETY: the call succeeded, so that it has written all of the struct.
    (got == 0).then(|| unsafe { registers.assume_init() })
}

/// Waits for the next event of any thread that the calling thread traces, and of no other child of this process.
pub(crate) fn wait() -> Event {
    let mut status = 0;
    // SAFETY: the status pointer is to a live c_int.
    let thread = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
    assert!(thread > 0, "{}", std::io::Error::last_os_error());
    if libc::WIFEXITED(status) {
        Event::Exited(thread, libc::WEXITSTATUS(status))
    } else if libc::WIFSIGNALED(status) {
        Event::Killed(thread)
    } else if status >> 16 != 0 {
        Event::Other(thread)
    } else if libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80 {
        Event::AtCall(thread)
    } else {
        Event::Stopped(thread, libc::WSTOPSIG(status))
    }
}
