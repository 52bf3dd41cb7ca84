//! DTensorSpec: where a tensor lies, and its picture. No communication.

use std::fmt;

use sconce_mesh::{DType, DeviceMesh, Rank};

use crate::placement::picture;
use crate::redistribute::coordinate;
use crate::{Error, Placement, Result, TensorBox, local_box, normalize_placements};

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
    /// A spec whose placements fit, with negative dims resolved, and what this rank holds.
    pub(crate) fn checked(mut self) -> Result<(Self, TensorBox)> {
        self.placements = normalize_placements(self.shape.len(), self.mesh.ndim(), &self.placements)?;
        let held = self.own_box()?;
        Ok((self, held))
    }

    /// The box that `rank` holds; `None` if it is not in the mesh. No communication.
    pub fn box_of(&self, rank: Rank) -> Option<TensorBox> {
        let coordinate = self.mesh.coordinate_of(rank)?;
        Some(local_box(&self.shape, self.mesh.shape(), &coordinate, &self.placements))
    }

    /// The boxes of all ranks of the mesh, in mesh order.
    pub fn boxes(&self) -> Vec<TensorBox> {
        let at = |nth| coordinate(self.mesh.shape(), nth);
        let held = |nth| local_box(&self.shape, self.mesh.shape(), &at(nth), &self.placements);
        (0..self.mesh.size()).map(held).collect()
    }

    /// The boxes of some ranks of the mesh.
    pub(crate) fn boxes_of(&self, ranks: &[Rank]) -> Vec<TensorBox> {
        ranks.iter().filter_map(|rank| self.box_of(*rank)).collect()
    }

    pub(crate) fn own_box(&self) -> Result<TensorBox> {
        let rank = self.mesh.mesh_group().rank();
        self.box_of(rank).ok_or_else(|| Error::InvalidPlacement {
            placements: picture(&self.placements),
            what: format!("rank {rank} is not in the mesh of ranks {:?}", self.mesh.ranks()),
        })
    }
}

/// What it is, and which rank holds which part. Up to two split tensor dims are drawn as a grid, whose cells list
/// ranks; of more, each rank is listed with its box.
///
/// ```text
/// f32[6, 5] as [R, S(0), S(1)] on mesh [2, 2, 2]
///        0..3   3..5
/// 0..3    0 4    1 5
/// 3..6    2 6    3 7
/// ```
impl fmt::Display for DTensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let placements = picture(&self.placements);
        write!(f, "{}{:?} as {placements} on mesh {:?}", self.dtype, self.shape, self.mesh.shape())?;
        let ndim = self.shape.len();
        let mut split: Vec<usize> = self.placements.iter().filter_map(|p| p.shard_dim(ndim)).collect();
        split.sort_unstable();
        split.dedup();
        match split[..] {
            [] => write!(f, "\nall of it on ranks {}", names(self.mesh.ranks().iter())),
            [rows] => self.draw(f, rows, None),
            [rows, columns] => self.draw(f, rows, Some(columns)),
            _ => {
                let mut each = self.mesh.ranks().iter().zip(self.boxes());
                each.try_for_each(|(rank, held)| write!(f, "\nrank {rank}: {held}"))
            }
        }
    }
}

impl DTensorSpec {
    fn draw(&self, f: &mut fmt::Formatter<'_>, rows: usize, columns: Option<usize>) -> fmt::Result {
        let boxes = self.boxes();
        let range = |held: &TensorBox, dim: usize| {
            format!("{}..{}", held.offsets[dim], held.offsets[dim] + held.sizes[dim])
        };
        let along = |dim: usize| {
            let mut ranges: Vec<(usize, usize)> =
                boxes.iter().map(|held| (held.offsets[dim], held.offsets[dim] + held.sizes[dim])).collect();
            ranges.sort_unstable();
            ranges.dedup();
            ranges.into_iter().map(|(start, end)| format!("{start}..{end}")).collect::<Vec<_>>()
        };
        let (row_names, column_names) = (along(rows), columns.map_or(vec![String::new()], along));
        let cell = |row: &str, column: &str| {
            let here = boxes.iter().zip(self.mesh.ranks()).filter(|(held, _)| {
                range(held, rows) == row && columns.is_none_or(|dim| range(held, dim) == column)
            });
            names(here.map(|(_, rank)| rank))
        };
        let mut table = vec![[vec![String::new()], column_names.clone()].concat()];
        for row in &row_names {
            let cells = column_names.iter().map(|column| cell(row, column));
            table.push(std::iter::once(row.clone()).chain(cells).collect());
        }
        if columns.is_none() {
            table.remove(0);
        }
        let width = table.iter().flatten().map(String::len).max().unwrap_or(0);
        table.iter().try_for_each(|row| {
            let line = row.iter().map(|cell| format!("{cell:>width$}")).collect::<Vec<_>>().join("  ");
            write!(f, "\n{}", line.trim_end())
        })
    }
}

fn names<'r>(ranks: impl Iterator<Item = &'r Rank>) -> String {
    ranks.map(Rank::to_string).collect::<Vec<_>>().join(" ")
}
