//! The only unsafe file of the backend: MPI's calls, one at a time, on buffers that they own until they are done.
//!
//! # Why it is sound
//!
//! - *Threads.* MPI is initialized with `MPI_THREAD_SERIALIZED` at least, and every call is made under one lock
//!   ([`CALLS`]), which also says whether MPI may be called at all: not before it is initialized, not after
//!   `MPI_Finalize`. All calls return at once, so nobody waits for the lock long.
//! - *Buffers.* A request owns its buffer. It is given back when MPI says that the request is complete; a request that
//!   is dropped before leaves its buffer allocated for good, as MPI may still touch it. Only failed groups do so.
//! - *Handles* of MPI are numbers or pointers that only MPI follows; they are made by MPI and passed back to it.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mpi::ffi;

use super::block::Block;
use crate::Error;

const SUCCESS: c_int = 0;

/// Guards every call of MPI.
static CALLS: Mutex<Library> = Mutex::new(Library::Fresh);
/// Worlds that have not been left.
static WORLDS: AtomicUsize = AtomicUsize::new(0);
/// Set once peers may be gone: `MPI_Finalize` would wait for them.
static BROKEN: AtomicBool = AtomicBool::new(false);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Library {
    Fresh,
    Running,
    Finalized,
}

unsafe extern "C" {
    fn atexit(callback: extern "C" fn()) -> c_int;
    fn dlsym(handle: *mut c_void, symbol: *const c_char) -> *mut c_void;
}

/// Why a call failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// The peer that the call concerns is dead, which only an MPI with ULFM tells.
    PeerDied,
    /// Some rank is dead, but this call may still be completed by others (ULFM).
    SomebodyDied,
    /// Anything else.
    Call(Error),
}

/// One world: a communicator of its own with all ranks of the MPI job.
pub(super) struct Mpi {
    comm: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    largest_tag: c_int,
    ulfm: Option<Ulfm>,
}

// SAFETY: the handle is only passed to MPI, which allows calls from any thread as long as they are serialized, and
// every call in this file is made under `CALLS`.
unsafe impl Send for Mpi {}
// SAFETY: as above; `&Mpi` gives nothing but such calls.
unsafe impl Sync for Mpi {}

/// The calls of ULFM, which `mpi.h` does not declare in every MPI that has them.
#[derive(Clone, Copy)]
struct Ulfm {
    acknowledge: unsafe extern "C" fn(ffi::MPI_Comm) -> c_int,
    acknowledged: unsafe extern "C" fn(ffi::MPI_Comm, *mut ffi::MPI_Group) -> c_int,
}

/// A communicator under way.
pub(super) struct Joining {
    comm: Box<ffi::MPI_Comm>,
    request: Request,
}

impl Joining {
    /// Initializes MPI if nobody has, and asks for a communicator of its own for a world.
    ///
    /// `MPI_Init_thread` returns when every process of the job has called it.
    ///
    /// # Errors
    /// `Backend` if MPI was finalized or cannot be called from several threads in turn.
    pub(super) fn start() -> Result<Joining, Error> {
        let mut library = lock();
        if *library == Library::Fresh {
            initialize()?;
            *library = Library::Running;
        }
        running(&library)?;
        let mut joining = Joining { comm: Box::new(comm_null()), request: Request::null() };
        // SAFETY: MPI runs and the lock is held; the world's communicator is valid; both places are valid for writes
        // and stay so until the request is complete: the box is leaked in `drop` if it never is.
        let code = unsafe { ffi::MPI_Comm_idup(comm_world(), &mut *joining.comm, &mut joining.request.raw) };
        check("MPI_Comm_idup", code)?;
        joining.request.done = false;
        Ok(joining)
    }

    /// The world, once every rank has asked for it.
    pub(super) fn test(&mut self) -> Result<Option<Mpi>, Fault> {
        if !self.request.test()? {
            return Ok(None);
        }
        let library = lock();
        running(&library).map_err(Fault::Call)?;
        Mpi::of(*self.comm).map(Some).map_err(Fault::Call)
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        if !self.request.done {
            // MPI may still write to it.
            Box::leak(std::mem::replace(&mut self.comm, Box::new(comm_null())));
        }
    }
}

impl Mpi {
    /// Called under the lock.
    fn of(comm: ffi::MPI_Comm) -> Result<Mpi, Error> {
        // SAFETY: MPI runs and the lock is held; a valid communicator and a predefined handler.
        check("MPI_Comm_set_errhandler", unsafe { ffi::MPI_Comm_set_errhandler(comm, errors_return()) })?;
        let (mut rank, mut size) = (0, 0);
        // SAFETY: as above; a place valid for writes.
        check("MPI_Comm_rank", unsafe { ffi::MPI_Comm_rank(comm, &mut rank) })?;
        // SAFETY: as above.
        check("MPI_Comm_size", unsafe { ffi::MPI_Comm_size(comm, &mut size) })?;
        WORLDS.fetch_add(1, Ordering::SeqCst);
        let (rank, size) = (rank as usize, size as usize);
        Ok(Mpi { comm, rank, size, largest_tag: largest_tag(), ulfm: Ulfm::find() })
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    pub(super) fn largest_tag(&self) -> usize {
        self.largest_tag as usize
    }

    /// Starts to send `block` to rank `to`.
    pub(super) fn send(&self, to: usize, tag: usize, block: Arc<Block>) -> Result<Sending, Fault> {
        let library = lock();
        running(&library).map_err(Fault::Call)?;
        let len = count(block.bytes().len())?;
        let mut sending = Sending { request: Request::null(), block: ManuallyDrop::new(block) };
        let start = sending.block.bytes().as_ptr().cast();
        // SAFETY: MPI runs and the lock is held; `start` is valid for `len` bytes, which nobody writes while the request
        // holds the block; rank, tag and communicator are checked by MPI.
        let code = unsafe {
            ffi::MPI_Isend(start, len, byte(), to as c_int, tag as c_int, self.comm, &mut sending.request.raw)
        };
        fault("MPI_Isend", code)?;
        sending.request.done = false;
        Ok(sending)
    }

    /// Starts to receive exactly `len` bytes from rank `from`, or from any.
    pub(super) fn receive(&self, from: Option<usize>, tag: usize, len: usize) -> Result<Receiving, Fault> {
        let library = lock();
        running(&library).map_err(Fault::Call)?;
        let n_bytes = count(len)?;
        let words = NonNull::from(Box::leak(Block::zeroed(len).into_words()));
        let mut receiving = Receiving { request: Request::null(), words, len };
        let source = from.map_or_else(any_source, |rank| rank as c_int);
        let start = words.as_ptr().cast();
        // SAFETY: MPI runs and the lock is held; `start` is valid for writes of `len` bytes and reached by nobody else
        // until the request is complete; rank, tag and communicator are checked by MPI.
        let code = unsafe {
            ffi::MPI_Irecv(
                start,
                n_bytes,
                byte(),
                source,
                tag as c_int,
                self.comm,
                &mut receiving.request.raw,
            )
        };
        if code == SUCCESS {
            receiving.request.done = false;
        }
        fault("MPI_Irecv", code)?;
        Ok(receiving)
    }

    /// The ranks that MPI knows to be dead, which receiving from any rank then ignores. Empty without ULFM.
    pub(super) fn dead(&self) -> Result<Vec<usize>, Error> {
        let library = lock();
        running(&library)?;
        let Some(ulfm) = self.ulfm else { return Ok(Vec::new()) };
        // SAFETY: MPI runs and the lock is held; the function is MPI's (see `Ulfm::find`), the communicator valid.
        check("MPIX_Comm_failure_ack", unsafe { (ulfm.acknowledge)(self.comm) })?;
        let mut dead = group_null();
        // SAFETY: as above; a place valid for writes.
        let code = unsafe { (ulfm.acknowledged)(self.comm, &mut dead) };
        check("MPIX_Comm_failure_get_acked", code)?;
        self.ranks_of(dead)
    }

    /// The ranks of `group` in this world; called under the lock.
    fn ranks_of(&self, group: ffi::MPI_Group) -> Result<Vec<usize>, Error> {
        let (mut all, mut size) = (group_null(), 0);
        // SAFETY: MPI runs and the lock is held; a valid communicator, a place valid for writes.
        check("MPI_Comm_group", unsafe { ffi::MPI_Comm_group(self.comm, &mut all) })?;
        // SAFETY: a group that MPI made; a place valid for writes.
        check("MPI_Group_size", unsafe { ffi::MPI_Group_size(group, &mut size) })?;
        let places: Vec<c_int> = (0..size).collect();
        let mut ranks = vec![0; places.len()];
        // SAFETY: groups that MPI made; `size` elements to read and as many to write.
        let code =
            unsafe { ffi::MPI_Group_translate_ranks(group, size, places.as_ptr(), all, ranks.as_mut_ptr()) };
        check("MPI_Group_translate_ranks", code)?;
        Ok(ranks.into_iter().filter_map(|rank| usize::try_from(rank).ok()).collect())
    }

    /// Leaves the world. `broken` if peers may be gone, so that this process must end without `MPI_Finalize`.
    ///
    /// The communicator is not freed, which all ranks would have to do together.
    pub(super) fn leave(&self, broken: bool) {
        BROKEN.fetch_or(broken, Ordering::SeqCst);
        WORLDS.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Ulfm {
    /// Looks for the functions in the MPI that this process runs with. Called under the lock.
    fn find() -> Option<Ulfm> {
        let acknowledge = NonNull::new(symbol(c"MPIX_Comm_failure_ack"))?;
        let acknowledged = NonNull::new(symbol(c"MPIX_Comm_failure_get_acked"))?;
        Some(Ulfm {
            // SAFETY: an MPI that exports this name gives it this signature (ULFM specification, chapter "Process Fault
            // Tolerance"); a function pointer has the size of an object pointer on the platforms that dlsym serves.
            acknowledge: unsafe {
                std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn(ffi::MPI_Comm) -> c_int>(
                    acknowledge,
                )
            },
            // SAFETY: as above.
            acknowledged: unsafe {
                std::mem::transmute::<
                    NonNull<c_void>,
                    unsafe extern "C" fn(ffi::MPI_Comm, *mut ffi::MPI_Group) -> c_int,
                >(acknowledged)
            },
        })
    }
}

/// The address of a symbol of this process, or null.
fn symbol(name: &CStr) -> *mut c_void {
    // SAFETY: null is RTLD_DEFAULT on Linux: all objects of this process; the name ends with a zero byte.
    unsafe { dlsym(null_mut(), name.as_ptr()) }
}

/// A request of MPI.
struct Request {
    raw: ffi::MPI_Request,
    done: bool,
}

// SAFETY: the handle is only passed to MPI under `CALLS`, from whatever thread.
unsafe impl Send for Request {}

impl Request {
    fn null() -> Request {
        // SAFETY: a constant of the shim library, initialized when it is loaded.
        Request { raw: unsafe { ffi::RSMPI_REQUEST_NULL }, done: true }
    }

    /// Whether it is complete; makes progress.
    fn test(&mut self) -> Result<bool, Fault> {
        if self.done {
            return Ok(true);
        }
        let library = lock();
        running(&library).map_err(Fault::Call)?;
        let mut flag = 0;
        // SAFETY: MPI runs and the lock is held; a request that MPI made and has not completed; a place for the flag;
        // no status is asked for.
        let code = unsafe { ffi::MPI_Test(&mut self.raw, &mut flag, status_ignore()) };
        fault("MPI_Test", code)?;
        self.done = flag != 0;
        Ok(self.done)
    }
}

/// A message on its way out.
pub(super) struct Sending {
    request: Request,
    block: ManuallyDrop<Arc<Block>>,
}

impl Sending {
    /// Whether the block may be reused: it has been received or stored.
    pub(super) fn test(&mut self) -> Result<bool, Fault> {
        self.request.test()
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if self.request.done {
            // SAFETY: dropped once, here, and not used after.
            unsafe { ManuallyDrop::drop(&mut self.block) }
        }
    }
}

/// A message on its way in.
pub(super) struct Receiving {
    request: Request,
    words: NonNull<[u64]>,
    len: usize,
}

// SAFETY: it owns the words, which only MPI writes until the request is complete; `Request` is Send.
unsafe impl Send for Receiving {}

impl Receiving {
    /// Whether the message has come.
    pub(super) fn test(&mut self) -> Result<bool, Fault> {
        self.request.test()
    }

    /// The message; `None` before it has come.
    pub(super) fn take(self) -> Option<Block> {
        if !self.request.done {
            return None;
        }
        let this = ManuallyDrop::new(self);
        // SAFETY: the words were leaked from a box in `receive`, the request is complete so that MPI is done with them,
        // and `drop` does not run: they are owned once again.
        let words = unsafe { Box::from_raw(this.words.as_ptr()) };
        Some(Block::from_words(words, this.len))
    }
}

impl Drop for Receiving {
    /// Calls the message off, so that `MPI_Finalize` does not wait for it.
    fn drop(&mut self) {
        if !self.request.done {
            let library = lock();
            if *library != Library::Running {
                return;
            }
            // SAFETY: MPI runs and the lock is held; a request that MPI made and has not completed.
            let cancelled = unsafe { ffi::MPI_Cancel(&mut self.request.raw) };
            if cancelled != SUCCESS {
                return;
            }
            // SAFETY: as above; freeing a request leaves it to MPI to complete it. The words stay allocated.
            let _freed = unsafe { ffi::MPI_Request_free(&mut self.request.raw) };
            return;
        }
        // SAFETY: leaked from a box in `receive`; the request is complete, so that MPI is done with them.
        drop(unsafe { Box::from_raw(self.words.as_ptr()) });
    }
}

fn lock() -> MutexGuard<'static, Library> {
    // Nothing in this file panics while it holds the lock.
    CALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn running(library: &Library) -> Result<(), Error> {
    match library {
        Library::Running => Ok(()),
        _ => Err(failed("any call", "MPI is finalized".to_owned())),
    }
}

/// Initializes MPI, or joins a program that has. Called under the lock.
fn initialize() -> Result<(), Error> {
    let (mut is_initialized, mut provided) = (0, 0);
    // SAFETY: may be called at any time; a place valid for writes.
    check("MPI_Initialized", unsafe { ffi::MPI_Initialized(&mut is_initialized) })?;
    let level = serialized();
    if is_initialized != 0 {
        // SAFETY: MPI is initialized; a place valid for writes.
        check("MPI_Query_thread", unsafe { ffi::MPI_Query_thread(&mut provided) })?;
    } else {
        // SAFETY: MPI is not initialized; null for the arguments of main is allowed; a place valid for writes.
        let code = unsafe { ffi::MPI_Init_thread(null_mut(), null_mut(), level, &mut provided) };
        check("MPI_Init_thread", code)?;
        // SAFETY: the callback is a function that neither unwinds nor returns a value.
        let registered = unsafe { atexit(finalize) };
        check("atexit", registered)?;
    }
    if provided < level {
        return Err(failed("MPI_Init_thread", format!("thread level {provided}, needed {level}")));
    }
    // SAFETY: MPI is initialized and the lock held; predefined handles.
    let code = unsafe { ffi::MPI_Comm_set_errhandler(comm_world(), errors_return()) };
    check("MPI_Comm_set_errhandler", code)
}

/// Ends MPI with the process, as mpi4py does. Not where a world was not left, so that the launcher sees a rank that
/// ended before its time, nor where peers may be gone, for whom it would wait.
extern "C" fn finalize() {
    if WORLDS.load(Ordering::SeqCst) > 0 || BROKEN.load(Ordering::SeqCst) {
        return;
    }
    let Ok(mut library) = CALLS.try_lock() else { return };
    *library = Library::Finalized;
    // SAFETY: MPI is initialized by this file and not finalized; the lock is held and says that nobody may call MPI.
    let _ended = unsafe { ffi::MPI_Finalize() };
}

/// The largest tag; MPI promises 32767 at least.
fn largest_tag() -> c_int {
    const PROMISED: c_int = 32_767;
    let (mut value, mut flag): (*mut c_int, c_int) = (null_mut(), 0);
    // SAFETY: MPI runs and the lock is held; the attribute's value is a pointer to an int, for which there is a place.
    let code = unsafe {
        ffi::MPI_Comm_get_attr(comm_world(), ffi::MPI_TAG_UB as c_int, (&raw mut value).cast(), &mut flag)
    };
    if code != SUCCESS || flag == 0 || value.is_null() {
        return PROMISED;
    }
    // SAFETY: MPI says by the flag that the attribute is set, so that the pointer is that of an int of its own.
    unsafe { value.read() }
}

fn count(len: usize) -> Result<c_int, Fault> {
    let fits = c_int::try_from(len);
    fits.map_err(|_| Fault::Call(failed("a message", format!("{len} bytes, at most {}", c_int::MAX))))
}

fn check(call: &str, code: c_int) -> Result<(), Error> {
    if code == SUCCESS { Ok(()) } else { Err(failed(call, text(code))) }
}

/// As [`check`], telling dead peers apart. Called under the lock.
fn fault(call: &str, code: c_int) -> Result<(), Fault> {
    if code == SUCCESS {
        return Ok(());
    }
    let text = text(code);
    // The classes' numbers differ between MPIs and are missing from the headers of those without ULFM; their names are
    // the specification's.
    Err(match () {
        () if text.contains("PROC_FAILED_PENDING") => Fault::SomebodyDied,
        () if text.contains("PROC_FAILED") => Fault::PeerDied,
        () => Fault::Call(failed(call, text)),
    })
}

/// MPI's words for an error code. Called under the lock.
fn text(code: c_int) -> String {
    let mut bytes = [0u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut len = 0;
    // SAFETY: may be called whenever MPI is initialized; the buffer has room for the longest text and its end.
    let known = unsafe { ffi::MPI_Error_string(code, bytes.as_mut_ptr().cast(), &mut len) };
    let end = usize::try_from(len).unwrap_or(0).min(bytes.len());
    if known == SUCCESS {
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    } else {
        format!("code {code}")
    }
}

fn failed(call: &str, cause: String) -> Error {
    Error::Backend { backend: "mpi", call: call.to_owned(), cause }
}

/// The constants of the shim library, which are initialized when it is loaded and never change.
macro_rules! constants {
    ($($name:ident: $kind:ty = $constant:ident;)*) => {$(
        fn $name() -> $kind {
            // SAFETY: see above.
            unsafe { ffi::$constant }
        }
    )*};
}

constants! {
    comm_world: ffi::MPI_Comm = RSMPI_COMM_WORLD;
    comm_null: ffi::MPI_Comm = RSMPI_COMM_NULL;
    group_null: ffi::MPI_Group = RSMPI_GROUP_NULL;
    byte: ffi::MPI_Datatype = RSMPI_UINT8_T;
    errors_return: ffi::MPI_Errhandler = RSMPI_ERRORS_RETURN;
    any_source: c_int = RSMPI_ANY_SOURCE;
    serialized: c_int = RSMPI_THREAD_SERIALIZED;
    status_ignore: *mut ffi::MPI_Status = RSMPI_STATUS_IGNORE;
}
