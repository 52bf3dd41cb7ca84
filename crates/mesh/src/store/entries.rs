//! What changing an entry means, the same in every store.

use std::collections::HashMap;

use crate::{Error, Result};

/// What a decimal number becomes by adding to it; an absent one is 0.
pub(super) fn sum(held: Option<&[u8]>, key: &str, delta: i64) -> Result<i64> {
    let Some(text) = held else { return Ok(delta) };
    let number = std::str::from_utf8(text).ok().and_then(|text| text.parse::<i64>().ok());
    let number =
        number.ok_or_else(|| Error::store("add", key, "the value is no decimal number".to_owned()))?;
    Ok(number.wrapping_add(delta))
}

/// Adds to a decimal number; an absent one is 0.
pub(super) fn add(entries: &mut HashMap<String, Vec<u8>>, key: &str, delta: i64) -> Result<i64> {
    let sum = sum(entries.get(key).map(Vec::as_slice), key, delta)?;
    entries.insert(key.to_owned(), sum.to_string().into_bytes());
    Ok(sum)
}

/// Sets a value if the expected one is there (absent counts as empty); returns what is there after.
pub(super) fn compare_set(
    entries: &mut HashMap<String, Vec<u8>>,
    key: &str,
    expected: &[u8],
    desired: &[u8],
) -> Vec<u8> {
    let held = entries.get(key).map_or(&[][..], Vec::as_slice);
    if held != expected {
        return held.to_vec();
    }
    entries.insert(key.to_owned(), desired.to_vec());
    desired.to_vec()
}

/// The keys that begin with `prefix`, sorted.
pub(super) fn list(entries: &HashMap<String, Vec<u8>>, prefix: &str) -> Vec<String> {
    let mut keys: Vec<String> = entries.keys().filter(|key| key.starts_with(prefix)).cloned().collect();
    keys.sort();
    keys
}
