#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratablk_fuzz::qcow2_journal(data));
