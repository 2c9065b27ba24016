//! What the process that serves the root may do once it serves: nothing but that.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use moor_tether::seccomp;
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use std::fs::{File, Permissions};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

const MARK: &str = "MOOR_TETHER_TEST_CONFINED";

/// A filter stays for the life of a process: the test runs in one of its own.
#[test]
fn what_is_not_on_the_list_is_refused_and_the_process_goes_on() {
    if let Some(dir) = std::env::var_os(MARK) {
        confined(Path::new(&dir));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let name = "what_is_not_on_the_list_is_refused_and_the_process_goes_on";
    let inner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(MARK, dir.path())
        .output()
        .unwrap();
    let said = [inner.stdout, inner.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(inner.status.success() && said.contains("1 passed"), "{}: {said}", inner.status);
}

fn confined(dir: &Path) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut random = File::open("/dev/urandom").unwrap();
    // A thread that was there before has the filter too.
    let (go, told) = std::sync::mpsc::channel::<()>();
    let earlier = std::thread::spawn(move || {
        told.recv().unwrap();
        Command::new("true").status().unwrap_err().raw_os_error()
    });
    seccomp::confine().unwrap();

    // What serving takes.
    let mut bytes = [0; 16];
    random.read_exact(&mut bytes).unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.write_all(&bytes).unwrap();
    let mut got = [0; 16];
    server.read_exact(&mut got).unwrap();
    assert_eq!(got, bytes);
    assert_eq!(std::thread::spawn(|| vec![1_u8; 64 << 20].len()).join().unwrap(), 64 << 20);

    // And what it does not.
    let refused = Some(nix::libc::EPERM);
    go.send(()).unwrap();
    assert_eq!(earlier.join().unwrap(), refused);
    assert_eq!(Command::new("true").status().unwrap_err().raw_os_error(), refused);
    assert_eq!(UnixStream::connect("/nowhere").unwrap_err().raw_os_error(), refused);
    assert_eq!(std::fs::create_dir(dir.join("x")).unwrap_err().raw_os_error(), refused);
    assert_eq!(std::fs::set_permissions(dir, Permissions::from_mode(0o777)).unwrap_err().raw_os_error(), refused);
    assert_eq!(nix::mount::umount("/proc"), Err(Errno::EPERM));
    assert_eq!(nix::unistd::setuid(nix::unistd::Uid::from_raw(61_235)), Err(Errno::EPERM));
    assert_eq!(TcpListener::bind("127.0.0.1:0").unwrap_err().raw_os_error(), refused);
    let kill = nix::sys::signal::kill(nix::unistd::getpid(), None);
    assert_eq!(kill, Err(Errno::EPERM));
    let length = NonZeroUsize::new(4096).unwrap();
    code(length);
}

#[expect(unsafe_code, reason = "memory is asked for, and not got")]
fn code(length: NonZeroUsize) {
    // SAFETY: anonymous memory at a place of the kernel's choice; nothing of this process is replaced.
    let mapped =
        unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_EXEC, MapFlags::MAP_PRIVATE) };
    assert_eq!(mapped.map(drop), Err(Errno::EPERM));
}
