//! Embedding: rows of a table by index, whose backward adds rows once, where they lie.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Module, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder};

use super::composed::is_fused;
use super::kernel::{Kernel, on_tensors};
use super::param::Param;
use super::real::Real;

/// A table of `[size, width]` from which rows are taken.
///
/// Shapes: indices `[…]`, u32 → `[…, width]`.
///
/// # Source
/// `candle_nn::Embedding`; `torch.nn.Embedding`.
#[derive(Debug, Clone)]
pub struct Embedding {
    table: Param,
    hidden_size: usize,
}

impl Embedding {
    /// A table of the given tensor, which an output layer may share.
    pub fn new(embeddings: Tensor, hidden_size: usize) -> Self {
        Self { table: Param::new(embeddings), hidden_size }
    }

    /// The table.
    pub fn embeddings(&self) -> &Tensor {
        self.table.tensor()
    }

    /// The width of the table.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }
}

impl Module for Embedding {
    fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        if !is_fused(indices) {
            return candle_nn::Embedding::new(self.table.tensor().clone(), self.hidden_size).forward(indices);
        }
        let mut shape = indices.dims().to_vec();
        shape.push(self.hidden_size);
        let indices = indices.flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
        let op = Rows { table: self.table.clone(), indices, shape: Shape::from(shape) };
        self.table.argument().apply_op1(op)
    }
}

/// A table with `weight` of `vb`, initialized as candle_nn's.
///
/// # Errors
/// What `vb` answers.
pub fn embedding(in_size: usize, out_size: usize, vb: VarBuilder<'_>) -> Result<Embedding> {
    let init = Init::Randn { mean: 0.0, stdev: 1.0 };
    Ok(Embedding::new(vb.get_with_hints((in_size, out_size), "weight", init)?, out_size))
}

/// The op; it holds the table because its argument may be the table's token.
struct Rows {
    table: Param,
    indices: Vec<u32>,
    shape: Shape,
}

impl CustomOp1 for Rows {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let indices = CpuStorage::U32(self.indices.clone());
        let of_all = Layout::contiguous(self.indices.len());
        self.table.lend((table, layout), |(table, layout)| {
            Ok((table.index_select(&indices, layout, &of_all, 0)?, self.shape.clone()))
        })
    }

    fn bwd(&self, _table: &Tensor, _rows: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let shape = self.table.tensor().shape();
        self.table.backward(|| {
            let add = AddRows { indices: &self.indices, numel: shape.elem_count() };
            let [sums] = on_tensors(&add, [grad], [shape.clone()])?;
            Ok(sums)
        })
    }
}

/// Adds each row to the row of its index.
struct AddRows<'a> {
    indices: &'a [u32],
    numel: usize,
}

impl Kernel<1, 1> for AddRows<'_> {
    #[inline(always)]
    fn run<T: Real>(&self, [rows]: [&[T]; 1]) -> [Vec<T>; 1] {
        let mut sums = vec![T::ZERO; self.numel];
        let width = rows.len() / self.indices.len().max(1);
        for (row, index) in rows.chunks_exact(width.max(1)).zip(self.indices) {
            let start = *index as usize * width;
            for (sum, value) in sums[start..start + width].iter_mut().zip(row) {
                *sum += *value;
            }
        }
        [sums]
    }
}
