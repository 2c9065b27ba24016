//! Memory that nobody uses goes back to the kernel. The C library keeps what was freed, in as many heaps as there were threads: a member with ten
//! thousand nodes held three times what it needed after they were defined.
#![expect(unsafe_code, reason = "a call of the C library")]

/// Gives back what is free. Takes some milliseconds; others allocate meanwhile from other heaps.
pub(crate) fn give_back() {
    // SAFETY: malloc_trim(3) may be called at any time by any thread, and touches nothing that is allocated.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
