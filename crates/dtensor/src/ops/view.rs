//! Ops that give the same elements another shape: transpose and reshape.

use sconce_mesh::ReduceOp;

use super::{Rule, apply};
use crate::error::CandleContext;
use crate::placement::{picture, tensor_dim};
use crate::redistribute::coordinate;
use crate::{DTensor, DTensorSpec, Error, Placement, Result, TensorBox, copy_runs, local_box};

impl DTensor {
    /// Two dims in each other's place; splits move along. No communication.
    ///
    /// # Errors
    /// `ShapeMismatch` for a dim that the tensor lacks; what candle reports.
    pub fn transpose(&self, dim_a: isize, dim_b: isize) -> Result<DTensor> {
        let ndim = self.shape().len();
        let (Some(a), Some(b)) = (tensor_dim(dim_a, ndim), tensor_dim(dim_b, ndim)) else {
            let what = format!("transpose of dims {dim_a} and {dim_b} of a tensor with {ndim} dims");
            return Err(Error::ShapeMismatch { what, expected: vec![], got: self.shape().to_vec() });
        };
        let mut shape = self.shape().to_vec();
        shape.swap(a, b);
        let swapped = |placement: Placement| match placement.shard_dim(ndim) {
            Some(dim) if dim == a => Placement::Shard(b as isize),
            Some(dim) if dim == b => Placement::Shard(a as isize),
            _ => placement,
        };
        let all_ops = [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::Prod];
        let shards = (0..ndim).map(|dim| Placement::Shard(dim as isize));
        let inputs = shards.chain(all_ops.map(Placement::Partial)).chain([Placement::Replicate]);
        let rules: Vec<Rule> = inputs.map(|input| Rule::new([input], swapped(input))).collect();
        apply("transpose", &[self], &shape, &rules, |parts| parts[0].transpose(a, b))
    }

    /// The last two dims in each other's place.
    ///
    /// # Errors
    /// As [`DTensor::transpose`].
    pub fn t(&self) -> Result<DTensor> {
        self.transpose(-2, -1)
    }

    /// The elements in row-major order under another shape, where every rank keeps what it holds. No communication.
    ///
    /// Splits of the leading one of dims that are merged or made by the split of one stay, if their chunks are the same.
    ///
    /// # Errors
    /// `ShapeMismatch` if the shapes differ in elements; `InvalidPlacement` naming what to redistribute first if a rank
    /// would hold other elements.
    ///
    /// ```
    /// use sconce_dtensor::{DTensor, DType, Placement::*};
    /// use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
    ///
    /// let mesh = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &["tp"])?;
    /// let x = DTensor::ones(&[2, 5, 8], DType::F32, &mesh, &[Shard(2)])?;
    /// let heads = x.reshape(&[2, 5, 4, 2])?;
    /// assert_eq!(heads.placements(), [Shard(2)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reshape(&self, shape: &[usize]) -> Result<DTensor> {
        if shape.iter().product::<usize>() != self.shape().iter().product::<usize>() {
            let (expected, got) = (self.shape().to_vec(), shape.to_vec());
            return Err(Error::ShapeMismatch { what: "reshape to as many elements".into(), expected, got });
        }
        let placements = reshaped(self.spec(), shape)?;
        let spec = DTensorSpec { placements, shape: shape.to_vec(), ..self.spec().clone() };
        let held = spec.own_box()?;
        let local =
            self.to_local().reshape(held.sizes.as_slice()).during(|| format!("reshape to {shape:?}"))?;
        DTensor::of_part(&local, spec)
    }
}

/// The placements under which every rank of the new shape holds the elements that it has.
fn reshaped(spec: &DTensorSpec, shape: &[usize]) -> Result<Vec<Placement>> {
    let mut placements = Vec::with_capacity(spec.placements.len());
    for placement in &spec.placements {
        placements.push(match placement.shard_dim(spec.shape.len()) {
            Some(dim) => {
                Placement::Shard(matching_dim(&spec.shape, dim, shape).unwrap_or(usize::MAX >> 1) as isize)
            }
            None => *placement,
        });
    }
    let fits =
        placements.iter().all(|p| !matches!(p, Placement::Shard(_)) || p.shard_dim(shape.len()).is_some());
    if fits && keeps_elements(spec, shape, &placements) {
        return Ok(placements);
    }
    let split = spec.placements.iter().filter(|p| matches!(p, Placement::Shard(_)));
    let split: Vec<String> = split.map(Placement::to_string).collect();
    let what = format!(
        "reshape of {:?} to {shape:?} would move elements between ranks: redistribute {} to Replicate or another dim first",
        spec.shape,
        split.join(" and ")
    );
    Err(Error::InvalidPlacement { placements: picture(&spec.placements), what })
}

/// The new dim that begins where the old one does and is not just 1 long, if there is one.
fn matching_dim(old: &[usize], dim: usize, new: &[usize]) -> Option<usize> {
    let before: usize = old[..dim].iter().product();
    let begins = |at: &usize| new[..*at].iter().product::<usize>() == before;
    let candidates: Vec<usize> = (0..new.len()).filter(begins).collect();
    candidates
        .iter()
        .copied()
        .find(|at| new[*at] == old[dim] && old[dim] != 1)
        .or_else(|| candidates.last().copied())
}

/// True if each rank's box holds the same row-major run or runs of elements in both shapes.
fn keeps_elements(spec: &DTensorSpec, shape: &[usize], placements: &[Placement]) -> bool {
    (0..spec.mesh.size()).all(|nth| {
        let at = coordinate(spec.mesh.shape(), nth);
        let old = local_box(&spec.shape, spec.mesh.shape(), &at, &spec.placements);
        let new = local_box(shape, spec.mesh.shape(), &at, placements);
        runs(&old, &spec.shape) == runs(&new, shape)
    })
}

/// The elements of a box as runs of the row-major tensor, each as long as can be.
fn runs(held: &TensorBox, shape: &[usize]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for run in copy_runs(held, &TensorBox::whole(shape), held) {
        match runs.last_mut() {
            Some((start, len)) if *start + *len == run.src => *len += run.len,
            _ => runs.push((run.src, run.len)),
        }
    }
    runs
}
