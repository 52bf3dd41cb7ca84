//! Redistribute from one mesh to another: one exchange of exactly the elements that each rank lacks.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use sconce_mesh::{DeviceMesh, ProcessGroup, Rank};

use super::{ExchangePlan, Move, coordinate, exchange, plan};
use crate::agree::{Grid, Kind, agree_on_grids};
use crate::candle_bytes::{on_device, on_host, zeros};
use crate::candle_tensors::FlatTensor;
use crate::grad::{attach, grad_placements};
use crate::placement::picture;
use crate::{DTensor, DTensorSpec, Error, Placement, Result, TensorBox, local_box, normalize_placements};

impl DTensor {
    /// The same tensor on another mesh over the same ranks: every rank receives exactly what it lacks.
    ///
    /// For meshes over other ranks there is [`redistribute_between`]. Gradients flow back.
    /// Ranks: collective over the ranks of both meshes, which are the same.
    ///
    /// # Errors
    /// `InvalidPlacement` if the placements do not fit; `ForeignMesh` if the meshes are of different ranks or worlds.
    pub fn redistribute_to(&self, mesh: &DeviceMesh, placements: &[Placement]) -> Result<DTensor> {
        if mesh == self.device_mesh() {
            return self.redistribute(placements);
        }
        let placements = normalize_placements(self.shape().len(), mesh.ndim(), placements)?;
        let group = self.device_mesh().mesh_group();
        if sorted(mesh.ranks()) != sorted(group.ranks()) || !group.same_world(mesh.mesh_group()) {
            let (expected, got) = (group.ranks().to_vec(), mesh.ranks().to_vec());
            return Err(Error::ForeignMesh { what: "target mesh of redistribute_to".into(), expected, got });
        }
        let spec = DTensorSpec { mesh: mesh.clone(), placements, ..self.spec().clone() };
        self.move_to(&spec)
    }

    fn move_to(&self, spec: &DTensorSpec) -> Result<DTensor> {
        let detached = DTensor::of_part(&self.to_local().detach(), self.spec().clone())?;
        let grids = (Grid::of(&self.spec().mesh, self.placements()), Grid::of(&spec.mesh, &spec.placements));
        let kind = Kind { dtype: spec.dtype, shape: spec.shape.clone() };
        let moved = carry(self.device_mesh().mesh_group(), Some(&detached), Some(spec), grids, &kind)?;
        let moved = moved.unwrap_or_else(|| unreachable!("this rank is in the target mesh"));
        let (from, to) = (self.spec().clone(), spec.clone());
        let backward = move |grad: &Tensor| {
            let spec = DTensorSpec { placements: grad_placements(&to.placements), ..to.clone() };
            let back = grad_placements(&from.placements);
            Ok(DTensor::of_part(grad, spec)?.redistribute_to(&from.mesh, &back)?.to_local().clone())
        };
        let (local, spec) = moved.into_parts();
        DTensor::of_part(&attach(self.to_local(), local, backward)?, spec)
    }
}

/// A tensor of one mesh on another, which may be of other, overlapping or more or fewer ranks: every rank receives
/// exactly what it lacks. The answer is `None` where there is no target.
///
/// Every rank of the source mesh passes the tensor, every rank of the target mesh its mesh and placements; a rank of
/// both passes both, one of neither none. Gradients do not flow from mesh to mesh, since a rank of one alone has
/// nothing to call backward on; [`DTensor::redistribute_to`] is differentiable.
///
/// Ranks: collective over `group`, which holds the ranks of both meshes.
///
/// # Errors
/// The same on all ranks: `RanksDisagree` naming the first rank that passes something else than the others of its
/// mesh, or nothing; `ForeignMesh` if `group` lacks a rank of a mesh, or is of another world; `InvalidPlacement`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use sconce_dtensor::{DTensor, Placement, redistribute_between};
/// use sconce_mesh::{DeviceMesh, DeviceType, GroupOptions, ProcessGroup, Rank};
///
/// // From ranks 0 and 1 to rank 2.
/// let worlds = ProcessGroup::threads(3, GroupOptions::default())?;
/// std::thread::scope(|scope| {
///     for world in worlds {
///         scope.spawn(move || {
///             let group = world.subgroups(&[vec![Rank(0), Rank(1)], vec![Rank(2)]])?.expect("every rank is listed");
///             let mesh = DeviceMesh::new(&group, DeviceType::Cpu, &[group.size()], &[])?;
///             let moved = if world.rank() == Rank(2) {
///                 redistribute_between(&world, None, Some((&mesh, &[Placement::Replicate])))?
///             } else {
///                 let whole = Tensor::ones((5, 3), DType::F32, &Device::Cpu)?;
///                 let source = DTensor::from_copy(&whole, &mesh, &[Placement::Shard(0)])?;
///                 redistribute_between(&world, Some(&source), None)?
///             };
///             assert_eq!(moved.map(|whole| whole.to_local().dims().to_vec()), (world.rank() == Rank(2)).then(|| vec![5, 3]));
///             Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
///         });
///     }
/// });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn redistribute_between(
    group: &ProcessGroup,
    source: Option<&DTensor>,
    target: Option<(&DeviceMesh, &[Placement])>,
) -> Result<Option<DTensor>> {
    let agreed = agree_on_grids(group, source.map(DTensor::spec), target)?;
    let spec = target.map(|(mesh, _)| DTensorSpec {
        mesh: mesh.clone(),
        placements: agreed.to.placements.clone(),
        shape: agreed.kind.shape.clone(),
        dtype: agreed.kind.dtype,
    });
    let detached = source.map(|source| DTensor::of_part(&source.to_local().detach(), source.spec().clone()));
    let grids = (agreed.from, agreed.to);
    carry(group, detached.transpose()?.as_ref(), spec.as_ref(), grids, &agreed.kind)
}

/// Reduces what is pending, exchanges over `group`, and makes terms if the target asks for them.
fn carry(
    group: &ProcessGroup,
    source: Option<&DTensor>,
    target: Option<&DTensorSpec>,
    (mut from, to): (Grid, Grid),
    Kind { dtype, shape }: &Kind,
) -> Result<Option<DTensor>> {
    let whole = Grid { placements: grad_placements(&to.placements), ..to };
    from.placements = reduced(shape, &from, &whole)?;
    let source = source.map(|source| source.redistribute(&from.placements)).transpose()?;
    let (held, wanted) = (from.boxes(shape, group.ranks()), whole.boxes(shape, group.ranks()));
    let me = group.group_rank().0;
    let (have, want) = (held[me].first(), wanted[me].first());
    let local = zeros(want.map_or(&[0], |want| &want.sizes), *dtype)?;
    let src = match &source {
        Some(source) => on_host(source.to_local())?,
        None => zeros(&[0], *dtype)?,
    };
    let src = FlatTensor::boxes(&src, shape, have.cloned().into_iter().collect())?;
    let mut dst = FlatTensor::boxes(&local, shape, want.cloned().into_iter().collect())?;
    let plan = ExchangePlan::new(me, &held, &wanted, &|_, _| true)?;
    exchange(group, &mut [Move { plan, src: &src, dst: &mut dst }])?;
    let Some(target) = target else { return Ok(None) };
    let device = source.as_ref().map_or(&Device::Cpu, |source| source.to_local().device());
    let local = on_device(&local, device)?;
    let spec = DTensorSpec { placements: whole.placements, ..target.clone() };
    DTensor::of_part(&local, spec)?.redistribute(&target.placements).map(Some)
}

/// Placements of the source without pending reductions, chosen so that the reductions and the exchange after them move
/// the least.
fn reduced(shape: &[usize], from: &Grid, to: &Grid) -> Result<Vec<Placement>> {
    let mut choices = vec![vec![]];
    for placement in &from.placements {
        let shards = (0..shape.len()).map(|dim| Placement::Shard(dim as isize));
        let options: Vec<Placement> = match placement {
            Placement::Partial(_) => shards.chain([Placement::Replicate]).collect(),
            other => vec![*other],
        };
        let extended = choices.iter().flat_map(|choice: &Vec<Placement>| {
            options.iter().map(|option| [choice.as_slice(), &[*option]].concat())
        });
        choices = extended.collect();
    }
    let mut best = None;
    for choice in choices {
        let reductions = plan(shape, &from.mesh_shape, &from.placements, &choice)?.received_numel();
        let lacking = Grid { placements: choice.clone(), ..from.clone() }.lacking(shape, to);
        if best.as_ref().is_none_or(|(least, _)| reductions + lacking < *least) {
            best = Some((reductions + lacking, choice));
        }
    }
    best.map(|(_, choice)| choice).ok_or_else(|| Error::InvalidPlacement {
        placements: picture(&from.placements),
        what: "no placements without pending reductions".to_owned(),
    })
}

impl Grid {
    /// What each of `ranks` holds: one box, or none outside of the grid.
    fn boxes(&self, shape: &[usize], ranks: &[Rank]) -> Vec<Vec<TensorBox>> {
        let places: HashMap<Rank, usize> =
            self.ranks.iter().enumerate().map(|(nth, rank)| (*rank, nth)).collect();
        let of = |rank| {
            let at = places.get(rank).map(|nth| coordinate(&self.mesh_shape, *nth));
            at.map(|at| local_box(shape, &self.mesh_shape, &at, &self.placements)).into_iter().collect()
        };
        ranks.iter().map(of).collect()
    }

    /// Elements that the ranks of `to` do not hold under this grid.
    fn lacking(&self, shape: &[usize], to: &Grid) -> usize {
        let (held, wanted) = (self.boxes(shape, &to.ranks), to.boxes(shape, &to.ranks));
        let missing = |(held, wanted): (&Vec<TensorBox>, &Vec<TensorBox>)| {
            let has = |want: &TensorBox| held.first().map_or(0, |held| held.overlap_numel(want));
            wanted.iter().map(|want| want.numel() - has(want)).sum::<usize>()
        };
        held.iter().zip(&wanted).map(missing).sum()
    }
}

fn sorted(ranks: &[Rank]) -> Vec<Rank> {
    let mut ranks = ranks.to_vec();
    ranks.sort_unstable();
    ranks
}
