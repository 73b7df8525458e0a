#![no_main]
//! See `virtionet_fuzz::split_chains`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtionet_fuzz::split_chains::run(data));
