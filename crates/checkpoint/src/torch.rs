//! PyTorch's files without Python: distributed checkpoints read and written, `torch.save` files read.
//!
//! Pickles are read by a machine that builds plain data of the classes that torch writes; nothing runs. Tensors are
//! read where they lie. See docs/TORCH.md for what is read and written.

mod archive;
pub(crate) mod check;
mod dcp;
mod dtypes;
mod pickle;
mod pt;
mod saved;
mod tensors;
mod zip;

pub use dcp::{Reader, Writer};
pub use pt::PtReader;

/// A pickle as distributed metadata: for fuzzing.
#[cfg(any(fuzzing, test))]
pub(crate) fn fuzz_metadata(bytes: &[u8]) {
    dcp::fuzz_metadata(bytes);
}

/// An archive with its tensors: for fuzzing.
#[cfg(any(fuzzing, test))]
pub(crate) fn fuzz_archive(region: crate::region::Region) {
    for unlisted in [pickle::Unlisted::Refused, pickle::Unlisted::Opaque] {
        let Ok(saved) = saved::read(region.clone(), "", unlisted) else { continue };
        for (_, tensor) in saved.tensors {
            if tensor.len_bytes() <= 1 << 20 {
                let _ = tensor.row_major();
            }
        }
    }
}
