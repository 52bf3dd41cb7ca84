//! Collectives with a root whose result only some ranks get: reduce, gather and scatter. `broadcast` is above.

use super::check::{in_group, len_is, n_counts, total};
use crate::backend::{Call, CallName};
use crate::{Element, GroupRank, ProcessGroup, ReduceOp, Result};

impl ProcessGroup {
    /// Leaves the reduction of all ranks' inputs in the output of `root`.
    ///
    /// Shapes: `[n]` → `[n]` on `root`; other ranks pass `None`.
    ///
    /// # Errors
    /// `InvalidArgument` if the group has no rank `root`, or the output is not there on `root` alone, `[n]` long.
    ///
    /// # Source
    /// `torch.distributed.reduce`, which works in place; `root` is a group rank.
    pub fn reduce<T: Element>(
        &self,
        input: &[T],
        output: Option<&mut [T]>,
        op: ReduceOp,
        root: GroupRank,
    ) -> Result<()> {
        let output = self.on_root("reduce", output, root, Some(input.len()))?;
        // Every rank reduces a part, and only those travel on to the root.
        let part_len = input.len().div_ceil(self.size()).max(1);
        let part_of = |g: usize| input.len().min((g + 1) * part_len) - input.len().min(g * part_len);
        let counts: Vec<usize> = (0..self.size()).map(|g| part_of(g) * size_of::<T>()).collect();
        let call = Call::rooted(CallName::Reduce, T::DTYPE, root);
        let mut part = vec![T::zeroed(); part_of(self.group_rank().0)];
        let (input, own) = (bytemuck::cast_slice(input), bytemuck::cast_slice_mut(&mut part));
        self.backend()?.reduce_scatter(call, op, &[input], &counts, own)?;
        self.backend()?.all_gather(
            call,
            bytemuck::cast_slice(&part),
            &counts,
            &mut [bytemuck::cast_slice_mut(output)],
        )
    }

    /// Gathers the inputs of all ranks, in group-rank order, in the output of `root`.
    ///
    /// Shapes: `[counts[group_rank]]` → `[Σ counts]` on `root`; other ranks pass `None`.
    ///
    /// # Errors
    /// `InvalidArgument` if the group has no rank `root`, there is not one count a rank, a length does not fit the
    /// counts, or the output is not there on `root` alone.
    ///
    /// # Source
    /// `torch.distributed.gather`; `root` is a group rank.
    pub fn gather<T: Element>(
        &self,
        input: &[T],
        counts: &[usize],
        output: Option<&mut [T]>,
        root: GroupRank,
    ) -> Result<()> {
        const OP: &str = "gather";
        n_counts(OP, "number of counts", self.size(), counts.len())?;
        len_is(OP, "length of input", Some(counts[self.group_rank().0]), input.len())?;
        let output = self.on_root(OP, output, root, total(counts))?;
        let call = Call::rooted(CallName::Gather, T::DTYPE, root);
        let (input, output) = (bytemuck::cast_slice(input), bytemuck::cast_slice_mut(output));
        self.backend()?.all_gather(call, input, &super::in_bytes::<T>(counts), &mut [output])
    }

    /// Gives each rank its part of the input of `root`.
    ///
    /// Shapes: `[Σ counts]` on `root`, other ranks pass `None` → `[counts[group_rank]]`.
    ///
    /// # Errors
    /// `InvalidArgument` if the group has no rank `root`, there is not one count a rank, a length does not fit the
    /// counts, or the input is not there on `root` alone.
    ///
    /// # Source
    /// `torch.distributed.scatter`; `root` is a group rank.
    pub fn scatter<T: Element>(
        &self,
        input: Option<&[T]>,
        counts: &[usize],
        output: &mut [T],
        root: GroupRank,
    ) -> Result<()> {
        const OP: &str = "scatter";
        in_group(OP, root, self.size())?;
        n_counts(OP, "number of counts", self.size(), counts.len())?;
        let is_root = self.group_rank() == root;
        present_on_root(OP, "input", input.is_some(), is_root)?;
        let input = input.unwrap_or(&[]);
        len_is(OP, "length of input", if is_root { total(counts) } else { Some(0) }, input.len())?;
        len_is(OP, "length of output", Some(counts[self.group_rank().0]), output.len())?;
        let counts = super::in_bytes::<T>(counts);
        let mut receive = vec![0; self.size()];
        receive[root.0] = counts[self.group_rank().0];
        let send = if is_root { counts } else { vec![0; self.size()] };
        let call = Call::rooted(CallName::Scatter, T::DTYPE, root);
        let (input, output) = (bytemuck::cast_slice(input), bytemuck::cast_slice_mut(output));
        self.backend()?.all_to_all(call, input, &send, output, &receive)
    }

    /// The output on the root, and an empty one elsewhere.
    fn on_root<'a, T: Element>(
        &self,
        op: &'static str,
        output: Option<&'a mut [T]>,
        root: GroupRank,
        expected: Option<usize>,
    ) -> Result<&'a mut [T]> {
        in_group(op, root, self.size())?;
        let is_root = self.group_rank() == root;
        present_on_root(op, "output", output.is_some(), is_root)?;
        let output = output.unwrap_or_default();
        len_is(op, "length of output", if is_root { expected } else { Some(0) }, output.len())?;
        Ok(output)
    }
}

fn present_on_root(op: &'static str, what: &str, present: bool, is_root: bool) -> Result<()> {
    if present == is_root {
        return Ok(());
    }
    let (expected, got) =
        if is_root { ("a buffer on root", "none") } else { ("none but on root", "a buffer") };
    Err(super::check::invalid(op, what, expected.into(), got))
}
