//! Names as people read them: numbers in their order, and layers that are alike as one.

use std::collections::HashMap;

use super::Files;
use crate::metadata::TensorStorageMetadata;

/// Tensors whose names differ in numbers only and that lie alike.
pub(super) struct Group<'t> {
    pub(super) first: &'t TensorStorageMetadata,
    pub(super) name: String,
    pub(super) count: usize,
}

/// Tensors by what they look like, in the order of the first of each.
pub(super) fn alike<'t>(tensors: &[&'t TensorStorageMetadata], files: &Files) -> Vec<Group<'t>> {
    let mut groups: Vec<Group<'t>> = Vec::new();
    let mut of_name = HashMap::<String, Vec<usize>>::new();
    for tensor in tensors {
        let name = without_numbers(&tensor.fqn);
        let known = of_name.entry(name.clone()).or_default();
        match known.iter().find(|nth| lie_alike(groups[**nth].first, tensor, files)) {
            Some(nth) => {
                let group = &mut groups[*nth];
                (group.name, group.count) = (name, group.count + 1);
            }
            None => {
                known.push(groups.len());
                groups.push(Group { first: tensor, name: tensor.fqn.clone(), count: 1 });
            }
        }
    }
    groups
}

fn lie_alike(a: &TensorStorageMetadata, b: &TensorStorageMetadata, files: &Files) -> bool {
    let mut chunks = a.chunks.iter().zip(&b.chunks);
    (a.dtype, &a.shape, a.chunks.len()) == (b.dtype, &b.shape, b.chunks.len())
        && chunks.all(|(a, b)| a.bounds == b.bounds && files.of[a.file] == files.of[b.file])
}

/// `layers.*.weight` for `layers.3.weight`.
pub(super) fn without_numbers(name: &str) -> String {
    let part = |part: &str| match part.bytes().all(|byte| byte.is_ascii_digit()) && !part.is_empty() {
        true => "*".to_owned(),
        false => part.to_owned(),
    };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

/// A key by which `layers.2` comes before `layers.10`.
pub(super) fn natural(name: &str) -> Vec<(String, u64)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let text = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (before, after) = rest.split_at(text);
        let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let (number, after) = after.split_at(digits);
        key.push((before.to_owned(), number.parse().unwrap_or(0)));
        rest = after;
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_ordered_as_numbers_and_left_out_as_parts() {
        let mut names = ["layers.10.w", "layers.9.w", "embed", "layers.w2"];
        names.sort_by_key(|name| natural(name));
        assert_eq!(names, ["embed", "layers.9.w", "layers.10.w", "layers.w2"]);
        assert_eq!(without_numbers("layers.10.w2.0"), "layers.*.w2.*");
    }
}
