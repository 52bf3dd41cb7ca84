//! The boxes that a rank holds of many tensors, as bytes for other ranks.
//!
//! Little-endian words: for each tensor 0 if the rank does not have it, otherwise one more than the number of boxes, and
//! then the offsets and sizes of each.

use sconce_dtensor::TensorBox;

pub(super) fn encode<'b>(tensors: impl Iterator<Item = Option<&'b [TensorBox]>>) -> Vec<u8> {
    let mut words = Vec::new();
    for boxes in tensors {
        words.push(boxes.map_or(0, |boxes| boxes.len() as u64 + 1));
        for held in boxes.unwrap_or_default() {
            words.extend(held.offsets.iter().chain(&held.sizes).map(|n| *n as u64));
        }
    }
    words.iter().flat_map(|word: &u64| word.to_le_bytes()).collect()
}

/// What [`encode`] was given, for tensors of these numbers of dims.
pub(super) fn decode(bytes: &[u8], ndims: &[usize]) -> Vec<Option<Vec<TensorBox>>> {
    let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word) as usize);
    let mut next = |n: usize| words.by_ref().take(n).collect::<Vec<usize>>();
    let mut boxes_of = |ndim: &usize| {
        let count = next(1).first().copied().unwrap_or(0).checked_sub(1)?;
        Some((0..count).map(|_| TensorBox { offsets: next(*ndim), sizes: next(*ndim) }).collect())
    };
    ndims.iter().map(&mut boxes_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_survive_the_wire() {
        let boxes = [
            Some(vec![TensorBox { offsets: vec![1, 2], sizes: vec![3, 4] }, TensorBox::whole(&[5, 6])]),
            Some(vec![]),
            None,
            Some(vec![TensorBox::whole(&[])]),
        ];
        let bytes = encode(boxes.iter().map(Option::as_deref));
        assert_eq!(decode(&bytes, &[2, 2, 3, 0]), boxes);
    }
}
