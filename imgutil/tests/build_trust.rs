//! `imgutil build` and an archive of apt in which something was changed after it was signed: nothing of it comes into a tree.
#![allow(missing_docs, clippy::unwrap_used)]

mod build_tree;
mod deb_archive;

use build_tree::{error, imgutil, names, scratch};
use deb_archive::{archive, signing_key};
use std::fs;
use std::path::Path;

/// Replaces a text in a file by another.
fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from}: {text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

const UNSIGNED: &str = "a repository is not signed by its key, so nothing of it was used: ";

#[test]
fn what_is_not_as_it_was_signed_is_refused_and_nothing_is_left() {
    let work = scratch();
    let home = work.path().join("gnupg");
    let key = signing_key(&home);
    let (place, logs) = (work.path().join("archive"), work.path().join("logs"));
    fs::create_dir(&logs).unwrap();
    // With packages of Debian's archive, which is what it is: a tree needs them.
    let recipe = format!(
        "base = \"minimal\"\nsecurity-mirror = \"\"\npackages = [\"own-hello\"]\n[[repository]]\nuri = \"copy:{}\"\nsuites = [\"./\"]\n\
         key = \"\"\"\n{key}\"\"\"\n",
        place.display()
    );
    fs::write(work.path().join("recipe.toml"), recipe).unwrap();
    let deb = "own-hello_2.0_all.deb";
    let flip = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let cases: [(&dyn Fn(), &[&str]); 4] = [
        (&|| replace(&place.join("InRelease"), "Suite: own", "Suite: mine"), &[UNSIGNED, "archive", "BADSIG"]),
        (&|| fs::remove_file(place.join("InRelease")).unwrap(), &[UNSIGNED, "archive", "is not signed"]),
        (&|| replace(&place.join("Packages"), "1:2.0", "1:3.0"), &["archive", "Packages is not the file that"]),
        (&|| flip(&place.join(deb)), &[deb, "is not the file that the signed index names"]),
    ];
    for (index, (change, parts)) in cases.into_iter().enumerate() {
        archive(&place, &home);
        change();
        let before = names(work.path());
        let mut command = imgutil();
        command.args(["build", "--no-cache", "-f", "recipe.toml", "tree"]).env("TMPDIR", &logs);
        let line = error(&command.current_dir(work.path()).output().unwrap(), 1);
        for part in parts {
            assert!(line.contains(part), "{index}: '{part}' is not in: {line}");
        }
        assert_eq!((names(work.path()), names(&logs)), (before, Vec::new()), "{index}");
        fs::remove_dir_all(&place).unwrap();
    }
}
