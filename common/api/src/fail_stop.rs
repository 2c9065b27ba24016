//! What ends a program one of whose threads panics.

/// From now on a panic ends the program, once it has said where it was: what a thread has left half done must be gone on with by nobody, and a program that is
/// started again begins with what is on disk. To be called first in `main`.
///
/// Not by a program that others stand on: `moor-tether` answers the one request with an error, and goes on.
pub fn abort_on_panic() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        say(panic);
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    /// Set in the run that ends.
    const MARK: &str = "MOOR_API_TEST_PANICS";
    /// signal(7), on all architectures that we build for.
    const SIGABRT: i32 = 6;

    #[test]
    fn a_panic_in_any_thread_is_said_and_ends_the_program() {
        if std::env::var_os(MARK).is_some() {
            abort_on_panic();
            let _ = std::thread::spawn(|| panic!("half done")).join();
            std::process::exit(0);
        }
        let name = "fail_stop::tests::a_panic_in_any_thread_is_said_and_ends_the_program";
        let mut again = Command::new(std::env::current_exe().unwrap());
        let output = again.args(["--exact", name, "--nocapture"]).env(MARK, "1").output().unwrap();
        assert_eq!(output.status.signal(), Some(SIGABRT), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("half done"), "{output:?}");
    }
}
