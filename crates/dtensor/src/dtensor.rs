//! DTensor: a candle tensor spread over a mesh. What it holds and how it is made; how it moves is `redistribute`.

use std::any::Any;

use candle_core::Tensor;
use sconce_mesh::{DType, DeviceMesh, Rank};

use crate::candle_bytes::{check_shape, deep_copy, dtype_of, read_bytes, write_bytes, zeros};
use crate::candle_tensors::FlatTensor;
use crate::error::CandleContext;
use crate::placement::picture;
use crate::redistribute::{ExchangePlan, Move, exchange};
use crate::{Error, LocalTensor, Placement, Result, TensorBox, Value, check_placements, local_box};

/// Where a tensor lies: mesh, one placement a mesh dim, global shape and dtype.
#[derive(Debug, Clone, PartialEq)]
pub struct DTensorSpec {
    /// The mesh.
    pub mesh: DeviceMesh,
    /// One placement a mesh dim.
    pub placements: Vec<Placement>,
    /// Shape of the global tensor.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
}

impl DTensorSpec {
    /// The box that `rank` holds; `None` if it is not in the mesh. No communication.
    pub fn box_of(&self, rank: Rank) -> Option<TensorBox> {
        let coordinate = self.mesh.coordinate_of(rank)?;
        Some(local_box(&self.shape, self.mesh.shape(), &coordinate, &self.placements))
    }

    /// The boxes of all ranks of the mesh, in mesh order.
    pub fn boxes(&self) -> Vec<TensorBox> {
        self.mesh.ranks().iter().filter_map(|rank| self.box_of(*rank)).collect()
    }

    fn check(&self) -> Result<TensorBox> {
        check_placements(self.shape.len(), self.mesh.ndim(), &self.placements)?;
        let rank = self.mesh.mesh_group().rank();
        self.box_of(rank).ok_or_else(|| Error::InvalidPlacement {
            placements: picture(&self.placements),
            what: format!("rank {rank} is not in the mesh of ranks {:?}", self.mesh.ranks()),
        })
    }
}

/// A tensor of which each rank of a mesh holds a part.
///
/// # Source
/// `torch.distributed.tensor.DTensor`. Gradients do not flow through it yet.
#[derive(Debug, Clone)]
pub struct DTensor {
    spec: DTensorSpec,
    held: [TensorBox; 1],
    local: Tensor,
}

impl DTensor {
    /// A DTensor from this rank's part of it, for a known global shape.
    ///
    /// Shapes: local is the rank's chunk as `torch.chunk` gives it ([`local_box`](crate::local_box)).
    /// Ranks: local, no communication.
    ///
    /// # Errors
    /// `ShapeMismatch` naming the rank if `local` is not the shape of its chunk; `InvalidPlacement`.
    pub fn from_local_with_shape(
        local: &Tensor,
        mesh: &DeviceMesh,
        placements: &[Placement],
        shape: &[usize],
    ) -> Result<Self> {
        let (mesh, placements, shape) = (mesh.clone(), placements.to_vec(), shape.to_vec());
        let spec = DTensorSpec { mesh, placements, shape, dtype: dtype_of(local)? };
        let held = spec.check()?;
        check_shape(&format!("local tensor of rank {}", spec.mesh.mesh_group().rank()), &held.sizes, local)?;
        let local = local.contiguous().during(|| format!("local tensor of shape {:?}", held.sizes))?;
        Ok(Self { spec, held: [held], local })
    }

    /// A DTensor from this rank's part of it; the global shape follows from what all ranks hold.
    ///
    /// Ranks: collective over the mesh.
    ///
    /// # Errors
    /// `ShapeMismatch` naming the first rank whose part does not fit the others', the same on every rank.
    pub fn from_local(local: &Tensor, mesh: &DeviceMesh, placements: &[Placement]) -> Result<Self> {
        check_placements(local.rank(), mesh.ndim(), placements)?;
        let shapes = gather_shapes(local, mesh)?;
        let shape = global_shape(&shapes, mesh.shape(), placements)?;
        for (rank, got) in mesh.ranks().iter().zip(&shapes) {
            let coordinate = mesh.coordinate_of(*rank).unwrap_or_default();
            let expected = local_box(&shape, mesh.shape(), &coordinate, placements).sizes;
            if *got != expected {
                let what = format!("local tensor of rank {rank}");
                return Err(Error::ShapeMismatch { what, expected, got: got.clone() });
            }
        }
        Self::from_local_with_shape(local, mesh, placements, &shape)
    }

    /// Spreads the tensor of the mesh's first rank: each rank receives its part only.
    ///
    /// Ranks: collective over the mesh; every rank passes a tensor of the same shape and dtype, only the first
    /// rank's values count.
    ///
    /// # Source
    /// `torch.distributed.tensor.distribute_tensor` with `src_data_rank=0`.
    ///
    /// # Errors
    /// `InvalidPlacement` for `Partial`; whatever the exchange reports.
    pub fn distribute(tensor: &Tensor, mesh: &DeviceMesh, placements: &[Placement]) -> Result<Self> {
        refuse_partial(placements)?;
        let shape = tensor.dims();
        let (mesh, placements) = (mesh.clone(), placements.to_vec());
        let spec = DTensorSpec { mesh, placements, shape: shape.to_vec(), dtype: dtype_of(tensor)? };
        let held = spec.check()?;
        let me = spec.mesh.mesh_group().group_rank().0;
        let mut sources = vec![vec![]; spec.mesh.size()];
        sources[0] = vec![TensorBox::whole(shape)];
        let targets: Vec<_> = spec.boxes().into_iter().map(|b| vec![b]).collect();
        let plan = ExchangePlan::new(me, &sources, &targets, &|_, _| true)?;
        let src =
            if me == 0 { FlatTensor::whole(tensor)? } else { FlatTensor::run(empty(spec.dtype)?, shape, 0)? };
        let local = zeros(&held.sizes, spec.dtype)?;
        let mut dtensor = Self { spec, held: [held], local };
        let group = dtensor.spec.mesh.mesh_group().clone();
        exchange(&group, &mut [Move { plan, src: &src, dst: &mut dtensor }])?;
        Ok(dtensor)
    }

    /// This rank's part of a tensor of which every rank has an equal copy. No communication.
    ///
    /// # Errors
    /// `InvalidPlacement` for `Partial`.
    pub fn from_copy(tensor: &Tensor, mesh: &DeviceMesh, placements: &[Placement]) -> Result<Self> {
        refuse_partial(placements)?;
        check_placements(tensor.rank(), mesh.ndim(), placements)?;
        let coordinate = mesh.coordinate().unwrap_or_default();
        let held = local_box(tensor.dims(), mesh.shape(), coordinate, placements);
        let local = slice(tensor, &TensorBox::whole(tensor.dims()), &held)?;
        Self::from_local_with_shape(&local, mesh, placements, tensor.dims())
    }

    /// This rank's part; shares storage with the DTensor.
    pub fn to_local(&self) -> &Tensor {
        &self.local
    }

    /// The whole tensor, on every rank.
    ///
    /// Ranks: collective over the mesh.
    ///
    /// # Errors
    /// Whatever the collectives report.
    pub fn full_tensor(&self) -> Result<Tensor> {
        Ok(self.redistribute(&vec![Placement::Replicate; self.spec.mesh.ndim()])?.local)
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
}

/// `inner` of the tensor that holds `outer`: a copy.
pub(crate) fn slice(tensor: &Tensor, outer: &TensorBox, inner: &TensorBox) -> Result<Tensor> {
    if inner.is_empty() {
        return zeros(&inner.sizes, dtype_of(tensor)?);
    }
    let dims = inner.offsets.iter().zip(&outer.offsets).zip(&inner.sizes).enumerate();
    let view = dims
        .into_iter()
        .try_fold(tensor.clone(), |t, (dim, ((inner, outer), size))| t.narrow(dim, inner - outer, *size));
    view.and_then(|v| v.force_contiguous()).during(|| format!("box {inner} of box {outer}"))
}

fn empty(dtype: DType) -> Result<Tensor> {
    zeros(&[0], dtype)
}

fn refuse_partial(placements: &[Placement]) -> Result<()> {
    if placements.iter().any(|p| matches!(p, Placement::Partial(_))) {
        let what = "a tensor cannot be split into terms of a reduction".to_owned();
        return Err(Error::InvalidPlacement { placements: picture(placements), what });
    }
    Ok(())
}

/// The local shape of every rank of the mesh, in mesh order.
fn gather_shapes(local: &Tensor, mesh: &DeviceMesh) -> Result<Vec<Vec<usize>>> {
    let mine: Vec<u8> = local.dims().iter().flat_map(|n| (*n as u64).to_le_bytes()).collect();
    let all = mesh.mesh_group().all_gather_object(&mine)?;
    let parse = |bytes: &[u8]| {
        let (words, _) = bytes.as_chunks::<8>();
        words.iter().map(|word| u64::from_le_bytes(*word) as usize).collect()
    };
    Ok(all.iter().map(|bytes| parse(bytes)).collect())
}

/// The shape whose chunks would have the given lengths: along a sharded dim, the sum over the mesh dims that split it.
fn global_shape(shapes: &[Vec<usize>], mesh_shape: &[usize], placements: &[Placement]) -> Result<Vec<usize>> {
    let mut shape = shapes[0].clone();
    if let Some((nth, got)) = shapes.iter().enumerate().find(|(_, s)| s.len() != shape.len()) {
        let what = format!("local tensor at mesh position {nth}");
        return Err(Error::ShapeMismatch { what, expected: shape, got: got.clone() });
    }
    for (dim, size) in shape.iter_mut().enumerate() {
        let splits = |mesh_dim: usize| placements[mesh_dim] == Placement::Shard(dim);
        let along = (0..shapes.len()).filter(|nth| {
            let at = crate::redistribute::coordinate(mesh_shape, *nth);
            at.iter().enumerate().all(|(mesh_dim, index)| *index == 0 || splits(mesh_dim))
        });
        *size = along.map(|nth| shapes[nth][dim]).sum();
    }
    Ok(shape)
}

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
        read_bytes(&self.local, read)
    }
    fn write_box(&mut self, _index: usize, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        write_bytes(&self.local, write)
    }
    fn deep_copy(&self) -> Result<Box<dyn LocalTensor>> {
        Ok(Box::new(Self { local: deep_copy(&self.local)?, ..self.clone() }))
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
