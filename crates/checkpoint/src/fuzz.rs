//! What the fuzz targets of `fuzz/` call, and a short run of it over the seeds that are checked in.

use std::path::Path;

use crate::region::Region;

/// A pickle, as distributed metadata.
pub fn pickle(bytes: &[u8]) {
    crate::torch::fuzz_metadata(bytes);
}

/// An archive of `torch.save`: records, pickle, tensors.
pub fn zip(bytes: &[u8]) {
    let region = Region::of_memory(bytes.to_vec(), Path::new("fuzz"));
    crate::torch::fuzz_archive(region);
}

/// A safetensors header.
pub fn header(bytes: &[u8]) {
    let _ = crate::hf::header::read(&Region::of_memory(bytes.to_vec(), Path::new("fuzz")));
}

/// A manifest.
pub fn manifest(bytes: &[u8]) {
    let _ = crate::format::manifest::decode(Path::new("fuzz"), bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seeds of a target, each also cut short and with bits turned, as a fuzzer begins.
    #[track_caller]
    fn seeds(target: &str, run: fn(&[u8])) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
        let mut count = 0;
        for entry in std::fs::read_dir(&dir).unwrap() {
            let seed = std::fs::read(entry.unwrap().path()).unwrap();
            run(&seed);
            let step = (seed.len() / 80).max(1);
            for at in (0..seed.len()).step_by(step) {
                run(&seed[..at]);
                for bit in [0x01, 0x80, 0xff] {
                    let mut turned = seed.clone();
                    turned[at] ^= bit;
                    run(&turned);
                }
            }
            count += 1;
        }
        assert!(count >= 3, "{} has {count} seeds", dir.display());
    }

    #[test]
    fn pickles_that_are_cut_or_turned_never_panic() {
        seeds("pickle", pickle);
    }

    #[test]
    fn archives_that_are_cut_or_turned_never_panic() {
        seeds("zip", zip);
    }

    #[test]
    fn headers_that_are_cut_or_turned_never_panic() {
        seeds("header", header);
    }

    #[test]
    fn manifests_that_are_cut_or_turned_never_panic() {
        seeds("manifest", manifest);
    }
}
