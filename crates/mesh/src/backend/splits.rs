//! What NCCL has no call for, as calls that it has: uneven gathers and exchanges as sends and receives in one group, uneven
//! reductions as one reduction for each rank; and its names of dtypes and reductions. Pure, and tested without NCCL.

use std::ops::Range;

use crate::backend::pieces::offsets;
use crate::{DType, ReduceOp};

/// Bytes that go to or come from another rank.
pub(crate) type Transfer = (usize, Range<usize>);

/// Sends and receives that are issued together, and what a rank keeps for itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Exchange {
    /// Ranges of the input.
    pub(crate) sends: Vec<Transfer>,
    /// Ranges of the output.
    pub(crate) receives: Vec<Transfer>,
    /// From the input to the output, of equal length.
    pub(crate) own: (Range<usize>, Range<usize>),
}

impl Exchange {
    /// Part g of the input goes to rank g, part g of the output comes from it.
    pub(crate) fn of_parts(me: usize, send: &[usize], receive: &[usize]) -> Exchange {
        let (from, to) = (ranges(send), ranges(receive));
        Exchange {
            own: (from[me].clone(), to[me].clone()),
            sends: others(me, from),
            receives: others(me, to),
        }
    }

    /// The whole input goes to every rank, part g of the output comes from rank g.
    pub(crate) fn of_gather(me: usize, counts: &[usize]) -> Exchange {
        let to = ranges(counts);
        let whole = 0..counts[me];
        let sends = others(me, vec![whole.clone(); counts.len()]);
        Exchange { own: (whole, to[me].clone()), sends, receives: others(me, to) }
    }
}

/// The parts of an uneven reduction that are not empty, each with the rank that gets it.
pub(crate) fn reductions(counts: &[usize]) -> Vec<Transfer> {
    ranges(counts).into_iter().enumerate().filter(|(_, part)| !part.is_empty()).collect()
}

/// Whether one call of NCCL does it.
pub(crate) fn is_even(counts: &[usize]) -> bool {
    counts.windows(2).all(|pair| pair[0] == pair[1])
}

fn ranges(counts: &[usize]) -> Vec<Range<usize>> {
    offsets(counts).into_iter().zip(counts).map(|(start, count)| start..start + count).collect()
}

/// An empty message is none: both sides know that it is empty. In an order that is another on every rank, so that not all
/// begin with the same peer.
fn others(me: usize, ranges: Vec<Range<usize>>) -> Vec<Transfer> {
    let n = ranges.len();
    let peers = (1..n).map(|step| (me + step) % n);
    peers.map(|peer| (peer, ranges[peer].clone())).filter(|(_, range)| !range.is_empty()).collect()
}

/// NCCL's number of an element type that it reduces, `ncclDataType_t`: all that collectives compute with but i16.
pub(crate) fn nccl_dtype(dtype: DType) -> Option<u32> {
    Some(match dtype {
        DType::I8 => 0,
        DType::U8 => 1,
        DType::I32 => 2,
        DType::U32 => 3,
        DType::I64 => 4,
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
        _ => return None,
    })
}

/// NCCL's number of a reduction, `ncclRedOp_t`.
pub(crate) fn nccl_op(op: ReduceOp) -> u32 {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Prod => 1,
        ReduceOp::Max => 2,
        ReduceOp::Min => 3,
        ReduceOp::Avg => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every rank's plan, for counts `count(from, to)`, carried out on bytes that say where they come from.
    fn carried_out(
        n: usize,
        plan: impl Fn(usize) -> Exchange,
        input: &[Vec<u8>],
        out: &[usize],
    ) -> Vec<Vec<u8>> {
        let plans: Vec<Exchange> = (0..n).map(plan).collect();
        let mut output: Vec<Vec<u8>> = out.iter().map(|len| vec![0; *len]).collect();
        for me in 0..n {
            let (from, to) = plans[me].own.clone();
            output[me][to].copy_from_slice(&input[me][from]);
            for (peer, range) in &plans[me].receives {
                let sent: Vec<_> = plans[*peer].sends.iter().filter(|(to, _)| *to == me).collect();
                let [(_, sent)] = sent[..] else {
                    panic!("rank {me} receives from {peer} what it does not send")
                };
                output[me][range.clone()].copy_from_slice(&input[*peer][sent.clone()]);
            }
            for (peer, _) in &plans[me].sends {
                assert_eq!(plans[*peer].receives.iter().filter(|(from, _)| *from == me).count(), 1);
            }
        }
        output
    }

    #[test]
    fn an_uneven_exchange_brings_every_part_to_its_place() {
        for n in 1..6 {
            let count = |from: usize, to: usize| (from * 2 + to * 3) % 5;
            let byte = |from: usize, to: usize, at: usize| (from * 50 + to * 10 + at) as u8;
            let part = |from: usize, to: usize| (0..count(from, to)).map(move |at| byte(from, to, at));
            let sent = |from: usize| (0..n).flat_map(|to| part(from, to)).collect::<Vec<u8>>();
            let wanted = |to: usize| (0..n).flat_map(|from| part(from, to)).collect::<Vec<u8>>();
            let input: Vec<_> = (0..n).map(sent).collect();
            let expected: Vec<_> = (0..n).map(wanted).collect();
            let plan = |me: usize| {
                let send: Vec<_> = (0..n).map(|to| count(me, to)).collect();
                let receive: Vec<_> = (0..n).map(|from| count(from, me)).collect();
                Exchange::of_parts(me, &send, &receive)
            };
            let lens: Vec<_> = expected.iter().map(Vec::len).collect();
            assert_eq!(carried_out(n, plan, &input, &lens), expected, "{n} ranks");
        }
    }

    #[test]
    fn an_uneven_gather_brings_every_input_to_every_rank() {
        for counts in [&[3, 0, 2][..], &[0, 0], &[4], &[1, 2, 3, 4]] {
            let n = counts.len();
            let input: Vec<Vec<u8>> =
                counts.iter().enumerate().map(|(g, len)| vec![g as u8 + 1; *len]).collect();
            let got =
                carried_out(n, |me| Exchange::of_gather(me, counts), &input, &vec![input.concat().len(); n]);
            assert!(got.iter().all(|output| *output == input.concat()), "{counts:?}: {got:?}");
        }
    }

    #[test]
    fn reductions_tile_the_input_without_empty_parts() {
        assert_eq!(reductions(&[3, 0, 2]), [(0, 0..3), (2, 3..5)]);
        assert_eq!(reductions(&[0, 0]), []);
        assert!(is_even(&[2, 2]) && is_even(&[7]) && !is_even(&[2, 0]));
    }

    #[test]
    fn every_dtype_that_collectives_compute_with_has_a_number_of_its_own_but_i16() {
        let numbers: Vec<_> = DType::ELEMENTS.into_iter().map(|dtype| (dtype, nccl_dtype(dtype))).collect();
        for (dtype, number) in &numbers {
            assert_eq!(number.is_none(), *dtype == DType::I16, "{dtype}");
            let same = numbers.iter().filter(|(_, other)| other == number).count();
            assert_eq!(same, 1, "{dtype}");
        }
        assert_eq!(
            (nccl_dtype(DType::BF16), nccl_dtype(DType::F16), nccl_dtype(DType::F32)),
            (Some(9), Some(6), Some(7))
        );
        assert_eq!(nccl_dtype(DType::F8E4M3), None);
        assert_eq!(
            [ReduceOp::Sum, ReduceOp::Prod, ReduceOp::Max, ReduceOp::Min, ReduceOp::Avg].map(nccl_op),
            [0, 1, 2, 3, 4]
        );
    }
}
