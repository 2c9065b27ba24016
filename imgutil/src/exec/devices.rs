//! Which devices a command in an image may open, whatever path or mount leads to them: a control group with a BPF device
//! program (version 2), or with a device list (version 1). The mounts of an image are `nodev` beside that; this holds where a
//! mount flag does not: for a device that was bound by name, and for what a mistake in a mount would let through.
//!
//! PID 1 stays outside of the group, so that it can take it away at the end; the command joins it before it gives up its
//! capabilities.

use super::bpf::{self, Instruction};
use super::mounts::{Detached, MountError};
use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, Stat, flock, major, minor, mkdirat, openat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Names of our groups begin so.
const PREFIX: &str = "imgutil-exec.";

// `struct bpf_cgroup_dev_ctx`, include/uapi/linux/bpf.h
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const MAKE: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

/// What may be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rule {
    kind: i32,
    major: u32,
    /// All minors of the major if `None`.
    minor: Option<u32>,
    writable: bool,
}

/// The image's own `/dev`: null, zero, full, random, urandom; tty, console, ptmx; pseudo-terminals
/// (Documentation/admin-guide/devices.txt of the kernel).
const USUAL: [Rule; 9] = [
    Rule::usual(1, Some(3)),
    Rule::usual(1, Some(5)),
    Rule::usual(1, Some(7)),
    Rule::usual(1, Some(8)),
    Rule::usual(1, Some(9)),
    Rule::usual(5, Some(0)),
    Rule::usual(5, Some(1)),
    Rule::usual(5, Some(2)),
    Rule::usual(136, None),
];

impl Rule {
    const fn usual(major: u32, minor: Option<u32>) -> Self {
        Self { kind: CHARACTER, major, minor, writable: true }
    }

    /// The rule for a device that the user binds into the image; `None` if the file is no device.
    pub(super) fn for_bind(stat: &Stat, writable: bool) -> Option<Self> {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => BLOCK,
            FileType::CharacterDevice => CHARACTER,
            _ => return None,
        };
        Some(Self { kind, major: major(stat.st_rdev), minor: Some(minor(stat.st_rdev)), writable })
    }

    /// As version 1 takes it (Documentation/admin-guide/cgroup-v1/devices.rst).
    fn line(&self) -> String {
        let kind = if self.kind == BLOCK { 'b' } else { 'c' };
        let minor = self.minor.map_or_else(|| "*".to_owned(), |minor| minor.to_string());
        format!("{kind} {}:{minor} {}", self.major, if self.writable { "rw" } else { "r" })
    }
}

/// What keeps devices away.
pub(super) enum Guard {
    /// A control group that the command joins.
    Group(Group),
    /// The kernel offers none, for this reason: `nodev` mounts alone must do.
    MountsOnly(String),
}

impl Guard {
    /// Makes the group; `bound` are devices that the user named. Call it in a cgroup namespace of one's own, as root of the host.
    pub(super) fn make(bound: &[Rule]) -> Self {
        let rules: Vec<Rule> = USUAL.iter().chain(bound).copied().collect();
        match Group::with_program(&rules) {
            Ok(group) => Self::Group(group),
            Err(program) => match Group::with_list(&rules) {
                Ok(group) => Self::Group(group),
                Err(list) => Self::MountsOnly(format!("version 2: {program}; version 1: {list}")),
            },
        }
    }

    /// Puts this process, and all it will start, into the group.
    pub(super) fn join(&self) -> io::Result<()> {
        match self {
            Self::Group(group) => group.join(),
            Self::MountsOnly(_) => Ok(()),
        }
    }

    /// Takes the group away, when no process is left in it.
    pub(super) fn remove(&self) -> io::Result<()> {
        match self {
            Self::Group(group) => group.remove(),
            Self::MountsOnly(_) => Ok(()),
        }
    }
}

/// A control group of our own, below the one this process runs in.
pub(super) struct Group {
    /// The hierarchy, seen from our cgroup namespace: its root is the group this process runs in.
    hierarchy: Detached,
    name: String,
    /// Locked while it is used, so that another `imgutil` that sweeps up leaves it alone.
    directory: OwnedFd,
}

impl Group {
    /// Version 2, with a BPF program.
    fn with_program(rules: &[Rule]) -> io::Result<Self> {
        let group = Self::below(hierarchy("cgroup2", None).map_err(io::Error::other)?)?;
        let attached = bpf::load_device_program(&assemble(rules))
            .and_then(|program| bpf::attach_device_program(group.directory.as_fd(), program.as_fd()));
        group.or_removed(attached)
    }

    /// Version 1, with a list.
    fn with_list(rules: &[Rule]) -> io::Result<Self> {
        let group = Self::below(hierarchy("cgroup", Some("devices")).map_err(io::Error::other)?)?;
        let written = group
            .write("devices.deny", "a")
            .and_then(|()| rules.iter().try_for_each(|rule| group.write("devices.allow", &rule.line())));
        group.or_removed(written)
    }

    fn or_removed(self, result: io::Result<()>) -> io::Result<Self> {
        match result {
            Ok(()) => Ok(self),
            Err(error) => {
                // The first failure is the one to report.
                let _ = self.remove();
                Err(error)
            }
        }
    }

    fn below(hierarchy: Detached) -> io::Result<Self> {
        sweep(hierarchy.fd());
        // Until it is locked, another `imgutil` that sweeps up may take a new group for a left one: then another is made.
        for _ in 0..100 {
            let mut random = [0; 8];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
            let name = format!("{PREFIX}{}", hex::encode(random));
            mkdirat(hierarchy.fd(), &name, Mode::from_raw_mode(0o755))?;
            if let Some(directory) = open_locked(hierarchy.fd(), &name)? {
                return Ok(Self { hierarchy, name, directory });
            }
        }
        Err(io::Error::other("each new control group was taken away at once"))
    }

    fn write(&self, file: &str, text: &str) -> io::Result<()> {
        let file = openat(&self.directory, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        File::from(file).write_all(text.as_bytes())
    }

    fn join(&self) -> io::Result<()> {
        self.write("cgroup.procs", "0")
    }

    fn remove(&self) -> io::Result<()> {
        // A process that has just been reaped may count for a moment.
        for _ in 0..50 {
            match unlinkat(self.hierarchy.fd(), &self.name, AtFlags::REMOVEDIR) {
                Err(Errno::BUSY) => std::thread::sleep(Duration::from_millis(10)),
                other => return Ok(other?),
            }
        }
        Err(Errno::BUSY.into())
    }
}

/// A mount of the hierarchy that nobody else sees: it works whether and wherever the host has mounted it.
fn hierarchy(kind: &str, controller: Option<&str>) -> Result<Detached, MountError> {
    let closed =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let flags: Vec<&str> = controller.into_iter().collect();
    Detached::with_flags(kind, &[], &flags, closed)
}

fn open(hierarchy: BorrowedFd<'_>, name: &str) -> rustix::io::Result<OwnedFd> {
    openat(hierarchy, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// The new group, locked; `None` if somebody who sweeps up has it or has removed it. With the lock held it stays.
fn open_locked(hierarchy: BorrowedFd<'_>, name: &str) -> io::Result<Option<OwnedFd>> {
    let directory = match open(hierarchy, name) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match flock(&directory, FlockOperation::NonBlockingLockShared) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    // The name is random: if it is there, it is this group.
    match statat(hierarchy, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(Some(directory)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Removes groups of runs that were killed together with their PID 1. Nothing depends on success.
fn sweep(hierarchy: BorrowedFd<'_>) {
    let Some(entries) = open(hierarchy, ".").ok().and_then(|listing| Dir::new(listing).ok()) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().to_str() else { continue };
        if !name.starts_with(PREFIX) {
            continue;
        }
        let Ok(group) = open(hierarchy, name) else { continue };
        // The lock is held until the group is gone: its maker sees either the lock or that it is gone.
        if flock(&group, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = unlinkat(hierarchy, name, AtFlags::REMOVEDIR);
        }
    }
}

/// The program: 1 (allow) if a rule covers kind, number and every kind of access that is asked for, else 0.
fn assemble(rules: &[Rule]) -> Vec<Instruction> {
    // BPF opcodes (Documentation/bpf/standardization/instruction-set.rst).
    const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + offset)
    const AND: u8 = 0x57;
    const SHIFT_RIGHT: u8 = 0x77;
    const COPY: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const SKIP_UNLESS: u8 = 0x55; // pc += offset if dst != immediate
    const EXIT: u8 = 0x95;
    const VERDICT: u8 = 0;
    const CONTEXT: u8 = 1;
    const ACCESS: u8 = 2;
    const KIND: u8 = 3;
    const MAJOR: u8 = 4;
    const MINOR: u8 = 5;
    let step =
        |code, to: u8, from: u8, offset, immediate| Instruction { code, registers: to | from << 4, offset, immediate };
    let number = |value: u32| i32::try_from(value).unwrap_or(-1);

    let mut program = vec![
        step(LOAD_WORD, ACCESS, CONTEXT, 0, 0),
        step(COPY, KIND, ACCESS, 0, 0),
        step(AND, KIND, 0, 0, 0xffff),
        step(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        step(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        step(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules {
        let denied = if rule.writable { MAKE } else { MAKE | WRITE };
        let mut checks = vec![(KIND, rule.kind), (MAJOR, number(rule.major))];
        checks.extend(rule.minor.map(|minor| (MINOR, number(minor))));
        // Behind each check come the later ones, four instructions that look at the access and allow, and the next rule.
        let mut left = i16::try_from(checks.len()).unwrap_or(0) + 4;
        for (register, value) in checks {
            program.push(step(SKIP_UNLESS, register, 0, left, value));
            left -= 1;
        }
        program.extend([
            step(COPY, VERDICT, ACCESS, 0, 0),
            step(AND, VERDICT, 0, 0, denied & (MAKE | READ | WRITE)),
            step(SKIP_UNLESS, VERDICT, 0, 2, 0),
            step(SET, VERDICT, 0, 0, 1),
            step(EXIT, 0, 0, 0, 0),
        ]);
    }
    program.extend([step(SET, VERDICT, 0, 0, 0), step(EXIT, 0, 0, 0, 0)]);
    program
}

#[cfg(test)]
mod tests {
    use super::super::sys;
    use super::*;
    use nix::sched::CloneFlags;
    use nix::sys::wait::{WaitStatus, waitpid};
    use std::os::unix::fs::OpenOptionsExt as _;

    /// How the kernel judges: a child joins the group and opens each device; bit n of its status says that it could open number n.
    fn judged(make: fn(&[Rule]) -> io::Result<Group>, rules: &[Rule], tries: &[(&str, bool)]) -> u8 {
        let child = sys::fork_into(|| {
            if nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWNS).is_err() {
                return 255;
            }
            let Ok(group) = make(rules) else { return 254 };
            let inner = sys::fork_into(|| {
                if group.join().is_err() {
                    return 253;
                }
                let mut could = 0;
                for (index, (path, write)) in tries.iter().enumerate() {
                    let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;
                    let opened = File::options().read(true).write(*write).custom_flags(flags).open(path);
                    could |= u8::from(opened.is_ok()) << index;
                }
                could
            });
            let Ok(inner) = inner else { return 252 };
            let Ok(WaitStatus::Exited(_, status)) = waitpid(inner, None) else { return 251 };
            if group.remove().is_err() {
                return 250;
            }
            u8::try_from(status).unwrap_or(249)
        });
        match waitpid(child.unwrap(), None).unwrap() {
            WaitStatus::Exited(_, status) => u8::try_from(status).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_kernel_keeps_devices_away_by_program_and_by_list() {
        let disk = std::fs::read_dir("/sys/class/block").unwrap().flatten().find_map(|entry| {
            let path = std::path::Path::new("/dev").join(entry.file_name());
            File::open(&path).is_ok().then(|| path.to_str().unwrap().to_owned())
        });
        let disk = disk.expect("a block device of the host that can be opened");
        let stat = rustix::fs::stat(&disk).unwrap();
        let tries = [(disk.as_str(), false), (disk.as_str(), true), ("/dev/null", true), ("/dev/kmsg", true)];
        for make in [Group::with_program, Group::with_list] {
            assert_eq!(judged(make, &USUAL, &tries), 0b0100);
            let reading: Vec<Rule> = USUAL.into_iter().chain(Rule::for_bind(&stat, false)).collect();
            assert_eq!(judged(make, &reading, &tries[..1]), 0b01);
            assert_eq!(judged(make, &reading, &[(disk.as_str(), true), ("/dev/full", true)]), 0b10);
            assert_eq!(judged(make, &[], &tries), 0);
        }
    }

    /// Children make groups at the same time, and each sweeps before; each must keep what it has made.
    #[test]
    fn groups_that_come_and_go_together_do_not_sweep_each_other_away() {
        let children: Vec<_> = (0..4)
            .map(|_| {
                sys::fork_into(|| {
                    if nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWNS).is_err() {
                        return 255;
                    }
                    for _ in 0..200 {
                        let Ok(group) = Group::with_program(&USUAL) else { return 254 };
                        if openat(&group.directory, "cgroup.procs", OFlags::WRONLY, Mode::empty()).is_err() {
                            return 253;
                        }
                        if group.remove().is_err() {
                            return 252;
                        }
                    }
                    0
                })
            })
            .collect();
        for child in children {
            let child = child.unwrap();
            assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
        }
    }

    #[test]
    fn rules_are_written_as_version_1_reads_them() {
        assert_eq!(USUAL[0].line(), "c 1:3 rw");
        assert_eq!(USUAL[8].line(), "c 136:* rw");
        assert_eq!(Rule { kind: BLOCK, major: 8, minor: Some(1), writable: false }.line(), "b 8:1 r");
    }
}
