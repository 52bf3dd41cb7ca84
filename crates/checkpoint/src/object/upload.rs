//! A data file on its way into a store: parts are filled from tensor memory, checksummed, and sent several at a time.

use std::collections::VecDeque;

use super::prefix::{Prefix, Request};
use crate::metadata::BLOCK_BYTES;
use crate::storage::file::Contents;
use crate::{Error, ObjectFailure, Result};

/// No store takes more parts.
const MAX_PARTS: u64 = 10_000;
/// What is checksummed and copied while it is in the cache.
const STEP_BYTES: usize = 256 << 10;

/// Puts a data file and returns its length and the checksums of its blocks. One that broke on the way is begun anew, as
/// often as the options say: parts of multipart uploads cannot be sent again one by one.
///
/// # Errors
/// `ObjectStore`; `Tensor` if a box cannot be read.
pub(super) fn put_file(prefix: &Prefix, name: &str, contents: &Contents<'_>) -> Result<(u64, Vec<u32>)> {
    let mut retries = prefix.options().retries;
    loop {
        match try_to_put(prefix, name, contents) {
            Err(Error::ObjectStore { failure: ObjectFailure::Broken, .. }) if retries > 0 => retries -= 1,
            outcome => return outcome,
        }
    }
}

fn try_to_put(prefix: &Prefix, name: &str, contents: &Contents<'_>) -> Result<(u64, Vec<u32>)> {
    let len_bytes = contents.len_bytes();
    let part_bytes = part_bytes(prefix, len_bytes);
    if len_bytes <= part_bytes {
        let (bytes, crcs) = part(contents, 0, len_bytes)?;
        prefix.put(name, bytes.into())?;
        return Ok((len_bytes, crcs));
    }
    let (store, location) = (prefix.store(), prefix.location(name));
    let begin = async move { store.put_multipart_opts(&location, Default::default()).await };
    let mut upload = prefix.spawn("begin to put", name, begin).wait()?;
    match put_parts(prefix, name, contents, part_bytes, upload.as_mut()) {
        Ok(crcs) => {
            prefix.spawn("complete", name, async move { upload.complete().await.map(drop) }).wait()?;
            Ok((len_bytes, crcs))
        }
        Err(error) => {
            // Best effort: what is left of it is no object, and stores remove it by rules of their own.
            let _ = prefix.spawn("abort", name, async move { upload.abort().await }).wait();
            Err(error)
        }
    }
}

fn put_parts(
    prefix: &Prefix,
    name: &str,
    contents: &Contents<'_>,
    part_bytes: u64,
    upload: &mut dyn object_store::MultipartUpload,
) -> Result<Vec<u32>> {
    let len_bytes = contents.len_bytes();
    let (mut crcs, mut start) = (Vec::new(), 0);
    let mut in_flight = VecDeque::<Request<()>>::new();
    while start < len_bytes {
        if in_flight.len() == prefix.options().in_flight.max(1) {
            in_flight.pop_front().map_or(Ok(()), Request::wait)?;
        }
        let end = (start + part_bytes).min(len_bytes);
        let (bytes, part_crcs) = part(contents, start, end)?;
        crcs.extend(part_crcs);
        in_flight.push_back(prefix.spawn("put a part of", name, upload.put_part(bytes.into())));
        start = end;
    }
    in_flight.into_iter().try_for_each(Request::wait)?;
    Ok(crcs)
}

/// Whole MiB, so that parts end where blocks do.
fn part_bytes(prefix: &Prefix, len_bytes: u64) -> u64 {
    let wanted = prefix.options().part_bytes as u64;
    wanted.max(len_bytes.div_ceil(MAX_PARTS)).max(1).next_multiple_of(BLOCK_BYTES)
}

/// The bytes of a range of the file that begins with a block, and the checksums of its blocks.
fn part(contents: &Contents<'_>, start: u64, end: u64) -> Result<(Vec<u8>, Vec<u32>)> {
    let mut part = Part { bytes: Vec::with_capacity((end - start) as usize), ..Part::default() };
    contents.lend(start..end, &mut |bytes| {
        part.push(bytes);
        Ok(())
    })?;
    Ok(part.finish())
}

#[derive(Default)]
struct Part {
    bytes: Vec<u8>,
    crc: crc32fast::Hasher,
    crcs: Vec<u32>,
}

impl Part {
    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let block_left = BLOCK_BYTES as usize - self.bytes.len() % BLOCK_BYTES as usize;
            let (now, later) = bytes.split_at(bytes.len().min(STEP_BYTES).min(block_left));
            self.crc.update(now);
            self.bytes.extend_from_slice(now);
            if now.len() == block_left {
                self.crcs.push(std::mem::take(&mut self.crc).finalize());
            }
            bytes = later;
        }
    }

    fn finish(mut self) -> (Vec<u8>, Vec<u32>) {
        if !self.bytes.len().is_multiple_of(BLOCK_BYTES as usize) {
            self.crcs.push(self.crc.finalize());
        }
        (self.bytes, self.crcs)
    }
}
