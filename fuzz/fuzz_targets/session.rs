#![no_main]
//! Passes each input of the fuzzer to `virtionet_fuzz::session`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtionet_fuzz::session::run(data));
