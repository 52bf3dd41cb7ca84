//! Copies between a device and this process through two pinned buffers in turns: the device fills or empties one while the
//! caller works on the other.
//!
//! ```text
//! device   ─copy 1▶ A   ─copy 2▶ B   ─copy 3▶ A   …
//! caller              takes A       takes B       …
//! ```

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError};

use super::ffi::PinnedBuffer;
use super::{CudaBytes, CudaBytesMut, failed};
use crate::Result;

/// Length of a buffer: long enough that a copy is far longer than its launch, short enough for the host's cache.
const CHUNK_BYTES: usize = 4 << 20;

/// Pairs of buffers that are kept for the next copies; several threads may copy at once.
const KEPT: usize = 8;

/// Two buffers and a stream of their own, so that copies run beside computation.
struct Bounce {
    stream: Arc<CudaStream>,
    buffers: [PinnedBuffer; 2],
}

/// Pinning memory takes as long as copying it, so that buffers are used again.
static IDLE: Mutex<Vec<Bounce>> = Mutex::new(Vec::new());

/// Lends the bytes of device memory to `take`, in order, each piece with where it begins. Pieces are aligned for any
/// element type.
///
/// It waits for what writes that memory, and for its own copies.
///
/// # Errors
/// `Backend` if the driver fails.
pub fn read_chunks(from: &CudaBytes<'_>, mut take: impl FnMut(usize, &[u8])) -> Result<()> {
    let mut bounce = Bounce::lent(from.context())?;
    let chunks = chunks(from.len_bytes());
    let Bounce { stream, buffers } = &mut bounce;
    from.precede(stream)?;
    let begin = |nth: usize, buffer: &mut PinnedBuffer| match chunks.get(nth) {
        Some(chunk) => buffer.begin_fetch(&from.range(chunk.clone()), stream),
        None => Ok(()),
    };
    begin(0, &mut buffers[0]).map_err(copying)?;
    for (nth, chunk) in chunks.iter().enumerate() {
        begin(nth + 1, &mut buffers[(nth + 1) % 2]).map_err(copying)?;
        let bytes = buffers[nth % 2].wait().map_err(copying)?;
        take(chunk.start, &bytes[..chunk.len()]);
    }
    bounce.give_back();
    Ok(())
}

/// Lets `fill` write all bytes of device memory, in order, each piece with where it begins. Pieces are aligned for any
/// element type, and hold nothing of use before.
///
/// It waits for what uses that memory, and for its own copies.
///
/// # Errors
/// `Backend` if the driver fails.
pub fn write_chunks(to: &mut CudaBytesMut<'_>, mut fill: impl FnMut(usize, &mut [u8])) -> Result<()> {
    let mut bounce = Bounce::lent(to.context())?;
    let Bounce { stream, buffers } = &mut bounce;
    for (nth, chunk) in chunks(to.len_bytes()).into_iter().enumerate() {
        let buffer = &mut buffers[nth % 2];
        let bytes = buffer.wait().map_err(copying)?;
        fill(chunk.start, &mut bytes[..chunk.len()]);
        buffer.begin_put(&mut to.range_mut(chunk), stream).map_err(copying)?;
    }
    bounce.give_back_once_done()
}

impl Bounce {
    /// A pair for this device that nobody uses.
    fn lent(context: &Arc<CudaContext>) -> Result<Bounce> {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = idle.iter().position(|pair| Arc::ptr_eq(pair.stream.context(), context)) {
            return Ok(idle.swap_remove(place));
        }
        drop(idle);
        let buffer = || PinnedBuffer::new(context, CHUNK_BYTES);
        let made =
            context.new_stream().and_then(|stream| Ok(Bounce { stream, buffers: [buffer()?, buffer()?] }));
        made.map_err(|e| failed("cuMemHostAlloc", e))
    }

    fn give_back(self) {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < KEPT {
            idle.push(self);
        }
    }

    fn give_back_once_done(mut self) -> Result<()> {
        for buffer in &mut self.buffers {
            buffer.wait().map_err(copying)?;
        }
        self.give_back();
        Ok(())
    }
}

fn copying(error: DriverError) -> crate::Error {
    failed("cuMemcpyAsync", error)
}

/// The ranges of `len_bytes` bytes that are copied one after the other.
fn chunks(len_bytes: usize) -> Vec<Range<usize>> {
    let starts = (0..len_bytes).step_by(CHUNK_BYTES);
    starts.map(|start| start..(start + CHUNK_BYTES).min(len_bytes)).collect()
}
