//! torch's distributed checkpoints: a directory of `.metadata` and `*.distcp` files.
//!
//! ```text
//! .metadata            a pickle: tensors and their chunks, values, nesting, and in which file each of them lies
//! __0_0.distcp         what rank 0 wrote: one torch.save archive after the other, each a chunk or a value
//! ```
//!
//! Torch may also write all tensors of a file as one safetensors image, and compress each item with zstd.

mod item;
mod metadata;
mod reader;
mod writer;

pub(super) use item::{decompressed, item_region};
pub(super) use metadata::Place;
pub use reader::Reader;
pub use writer::Writer;

/// The index and the mark of the commit.
const METADATA_NAME: &str = ".metadata";

/// A pickle as metadata: for fuzzing.
#[cfg(any(fuzzing, test))]
pub(super) fn fuzz_metadata(bytes: &[u8]) {
    if let Ok((pickle, _)) = super::pickle::load(bytes, super::pickle::Unlisted::Refused) {
        let _ = metadata::decode(&pickle).and_then(|decoded| reader::fuzz_tree(&decoded));
    }
}
