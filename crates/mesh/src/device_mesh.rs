//! DeviceMesh: the ranks of a world as a grid with named dims, and one process group for each dim.
//!
//! The geometry is in `layout.rs`; here are the names, the groups and their order of creation.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::layout::MeshLayout;
use crate::{Error, ProcessGroup, Rank, Result};

/// Where the tensors of a mesh live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceType {
    /// Host memory.
    Cpu,
    /// CUDA devices, one a rank.
    Cuda,
}

impl fmt::Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceType::Cpu => "cpu",
            DeviceType::Cuda => "cuda",
        })
    }
}

/// An n-dimensional grid of ranks. A clone is the same mesh.
///
/// Equality is by device type, shape, ranks and dim names, not by groups.
///
/// # Source
/// `torch.distributed.device_mesh.DeviceMesh`.
#[derive(Clone)]
pub struct DeviceMesh {
    inner: Arc<Inner>,
}

struct Inner {
    device_type: DeviceType,
    layout: MeshLayout,
    /// One for each dim, or none.
    dim_names: Vec<String>,
    coordinate: Option<Vec<usize>>,
    /// The group along each dim that holds this rank.
    dim_groups: Vec<ProcessGroup>,
    mesh_group: ProcessGroup,
    /// Groups along several dims that were asked for.
    joint_groups: Mutex<HashMap<Vec<usize>, ProcessGroup>>,
}

impl DeviceMesh {
    /// Lays the ranks of `world` out in row-major order, and makes the group along each dim.
    ///
    /// Ranks:  collective over `world`; all ranks pass the same arguments.
    ///
    /// ```
    /// use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
    ///
    /// let world = ProcessGroup::single();
    /// let mesh = DeviceMesh::new(&world, DeviceType::Cpu, &[1, 1], &["replicate", "shard"])?;
    /// assert_eq!(mesh.group_by_name("shard")?.size(), 1);
    /// # Ok::<(), sconce_mesh::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidArgument` if the product of `shape` is not the size of `world`, or `dim_names` are neither empty nor
    /// one a dim and unique; as a collective, `Mismatch`, `PeerLost` and `Timeout`.
    ///
    /// # Source
    /// `torch.distributed.device_mesh.init_device_mesh`.
    pub fn new(
        world: &ProcessGroup,
        device_type: DeviceType,
        shape: &[usize],
        dim_names: &[&str],
    ) -> Result<DeviceMesh> {
        let layout = MeshLayout::row_major(shape, world.ranks())
            .ok_or_else(|| invalid("shape", format!("{} ranks in all", world.size()), in_all(shape)))?;
        check_names(dim_names, shape.len())?;
        let mut dim_groups = Vec::new();
        for dim in 0..shape.len() {
            dim_groups.push(own(world, &layout.groups_along(dim))?);
        }
        let dim_names = dim_names.iter().map(|name| name.to_string()).collect();
        Ok(Self::assemble(device_type, layout, dim_names, dim_groups, world.clone()))
    }

    /// A mesh whose dims are groups that exist already; `mesh_group` holds all its ranks, in mesh order.
    ///
    /// Ranks:  local, no communication; every rank passes its own groups.
    ///
    /// ```
    /// use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup};
    ///
    /// let world = ProcessGroup::single();
    /// let mesh = DeviceMesh::from_groups(&world, DeviceType::Cpu, &[world.clone()], &["shard"])?;
    /// assert_eq!(mesh.shape(), [1]);
    /// # Ok::<(), sconce_mesh::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidArgument` if the product of the groups' sizes is not that of `mesh_group`, a group does not hold the
    /// ranks that lie along its dim through this one, or `dim_names` are neither empty nor one a dim and unique.
    ///
    /// # Source
    /// `DeviceMesh.from_group`.
    pub fn from_groups(
        mesh_group: &ProcessGroup,
        device_type: DeviceType,
        groups: &[ProcessGroup],
        dim_names: &[&str],
    ) -> Result<DeviceMesh> {
        let shape: Vec<usize> = groups.iter().map(ProcessGroup::size).collect();
        let layout = MeshLayout::row_major(&shape, mesh_group.ranks()).ok_or_else(|| {
            invalid("groups", format!("{} ranks in all", mesh_group.size()), in_all(&shape))
        })?;
        check_names(dim_names, groups.len())?;
        for (dim, group) in groups.iter().enumerate() {
            let along = layout.groups_along(dim).into_iter().find(|ranks| ranks.contains(&mesh_group.rank()));
            if along.as_deref() != Some(group.ranks()) {
                let name =
                    |ranks: &[Rank]| format!("ranks {:?}", ranks.iter().map(|r| r.0).collect::<Vec<_>>());
                let expected = name(&along.unwrap_or_default());
                return Err(invalid(&format!("group of dim {dim}"), expected, name(group.ranks())));
            }
        }
        let dim_names = dim_names.iter().map(|name| name.to_string()).collect();
        Ok(Self::assemble(device_type, layout, dim_names, groups.to_vec(), mesh_group.clone()))
    }

    /// The same ranks along one dim of this name, in mesh order.
    ///
    /// Together with [`DeviceMesh::submesh`] it joins some dims: `mesh.submesh(&["replicate", "shard"])?.flatten("all")`.
    /// Ranks:  local, no communication.
    ///
    /// # Source
    /// `DeviceMesh._flatten`.
    pub fn flatten(&self, name: &str) -> DeviceMesh {
        let group = self.mesh_group().clone();
        let layout = self.inner.layout.flatten();
        Self::assemble(self.device_type(), layout, vec![name.to_owned()], vec![group.clone()], group)
    }

    fn assemble(
        device_type: DeviceType,
        layout: MeshLayout,
        dim_names: Vec<String>,
        dim_groups: Vec<ProcessGroup>,
        mesh_group: ProcessGroup,
    ) -> DeviceMesh {
        let coordinate = layout.coordinate_of(mesh_group.rank());
        let joint_groups = Mutex::default();
        let inner =
            Inner { device_type, layout, dim_names, coordinate, dim_groups, mesh_group, joint_groups };
        DeviceMesh { inner: Arc::new(inner) }
    }

    /// Where the tensors of this mesh live.
    pub fn device_type(&self) -> DeviceType {
        self.inner.device_type
    }

    /// Number of dims.
    pub fn ndim(&self) -> usize {
        self.shape().len()
    }

    /// Number of ranks along each dim.
    pub fn shape(&self) -> &[usize] {
        self.inner.layout.shape()
    }

    /// Name of each dim; empty if the mesh has no names.
    pub fn dim_names(&self) -> &[String] {
        &self.inner.dim_names
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.ranks().len()
    }

    /// The ranks in row-major order.
    pub fn ranks(&self) -> &[Rank] {
        self.inner.layout.ranks()
    }

    /// Where this rank stands, one coordinate a dim.
    pub fn coordinate(&self) -> Option<&[usize]> {
        self.inner.coordinate.as_deref()
    }

    /// Where `rank` stands; `None` if it is not in the mesh.
    pub fn coordinate_of(&self, rank: Rank) -> Option<Vec<usize>> {
        self.inner.layout.coordinate_of(rank)
    }

    /// The group along `dim` that holds this rank, ordered by coordinate.
    ///
    /// # Errors
    /// `InvalidArgument` if the mesh has no such dim.
    pub fn group(&self, dim: usize) -> Result<&ProcessGroup> {
        let groups = &self.inner.dim_groups;
        groups
            .get(dim)
            .ok_or_else(|| invalid("dim", format!("a dim below {}", groups.len()), dim.to_string()))
    }

    /// The group along several dims together that holds this rank, in row-major order of their coordinates.
    ///
    /// Ranks:  collective over the mesh where the group is new; all ranks pass the same dims, ascending.
    ///
    /// # Errors
    /// `InvalidArgument` if the dims do not ascend or the mesh has not all of them; as a collective, `Mismatch`,
    /// `PeerLost` and `Timeout`.
    pub fn joint_group(&self, dims: &[usize]) -> Result<ProcessGroup> {
        if dims.windows(2).any(|pair| pair[0] >= pair[1])
            || dims.last().is_some_and(|dim| *dim >= self.ndim())
        {
            return Err(invalid(
                "dims",
                format!("ascending dims below {}", self.ndim()),
                format!("{dims:?}"),
            ));
        }
        if dims.len() == self.ndim() {
            return Ok(self.mesh_group().clone());
        }
        if let [dim] = dims {
            return self.group(*dim).cloned();
        }
        let groups = || self.inner.joint_groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = groups().get(dims) {
            return Ok(group.clone());
        }
        let slices = self.inner.layout.slices(dims);
        let partition: Vec<Vec<Rank>> = slices.iter().map(|slice| slice.ranks().to_vec()).collect();
        let group = own(self.mesh_group(), &partition)?;
        groups().insert(dims.to_vec(), group.clone());
        Ok(group)
    }

    /// The group along the dim of this name.
    ///
    /// # Errors
    /// `InvalidArgument` if the mesh has no such dim.
    pub fn group_by_name(&self, name: &str) -> Result<&ProcessGroup> {
        self.group(self.dim_by_name(name)?)
    }

    /// Index of the dim of this name.
    ///
    /// # Errors
    /// `InvalidArgument` if the mesh has no such dim.
    pub fn dim_by_name(&self, name: &str) -> Result<usize> {
        let found = self.dim_names().iter().position(|other| other == name);
        found
            .ok_or_else(|| invalid("dim name", format!("one of {:?}", self.dim_names()), format!("{name:?}")))
    }

    /// The group of all ranks of the mesh, in mesh order.
    pub fn mesh_group(&self) -> &ProcessGroup {
        &self.inner.mesh_group
    }

    /// The mesh along `names`, in that order, that holds this rank.
    ///
    /// The groups along its dims are this mesh's.
    /// Ranks:  collective over the mesh, as the group of all its ranks may be new; all ranks pass the same names.
    ///
    /// # Errors
    /// `InvalidArgument` if a name is unknown or twice, or there is none; as a collective, `Mismatch`, `PeerLost`
    /// and `Timeout`.
    ///
    /// # Source
    /// `DeviceMesh.__getitem__`.
    pub fn submesh(&self, names: &[&str]) -> Result<DeviceMesh> {
        if names.is_empty() {
            return Err(invalid("dim names", "one or more".into(), "none".into()));
        }
        check_names(names, names.len())?;
        let dims: Result<Vec<usize>> = names.iter().map(|name| self.dim_by_name(name)).collect();
        let dims = dims?;
        let slices = self.inner.layout.slices(&dims);
        let partition: Vec<Vec<Rank>> = slices.iter().map(|slice| slice.ranks().to_vec()).collect();
        let mesh_group = own(self.mesh_group(), &partition)?;
        let layout = slices.into_iter().find(|slice| slice.ranks() == mesh_group.ranks());
        let layout = layout.unwrap_or_else(|| unreachable!("the group was made from one of the slices"));
        let dim_groups = dims.iter().map(|dim| self.inner.dim_groups[*dim].clone()).collect();
        let dim_names = names.iter().map(|name| name.to_string()).collect();
        Ok(Self::assemble(self.device_type(), layout, dim_names, dim_groups, mesh_group))
    }

    /// Name of a dim for messages.
    fn label(&self, dim: usize) -> String {
        self.dim_names().get(dim).cloned().unwrap_or_else(|| format!("dim{dim}"))
    }
}

impl PartialEq for DeviceMesh {
    fn eq(&self, other: &DeviceMesh) -> bool {
        self.device_type() == other.device_type()
            && self.inner.layout == other.inner.layout
            && self.dim_names() == other.dim_names()
    }
}

impl Eq for DeviceMesh {}

/// Who is where, one line for each row along the last dim:
///
/// ```text
/// DeviceMesh(cpu, replicate=2, shard=3)
///   replicate=0: 0 1 2
///   replicate=1: 3 4 5
/// ```
impl fmt::Display for DeviceMesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims = (0..self.ndim()).map(|dim| format!(", {}={}", self.label(dim), self.shape()[dim]));
        write!(f, "DeviceMesh({}{})", self.device_type(), dims.collect::<String>())?;
        let row_len = self.shape().last().copied().unwrap_or(1);
        self.ranks().chunks(row_len).try_for_each(|row| self.write_row(f, row))
    }
}

impl DeviceMesh {
    fn write_row(&self, f: &mut fmt::Formatter<'_>, row: &[Rank]) -> fmt::Result {
        let place = self.coordinate_of(row[0]).unwrap_or_default();
        let leading = place.iter().enumerate().take(self.ndim().saturating_sub(1));
        let place: Vec<String> = leading.map(|(dim, at)| format!("{}={at}", self.label(dim))).collect();
        let ranks: Vec<String> = row.iter().map(Rank::to_string).collect();
        let colon = if place.is_empty() { "" } else { ": " };
        write!(f, "\n  {}{colon}{}", place.join(" "), ranks.join(" "))
    }
}

impl fmt::Debug for DeviceMesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMesh")
            .field("device_type", &self.device_type())
            .field("shape", &self.shape())
            .field("dim_names", &self.dim_names())
            .field("ranks", &self.ranks().iter().map(|rank| rank.0).collect::<Vec<_>>())
            .field("coordinate", &self.coordinate())
            .finish()
    }
}

/// The group of `partition`, which covers the parent, that holds this rank.
fn own(parent: &ProcessGroup, partition: &[Vec<Rank>]) -> Result<ProcessGroup> {
    let group = parent.subgroups(partition)?;
    Ok(group.unwrap_or_else(|| unreachable!("the groups along a dim hold every rank of the mesh")))
}

fn check_names(names: &[&str], n_dims: usize) -> Result<()> {
    if !names.is_empty() && names.len() != n_dims {
        return Err(invalid("dim names", format!("{n_dims}, one a dim, or none"), names.len().to_string()));
    }
    match names.iter().enumerate().find(|(at, name)| names[..*at].contains(name)) {
        Some((_, name)) => Err(invalid("dim names", "each name once".into(), format!("{name:?} twice"))),
        None => Ok(()),
    }
}

/// `2 x 3 = 6`.
fn in_all(shape: &[usize]) -> String {
    let product = shape.iter().try_fold(1usize, |product, len| product.checked_mul(*len));
    let product = product.map_or("more than memory can hold".into(), |product| product.to_string());
    let lens: Vec<String> = shape.iter().map(usize::to_string).collect();
    format!("{} = {product}", lens.join(" x "))
}

fn invalid(what: &str, expected: String, got: String) -> Error {
    Error::InvalidArgument { op: "device mesh", what: what.into(), expected, got }
}

#[cfg(test)]
mod tests;
