//! Small RPM repositories made by the tests themselves: packages by `rpmbuild`, keys by gpg, indexes by `createrepo_c`, signatures of
//! both by the keys that a test wants.
#![allow(dead_code, unreachable_pub)] // each test program uses a part
#![allow(clippy::unwrap_used)]

#[path = "../common/tied.rs"]
#[allow(clippy::duplicate_mod)] // shared with the other folders of helpers
mod tied;

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tied::tied;

/// A package to be made.
#[derive(Clone, Copy)]
pub struct Package {
    pub name: &'static str,
    /// Version and release.
    pub version: (&'static str, &'static str),
    /// Lines of its part of the spec file: dependencies, epoch.
    pub header: &'static str,
    /// Path, content, and mode, user, group.
    pub files: &'static [(&'static str, &'static str, &'static str)],
    /// Script sections.
    pub scripts: &'static str,
}

impl Package {
    /// A package without anything in it.
    pub const fn empty(name: &'static str) -> Self {
        Self { name, version: ("1", "1"), header: "", files: &[], scripts: "" }
    }

    /// The name of its file.
    pub fn file(&self) -> String {
        format!("{}-{}-{}.noarch.rpm", self.name, self.version.0, self.version.1)
    }
}

fn run<S: AsRef<OsStr>>(command: &mut Command, args: impl IntoIterator<Item = S>) -> Vec<u8> {
    let output = command.args(args).stdin(Stdio::null()).output().unwrap();
    let shown = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {shown}");
    output.stdout
}

/// A key pair of gpg's in a home of its own, whose path is short: a socket's name has 107 bytes.
pub struct Key {
    home: tempfile::TempDir,
}

impl Key {
    pub fn new() -> Self {
        let key = Self { home: tempfile::Builder::new().prefix("rpm-key-").tempdir_in("/tmp").unwrap() };
        run(&mut key.gpg(), ["--passphrase", "", "--quick-generate-key", "tests", "rsa2048", "sign", "never"]);
        key
    }

    fn gpg(&self) -> Command {
        let mut gpg = tied("gpg");
        gpg.env("GNUPGHOME", self.home.path()).args(["--batch", "--quiet", "--yes"]);
        gpg
    }

    /// Writes the public key.
    pub fn export(&self, path: &Path) {
        std::fs::write(path, run(&mut self.gpg(), ["--armor", "--export"])).unwrap();
    }

    /// Signs packages.
    pub fn sign(&self, packages: &[PathBuf]) {
        let mut sign = tied("rpmsign");
        sign.env("GNUPGHOME", self.home.path());
        sign.args(["--define", "__gpg /usr/bin/gpg", "--define", "_gpg_name tests", "--addsign"]);
        run(&mut sign, packages);
    }

    /// Signs a repository's index.
    pub fn sign_index(&self, repository: &Path) {
        let index = repository.join("repodata/repomd.xml");
        run(self.gpg().args(["--armor", "--detach-sign"]), [&index]);
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        let _ = Command::new("gpgconf").env("GNUPGHOME", self.home.path()).args(["--kill", "all"]).status();
    }
}

/// Makes packages, not signed, in `directory`.
pub fn build(directory: &Path, packages: &[Package]) {
    let work = tempfile::Builder::new().prefix("test-rpm-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // Writing to a String cannot fail.
    let mut spec =
        "%global debug_package %{nil}\n%global __os_install_post %{nil}\n%global _binary_payload w1.zstdio\n\
                    Name: unused\nVersion: 1\nRelease: 1\nSummary: unused\nLicense: none\nBuildArch: noarch\n\
                    AutoReqProv: no\n%description\nunused\n"
            .to_owned();
    for package in packages {
        let Package { name, version: (version, release), header, scripts, .. } = package;
        let _ = write!(
            spec,
            "%package -n {name}\nVersion: {version}\nRelease: {release}\nSummary: {name}\nAutoReqProv: no\n{header}\n\
             %description -n {name}\n{name}\n%files -n {name}\n"
        );
        for (path, content, attributes) in package.files {
            let place = work.path().join(format!("root{path}"));
            std::fs::create_dir_all(place.parent().unwrap()).unwrap();
            std::fs::write(&place, content).unwrap();
            let _ = writeln!(spec, "%attr({attributes}) {path}");
        }
        let _ = writeln!(spec, "{scripts}");
    }
    let path = work.path().join("packages.spec");
    std::fs::write(&path, spec).unwrap();
    let define = |name: &str, value: String| ["--define".to_owned(), format!("{name} {value}")];
    let (top, out) = (work.path().display(), directory.display());
    std::fs::create_dir_all(directory).unwrap();
    let mut rpmbuild = tied("rpmbuild");
    rpmbuild.args(["-bb", "--noclean", "--buildroot"]).arg(work.path().join("root"));
    rpmbuild.args(define("_topdir", top.to_string())).args(define("_rpmdir", out.to_string()));
    rpmbuild.args(define("_dbpath", format!("{top}/db")));
    rpmbuild.args(define("_rpmfilename", "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm".to_owned()));
    run(&mut rpmbuild, [&path]);
}

/// All package files of a directory.
pub fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|end| end == "rpm")).collect()
}

/// Makes the index of a repository.
pub fn index(directory: &Path) {
    run(&mut tied("createrepo_c"), [OsStr::new("--quiet"), directory.as_os_str()]);
}

/// A repository whose packages and index `key` has signed.
pub fn signed(directory: &Path, packages: &[Package], key: &Key) {
    build(directory, packages);
    key.sign(&files(directory));
    index(directory);
    key.sign_index(directory);
}

/// A description of an operating system with one repository.
pub fn describe(work: &Path, backend: &str, uri: &str, key: &Path, more: &str) {
    let text = format!(
        "name = \"own-1\"\nfamily = \"{}\"\nrelease = \"1\"\nmirror = \"{uri}\"\nservices = {{ node = [] }}\n{more}\n\
         [packages]\nminimal = [\"base\"]\nnode = []\n\
         [[repository]]\nname = \"main\"\nuri = \"{{mirror}}\"\nkey = \"{}\"\nkey-package = \"none\"\n",
        if backend == "dnf" { "el-9" } else { "suse-15" },
        key.display()
    );
    std::fs::write(work.join("os.toml"), text).unwrap();
    std::fs::create_dir_all(work.join("logs")).unwrap();
}

/// A web server for a directory; it ends with this.
pub struct Server {
    child: Child,
    pub url: String,
}

impl Server {
    pub fn start(directory: &Path) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let child = tied("python3")
            .args(["-m", "http.server", "--bind", "127.0.0.1", "--directory"])
            .arg(directory)
            .arg(port.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(std::time::Instant::now() < deadline, "the web server does not answer");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Self { child, url: format!("http://127.0.0.1:{port}") }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
