//! What ranks ask of each other: the items that lie in blocks which another rank reads.
//!
//! Only ranks of one version, with the same metadata, talk to each other: this is no format of files.

use sconce_dtensor::TensorBox;
use sconce_mesh::ProcessGroup;

use super::runs::ItemRuns;
use crate::Result;
use crate::coordinate::protocol;
use crate::metadata::Metadata;
use crate::plan::ReadItem;
use crate::wire;

/// Sends each rank the items asked of it and returns what each rank asks of this one.
///
/// Ranks: collective.
///
/// # Errors
/// `Mesh`.
pub(super) fn trade(group: &ProcessGroup, asked: &[Vec<&ReadItem>]) -> Result<Vec<Vec<u8>>> {
    let messages: Vec<Vec<u8>> = asked.iter().map(|items| encode(items)).collect();
    let send: Vec<usize> = messages.iter().map(Vec::len).collect();
    let lens: Vec<i64> = send.iter().map(|len| *len as i64).collect();
    let mut receive = vec![0; lens.len()];
    group.all_to_all(&lens, &mut receive)?;
    let receive: Vec<usize> = receive.into_iter().map(|len: i64| len as usize).collect();
    let mut bytes = vec![0; receive.iter().sum()];
    group.all_to_all_uneven(&messages.concat(), &send, &mut bytes, &receive)?;
    let mut rest = bytes.as_slice();
    let parts = receive.into_iter().map(|len| {
        let (part, later) = rest.split_at(len);
        rest = later;
        part.to_vec()
    });
    Ok(parts.collect())
}

fn encode(items: &[&ReadItem]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for ReadItem { saved, chunk, part, .. } in items {
        let numbers = [saved, chunk].into_iter().chain(&part.offsets).chain(&part.sizes);
        numbers.for_each(|n| wire::push(&mut bytes, *n));
    }
    bytes
}

/// The runs of the items that a rank asked for, in its order.
///
/// # Errors
/// `ValueMismatch` for bytes that [`trade`] did not send.
pub(super) fn decode(mut bytes: &[u8], metadata: &Metadata) -> Result<Vec<ItemRuns>> {
    let mut items = Vec::new();
    while !bytes.is_empty() {
        let item = item(&mut bytes, metadata);
        items.push(item.ok_or_else(|| protocol("a request for what is not in the checkpoint"))?);
    }
    Ok(items)
}

fn item(from: &mut &[u8], metadata: &Metadata) -> Option<ItemRuns> {
    let (saved, chunk) = (wire::number(from)?, wire::number(from)?);
    let saved = metadata.tensors.get(saved)?;
    let bounds = &saved.chunks.get(chunk)?.bounds;
    let ndim = bounds.offsets.len();
    let part = TensorBox { offsets: wire::numbers(from, ndim)?, sizes: wire::numbers(from, ndim)? };
    // Whoever hands the bytes on does not care where they go: as they lie in the chunk, in the fewest runs.
    (part.fits(&saved.shape) && bounds.contains(&part)).then(|| ItemRuns::new(&part, chunk, saved, &part))
}
