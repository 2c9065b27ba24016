#![no_main]

#[path = "../entries/squashfs.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| entry::run(data));
