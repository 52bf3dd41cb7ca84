//! Fingerprint: what a rank called, in the words that all ranks compare before they touch the data. Pure.

use crate::backend::{Call, CallName};
use crate::{DType, ReduceOp};

/// Counts that are kept for messages; all of them count for the hash.
const SHOWN_COUNTS: usize = 16;
const SHOWN: usize = 8;
/// Beside the code of the name: the call is of device memory.
const ON_DEVICE: u64 = 1 << 32;
const WORDS: usize = SHOWN + SHOWN_COUNTS;

/// Length of a fingerprint in the segment.
pub(crate) const FINGERPRINT_BYTES: usize = WORDS * 8;

/// A collective with everything that ranks must agree on.
///
/// ```text
/// word  0     1      2           3           4      5         6            7            8…23
///       seq   name   dtype + 1   reduce + 1  root+1 bytes     n_counts     counts_hash  counts
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    words: [u64; WORDS],
}

impl Fingerprint {
    /// A call on `bytes` bytes; `bytes` is per rank where ranks contribute equally.
    pub(crate) fn new(seq: u64, call: Call, bytes: usize) -> Self {
        let mut words = [0; WORDS];
        words[..3].copy_from_slice(&[seq, call.name as u64, call.dtype as u64 + 1]);
        words[4] = call.root.map_or(0, |root| root.0 as u64 + 1);
        words[5] = bytes as u64;
        Fingerprint { words }
    }

    /// A call without elements.
    pub(crate) fn barrier(seq: u64) -> Self {
        let mut words = [0; WORDS];
        words[..2].copy_from_slice(&[seq, CallName::Barrier as u64]);
        Fingerprint { words }
    }

    /// A call to which rank g contributes, or from which it gets, `counts[g]` bytes.
    pub(crate) fn counted(seq: u64, call: Call, counts: &[usize]) -> Self {
        if counts.windows(2).all(|pair| pair[0] == pair[1]) {
            return Self::new(seq, call, counts.first().copied().unwrap_or(0));
        }
        let mut fingerprint = Self::new(seq, call, counts.iter().sum());
        fingerprint.words[6] = counts.len() as u64;
        fingerprint.words[7] = hash(counts);
        for (word, count) in fingerprint.words[SHOWN..].iter_mut().zip(counts) {
            *word = *count as u64;
        }
        fingerprint
    }

    /// The call as one of device memory, which is no match for one of host memory.
    #[cfg(feature = "nccl")]
    pub(crate) fn on_device(mut self) -> Self {
        self.words[1] |= ON_DEVICE;
        self
    }

    pub(crate) fn with_op(mut self, op: ReduceOp) -> Self {
        self.words[3] = op as u64 + 1;
        self
    }

    pub(crate) fn seq(&self) -> u64 {
        self.words[0]
    }

    pub(crate) fn write(&self, header: &mut [u8]) {
        header[..FINGERPRINT_BYTES].copy_from_slice(bytemuck::cast_slice(&self.words));
    }

    pub(crate) fn read(header: &[u8]) -> Self {
        let mut words = [0; WORDS];
        bytemuck::cast_slice_mut(&mut words).copy_from_slice(&header[..FINGERPRINT_BYTES]);
        Fingerprint { words }
    }

    /// The collective's name.
    pub(crate) fn name(&self) -> &'static str {
        CallName::from_code(self.words[1] & !ON_DEVICE).map_or("an unknown collective", CallName::name)
    }

    /// As a person would write the call: `all_reduce(sum, f32, 4096 bytes)`.
    pub(crate) fn describe(&self) -> String {
        let place = if self.words[1] & ON_DEVICE == 0 { "" } else { "cuda " };
        let parts = [self.op(), self.root(), self.dtype(), self.sizes()];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        format!("{place}{}({})", self.name(), parts.join(", "))
    }

    fn op(&self) -> Option<String> {
        const OPS: [ReduceOp; 5] =
            [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::Prod];
        OPS.iter().find(|op| **op as u64 + 1 == self.words[3]).map(ReduceOp::to_string)
    }

    fn root(&self) -> Option<String> {
        self.words[4].checked_sub(1).map(|root| format!("root {root}"))
    }

    fn dtype(&self) -> Option<String> {
        DType::ALL.iter().find(|dtype| **dtype as u64 + 1 == self.words[2]).map(DType::to_string)
    }

    fn sizes(&self) -> Option<String> {
        let n_counts = self.words[6] as usize;
        if n_counts > 0 {
            let shown = &self.words[SHOWN..SHOWN + n_counts.min(SHOWN_COUNTS)];
            let more = if n_counts > SHOWN_COUNTS { " and more" } else { "" };
            return Some(format!("{shown:?}{more} bytes"));
        }
        (self.words[2] > 0).then(|| format!("{} bytes", self.words[5]))
    }
}

/// FNV-1a over the counts.
fn hash(counts: &[usize]) -> u64 {
    let bytes = counts.iter().flat_map(|count| (*count as u64).to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GroupRank;

    const CALL: Call = Call::new(CallName::AllReduce, DType::F32);
    const ROOTED: Call = Call::rooted(CallName::Reduce, DType::F32, GroupRank(0));

    #[test]
    fn a_fingerprint_describes_the_call_and_survives_the_segment() {
        let calls = [
            (Fingerprint::barrier(1), "barrier()"),
            (Fingerprint::new(2, CALL, 4096).with_op(ReduceOp::Sum), "all_reduce(sum, f32, 4096 bytes)"),
            (Fingerprint::new(2, ROOTED, 0), "reduce(root 0, f32, 0 bytes)"),
            (Fingerprint::counted(2, CALL, &[4, 8, 0]), "all_reduce(f32, [4, 8, 0] bytes)"),
            (Fingerprint::counted(2, CALL, &[4, 4, 4]), "all_reduce(f32, 4 bytes)"),
        ];
        for (fingerprint, text) in calls {
            let mut header = [0xff; 4096];
            fingerprint.write(&mut header);
            assert_eq!(Fingerprint::read(&header), fingerprint);
            assert_eq!(fingerprint.describe(), text);
        }
    }

    #[test]
    fn counts_beyond_the_shown_ones_still_differ() {
        let mut counts: Vec<usize> = (0..40).collect();
        let first = Fingerprint::counted(0, CALL, &counts);
        counts.swap(30, 31);
        assert_ne!(first, Fingerprint::counted(0, CALL, &counts));
    }

    #[test]
    fn foreign_bytes_are_described_without_a_panic() {
        assert!(Fingerprint::read(&[0xee; 4096]).describe().starts_with("an unknown collective"));
    }
}
