//! A small archive of Debian packages, signed by a key of the test's own.
#![allow(dead_code, unreachable_pub)] // each test program uses a part
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

/// A key pair of the test's own, in a directory of `gpg`: its armoured public key.
pub fn signing_key(home: &Path) -> String {
    std::fs::create_dir(home).unwrap();
    std::fs::set_permissions(home, std::fs::Permissions::from_mode(0o700)).unwrap();
    let gpg = |args: &[&str]| {
        let output =
            Command::new("gpg").args(["--batch", "--quiet", "--homedir"]).arg(home).args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    gpg(&["--passphrase", "", "--quick-generate-key", "archive@test", "ed25519", "sign", "never"]);
    let key = gpg(&["--armor", "--export", "archive@test"]);
    // The agent that gpg started would outlive the test.
    drop(Command::new("gpgconf").arg("--homedir").arg(home).args(["--kill", "all"]).status());
    key
}

/// An archive of one package, `own-hello`, signed by the key in `home`.
pub fn archive(directory: &Path, home: &Path) {
    unsigned_archive(directory, ("own-hello", "2.0"), "own");
    let script = format!(
        "apt-ftparchive -o APT::FTPArchive::Release::Suite=own release . > ../Release && mv ../Release . && \
         gpg --batch --quiet --homedir {0} --clearsign -o InRelease Release && gpgconf --homedir {0} --kill all",
        home.display()
    );
    shell(directory, &script);
}

/// An archive of one package that puts its file into `/usr/share`. Nobody has signed anything.
pub fn unsigned_archive(directory: &Path, (package, version): (&str, &str), file: &str) {
    std::fs::create_dir_all(directory.join("p/DEBIAN")).unwrap();
    std::fs::create_dir_all(directory.join("p/usr/share")).unwrap();
    std::fs::write(directory.join("p/usr/share").join(file), format!("{file}\n")).unwrap();
    let control =
        format!("Package: {package}\nVersion: 1:{version}\nArchitecture: all\nMaintainer: t <t@t>\nDescription: t\n");
    std::fs::write(directory.join("p/DEBIAN/control"), control).unwrap();
    let script =
        format!("dpkg-deb --build p {package}_{version}_all.deb && rm -r p && apt-ftparchive packages . > Packages");
    shell(directory, &script);
}

fn shell(directory: &Path, script: &str) {
    let output = Command::new("sh").args(["-ec", script]).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
