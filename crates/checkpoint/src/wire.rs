//! A [`SavePlan`] as bytes between ranks: its boxes are most of what a save sends, so they travel as varints.
//!
//! Only ranks of one version talk to each other: this is no format of files.

use sconce_dtensor::{DType, TensorBox};

use crate::Result;
use crate::coordinate::{Message, protocol};
use crate::plan::{HeldTensor, SavePlan};
use crate::tree::Node;

impl Message for SavePlan {
    fn encode(&self) -> Result<Vec<u8>> {
        let (tree, tensors) = (self.tree.encode()?, encode(&self.tensors));
        Ok([&(tree.len() as u64).to_le_bytes()[..], &tree, &tensors].concat())
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let parts = bytes.split_first_chunk().and_then(|(len, rest)| {
            let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
            rest.split_at_checked(len)
        });
        let tensors = parts.and_then(|(tree, tensors)| Some((tree, decode(tensors)?)));
        let (tree, tensors) = tensors.ok_or_else(|| protocol("a plan that breaks off"))?;
        Ok(SavePlan { tree: Node::decode(tree)?, tensors })
    }
}

fn encode(tensors: &[HeldTensor]) -> Vec<u8> {
    let mut bytes = Vec::new();
    push(&mut bytes, tensors.len());
    for tensor in tensors {
        push(&mut bytes, tensor.fqn.len());
        bytes.extend_from_slice(tensor.fqn.as_bytes());
        bytes.push(tensor.dtype as u8);
        push(&mut bytes, tensor.shape.len());
        tensor.shape.iter().for_each(|n| push(&mut bytes, *n));
        push(&mut bytes, tensor.boxes.len());
        for part in &tensor.boxes {
            part.offsets.iter().chain(&part.sizes).for_each(|n| push(&mut bytes, *n));
        }
    }
    bytes
}

/// The tensors of a rank; `None` for bytes that [`encode`] did not make.
fn decode(mut bytes: &[u8]) -> Option<Vec<HeldTensor>> {
    let from = &mut bytes;
    let n = count(from)?;
    let mut tensors = Vec::with_capacity(n);
    for _ in 0..n {
        tensors.push(tensor(from)?);
    }
    bytes.is_empty().then_some(tensors)
}

fn tensor(from: &mut &[u8]) -> Option<HeldTensor> {
    let len = count(from)?;
    let fqn = std::str::from_utf8(take(from, len)?).ok()?.to_owned();
    let dtype = *DType::ALL.get(take(from, 1)?[0] as usize)?;
    let ndim = count(from)?;
    let shape = numbers(from, ndim)?;
    let n = count(from)?;
    let mut boxes = Vec::with_capacity(n);
    for _ in 0..n {
        boxes.push(TensorBox { offsets: numbers(from, ndim)?, sizes: numbers(from, ndim)? });
    }
    Some(HeldTensor { fqn, dtype, shape, boxes })
}

/// `n` numbers.
pub(crate) fn numbers(from: &mut &[u8], n: usize) -> Option<Vec<usize>> {
    let mut numbers = Vec::with_capacity(n.min(from.len()));
    for _ in 0..n {
        numbers.push(number(from)?);
    }
    Some(numbers)
}

/// A number of things that take a byte or more each; boxes of 0-d tensors take none, and there is at most one.
fn count(from: &mut &[u8]) -> Option<usize> {
    number(from).filter(|n| *n <= from.len().max(1))
}

fn take<'b>(from: &mut &'b [u8], n: usize) -> Option<&'b [u8]> {
    let (taken, rest) = from.split_at_checked(n)?;
    *from = rest;
    Some(taken)
}

/// Appends a number.
pub(crate) fn push(bytes: &mut Vec<u8>, mut n: usize) {
    while n >= 0x80 {
        bytes.push(n as u8 | 0x80);
        n >>= 7;
    }
    bytes.push(n as u8);
}

/// A number that [`push`] appended.
pub(crate) fn number(from: &mut &[u8]) -> Option<usize> {
    let mut n = 0usize;
    for nth in 0..10 {
        let (byte, rest) = from.split_first()?;
        *from = rest;
        let bits = usize::from(byte & 0x7f);
        // Shifted out bits would come back as another number.
        n |= bits.checked_shl(7 * nth).filter(|shifted| shifted >> (7 * nth) == bits)?;
        if byte & 0x80 == 0 {
            return Some(n);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tensors() -> Vec<HeldTensor> {
        let held = |fqn: &str, dtype, shape: &[usize], boxes: Vec<TensorBox>| HeldTensor {
            fqn: fqn.to_owned(),
            dtype,
            shape: shape.to_vec(),
            boxes,
        };
        let part = TensorBox { offsets: vec![300, 0], sizes: vec![1 << 40, 127] };
        vec![
            held("größe", DType::BF16, &[usize::MAX, 128], vec![part.clone(), part]),
            held("", DType::F64, &[], vec![TensorBox::whole(&[])]),
            held("none", DType::U8, &[0], vec![]),
        ]
    }

    #[test]
    fn plans_arrive_as_they_were_sent() {
        let plan = SavePlan { tree: Node::Int(3), tensors: tensors() };
        assert_eq!(SavePlan::decode(&Message::encode(&plan).unwrap()).unwrap(), plan);
    }

    #[test]
    fn a_cut_plan_is_no_plan() {
        let bytes = encode(&tensors());
        assert!((0..bytes.len()).all(|len| decode(&bytes[..len]).is_none()));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_do_not_and_allocate_no_more_than_they_are(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }
}
