#![no_main]
//! See `virtionet_fuzz::offload`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtionet_fuzz::offload::run(data));
