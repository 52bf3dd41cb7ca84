//! How DTensors come to be: from local parts, from a whole tensor, and by factories whose values do not depend on the
//! layout.

use candle_core::Tensor;
use sconce_mesh::{DType, DeviceMesh};

use crate::agree::{Kind, gather_kinds};
use crate::candle_bytes::{dtype_of, on_host, zeros};
use crate::candle_tensors::FlatTensor;
use crate::dtensor::slice;
use crate::error::CandleContext;
use crate::placement::picture;
use crate::random::{Distribution, values};
use crate::redistribute::{ExchangePlan, Move, coordinate, exchange};
use crate::{DTensor, DTensorSpec, Error, Placement, Result, TensorBox, local_box, normalize_placements};

impl DTensor {
    /// A DTensor from this rank's part of it, for a known global shape. It is a function of `local`.
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
        Self::of_part(local, spec(dtype_of(local)?, shape, mesh, placements))
    }

    /// A DTensor from this rank's part of it; the global shape follows from what all ranks hold. It is a function of
    /// `local`.
    ///
    /// Ranks: collective over the mesh.
    ///
    /// # Errors
    /// The same on every rank: `ShapeMismatch` naming the first rank whose part does not fit the others',
    /// `RanksDisagree` naming the first whose dtype or placements differ; `InvalidPlacement`.
    ///
    /// # Source
    /// `DTensor.from_local`, which infers the shape of even shards only.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use sconce_dtensor::{DTensor, Placement};
    /// use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
    ///
    /// let mesh = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &[])?;
    /// let rows = Tensor::new(&[[1f32, 2.0]], &Device::Cpu)?;
    /// assert_eq!(DTensor::from_local(&rows, &mesh, &[Placement::Shard(0)])?.shape(), [1, 2]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_local(local: &Tensor, mesh: &DeviceMesh, placements: &[Placement]) -> Result<Self> {
        let mine = Kind { dtype: dtype_of(local)?, shape: local.dims().to_vec() };
        let all = gather_kinds(mesh.mesh_group(), &mine, placements)?;
        same_on_all("placements of from_local", mesh, all.iter().map(|(_, placements)| picture(placements)))?;
        same_on_all("dtype of the local tensor", mesh, all.iter().map(|(kind, _)| kind.dtype.to_string()))?;
        let shapes: Vec<&[usize]> = all.iter().map(|(kind, _)| kind.shape.as_slice()).collect();
        let shape = global_shape(&shapes, mesh, placements)?;
        Self::from_local_with_shape(local, mesh, placements, &shape)
    }

    /// Spreads the tensor of the mesh's first rank: each rank receives its part only.
    ///
    /// Each part lies on the device of the tensor that its rank passes.
    /// Ranks: collective over the mesh; every rank passes a tensor of the same shape and dtype, only the first
    /// rank's values count.
    ///
    /// # Source
    /// `torch.distributed.tensor.distribute_tensor` with `src_data_rank=0`.
    ///
    /// # Errors
    /// The same on every rank: `RanksDisagree` naming the first whose shape, dtype or placements differ;
    /// `InvalidPlacement`, also for `Partial`; whatever the exchange reports.
    pub fn distribute(tensor: &Tensor, mesh: &DeviceMesh, placements: &[Placement]) -> Result<Self> {
        let mine = Kind { dtype: dtype_of(tensor)?, shape: tensor.dims().to_vec() };
        let all = gather_kinds(mesh.mesh_group(), &mine, placements)?;
        let what = "tensor and placements to distribute";
        same_on_all(what, mesh, all.iter().map(|(kind, p)| format!("{kind} as {}", picture(p))))?;
        let (spec, held) = spec(mine.dtype, &mine.shape, mesh, placements).checked()?;
        refuse_partial(placements)?;
        let me = mesh.mesh_group().group_rank().0;
        let mut sources = vec![vec![]; mesh.size()];
        sources[0] = vec![TensorBox::whole(&mine.shape)];
        let targets: Vec<_> = spec.boxes().into_iter().map(|held| vec![held]).collect();
        let plan = ExchangePlan::new(me, &sources, &targets, &|_, _| true)?;
        let src = match me {
            0 => FlatTensor::whole(&on_host(tensor)?)?,
            _ => FlatTensor::run(zeros(&[0], spec.dtype)?, &mine.shape, 0)?,
        };
        let local = zeros(&held.sizes, spec.dtype)?;
        let mut dtensor = Self::of_part(&local, spec)?;
        exchange(mesh.mesh_group(), &mut [Move { plan, src: &src, dst: &mut dtensor }])?;
        dtensor.to_device(tensor.device())
    }

    /// This rank's part of a tensor of which every rank has an equal copy. No communication.
    ///
    /// # Errors
    /// `InvalidPlacement`, also for `Partial`.
    ///
    /// # Source
    /// `torch.distributed.tensor.distribute_tensor` with `src_data_rank=None`.
    pub fn from_copy(tensor: &Tensor, mesh: &DeviceMesh, placements: &[Placement]) -> Result<Self> {
        refuse_partial(placements)?;
        let (spec, held) = spec(dtype_of(tensor)?, tensor.dims(), mesh, placements).checked()?;
        let local = slice(tensor, &TensorBox::whole(tensor.dims()), &held)?;
        Self::of_part(&local, spec)
    }

    /// Zeros. No communication.
    ///
    /// # Errors
    /// `InvalidPlacement`, also for `Partial`.
    ///
    /// # Source
    /// `torch.distributed.tensor.zeros`.
    pub fn zeros(shape: &[usize], dtype: DType, mesh: &DeviceMesh, placements: &[Placement]) -> Result<Self> {
        refuse_partial(placements)?;
        let (spec, held) = spec(dtype, shape, mesh, placements).checked()?;
        Self::of_part(&zeros(&held.sizes, dtype)?, spec)
    }

    /// Ones. No communication.
    ///
    /// # Errors
    /// `InvalidPlacement`, also for `Partial`.
    ///
    /// # Source
    /// `torch.distributed.tensor.ones`.
    pub fn ones(shape: &[usize], dtype: DType, mesh: &DeviceMesh, placements: &[Placement]) -> Result<Self> {
        Self::full(1.0, shape, dtype, mesh, placements)
    }

    /// One value everywhere. No communication.
    ///
    /// # Errors
    /// `InvalidPlacement`, also for `Partial`.
    ///
    /// # Source
    /// `torch.distributed.tensor.full`.
    pub fn full(
        value: f64,
        shape: &[usize],
        dtype: DType,
        mesh: &DeviceMesh,
        placements: &[Placement],
    ) -> Result<Self> {
        let zeros = Self::zeros(shape, dtype, mesh, placements)?;
        let (local, spec) = zeros.into_parts();
        let local = local.affine(0.0, value).during(|| format!("filling a tensor of shape {shape:?}"))?;
        Self::of_part(&local, spec)
    }

    /// Uniform random values from `lo` up to `up`, of which a seed always gives the same global tensor, on any mesh and
    /// under any placements. No communication.
    ///
    /// # Errors
    /// `InvalidPlacement`, also for `Partial`; `Candle` for a dtype that is no float.
    ///
    /// # Source
    /// `torch.distributed.tensor.rand`; each element's value is a function of the seed and its index.
    ///
    /// ```
    /// use sconce_dtensor::{DTensor, DType, Placement};
    /// use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
    ///
    /// let mesh = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &[])?;
    /// let rows = DTensor::rand(0.0..1.0, 7, &[4, 3], DType::F32, &mesh, &[Placement::Shard(0)])?;
    /// let columns = DTensor::rand(0.0..1.0, 7, &[4, 3], DType::F32, &mesh, &[Placement::Shard(1)])?;
    /// assert!(rows.equal(&columns)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rand(
        range: std::ops::Range<f64>,
        seed: u64,
        shape: &[usize],
        dtype: DType,
        mesh: &DeviceMesh,
        placements: &[Placement],
    ) -> Result<Self> {
        let distribution = Distribution::Uniform { lo: range.start, up: range.end };
        Self::random(distribution, seed, spec(dtype, shape, mesh, placements))
    }

    /// Normal random values, of which a seed always gives the same global tensor, on any mesh and under any placements.
    /// No communication.
    ///
    /// # Errors
    /// `InvalidPlacement`, also for `Partial`; `Candle` for a dtype that is no float.
    ///
    /// # Source
    /// `torch.distributed.tensor.randn`; each element's value is a function of the seed and its index.
    pub fn randn(
        (mean, std): (f64, f64),
        seed: u64,
        shape: &[usize],
        dtype: DType,
        mesh: &DeviceMesh,
        placements: &[Placement],
    ) -> Result<Self> {
        Self::random(Distribution::Normal { mean, std }, seed, spec(dtype, shape, mesh, placements))
    }

    fn random(distribution: Distribution, seed: u64, spec: DTensorSpec) -> Result<Self> {
        refuse_partial(&spec.placements)?;
        let (spec, held) = spec.checked()?;
        let local = values(distribution, seed, &spec.shape, &held, spec.dtype)?;
        Self::of_part(&local, spec)
    }

    /// The same values as another dtype. Gradients flow.
    ///
    /// Pending terms are reduced first unless the new dtype holds every value of the old, since the sum of rounded terms
    /// is not the rounded sum.
    /// Ranks: collective over the mesh if terms are pending.
    ///
    /// # Errors
    /// `Mesh` for a dtype that candle lacks; what the reduction reports.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let old = self.spec().dtype;
        let widens = [DType::F16, DType::BF16].contains(&old) && [DType::F32, DType::F64].contains(&dtype)
            || old == DType::F32 && dtype == DType::F64
            || old == dtype;
        let whole = crate::grad::grad_placements(self.placements());
        let source = if widens { self.clone() } else { self.redistribute(&whole)? };
        let (local, spec) = source.into_parts();
        let local = local.to_dtype(dtype.try_into()?).during(|| format!("a tensor of {old} as {dtype}"))?;
        Self::of_part(&local, DTensorSpec { dtype, ..spec })
    }
}

fn spec(dtype: DType, shape: &[usize], mesh: &DeviceMesh, placements: &[Placement]) -> DTensorSpec {
    let (mesh, placements, shape) = (mesh.clone(), placements.to_vec(), shape.to_vec());
    DTensorSpec { mesh, placements, shape, dtype }
}

fn refuse_partial(placements: &[Placement]) -> Result<()> {
    if placements.iter().any(|p| p.is_partial()) {
        let what = "a tensor cannot be split into terms of a reduction".to_owned();
        return Err(Error::InvalidPlacement { placements: picture(placements), what });
    }
    Ok(())
}

fn same_on_all(what: &str, mesh: &DeviceMesh, each: impl Iterator<Item = String>) -> Result<()> {
    let each: Vec<String> = each.collect();
    match each.iter().zip(mesh.mesh_group().ranks()).find(|(given, _)| **given != each[0]) {
        None => Ok(()),
        Some((got, rank)) => Err(Error::RanksDisagree {
            what: what.to_owned(),
            rank: *rank,
            expected: each[0].clone(),
            got: got.clone(),
        }),
    }
}

/// The shape whose chunks are the given ones: along a split dim, the sum over the mesh dims that split it.
fn global_shape(shapes: &[&[usize]], mesh: &DeviceMesh, placements: &[Placement]) -> Result<Vec<usize>> {
    let mismatch = |nth: usize, expected: Vec<usize>| {
        let what = format!("local tensor of rank {}", mesh.ranks()[nth]);
        Err(Error::ShapeMismatch { what, expected, got: shapes[nth].to_vec() })
    };
    let mut shape = shapes[0].to_vec();
    if let Some(nth) = shapes.iter().position(|other| other.len() != shape.len()) {
        return mismatch(nth, shape);
    }
    let placements = normalize_placements(shape.len(), mesh.ndim(), placements)?;
    for (dim, size) in shape.iter_mut().enumerate() {
        let along = (0..shapes.len()).filter(|nth| {
            let at = coordinate(mesh.shape(), *nth);
            let splits = |mesh_dim: usize| placements[mesh_dim] == Placement::Shard(dim as isize);
            at.iter().enumerate().all(|(mesh_dim, index)| *index == 0 || splits(mesh_dim))
        });
        *size = along.map(|nth| shapes[nth][dim]).sum();
    }
    for (nth, got) in shapes.iter().enumerate() {
        let expected = local_box(&shape, mesh.shape(), &coordinate(mesh.shape(), nth), &placements).sizes;
        if *got != expected {
            return mismatch(nth, expected);
        }
    }
    Ok(shape)
}
