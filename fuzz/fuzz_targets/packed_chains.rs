#![no_main]
//! Passes each input of the fuzzer to `virtionet_fuzz::packed_chains`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtionet_fuzz::packed_chains::run(data));
