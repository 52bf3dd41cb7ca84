//! Arbitrary bytes as safetensors headers: an answer or an error, in bounded memory.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sconce_checkpoint::fuzz::header(bytes));
