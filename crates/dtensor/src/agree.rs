//! What ranks tell each other before they move data of which one may know too little, so that a mistake on one rank is
//! the same error on all. Collective; the checks themselves are pure.

use std::fmt;

use sconce_mesh::{DType, DeviceMesh, ProcessGroup, Rank, ReduceOp};

use crate::placement::picture;
use crate::{DTensorSpec, Error, Placement, Result, normalize_placements};

/// A mesh and placements on it, known also where the mesh is not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grid {
    /// In mesh order.
    pub(crate) ranks: Vec<Rank>,
    pub(crate) mesh_shape: Vec<usize>,
    pub(crate) placements: Vec<Placement>,
}

/// Element type and shape of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
}

/// What all ranks of a redistribute between meshes know in the end.
pub(crate) struct Agreed {
    pub(crate) from: Grid,
    pub(crate) to: Grid,
    pub(crate) kind: Kind,
}

impl Grid {
    pub(crate) fn of(mesh: &DeviceMesh, placements: &[Placement]) -> Self {
        Self {
            ranks: mesh.ranks().to_vec(),
            mesh_shape: mesh.shape().to_vec(),
            placements: placements.to_vec(),
        }
    }
}

impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranks: Vec<usize> = self.ranks.iter().map(|rank| rank.0).collect();
        write!(f, "{} on mesh {:?} of ranks {ranks:?}", picture(&self.placements), self.mesh_shape)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

/// Gathers every rank's part of a redistribute between meshes, and checks that they make a whole.
pub(crate) fn agree_on_grids(
    group: &ProcessGroup,
    source: Option<&DTensorSpec>,
    target: Option<(&DeviceMesh, &[Placement])>,
) -> Result<Agreed> {
    let mut words = Words::default();
    let at_home = |mesh: &DeviceMesh| u64::from(mesh.mesh_group().same_world(group));
    words.option(source, |words, spec| {
        words.0.push(at_home(&spec.mesh));
        words.grid(&Grid::of(&spec.mesh, &spec.placements));
        words.kind(&Kind { dtype: spec.dtype, shape: spec.shape.clone() });
    });
    words.option(target, |words, (mesh, placements)| {
        words.0.push(at_home(mesh));
        words.grid(&Grid::of(mesh, placements));
    });
    let all = group.all_gather_object(&words.bytes())?;
    let (mut sources, mut targets) = (Vec::new(), Vec::new());
    for bytes in &all {
        let mut words = Read::new(bytes);
        sources.push(words.option(|words| (words.next() == 1, words.grid(), Some(words.kind()))));
        targets.push(words.option(|words| (words.next() == 1, words.grid(), None)));
    }
    let (from, kind) = one_of_all("source", group.ranks(), &sources)?;
    let (mut to, _) = one_of_all("target", group.ranks(), &targets)?;
    let Some(kind) = kind else { unreachable!("sources have a kind") };
    to.placements = normalize_placements(kind.shape.len(), to.mesh_shape.len(), &to.placements)?;
    Ok(Agreed { from, to, kind })
}

type Part = (bool, Grid, Option<Kind>);

/// The one grid that all its ranks passed, and only they.
fn one_of_all(role: &str, ranks: &[Rank], parts: &[Option<Part>]) -> Result<(Grid, Option<Kind>)> {
    let Some((first, part)) = parts.iter().enumerate().find_map(|(g, part)| Some((g, part.as_ref()?))) else {
        let (what, rank) = (format!("{role} of a redistribute between meshes"), ranks[0]);
        return Err(Error::RanksDisagree {
            what,
            rank,
            expected: "one on its ranks".into(),
            got: "none".into(),
        });
    };
    let (_, grid, kind) = part;
    if grid.ranks.iter().any(|rank| !ranks.contains(rank)) || parts.iter().flatten().any(|part| !part.0) {
        let what = format!("{role} mesh, group and world of a redistribute between meshes");
        return Err(Error::ForeignMesh { what, expected: ranks.to_vec(), got: grid.ranks.clone() });
    }
    let describe = |part: Option<&Part>| match part {
        Some((_, grid, Some(kind))) => format!("{kind} as {grid}"),
        Some((_, grid, None)) => grid.to_string(),
        None => "none".to_owned(),
    };
    for (rank, given) in ranks.iter().zip(parts) {
        let expected = grid.ranks.contains(rank).then_some(part);
        if expected != given.as_ref() {
            let what = format!("{role} of a redistribute between meshes, as rank {} passed it", ranks[first]);
            let (expected, got) = (describe(expected), describe(given.as_ref()));
            return Err(Error::RanksDisagree { what, rank: *rank, expected, got });
        }
    }
    Ok((grid.clone(), kind.clone()))
}

/// Every rank's tensor and placements, in group order.
pub(crate) fn gather_kinds(
    group: &ProcessGroup,
    kind: &Kind,
    placements: &[Placement],
) -> Result<Vec<(Kind, Vec<Placement>)>> {
    let mut words = Words::default();
    words.kind(kind);
    words.placements(placements);
    let all = group.all_gather_object(&words.bytes())?;
    let read = |bytes: &Vec<u8>| {
        let mut words = Read::new(bytes);
        (words.kind(), words.placements())
    };
    Ok(all.iter().map(read).collect())
}

/// Numbers on their way to other ranks of the same build.
#[derive(Default)]
struct Words(Vec<u64>);

impl Words {
    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.0.push(u64::from(value.is_some()));
        if let Some(value) = value {
            write(self, value);
        }
    }

    fn list(&mut self, values: impl ExactSizeIterator<Item = u64>) {
        self.0.push(values.len() as u64);
        self.0.extend(values);
    }

    fn placements(&mut self, placements: &[Placement]) {
        self.list(placements.iter().map(|placement| match placement {
            Placement::Replicate => 0,
            Placement::Partial(op) => 1 + *op as u64,
            // Dims may be negative.
            Placement::Shard(dim) => (*dim as i64 as u64).wrapping_add(1 << 32),
        }));
    }

    fn grid(&mut self, grid: &Grid) {
        self.list(grid.ranks.iter().map(|rank| rank.0 as u64));
        self.list(grid.mesh_shape.iter().map(|len| *len as u64));
        self.placements(&grid.placements);
    }

    fn kind(&mut self, kind: &Kind) {
        self.0.push(kind.dtype as u64);
        self.list(kind.shape.iter().map(|len| *len as u64));
    }
}

/// Numbers that [`Words`] wrote.
struct Read<'b>(std::slice::Iter<'b, [u8; 8]>);

impl<'b> Read<'b> {
    fn new(bytes: &'b [u8]) -> Self {
        Self(bytes.as_chunks().0.iter())
    }

    fn next(&mut self) -> u64 {
        self.0.next().map_or(0, |word| u64::from_le_bytes(*word))
    }

    fn option<T>(&mut self, read: impl FnOnce(&mut Self) -> T) -> Option<T> {
        (self.next() == 1).then(|| read(self))
    }

    fn list<T>(&mut self, each: impl Fn(u64) -> T) -> Vec<T> {
        (0..self.next()).map(|_| each(self.next())).collect()
    }

    fn placements(&mut self) -> Vec<Placement> {
        const OPS: [ReduceOp; 5] =
            [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::Prod];
        self.list(|code| match code {
            0 => Placement::Replicate,
            1..=5 => Placement::Partial(OPS[code as usize - 1]),
            dim => Placement::Shard(dim.wrapping_sub(1 << 32) as i64 as isize),
        })
    }

    fn grid(&mut self) -> Grid {
        Grid {
            ranks: self.list(|rank| Rank(rank as usize)),
            mesh_shape: self.list(|len| len as usize),
            placements: self.placements(),
        }
    }

    fn kind(&mut self) -> Kind {
        Kind {
            dtype: DType::ALL[self.next() as usize % DType::ALL.len()],
            shape: self.list(|len| len as usize),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let placements = vec![
            Placement::Replicate,
            Placement::Shard(3),
            Placement::Shard(-2),
            Placement::Partial(ReduceOp::Prod),
            Placement::Partial(ReduceOp::Sum),
        ];
        let grid = Grid { ranks: [4, 0, 2].map(Rank).to_vec(), mesh_shape: vec![3, 1], placements };
        let kind = Kind { dtype: DType::BF16, shape: vec![5, 0] };
        let mut words = Words::default();
        words.option(Some(()), |words, ()| words.grid(&grid));
        words.option(None::<()>, |_, ()| ());
        words.kind(&kind);
        let bytes = words.bytes();
        let mut read = Read::new(&bytes);
        assert_eq!(read.option(Read::grid), Some(grid));
        assert_eq!(read.option(|_| ()), None);
        assert_eq!(read.kind(), kind);
    }
}
