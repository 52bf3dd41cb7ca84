//! Arbitrary bytes as archives of torch.save: an answer or an error, in bounded memory.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sconce_checkpoint::fuzz::zip(bytes));
