//! FlatParameter: where each parameter of a unit lies in the unit's flat sequence, and what of it a shard holds.
//! Pure metadata: no tensor, no group.
//!
//! ```text
//!   trainable    | net1.weight [8,5] | net1.bias [8] | net2.weight …        | padding |
//!   chunks       |      chunk 0      |      chunk 1     |     chunk 2      |  chunk 3  |   equal lengths
//!   frozen       | token.weight                                    | padding |            cut likewise
//!   shard r      | trainable chunk r | frozen chunk r |
//! ```
//!
//! Frozen parameters lie apart so that reductions and optimizers have one contiguous run and no more.

use sconce_dtensor::{TensorBox, run_boxes};

/// One parameter of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamLayout {
    /// Its full name.
    pub fqn: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its first element in the sequence of the trainable or of the frozen parameters.
    pub offset: usize,
    /// Number of elements.
    pub numel: usize,
    /// Whether it has no gradient.
    pub frozen: bool,
}

/// The parameters of a unit, concatenated row-major in declaration order and padded to the group size.
///
/// # Source
/// `FlatParameter` of `torch/distributed/fsdp/_flat_param.py`: shards are `torch.chunk` of the padded sequence. There,
/// frozen parameters lie among the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatParameter {
    /// The trainable ones first.
    params: Vec<ParamLayout>,
    group_size: usize,
    trainable_chunk: usize,
    frozen_chunk: usize,
}

/// What one shard holds of one parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamRun {
    /// First element inside the shard.
    pub shard_offset: usize,
    /// First element inside the parameter.
    pub param_offset: usize,
    /// Number of elements; 0, with offsets 0, if the shard holds none.
    pub len: usize,
}

impl FlatParameter {
    /// Lays out trainable parameters, given as name and shape, over `group_size` shards.
    pub fn new(params: impl IntoIterator<Item = (String, Vec<usize>)>, group_size: usize) -> Self {
        Self::with_frozen(params, [], group_size)
    }

    /// Lays out trainable and frozen parameters, given as name and shape, over `group_size` shards.
    pub fn with_frozen(
        trainable: impl IntoIterator<Item = (String, Vec<usize>)>,
        frozen: impl IntoIterator<Item = (String, Vec<usize>)>,
        group_size: usize,
    ) -> Self {
        let mut params = Vec::new();
        let trainable_numel = append(&mut params, trainable, false);
        let frozen_numel = append(&mut params, frozen, true);
        let trainable_chunk = trainable_numel.div_ceil(group_size);
        Self { params, group_size, trainable_chunk, frozen_chunk: frozen_numel.div_ceil(group_size) }
    }

    /// The parameters in flat order, the trainable ones first.
    pub fn params(&self) -> &[ParamLayout] {
        &self.params
    }

    /// The parameters that have gradients.
    pub fn trainable(&self) -> &[ParamLayout] {
        &self.params[..self.params.partition_point(|param| !param.frozen)]
    }

    /// Length of every shard, in elements, padding included.
    pub fn shard_numel(&self) -> usize {
        self.trainable_chunk + self.frozen_chunk
    }

    /// Length of the trainable part, with which every shard begins.
    pub fn trainable_shard_numel(&self) -> usize {
        self.trainable_chunk
    }

    /// What the shard of group rank `shard` holds of parameter `index`.
    pub fn run(&self, index: usize, shard: usize) -> ParamRun {
        let param = &self.params[index];
        let (chunk, before) =
            if param.frozen { (self.frozen_chunk, self.trainable_chunk) } else { (self.trainable_chunk, 0) };
        let chunk_start = shard * chunk;
        let start = param.offset.max(chunk_start);
        let end = (param.offset + param.numel).min(chunk_start + chunk);
        if start >= end {
            return ParamRun { shard_offset: 0, param_offset: 0, len: 0 };
        }
        let (shard_offset, param_offset) = (before + start - chunk_start, start - param.offset);
        ParamRun { shard_offset, param_offset, len: end - start }
    }

    /// The boxes that the shard of group rank `shard` holds of parameter `index`.
    pub fn boxes(&self, index: usize, shard: usize) -> Vec<TensorBox> {
        let run = self.run(index, shard);
        run_boxes(&self.params[index].shape, run.param_offset, run.len)
    }

    /// Elements of padding that [`FlatParameter::pieces`] needs room for.
    pub(crate) fn padding(&self) -> usize {
        if self.is_one_sequence() {
            return 0;
        }
        let numel: usize = self.params.iter().map(|param| param.numel).sum();
        self.group_size * self.shard_numel() - numel
    }

    /// Whole parameters as the pieces of all shards one after the other: what an all-gather of shards fills.
    pub(crate) fn pieces<'b, T>(
        &self,
        params: &'b mut [Vec<T>],
        mut padding: &'b mut [T],
    ) -> Vec<&'b mut [T]> {
        let mut whole: Vec<&'b mut [T]> = params.iter_mut().map(Vec::as_mut_slice).collect();
        if self.is_one_sequence() {
            // Padding lies at the very end, where a collective needs no room for it.
            return whole;
        }
        let mut frozen = whole.split_off(self.trainable().len()).into_iter();
        let (mut trainable, mut cut) = (whole.into_iter(), Vec::new());
        let (mut rest, mut frozen_rest): (&mut [T], &mut [T]) = (&mut [], &mut []);
        for _ in 0..self.group_size {
            take(self.trainable_chunk, &mut rest, &mut trainable, &mut padding, &mut cut);
            take(self.frozen_chunk, &mut frozen_rest, &mut frozen, &mut padding, &mut cut);
        }
        cut
    }

    pub(crate) fn is_one_sequence(&self) -> bool {
        self.trainable_chunk == 0 || self.frozen_chunk == 0
    }
}

/// Lays parameters out one after the other; the number of elements.
fn append(
    params: &mut Vec<ParamLayout>,
    new: impl IntoIterator<Item = (String, Vec<usize>)>,
    frozen: bool,
) -> usize {
    let mut offset = 0;
    for (fqn, shape) in new {
        let numel = shape.iter().product();
        params.push(ParamLayout { fqn, shape, offset, numel, frozen });
        offset += numel;
    }
    offset
}

/// Cuts the next `len` elements off a sequence of slices, the first of which is `rest`, and off `padding` at its end.
fn take<'b, T>(
    mut len: usize,
    rest: &mut &'b mut [T],
    sequence: &mut impl Iterator<Item = &'b mut [T]>,
    padding: &mut &'b mut [T],
    cut: &mut Vec<&'b mut [T]>,
) {
    while len > 0 {
        if rest.is_empty() {
            match sequence.next() {
                Some(next) => *rest = next,
                None => return cut.push(split_off(padding, len)),
            }
        }
        let now = len.min(rest.len());
        cut.push(split_off(rest, now));
        len -= now;
    }
}

fn split_off<'b, T>(slice: &mut &'b mut [T], len: usize) -> &'b mut [T] {
    let (first, rest) = std::mem::take(slice).split_at_mut(len);
    *slice = rest;
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn simple_model(group_size: usize) -> FlatParameter {
        let shapes: [(&str, &[usize]); 3] = [("w", &[3, 5]), ("b", &[3]), ("s", &[])];
        FlatParameter::new(shapes.map(|(n, s)| (n.to_owned(), s.to_vec())), group_size)
    }

    #[test]
    fn runs_of_all_shards_tile_every_parameter() {
        for group_size in 1..8 {
            let flat = simple_model(group_size);
            assert_eq!(flat.shard_numel(), 19usize.div_ceil(group_size));
            for index in 0..3 {
                let runs: Vec<_> = (0..group_size).map(|shard| flat.run(index, shard)).collect();
                let mut next = 0;
                for run in runs.iter().filter(|run| run.len > 0) {
                    assert_eq!(run.param_offset, next, "{group_size} shards, parameter {index}");
                    assert!(run.shard_offset + run.len <= flat.shard_numel());
                    next += run.len;
                }
                assert_eq!(next, flat.params()[index].numel);
            }
        }
    }

    #[test]
    fn pieces_of_a_partly_frozen_unit_are_its_shards_in_order() {
        let named = |shapes: &[(&str, usize)]| {
            shapes.iter().map(|(n, s)| ((*n).to_owned(), vec![*s])).collect::<Vec<_>>()
        };
        for group_size in 1..6 {
            let flat = FlatParameter::with_frozen(
                named(&[("a", 5), ("b", 2)]),
                named(&[("c", 4), ("d", 9)]),
                group_size,
            );
            let mut params: Vec<Vec<usize>> = flat.params().iter().map(|p| vec![0; p.numel]).collect();
            let mut padding = vec![0; flat.padding()];
            let pieces = flat.pieces(&mut params, &mut padding);
            // Every element is told its place among the shards.
            for (place, element) in pieces.into_iter().flatten().enumerate() {
                *element = place;
            }
            for (index, values) in params.iter().enumerate() {
                for shard in 0..group_size {
                    let run = flat.run(index, shard);
                    let expected: Vec<usize> =
                        (0..run.len).map(|n| shard * flat.shard_numel() + run.shard_offset + n).collect();
                    assert_eq!(
                        values[run.param_offset..][..run.len],
                        expected,
                        "{group_size} shards, parameter {index}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_shard_that_is_all_padding_holds_nothing() {
        let flat = FlatParameter::new([("w".to_owned(), vec![3])], 4);
        assert_eq!((flat.run(0, 3).len, flat.boxes(0, 3)), (0, vec![]));
    }

    #[test]
    fn a_run_across_rows_is_up_to_three_boxes() {
        let flat = simple_model(2);
        let second: Vec<String> = flat.boxes(0, 1).iter().map(TensorBox::to_string).collect();
        assert_eq!(second, ["[2, 0]+[1, 5]"]);
        let first: Vec<String> = simple_model(3).boxes(0, 1).iter().map(TensorBox::to_string).collect();
        assert_eq!(first, ["[1, 2]+[1, 3]", "[2, 0]+[1, 4]"]);
    }
}
