//! Ops that look at one element at a time, of one tensor or of two that broadcast.

use candle_core::Tensor;
use sconce_mesh::ReduceOp;

use super::{Rule, apply};
use crate::{DTensor, Error, Placement, Result};

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        ///
        /// Shards stay where they are; pending terms are reduced first.
        ///
        /// # Errors
        /// Whatever the reduction and candle report.
        pub fn $name(&self) -> Result<DTensor> {
            self.elementwise(stringify!($name), Tensor::$name)
        }
    )*};
}

macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident, $candle:ident, $linear:ident);* $(;)?) => {$(
        $(#[$doc])*
        ///
        /// Operands broadcast as in candle. One is redistributed where the two lie differently: whichever moves fewer
        /// bytes.
        ///
        /// # Errors
        /// `ShapeMismatch` if the shapes do not broadcast, `ForeignMesh` if the meshes differ; what candle reports.
        pub fn $name(&self, other: &DTensor) -> Result<DTensor> {
            self.zip(stringify!($name), other, Linear::$linear, Tensor::$candle)
        }
    )*};
}

/// For which operands terms may stay pending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Linear {
    /// In both together: the sum of sums is the sum of all terms.
    Both,
    /// In either, while the other is whole.
    Each,
    /// In the first, while the second is whole.
    First,
    No,
}

impl DTensor {
    unary! {
        /// The absolute value of each element.
        abs,
        /// The exponential of each element.
        exp,
        /// The natural logarithm of each element.
        log,
        /// Each element squared.
        sqr,
        /// The square root of each element.
        sqrt,
        /// The reciprocal of each element.
        recip,
        /// The sine of each element.
        sin,
        /// The cosine of each element.
        cos,
        /// The hyperbolic tangent of each element.
        tanh,
        /// The larger of each element and 0.
        relu,
        /// GELU by its approximation through tanh, as `candle_core::Tensor::gelu`.
        gelu,
        /// GELU by the error function, as `candle_core::Tensor::gelu_erf`.
        gelu_erf,
        /// SiLU: each element times its logistic function.
        silu,
    }

    binary! {
        /// The sum of two tensors.
        add, broadcast_add, Both;
        /// The difference of two tensors.
        sub, broadcast_sub, Both;
        /// The product of two tensors, element by element.
        mul, broadcast_mul, Each;
        /// The quotient of two tensors, element by element.
        div, broadcast_div, First;
        /// The larger of two tensors, element by element.
        maximum, broadcast_maximum, No;
        /// The smaller of two tensors, element by element.
        minimum, broadcast_minimum, No;
    }

    /// Each element times `factor`. Pending sums and averages stay pending.
    ///
    /// # Errors
    /// Whatever a reduction of other terms and candle report.
    pub fn scale(&self, factor: f64) -> Result<DTensor> {
        let rules = unary_rules(self.shape().len(), &[ReduceOp::Sum, ReduceOp::Avg]);
        apply("scale", &[self], self.shape(), &rules, |parts| parts[0].affine(factor, 0.0))
    }

    /// Each element plus `term`; pending terms are reduced first.
    ///
    /// # Errors
    /// Whatever the reduction and candle report.
    pub fn shift(&self, term: f64) -> Result<DTensor> {
        self.elementwise("shift", |part| part.affine(1.0, term))
    }

    fn elementwise(
        &self,
        op: &str,
        compute: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<DTensor> {
        let rules = unary_rules(self.shape().len(), &[]);
        apply(op, &[self], self.shape(), &rules, |parts| compute(&parts[0]))
    }

    fn zip(
        &self,
        op: &str,
        other: &DTensor,
        linear: Linear,
        compute: impl FnOnce(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<DTensor> {
        let shape = broadcast(op, self.shape(), other.shape())?;
        let rules = binary_rules(&shape, self.shape(), other.shape(), linear);
        apply(op, &[self, other], &shape, &rules, |parts| compute(&parts[0], &parts[1]))
    }
}

fn unary_rules(ndim: usize, linear: &[ReduceOp]) -> Vec<Rule> {
    let shards = (0..ndim).map(|dim| Placement::Shard(dim as isize));
    let terms = linear.iter().map(|op| Placement::Partial(*op));
    shards.chain(terms).chain([Placement::Replicate]).map(|p| Rule::new([p], p)).collect()
}

fn binary_rules(shape: &[usize], lhs: &[usize], rhs: &[usize], linear: Linear) -> Vec<Rule> {
    let mut rules = vec![Rule::new([Placement::Replicate; 2], Placement::Replicate)];
    for dim in 0..shape.len() {
        let place = |operand: &[usize]| {
            let own = (dim + operand.len()).checked_sub(shape.len());
            match own.filter(|own| operand[*own] == shape[dim]) {
                Some(own) => Placement::Shard(own as isize),
                None => Placement::Replicate,
            }
        };
        rules.push(Rule::new([place(lhs), place(rhs)], Placement::Shard(dim as isize)));
    }
    let (sum, whole) = (Placement::Partial(ReduceOp::Sum), Placement::Replicate);
    match linear {
        Linear::Both => {
            let both = [ReduceOp::Sum, ReduceOp::Avg].map(Placement::Partial);
            rules.extend(both.map(|terms| Rule::new([terms; 2], terms)));
        }
        Linear::Each => rules.extend([[sum, whole], [whole, sum]].map(|inputs| Rule::new(inputs, sum))),
        Linear::First => rules.push(Rule::new([sum, whole], sum)),
        Linear::No => {}
    }
    rules
}

/// The shape of a result whose operands broadcast.
pub(super) fn broadcast(op: &str, lhs: &[usize], rhs: &[usize]) -> Result<Vec<usize>> {
    let ndim = lhs.len().max(rhs.len());
    let len = |shape: &[usize], dim: usize| (dim + shape.len()).checked_sub(ndim).map_or(1, |own| shape[own]);
    let each = (0..ndim).map(|dim| match (len(lhs, dim), len(rhs, dim)) {
        (a, b) if a == b || b == 1 => Some(a),
        (1, b) => Some(b),
        _ => None,
    });
    each.collect::<Option<Vec<usize>>>().ok_or_else(|| Error::ShapeMismatch {
        what: format!("second operand of {op}, to broadcast"),
        expected: lhs.to_vec(),
        got: rhs.to_vec(),
    })
}
