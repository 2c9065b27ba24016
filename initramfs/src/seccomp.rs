//! Which system calls the process that serves the root may make, once it serves: those that reading from servers, answering FUSE and writing
//! its own state take. Every test of a mount in the background runs behind it. No program is started, nothing is mounted, no file is opened but in directories that
//! are open, no memory becomes code.
//!
//! A call that is not on the list fails with EPERM and does not end the process. It serves the root file system: a call that somebody
//! forgot, in a path that no test goes, must not take the node down. What an attacker gains by trying is an error each time.

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// Allowed whatever their arguments are.
const ALLOWED: &[i64] = &[
    // Descriptors that are open, and files in directories that are.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_lseek,
    // A disk cache that is set up later than anybody waits for it.
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_openat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    // Servers, and the control socket.
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Waiting.
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    // Memory and threads of its own.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_tgkill,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getrandom,
    // Later threads drop their capabilities as the first ones did.
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The same, where the architecture has them.
#[cfg(target_arch = "x86_64")]
const ALSO_ALLOWED: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_newfstatat];
#[cfg(target_arch = "aarch64")]
const ALSO_ALLOWED: &[i64] = &[libc::SYS_newfstatat];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("the list of system calls is made for x86_64 and aarch64: look at another architecture's with strace");

/// The filter could not be put on.
#[derive(Debug, thiserror::Error)]
#[error("a filter of system calls: {0}")]
pub struct FilterError(String);

fn wrong(error: impl std::fmt::Display) -> FilterError {
    FilterError(error.to_string())
}

/// One condition on an argument.
fn rule(argument: u8, op: SeccompCmpOp, value: libc::c_int) -> Result<SeccompRule, FilterError> {
    let value = u64::try_from(value).map_err(wrong)?;
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value).map_err(wrong)?;
    SeccompRule::new(vec![condition]).map_err(wrong)
}

/// Every bit of `mask` is set, or none.
fn bits(argument: u8, mask: libc::c_int, value: libc::c_int) -> Result<SeccompRule, FilterError> {
    rule(argument, SeccompCmpOp::MaskedEq(u64::try_from(mask).map_err(wrong)?), value)
}

fn error(number: libc::c_int) -> Result<SeccompAction, FilterError> {
    u32::try_from(number).map(SeccompAction::Errno).map_err(wrong)
}

/// The list.
fn allow_list() -> Result<BpfProgram, FilterError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().chain(ALSO_ALLOWED).map(|call| (*call, Vec::new())).collect();
    // To servers only.
    rules.insert(
        libc::SYS_socket,
        vec![rule(0, SeccompCmpOp::Eq, libc::AF_INET)?, rule(0, SeccompCmpOp::Eq, libc::AF_INET6)?],
    );
    // Memory is never code.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![bits(2, libc::PROT_EXEC, 0)?]);
    }
    // Threads, never processes.
    rules.insert(libc::SYS_clone, vec![bits(0, libc::CLONE_THREAD, libc::CLONE_THREAD)?]);
    // The name of a thread, and of a piece of memory (PR_SET_VMA).
    rules.insert(
        libc::SYS_prctl,
        vec![rule(0, SeccompCmpOp::Eq, libc::PR_SET_NAME)?, rule(0, SeccompCmpOp::Eq, libc::PR_SET_VMA)?],
    );
    filter(rules, error(libc::EPERM)?, SeccompAction::Allow)
}

/// The flags of clone3 are out of a filter's reach. Where there is no such call the C library takes clone.
fn no_clone3() -> Result<BpfProgram, FilterError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    filter(rules, SeccompAction::Allow, error(libc::ENOSYS)?)
}

fn filter(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, FilterError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(wrong)?;
    SeccompFilter::new(rules, otherwise, listed, architecture).and_then(SeccompFilter::try_into).map_err(wrong)
}

/// Puts the filter on every thread of this process, and on those to come. There is no way back.
///
/// # Errors
/// The kernel has no such filters.
pub fn confine() -> Result<(), FilterError> {
    let (list, clone3) = (allow_list()?, no_clone3()?);
    // This one first: the list does not allow to put on another.
    seccompiler::apply_filter_all_threads(&clone3).map_err(wrong)?;
    seccompiler::apply_filter_all_threads(&list).map_err(wrong)
}
