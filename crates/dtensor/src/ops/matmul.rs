//! Matrix products: by rows, by columns, by batch, or by the inner dim, which leaves terms of a sum.

use candle_core::Tensor;
use sconce_mesh::ReduceOp;

use super::elementwise::broadcast;
use super::{Rule, apply};
use crate::{DTensor, Error, Placement, Result};

impl DTensor {
    /// The matrix product of the last two dims; dims before them broadcast.
    ///
    /// Along a mesh dim it runs without communication where the operands are split by rows of the first, columns of the
    /// second, a batch dim of both, or the inner dim of both, which gives a pending sum; otherwise one operand is
    /// redistributed, whichever moves fewer bytes.
    ///
    /// Shapes: `[…, m, k]`, `[…, k, n]` → `[…, m, n]`.
    ///
    /// # Errors
    /// `ShapeMismatch` if the shapes do not fit, `ForeignMesh` if the meshes differ; what candle reports.
    ///
    /// # Source
    /// `torch/distributed/tensor/_ops/_matrix_ops.py`.
    ///
    /// ```
    /// use sconce_dtensor::{DTensor, DType, Placement::*};
    /// use sconce_mesh::{DeviceMesh, DeviceType, ProcessGroup, ReduceOp};
    ///
    /// let mesh = DeviceMesh::new(&ProcessGroup::single(), DeviceType::Cpu, &[1], &["tp"])?;
    /// let x = DTensor::ones(&[2, 8], DType::F32, &mesh, &[Shard(1)])?;
    /// let w = DTensor::ones(&[8, 4], DType::F32, &mesh, &[Shard(0)])?;
    /// assert_eq!(x.matmul(&w)?.placements(), [Partial(ReduceOp::Sum)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn matmul(&self, other: &DTensor) -> Result<DTensor> {
        let shape = product_shape(self.shape(), other.shape())?;
        let rules = rules(&shape, self.shape(), other.shape());
        apply("matmul", &[self, other], &shape, &rules, |parts| product(&parts[0], &parts[1]))
    }
}

fn product_shape(lhs: &[usize], rhs: &[usize]) -> Result<Vec<usize>> {
    let mismatch = || Error::ShapeMismatch {
        what: "second operand of matmul".to_owned(),
        expected: lhs.to_vec(),
        got: rhs.to_vec(),
    };
    let ([batch_a @ .., m, k], [batch_b @ .., k_b, n]) = (lhs, rhs) else { return Err(mismatch()) };
    if k != k_b {
        return Err(mismatch());
    }
    let mut shape = broadcast("matmul", batch_a, batch_b)?;
    shape.extend([*m, *n]);
    Ok(shape)
}

fn rules(shape: &[usize], lhs: &[usize], rhs: &[usize]) -> Vec<Rule> {
    let shard = |operand: &[usize], from_last: usize| Placement::Shard((operand.len() - from_last) as isize);
    let (whole, sum) = (Placement::Replicate, Placement::Partial(ReduceOp::Sum));
    let mut rules = vec![
        Rule::new([whole; 2], whole),
        Rule::new([shard(lhs, 2), whole], shard(shape, 2)),
        Rule::new([whole, shard(rhs, 1)], shard(shape, 1)),
        Rule::new([shard(lhs, 1), shard(rhs, 2)], sum),
        Rule::new([sum, whole], sum),
        Rule::new([whole, sum], sum),
    ];
    for from_last in 3..=shape.len() {
        let len = shape[shape.len() - from_last];
        let place = |operand: &[usize]| match operand.len().checked_sub(from_last) {
            Some(dim) if operand[dim] == len => Placement::Shard(dim as isize),
            _ => whole,
        };
        rules.push(Rule::new([place(lhs), place(rhs)], shard(shape, from_last)));
    }
    rules
}

fn product(lhs: &Tensor, rhs: &Tensor) -> candle_core::Result<Tensor> {
    let dims = lhs.dims();
    if rhs.rank() > 2 || dims.len() == 2 {
        return lhs.broadcast_matmul(rhs);
    }
    // One product of all rows instead of one a batch with the second operand repeated.
    let (rows, k) = (dims[..dims.len() - 1].iter().product::<usize>(), dims[dims.len() - 1]);
    let shape = [&dims[..dims.len() - 1], &[rhs.dims()[1]]].concat();
    lhs.reshape((rows, k))?.matmul(rhs)?.reshape(shape)
}
