#![no_main]
//! See `virtionet_fuzz::framing`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtionet_fuzz::framing::run(data));
