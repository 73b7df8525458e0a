#![no_main]
//! Passes each input of the fuzzer to `virtionet_fuzz::framing`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtionet_fuzz::framing::run(data));
