//! libtss2 writes warnings about ordinary refusals of a TPM to standard error, which is the console of a booting node. It knows one
//! way to be quiet: an environment variable, read when it first wants to write.
#![allow(unsafe_code)]

/// Silences libtss2 (`TSS2_LOG=all+none`), unless somebody who looks for a fault has set the variable. Call it first in `main`: once
/// other threads run, it does nothing.
pub fn silence_libtss2() {
    const VARIABLE: &str = "TSS2_LOG";
    if std::env::var_os(VARIABLE).is_some() {
        return;
    }
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads == 1 {
        // SAFETY: this thread is the only one of the process, so that nobody reads the environment meanwhile.
        unsafe { std::env::set_var(VARIABLE, "all+none") };
    }
}
