//! Steps of a redistribute that need no cutting or joining of boxes, from device to device.

use candle_core::op::BackpropOp;
use candle_core::{Device, Layout, Shape, Storage, Tensor};
use sconce_mesh::cuda::{CudaBytes, CudaBytesMut, uninit};

use super::Action;
use super::reduce::lies_in_order;
use crate::{DTensor, DTensorSpec, Result, TensorBox};

/// This rank's part after a step, if the step is of that kind and the tensor on a CUDA device.
pub(super) fn on_cuda(now: &DTensor, to: &DTensorSpec, action: &Action) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = now.to_local().device() else { return Ok(None) };
    let (held, whole) = (now.local_box(), to.own_box()?);
    let (storage, layout) = now.to_local().storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { unreachable!("a tensor of a CUDA device is stored there") };
    let mut made = uninit(device, to.dtype, whole.numel())?;
    let shape = Shape::from(whole.sizes.as_slice());
    let input = CudaBytes::of(storage, layout)?;
    let mut output = CudaBytesMut::of(&mut made, &Layout::contiguous(&shape))?;
    let len_bytes = input.len_bytes();
    match action {
        Action::AllReduce { mesh_dims, op } => {
            let group = now.device_mesh().joint_group(mesh_dims)?;
            output.copy_from(&input)?;
            group.cuda_all_reduce(&mut output, *op)?;
        }
        Action::ReduceScatter { mesh_dims, op } => {
            let group = now.device_mesh().joint_group(mesh_dims)?;
            let wanted = to.boxes_of(group.ranks());
            if !lies_in_order(held, &wanted) {
                return Ok(None);
            }
            group.cuda_reduce_scatter_uneven(
                &input.range(0..len_bytes),
                &numels(&wanted),
                &mut output,
                *op,
            )?;
        }
        Action::AllGather { mesh_dims } => {
            let group = now.device_mesh().joint_group(mesh_dims)?;
            let pieces = now.spec().boxes_of(group.ranks());
            if !lies_in_order(&whole, &pieces) {
                return Ok(None);
            }
            group.cuda_all_gather_uneven(&input, &numels(&pieces), &mut output)?;
        }
        Action::Slice | Action::MakePartial { .. } | Action::Exchange => return Ok(None),
    }
    Ok(Some(Tensor::from_storage(Storage::Cuda(made), shape, BackpropOp::none(), false)))
}

fn numels(boxes: &[TensorBox]) -> Vec<usize> {
    boxes.iter().map(TensorBox::numel).collect()
}
