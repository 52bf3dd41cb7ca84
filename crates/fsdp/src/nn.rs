//! Fused modules: what `candle_nn` offers under the same names, with a backward of its own.
//!
//! A module here takes the same var builder, asks it for the same parameters and returns the same values as its
//! namesake of `candle_nn`; a model changes its imports and nothing else. What differs is backward. candle's own
//! `matmul(w.t())` makes a zeroed buffer, a product and a sum for `w.t()`, and then a second zeroed buffer and a strided,
//! transposed sum for `w`; here the product is written once, in the layout of `w`, and handed to the unit that shards
//! `w`. Layer norm and softmax of `candle_nn` have no backward in their fused form; here they have.
//!
//! Parameters that no unit shards (from a `VarMap`, say) work as well; their gradients go through candle's store.
//!
//! These modules compute on the CPU in f32 or f64; f16 and bf16 are widened to f32 and rounded once. On other devices they
//! are made of candle's own ops, with its values and its backward.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Module, VarBuilder, VarMap};
//! use sconce_fsdp::nn;
//!
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let norm = nn::layer_norm(8, 1e-5, vb.pp("norm"))?;
//! let up = nn::linear(8, 32, vb.pp("up"))?;
//! let head = nn::linear_no_bias(32, 10, vb.pp("head"))?;
//!
//! let x = Tensor::randn(0f32, 1.0, (4, 8), &Device::Cpu)?;
//! let targets = Tensor::new(&[1u32, 9, 0, 3], &Device::Cpu)?;
//! let hidden = nn::gelu(&up.forward(&norm.forward(&x)?)?)?;
//! let loss = nn::cross_entropy(&head.forward(&hidden)?, &targets)?;
//! assert_eq!(loss.backward()?.get_ids().count(), 5);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod activation;
mod attention;
mod composed;
mod embedding;
mod kernel;
mod linear;
mod loss;
mod norm;
mod param;
mod real;
mod softmax;

pub use activation::gelu;
pub use attention::{attention, causal_attention};
pub use embedding::{Embedding, embedding};
pub use linear::{Linear, linear, linear_b, linear_no_bias};
pub use loss::cross_entropy;
pub use norm::{LayerNorm, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm};
pub use softmax::softmax_last_dim;
