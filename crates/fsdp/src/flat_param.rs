//! FlatParameter: where each parameter of a unit lies in the unit's flat sequence, and what of it a shard holds.
//! Pure metadata: no tensor, no group.
//!
//! ```text
//!   parameters   | net1.weight [8,5] | net1.bias [8] | net2.weight …        | padding |
//!   shards       |   group rank 0   |   group rank 1   |   group rank 2   |  rank 3   |   equal lengths
//! ```

use sconce_dtensor::{TensorBox, run_boxes};

/// One parameter of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamLayout {
    /// Its full name.
    pub fqn: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its first element in the flat sequence.
    pub offset: usize,
    /// Number of elements.
    pub numel: usize,
}

/// The parameters of a unit, concatenated row-major in declaration order and padded to the group size.
///
/// # Source
/// `FlatParameter` of `torch/distributed/fsdp/_flat_param.py`: shards are `torch.chunk` of the padded sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatParameter {
    params: Vec<ParamLayout>,
    shard_numel: usize,
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
    /// Lays out parameters, given as name and shape, over `group_size` shards.
    pub fn new(params: impl IntoIterator<Item = (String, Vec<usize>)>, group_size: usize) -> Self {
        let mut numel = 0;
        let layout = |(fqn, shape): (String, Vec<usize>)| {
            let param = ParamLayout { fqn, offset: numel, numel: shape.iter().product(), shape };
            numel += param.numel;
            param
        };
        let params = params.into_iter().map(layout).collect();
        Self { params, shard_numel: numel.div_ceil(group_size) }
    }

    /// The parameters in flat order.
    pub fn params(&self) -> &[ParamLayout] {
        &self.params
    }

    /// Length of every shard, in elements, padding included.
    pub fn shard_numel(&self) -> usize {
        self.shard_numel
    }

    /// What the shard of group rank `shard` holds of parameter `index`.
    pub fn run(&self, index: usize, shard: usize) -> ParamRun {
        let param = &self.params[index];
        let shard_start = shard * self.shard_numel;
        let start = param.offset.max(shard_start);
        let end = (param.offset + param.numel).min(shard_start + self.shard_numel);
        if start >= end {
            return ParamRun { shard_offset: 0, param_offset: 0, len: 0 };
        }
        ParamRun { shard_offset: start - shard_start, param_offset: start - param.offset, len: end - start }
    }

    /// The boxes that the shard of group rank `shard` holds of parameter `index`.
    pub fn boxes(&self, index: usize, shard: usize) -> Vec<TensorBox> {
        let run = self.run(index, shard);
        run_boxes(&self.params[index].shape, run.param_offset, run.len)
    }
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
