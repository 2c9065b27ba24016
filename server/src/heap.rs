//! Memory that nobody uses goes back to the kernel. The allocator keeps what was freed for a while, and what a snapshot or ten thousand new nodes took
//! is not taken again soon.
#![expect(unsafe_code, reason = "a call of the allocator, for which its crate has no name without another dependency")]

use std::time::Duration;

/// What was freed is given back this often. The allocator does so when it is asked for memory next, which on an idle member may be never.
const OFTEN: Duration = Duration::from_secs(1);

// So that it is linked also where it is not the allocator: in tests of this library.
use mimalloc as _;

unsafe extern "C" {
    /// `void mi_collect(bool force)`, of mimalloc.h.
    safe fn mi_collect(force: bool);
}

/// Gives back what is free. Takes some milliseconds; others allocate meanwhile.
pub(crate) fn give_back() {
    // It may be called at any time by any thread, and touches nothing that is allocated.
    mi_collect(true);
}

/// Gives back what is free, now and then. Goes on for ever.
pub(crate) async fn tidy() {
    loop {
        tokio::time::sleep(OFTEN).await;
        // Ends early only with the runtime.
        let _ = tokio::task::spawn_blocking(give_back).await;
    }
}
