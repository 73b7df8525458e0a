#![no_main]
//! See `virtionet_fuzz::packed_chains`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtionet_fuzz::packed_chains::run(data));
