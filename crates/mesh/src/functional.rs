//! Collectives as functions of candle tensors, through which gradients flow.
//!
//! Each takes a tensor of any strides, on the CPU or, with feature `cuda`, on a CUDA device, leaves it as it is and returns
//! a new one there. Gradients are those of the sum of
//! all ranks' losses, as in torch. The backward pass makes collectives too, so all ranks run it on graphs of the same
//! shape.
//!
//! | function | its gradient |
//! | --- | --- |
//! | `all_reduce` by sum, avg | `all_reduce` by the same |
//! | `all_gather` | `reduce_scatter` by sum |
//! | `reduce_scatter` by sum, avg | `all_gather`, for avg divided by the group size |
//! | `all_to_all` | `all_to_all` |
//! | `broadcast` | sum on the root, zeros elsewhere |
//!
//! Errors are candle's; inside them is this crate's [`Error`].
//!
//! # Source
//! `torch.distributed.nn.functional` and `torch.distributed._functional_collectives`.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendDevice as _;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use crate::backend::{Call, CallName};
#[cfg(feature = "cuda")]
use crate::cuda::{self, CudaBytes, CudaBytesMut};
use crate::{DType, Error, GroupRank, ProcessGroup, ReduceOp, cpu_bytes, cpu_bytes_mut};

/// The reduction of all ranks' tensors, on every rank.
///
/// Shapes: `[…]` → the same, equal on all ranks.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use sconce_mesh::{ProcessGroup, ReduceOp, functional};
///
/// let x = Var::new(&[1.0f32, 2.0], &Device::Cpu)?;
/// let y = functional::all_reduce(&x, ReduceOp::Sum, &ProcessGroup::single())?;
/// let gradients = y.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>()?, [1.0, 1.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn all_reduce(tensor: &Tensor, op: ReduceOp, group: &ProcessGroup) -> Result<Tensor> {
    apply(tensor, Kind::AllReduce(op), group)
}

/// The concatenation of all ranks' tensors along dim 0, in group-rank order.
///
/// Shapes: `[n, …]` → `[group_size · n, …]`.
pub fn all_gather(tensor: &Tensor, group: &ProcessGroup) -> Result<Tensor> {
    apply(tensor, Kind::AllGather, group)
}

/// Part `group_rank` along dim 0 of the reduction of all ranks' tensors.
///
/// Shapes: `[group_size · n, …]` → `[n, …]`.
pub fn reduce_scatter(tensor: &Tensor, op: ReduceOp, group: &ProcessGroup) -> Result<Tensor> {
    apply(tensor, Kind::ReduceScatter(op), group)
}

/// Part `group_rank` along dim 0 of each rank's tensor, in group-rank order.
///
/// Shapes: `[group_size · n, …]` → the same.
pub fn all_to_all(tensor: &Tensor, group: &ProcessGroup) -> Result<Tensor> {
    apply(tensor, Kind::AllToAll, group)
}

/// The tensor of `root` on every rank.
///
/// Shapes: `[…]` → the same, equal on all ranks.
pub fn broadcast(tensor: &Tensor, root: GroupRank, group: &ProcessGroup) -> Result<Tensor> {
    crate::collective::in_group("broadcast", root, group.size()).map_err(candle_core::Error::wrap)?;
    apply(tensor, Kind::Broadcast(root), group)
}

fn apply(tensor: &Tensor, kind: Kind, group: &ProcessGroup) -> Result<Tensor> {
    tensor.contiguous()?.apply_op1(Collective { kind, group: group.clone() })
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    AllReduce(ReduceOp),
    AllGather,
    ReduceScatter(ReduceOp),
    AllToAll,
    Broadcast(GroupRank),
}

struct Collective {
    kind: Kind,
    group: ProcessGroup,
}

impl Collective {
    fn call_name(&self) -> CallName {
        match self.kind {
            Kind::AllReduce(_) => CallName::AllReduce,
            Kind::AllGather => CallName::AllGather,
            Kind::ReduceScatter(_) => CallName::ReduceScatter,
            Kind::AllToAll => CallName::AllToAll,
            Kind::Broadcast(_) => CallName::Broadcast,
        }
    }

    /// Shape of the result.
    fn output_shape(&self, shape: &Shape) -> crate::Result<Shape> {
        let n = self.group.size();
        let mut dims = shape.dims().to_vec();
        let first = || {
            let divides = dims.first().filter(|len| *len % n == 0);
            divides.copied().ok_or_else(|| Error::InvalidArgument {
                op: self.call_name().name(),
                what: "shape of the tensor".into(),
                expected: format!("a first dim that {n} ranks divide"),
                got: format!("{shape:?}"),
            })
        };
        match self.kind {
            Kind::AllReduce(_) | Kind::Broadcast(_) => {}
            Kind::AllToAll => drop(first()?),
            Kind::ReduceScatter(_) => dims[0] = first()? / n,
            Kind::AllGather if dims.is_empty() => dims.push(n),
            Kind::AllGather => dims[0] *= n,
        }
        Ok(Shape::from(dims))
    }

    fn run(&self, dtype: DType, input: &[u8], output: &mut [u8]) -> crate::Result<()> {
        let (backend, n) = (self.group.backend()?, self.group.size());
        let call = Call::new(self.call_name(), dtype);
        match self.kind {
            Kind::AllReduce(op) => {
                output.copy_from_slice(input);
                backend.all_reduce(call, output, op)
            }
            Kind::AllGather => backend.all_gather(call, input, &vec![input.len(); n], &mut [output]),
            Kind::ReduceScatter(op) => {
                backend.reduce_scatter(call, op, &[input], &vec![output.len(); n], output)
            }
            Kind::AllToAll => {
                let counts = vec![input.len() / n; n];
                backend.all_to_all(call, input, &counts, output, &counts)
            }
            Kind::Broadcast(root) => {
                output.copy_from_slice(input);
                backend.broadcast(Call::rooted(CallName::Broadcast, dtype, root), output, root)
            }
        }
    }
}

#[cfg(feature = "cuda")]
impl Collective {
    fn run_on_device(&self, input: &CudaBytes<'_>, mut output: CudaBytesMut<'_>) -> crate::Result<()> {
        match self.kind {
            Kind::AllReduce(op) => {
                output.copy_from(input)?;
                self.group.cuda_all_reduce(&mut output, op)
            }
            Kind::AllGather => self.group.cuda_all_gather(input, &mut [output]),
            Kind::ReduceScatter(op) => {
                let whole = input.range(0..input.len_bytes());
                self.group.cuda_reduce_scatter(&[whole], &mut output, op)
            }
            Kind::AllToAll => self.group.cuda_all_to_all(input, &mut output),
            Kind::Broadcast(root) => {
                output.copy_from(input)?;
                self.group.cuda_broadcast(&mut output, root)
            }
        }
    }
}

impl CustomOp1 for Collective {
    fn name(&self) -> &'static str {
        self.call_name().name()
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage as _;

        let wrap = candle_core::Error::wrap;
        let shape = self.output_shape(layout.shape()).map_err(wrap)?;
        let dtype = DType::try_from(storage.dtype()).map_err(wrap)?;
        let mut output = candle_core::cpu_backend::CpuDevice.zeros_impl(&shape, storage.dtype())?;
        let start = layout.start_offset() * dtype.size_bytes();
        let input =
            &cpu_bytes(storage).map_err(wrap)?[start..][..layout.shape().elem_count() * dtype.size_bytes()];
        self.run(dtype, input, cpu_bytes_mut(&mut output).map_err(wrap)?).map_err(wrap)?;
        Ok((output, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let wrap = candle_core::Error::wrap;
        let shape = self.output_shape(layout.shape()).map_err(wrap)?;
        let input = CudaBytes::of(storage, layout).map_err(wrap)?;
        let mut output = cuda::uninit(&storage.device, input.dtype(), shape.elem_count()).map_err(wrap)?;
        let whole = Layout::contiguous(&shape);
        self.run_on_device(&input, CudaBytesMut::of(&mut output, &whole).map_err(wrap)?).map_err(wrap)?;
        Ok((output, shape))
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad_res: &Tensor) -> Result<Option<Tensor>> {
        let (group, n) = (&self.group, self.group.size() as f64);
        let gradient = match self.kind {
            Kind::AllReduce(op @ (ReduceOp::Sum | ReduceOp::Avg)) => all_reduce(grad_res, op, group)?,
            Kind::AllGather => reduce_scatter(grad_res, ReduceOp::Sum, group)?.reshape(arg.shape())?,
            Kind::ReduceScatter(ReduceOp::Sum) => all_gather(grad_res, group)?,
            Kind::ReduceScatter(ReduceOp::Avg) => (all_gather(grad_res, group)? / n)?,
            Kind::AllToAll => all_to_all(grad_res, group)?,
            Kind::Broadcast(root) => {
                let sum = all_reduce(grad_res, ReduceOp::Sum, group)?;
                if group.group_rank() == root { sum } else { sum.zeros_like()? }
            }
            Kind::AllReduce(_) | Kind::ReduceScatter(_) => {
                return Err(candle_core::Error::BackwardNotSupported { op: self.name() });
            }
        };
        Ok(Some(gradient))
    }
}

#[cfg(test)]
mod tests;
