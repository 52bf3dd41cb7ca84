//! MixedPrecision: in which dtypes a model computes and reduces. Shards and optimizer state are always f32.

use candle_core::{CpuStorage, DType, Layout, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::CandleContext;
use crate::{Error, Result};

/// Dtypes of the gathered parameters, of the reduction of gradients, and of the model's output.
///
/// On the CPU candle 0.11 multiplies matrices of f16 and f32, not of bf16.
///
/// # Source
/// `torch.distributed.fsdp.MixedPrecision` and `MixedPrecisionPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MixedPrecision {
    /// What parameters are gathered, lent to the model and differentiated in: f32, f16 or bf16. It is the dtype of the
    /// var builder, so that the model's own constants follow; inputs are the caller's.
    pub param_dtype: DType,
    /// What gradients are reduced in: f32, f16 or bf16. Sums are formed in f32 whatever it is.
    pub reduce_dtype: DType,
    /// What the model's float outputs are cast to; `None` leaves them.
    pub output_dtype: Option<DType>,
}

impl Default for MixedPrecision {
    /// All f32, outputs as they are.
    fn default() -> Self {
        Self { param_dtype: DType::F32, reduce_dtype: DType::F32, output_dtype: None }
    }
}

impl MixedPrecision {
    /// Refuses dtypes that shards cannot be cast to.
    pub(crate) fn check(&self) -> Result<()> {
        for (what, dtype) in [("param_dtype", self.param_dtype), ("reduce_dtype", self.reduce_dtype)] {
            if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
                let got = dtype.as_str().to_owned();
                return Err(Error::UnsupportedDType { fqn: what.to_owned(), got });
            }
        }
        Ok(())
    }
}

/// An element type that parameters are gathered or gradients reduced in.
pub(crate) trait Float: sconce_mesh::Element + Default {
    /// Casts all of a shard.
    fn from_shard(values: &[f32]) -> Vec<Self>;
    /// Casts a reduced gradient back.
    fn into_f32(values: Vec<Self>) -> Vec<f32>;
    /// As a candle storage.
    fn storage(values: Vec<Self>) -> CpuStorage;
    /// The values of a candle storage of this type.
    fn values(storage: &CpuStorage) -> Option<&[Self]>;
    /// The same, taken out of it.
    fn into_values(storage: CpuStorage) -> Option<Vec<Self>>;
}

impl Float for f32 {
    fn from_shard(values: &[f32]) -> Vec<f32> {
        values.to_vec()
    }
    fn into_f32(values: Vec<f32>) -> Vec<f32> {
        values
    }
    fn storage(values: Vec<f32>) -> CpuStorage {
        CpuStorage::F32(values)
    }
    fn values(storage: &CpuStorage) -> Option<&[f32]> {
        match storage {
            CpuStorage::F32(values) => Some(values),
            _ => None,
        }
    }
    fn into_values(storage: CpuStorage) -> Option<Vec<f32>> {
        match storage {
            CpuStorage::F32(values) => Some(values),
            _ => None,
        }
    }
}

macro_rules! half_float {
    ($($type:ident => $variant:ident),*) => {$(
        impl Float for $type {
            fn from_shard(values: &[f32]) -> Vec<$type> {
                let mut cast = vec![$type::ZERO; values.len()];
                cast.convert_from_f32_slice(values);
                cast
            }
            fn into_f32(values: Vec<$type>) -> Vec<f32> {
                let mut cast = vec![0.0; values.len()];
                values.convert_to_f32_slice(&mut cast);
                cast
            }
            fn storage(values: Vec<$type>) -> CpuStorage {
                CpuStorage::$variant(values)
            }
            fn values(storage: &CpuStorage) -> Option<&[$type]> {
                match storage {
                    CpuStorage::$variant(values) => Some(values),
                    _ => None,
                }
            }
            fn into_values(storage: CpuStorage) -> Option<Vec<$type>> {
                match storage {
                    CpuStorage::$variant(values) => Some(values),
                    _ => None,
                }
            }
        }
    )*};
}

half_float!(f16 => F16, bf16 => BF16);

/// The values of a contiguous tensor of type `T` on the CPU, by its storage and layout.
pub(crate) fn slice_of<'s, T: Float>(storage: &'s Storage, layout: &Layout) -> Option<&'s [T]> {
    let (Storage::Cpu(storage), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
        return None;
    };
    T::values(storage).map(|values| &values[start..end])
}

/// `tensor` in `dtype`, contiguous; itself if it is so already.
pub(crate) fn cast(tensor: &Tensor, dtype: DType, what: impl FnOnce() -> String) -> Result<Tensor> {
    tensor.to_dtype(dtype).and_then(|t| t.contiguous()).during(what)
}
