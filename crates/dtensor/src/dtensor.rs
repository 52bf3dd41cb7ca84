//! DTensor: a candle tensor spread over a mesh. What it holds; how it is made is `create.rs`, how it moves is
//! `redistribute`, what is computed with it is `ops`.

use std::any::Any;
use std::fmt;
use std::ops::Range;

use candle_core::{Device, Tensor};
use sconce_mesh::{DType, DeviceMesh};

use crate::candle_bytes::{
    check_shape, deep_copy, dtype_of, on_device, read_bytes, read_range, write_bytes, zeros,
};
use crate::error::CandleContext;
use crate::placement::picture;
use crate::{DTensorSpec, Error, LocalTensor, Placement, Result, TensorBox, Value, normalize_placements};

/// A tensor of which each rank of a mesh holds a part.
///
/// Gradients flow through it: it is a function of the candle tensor that it was made from. Along a mesh dim the gradient
/// of a tensor has the placement of the tensor, except that the gradient of a pending term is whole, as that of the sum.
///
/// Its `Display` shows which rank holds what.
///
/// # Source
/// `torch.distributed.tensor.DTensor`.
#[derive(Debug, Clone)]
pub struct DTensor {
    spec: DTensorSpec,
    held: [TensorBox; 1],
    local: Tensor,
}

impl DTensor {
    /// `local` as this rank's part of a tensor of `spec`; it stays part of candle's graph.
    pub(crate) fn of_part(local: &Tensor, spec: DTensorSpec) -> Result<Self> {
        let (spec, held) = spec.checked()?;
        check_shape(&format!("local tensor of rank {}", spec.mesh.mesh_group().rank()), &held.sizes, local)?;
        let got = dtype_of(local)?;
        if got != spec.dtype {
            return Err(Error::DTypeMismatch { what: "local tensor".into(), expected: spec.dtype, got });
        }
        let local = local.contiguous().during(|| format!("local tensor of shape {:?}", held.sizes))?;
        Ok(Self { spec, held: [held], local })
    }

    pub(crate) fn into_parts(self) -> (Tensor, DTensorSpec) {
        (self.local, self.spec)
    }

    /// This rank's part; shares storage with the DTensor. Gradients flow through it: they are expected to have the
    /// placements of the tensor, whole where it has pending terms. Where they have others, see
    /// [`DTensor::to_local_with_grad`].
    ///
    /// # Source
    /// `DTensor.to_local`.
    pub fn to_local(&self) -> &Tensor {
        &self.local
    }

    /// This rank's part, for a computation after which its gradient has `grad_placements`: `Partial` for instance where
    /// ranks that hold the same values compute different things with them.
    ///
    /// Ranks: local; its backward pass is collective over the mesh.
    ///
    /// # Errors
    /// `InvalidPlacement`.
    ///
    /// # Source
    /// `DTensor.to_local(grad_placements=…)`.
    pub fn to_local_with_grad(&self, grad_placements: &[Placement]) -> Result<Tensor> {
        let given = normalize_placements(self.shape().len(), self.spec.mesh.ndim(), grad_placements)?;
        self.lend(self.placements(), &given)
    }

    /// The whole tensor, on every rank.
    ///
    /// Ranks: collective over the mesh.
    ///
    /// # Errors
    /// Whatever the collectives report.
    ///
    /// # Source
    /// `DTensor.full_tensor`.
    pub fn full_tensor(&self) -> Result<Tensor> {
        Ok(self.redistribute(&vec![Placement::Replicate; self.spec.mesh.ndim()])?.local)
    }

    /// A copy that shares no storage with this one and is no function of it.
    ///
    /// # Errors
    /// `Candle` if there is no memory.
    pub fn copy(&self) -> Result<DTensor> {
        Ok(Self { local: deep_copy(&self.local.detach())?, ..self.clone() })
    }

    /// The same tensor, this rank's part on `device`. Gradients flow. No communication.
    ///
    /// # Errors
    /// `Candle` if the device has no memory, or this build no such devices.
    ///
    /// # Source
    /// `DTensor.to`.
    pub fn to_device(&self, device: &Device) -> Result<DTensor> {
        Ok(Self { local: on_device(&self.local, device)?, ..self.clone() })
    }

    /// Where it lies.
    pub fn spec(&self) -> &DTensorSpec {
        &self.spec
    }

    /// The mesh it is spread over.
    pub fn device_mesh(&self) -> &DeviceMesh {
        &self.spec.mesh
    }

    /// One placement a mesh dim.
    pub fn placements(&self) -> &[Placement] {
        &self.spec.placements
    }

    /// Shape of the global tensor.
    pub fn shape(&self) -> &[usize] {
        &self.spec.shape
    }

    /// What this rank holds.
    pub(crate) fn local_box(&self) -> &TensorBox {
        &self.held[0]
    }

    /// A tensor of pending terms has no bytes of its own.
    fn check_whole(&self) -> Result<()> {
        if self.placements().iter().any(|p| p.is_partial()) {
            let what = "pending terms can be neither saved nor loaded: redistribute first".to_owned();
            return Err(Error::InvalidPlacement { placements: picture(self.placements()), what });
        }
        Ok(())
    }
}

impl fmt::Display for DTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.spec.fmt(f)
    }
}

/// `inner` of the tensor that holds `outer`: a copy.
pub(crate) fn slice(tensor: &Tensor, outer: &TensorBox, inner: &TensorBox) -> Result<Tensor> {
    if inner.is_empty() {
        return on_device(&zeros(&inner.sizes, dtype_of(tensor)?)?, tensor.device());
    }
    let dims = inner.offsets.iter().zip(&outer.offsets).zip(&inner.sizes).enumerate();
    let view = dims
        .into_iter()
        .try_fold(tensor.clone(), |t, (dim, ((inner, outer), size))| t.narrow(dim, inner - outer, *size));
    view.and_then(|v| v.force_contiguous()).during(|| format!("box {inner} of box {outer}"))
}

/// # Errors
/// Reading and writing: `InvalidPlacement` while terms are pending.
impl LocalTensor for DTensor {
    fn dtype(&self) -> DType {
        self.spec.dtype
    }
    fn global_shape(&self) -> &[usize] {
        &self.spec.shape
    }
    fn local_boxes(&self) -> &[TensorBox] {
        &self.held
    }
    fn read_box(&self, _index: usize, read: &mut dyn FnMut(&[u8])) -> Result<()> {
        self.check_whole()?;
        read_bytes(&self.local, read)
    }
    fn read_box_range(&self, _: usize, range: Range<usize>, read: &mut dyn FnMut(&[u8])) -> Result<()> {
        self.check_whole()?;
        read_range(&self.local, range, read)
    }
    fn write_box(&mut self, _index: usize, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        self.check_whole()?;
        write_bytes(&self.local, write)
    }
    fn deep_copy(&self) -> Result<Box<dyn LocalTensor>> {
        Ok(Box::new(self.copy()?))
    }
    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }
}

impl From<DTensor> for Value<'_> {
    fn from(dtensor: DTensor) -> Self {
        Value::Tensor(Box::new(dtensor))
    }
}
