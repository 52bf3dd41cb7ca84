//! Plans that were made before: a training loop asks for the same ones in every step, and a search with terms may take a
//! millisecond.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use super::{Plan, plan};
use crate::{Placement, Result};

/// Plans that are kept; when there are as many, all are forgotten.
const MOST: usize = 4096;

/// Shape, shape of the mesh, and placements on both sides.
type Key = (Vec<usize>, Vec<usize>, Vec<Placement>, Vec<Placement>);

static KNOWN: LazyLock<Mutex<HashMap<Key, Arc<Plan>>>> = LazyLock::new(Mutex::default);

/// [`plan`], made once.
///
/// # Errors
/// Those of [`plan`].
///
/// # Source
/// `_gen_transform_infos` of `torch/distributed/tensor/_redistribute.py`, an `lru_cache`.
pub(crate) fn known_plan(
    shape: &[usize],
    mesh_shape: &[usize],
    from: &[Placement],
    to: &[Placement],
) -> Result<Arc<Plan>> {
    let key = (shape.to_vec(), mesh_shape.to_vec(), from.to_vec(), to.to_vec());
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(plan) = known().get(&key) {
        return Ok(plan.clone());
    }
    // Made without the lock: threads that need the same one at once make it twice, and equal.
    let made = Arc::new(plan(shape, mesh_shape, from, to)?);
    let mut known = known();
    if known.len() >= MOST {
        known.clear();
    }
    known.insert(key, made.clone());
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Placement::{Replicate, Shard};

    #[test]
    fn a_plan_is_made_once_and_the_oldest_are_forgotten() {
        let asked = |n: usize| known_plan(&[n, 3], &[2], &[Shard(0)], &[Replicate]).unwrap();
        let first = asked(7);
        assert!(Arc::ptr_eq(&first, &asked(7)));
        assert_eq!(*first, plan(&[7, 3], &[2], &[Shard(0)], &[Replicate]).unwrap());
        assert_eq!(known_plan(&[7, 3], &[2], &[Shard(0)], &[Shard(1)]).unwrap().to(), [Shard(1)]);
        (8..8 + MOST).for_each(|n| drop(asked(n)));
        assert!(KNOWN.lock().unwrap().len() <= MOST);
        assert!(!Arc::ptr_eq(&first, &asked(7)));
    }
}
