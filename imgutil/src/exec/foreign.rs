//! Trees of another architecture: which one a tree is for, and what runs its programs here. That is qemu's user emulation, called
//! by the kernel (`binfmt_misc`, Documentation/admin-guide/binfmt-misc.rst).
//!
//! Since kernel 6.7 a user namespace has registrations of its own: then nothing is needed but the emulator's file, and the host's
//! list is neither read nor changed. On older kernels the host must have it registered, with flag F: the emulator is opened when
//! it is registered, not looked for in the image.

use super::mounts::{Detached, During, MountError, open_below};
use super::user::install;
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::MountAttrFlags;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

/// Where the host's registrations are shown.
const REGISTERED: &str = "/proc/sys/fs/binfmt_misc";
/// As much of a program as tells its machine.
const HEADER: usize = 20;

/// A processor architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// In Debian's words, as `arm64`.
    pub name: &'static str,
    /// In qemu's, as `aarch64`.
    qemu: &'static str,
    /// `e_machine`, and whether its programs are of 64 bits and big-endian.
    elf: (u16, bool, bool),
}

const MACHINES: [Machine; 7] = [
    Machine { name: "amd64", qemu: "x86_64", elf: (62, true, false) },
    Machine { name: "arm64", qemu: "aarch64", elf: (183, true, false) },
    Machine { name: "armhf", qemu: "arm", elf: (40, false, false) },
    Machine { name: "i386", qemu: "i386", elf: (3, false, false) },
    Machine { name: "ppc64el", qemu: "ppc64le", elf: (21, true, false) },
    Machine { name: "riscv64", qemu: "riscv64", elf: (243, true, false) },
    Machine { name: "s390x", qemu: "s390x", elf: (22, true, true) },
];

/// Why programs of an architecture cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ForeignError {
    /// No emulator.
    #[error("this machine is {host} and cannot run programs for {arch} without an emulator: {command}")]
    NoEmulator {
        /// This machine.
        host: &'static str,
        /// The image's.
        arch: String,
        /// What brings it.
        command: String,
    },
    /// An emulator that the kernel does not know of.
    #[error("the emulator '{}' for {arch} is installed, but the kernel does not know of it: {command}", emulator.display())]
    NotRegistered {
        /// The image's architecture.
        arch: &'static str,
        /// The program.
        emulator: PathBuf,
        /// What registers it.
        command: String,
    },
    /// Registered in a way that works only if the emulator is in the image.
    #[error(
        "the emulator for {arch} is registered without flag F, so it would be looked for in the image ('{entry}' in \
         {REGISTERED}): {command}"
    )]
    WithoutFix {
        /// The image's architecture.
        arch: &'static str,
        /// The name of the registration.
        entry: String,
        /// What mends it.
        command: String,
    },
    /// Nothing is known of it.
    #[error("nothing is known of the architecture '{0}': known are {known}", known = MACHINES.map(|machine| machine.name).join(", "))]
    Unknown(String),
}

/// What runs the programs of an architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Runner {
    /// The processor, or what the host has registered.
    Host,
    /// An emulator that is registered in a user namespace of the command's own.
    Own(Emulator),
}

/// An emulator and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Emulator {
    machine: Machine,
    program: PathBuf,
}

impl Machine {
    /// The one called `name` in Debian's words, or in those of `uname -m`.
    pub fn named(name: &str) -> Result<Self, ForeignError> {
        MACHINES
            .into_iter()
            .find(|machine| machine.name == name || machine.qemu == name)
            .ok_or_else(|| ForeignError::Unknown(name.to_owned()))
    }

    /// Its name as `uname -m` says it.
    pub(crate) fn machine(self) -> &'static str {
        match self.qemu {
            "arm" => "armv7l",
            "i386" => "i686",
            other => other,
        }
    }

    /// This one.
    pub(crate) fn of_the_host() -> Self {
        let name = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64el",
            "riscv64" => "riscv64",
            _ => "s390x",
        };
        MACHINES.into_iter().find(|machine| machine.name == name).unwrap_or(MACHINES[0])
    }

    /// The one that a program is for (elf(5)).
    fn of_program(header: &[u8; HEADER]) -> Option<Self> {
        let (wide, big) = (header[4] == 2, header[5] == 2);
        let bytes = [header[18], header[19]];
        let number = if big { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) };
        MACHINES.into_iter().find(|machine| header.starts_with(b"\x7fELF") && machine.elf == (number, wide, big))
    }

    /// The one that a file of the host is a program for; `None` if it is no program that is known.
    pub(crate) fn of_file(path: &Path) -> std::io::Result<Option<Self>> {
        Ok(header_of(File::open(path)?).and_then(|header| Self::of_program(&header)))
    }

    /// The one that the tree behind `root` is for; `None` if it holds no program that is known.
    pub(crate) fn of_tree(root: BorrowedFd<'_>) -> Option<Self> {
        ["bin/sh", "usr/bin/env", "bin/true", "usr/lib/systemd/systemd", "sbin/init", "bin/busybox"].iter().find_map(
            |name| {
                let place = open_below(root, Path::new(name), OFlags::empty()).ok()?;
                let path = format!("/proc/self/fd/{}", place.as_raw_fd());
                let file = place_is_file(&place).then(|| File::open(path).ok()).flatten()?;
                header_of(file).and_then(|header| Self::of_program(&header))
            },
        )
    }

    /// Whether programs for `self` run on a processor of `host` by themselves.
    fn runs_on(self, host: Self) -> bool {
        self == host || matches!((self.name, host.name), ("i386", "amd64"))
    }

    /// The first bytes of its programs, and which of them count, as qemu's scripts/qemu-binfmt-conf.sh registers them.
    fn magic(self) -> ([u8; HEADER], [u8; HEADER]) {
        let (number, wide, big) = self.elf;
        let mut magic = [0; HEADER];
        magic[..4].copy_from_slice(b"\x7fELF");
        magic[4] = if wide { 2 } else { 1 };
        magic[5] = if big { 2 } else { 1 };
        magic[6] = 1;
        // Executables (2), and with the mask shared objects (3), which position-independent executables are.
        let pair = |value: u16| if big { value.to_be_bytes() } else { value.to_le_bytes() };
        magic[16..18].copy_from_slice(&pair(2));
        magic[18..].copy_from_slice(&pair(number));
        let mut mask = [0xff; HEADER];
        mask[7] = 0;
        mask[16..18].copy_from_slice(&pair(0xfffe));
        (magic, mask)
    }

    /// Finds what runs its programs. `private` says whether this kernel has registrations in user namespaces.
    pub(crate) fn runner(self) -> Result<Runner, ForeignError> {
        let host = Self::of_the_host();
        if self.runs_on(host) {
            return Ok(Runner::Host);
        }
        let registration = self.registration();
        if let Some(Registration { fixed: true, .. }) = registration {
            return Ok(Runner::Host);
        }
        let Some(program) = self.emulator() else {
            let command = install("qemu-user-static", "qemu-user-static", "qemu-linux-user");
            return Err(ForeignError::NoEmulator { host: host.name, arch: self.name.to_owned(), command });
        };
        if kernel_is_at_least(6, 7) {
            return Ok(Runner::Own(Emulator { machine: self, program }));
        }
        let again = format!(
            "{} && sudo update-binfmts --disable qemu-{qemu}; sudo update-binfmts --enable qemu-{qemu} (or, with systemd: \
             sudo systemctl restart systemd-binfmt)",
            install("binfmt-support", "qemu-user-binfmt", "qemu-linux-user"),
            qemu = self.qemu
        );
        match registration {
            Some(Registration { name, .. }) => {
                Err(ForeignError::WithoutFix { arch: self.name, entry: name, command: again })
            }
            None if !Path::new(REGISTERED).join("register").exists() => Err(ForeignError::NotRegistered {
                arch: self.name,
                emulator: program,
                command: format!("sudo mount -t binfmt_misc binfmt_misc {REGISTERED} && {again}"),
            }),
            None => Err(ForeignError::NotRegistered { arch: self.name, emulator: program, command: again }),
        }
    }

    /// An emulator that needs nothing of the image: a static program.
    fn emulator(self) -> Option<PathBuf> {
        ["/usr/bin", "/usr/local/bin"]
            .iter()
            .flat_map(|directory| {
                [format!("{directory}/qemu-{}-static", self.qemu), format!("{directory}/qemu-{}", self.qemu)]
            })
            .map(PathBuf::from)
            .find(|path| is_static(path))
    }

    /// What the host has registered for it.
    fn registration(self) -> Option<Registration> {
        let entries = std::fs::read_dir(REGISTERED).ok()?;
        let mut found: Vec<Registration> = entries
            .flatten()
            .filter_map(|entry| {
                let text = std::fs::read_to_string(entry.path()).ok()?;
                let fixed = self.is_served_by(&text)?;
                Some(Registration { name: entry.file_name().to_string_lossy().into_owned(), fixed })
            })
            .collect();
        found.sort_by_key(|registration| !registration.fixed);
        found.into_iter().next()
    }

    /// Whether a registration, in the kernel's words, is for this architecture, and then whether it has flag F.
    fn is_served_by(self, text: &str) -> Option<bool> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if text.lines().next() != Some("enabled") || field("offset").is_some_and(|offset| offset != "0") {
            return None;
        }
        let magic = hex::decode(field("magic")?).ok()?;
        let mask = field("mask").and_then(|mask| hex::decode(mask).ok()).unwrap_or_else(|| vec![0xff; magic.len()]);
        let (own, _) = self.magic();
        let matches = magic.len() <= HEADER
            && magic.len() > 18
            && magic.iter().zip(&mask).zip(own).all(|((magic, mask), own)| magic & mask == own & mask);
        matches.then(|| field("flags:").is_some_and(|flags| flags.contains('F')))
    }
}

/// An entry of the host's list.
struct Registration {
    name: String,
    /// Flag F: the emulator was opened when it was registered.
    fixed: bool,
}

impl Emulator {
    /// Registers it in the user namespace of this process. It stays as long as what is returned, so PID 1 keeps that.
    pub(super) fn register(&self) -> Result<Detached, MountError> {
        let closed =
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let list = Detached::new("binfmt_misc", &[], closed)?;
        let register = openat(list.fd(), "register", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .during("open the list of binary formats", "register")?;
        File::from(register).write_all(&self.line()).during("register the emulator", &self.program)?;
        Ok(list)
    }

    /// `:name:M:offset:magic:mask:interpreter:flags`. O and C let programs that the user may not read, and setuid ones, run; P gives
    /// them their own name (qemu 6 and later understand it).
    fn line(&self) -> Vec<u8> {
        use std::os::unix::ffi::OsStrExt as _;
        let escaped =
            |bytes: [u8; HEADER]| bytes.iter().fold(String::new(), |text, byte| format!("{text}\\x{byte:02x}"));
        let (magic, mask) = self.machine.magic();
        let mut line = format!(":qemu-{}:M:0:{}:{}:", self.machine.qemu, escaped(magic), escaped(mask)).into_bytes();
        line.extend_from_slice(self.program.as_os_str().as_bytes());
        line.extend_from_slice(b":POCF");
        line
    }
}

fn place_is_file(place: &std::os::fd::OwnedFd) -> bool {
    use std::os::fd::AsFd as _;
    super::mounts::file_type(place.as_fd()).is_ok_and(|kind| kind == rustix::fs::FileType::RegularFile)
}

fn header_of(mut file: File) -> Option<[u8; HEADER]> {
    let mut header = [0; HEADER];
    file.read_exact(&mut header).ok().map(|()| header)
}

/// Whether a program is there and asks for no loader (`PT_INTERP`), which would be looked for in the image. 64-bit little-endian
/// programs only: hosts are that.
fn is_static(path: &Path) -> bool {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(4096).read_to_end(&mut start));
    let number = |offset: usize, length: usize| -> Option<usize> {
        let bytes = start.get(offset..offset.checked_add(length)?)?;
        usize::try_from(bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte))).ok()
    };
    let has_loader = || {
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let mut found = false;
        for index in 0..count {
            found |= number(table.checked_add(index * size)?, 4)? == 3;
        }
        Some(found)
    };
    read.is_ok() && start.starts_with(b"\x7fELF\x02\x01") && has_loader() == Some(false)
}

fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let Ok(system) = nix::sys::utsname::uname() else { return false };
    let release = system.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    numbers.next().zip(numbers.next()).is_some_and(|version| version >= (major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// /usr/share/binfmts of Debian's qemu-user-static 7.2, as the kernel shows it.
    const ARM64: &str = "enabled\ninterpreter /usr/libexec/qemu-binfmt/aarch64-binfmt-P\nflags: POCF\noffset 0\n\
        magic 7f454c460201010000000000000000000200b700\nmask ffffffffffffff00fffffffffffffffffeffffff\n";

    #[test]
    fn a_registration_is_recognised_by_what_it_matches() {
        let arm = Machine::named("arm64").unwrap();
        assert_eq!(arm.is_served_by(ARM64), Some(true));
        assert_eq!(arm.is_served_by(&ARM64.replace("POCF", "PO")), Some(false));
        assert_eq!(arm.is_served_by(&ARM64.replace("enabled", "disabled")), None);
        assert_eq!(Machine::named("riscv64").unwrap().is_served_by(ARM64), None);
        assert!(Machine::named("vax").unwrap_err().to_string().contains("known are amd64, arm64"));
        let emulator = Emulator { machine: arm, program: PathBuf::from("/usr/bin/qemu-aarch64-static") };
        assert_eq!(
            String::from_utf8(emulator.line()).unwrap(),
            ":qemu-aarch64:M:0:\\x7f\\x45\\x4c\\x46\\x02\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\xb7\\x00:\
             \\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff:\
             /usr/bin/qemu-aarch64-static:POCF"
        );
    }

    #[test]
    fn programs_tell_their_machine() {
        for machine in MACHINES {
            let (header, _) = machine.magic();
            assert_eq!(Machine::of_program(&header), Some(machine));
        }
        assert_eq!(Machine::of_program(b"#!/bin/sh -e       \n"), None);
        assert_eq!(
            header_of(File::open("/proc/self/exe").unwrap()).and_then(|header| Machine::of_program(&header)),
            Some(Machine::of_the_host())
        );
        assert!(!is_static(Path::new("/usr/bin/env")) && !is_static(Path::new("/etc/passwd")));
        assert!(kernel_is_at_least(5, 10) && !kernel_is_at_least(99, 0));
    }
}
