//! Times of an image that is to be the same whenever it is built: nothing in it is newer than a given moment.

use super::BuildError;
use super::tree::Tree;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT, utimensat};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

const SECONDS_PER_DAY: i64 = 86_400;

/// Sets back everything in `tree`, whose root is `root`, that is newer than `seconds` after 1970.
pub(super) fn apply(tree: &Tree, root: &Path, seconds: i64) -> Result<(), BuildError> {
    for path in ["/etc/shadow", "/etc/shadow-"] {
        let text = tree.read_text(path)?;
        if !text.is_empty() {
            tree.rewrite(path, &shadow_not_after(&text, seconds / SECONDS_PER_DAY))?;
        }
    }
    set_back(root, seconds)
}

/// Day of the last password change (shadow(5), field 3): the day a package made its user, for most.
fn shadow_not_after(text: &str, day: i64) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let mut fields: Vec<&str> = line.split(':').collect();
        let limit = day.to_string();
        if fields.get(2).and_then(|field| field.parse::<i64>().ok()).is_some_and(|changed| changed > day) {
            fields[2] = &limit;
        }
        out.push_str(&fields.join(":"));
        out.push('\n');
    }
    out
}

/// Modification times of `path` and all below it; symbolic links are not followed, so nothing outside is touched.
fn set_back(path: &Path, seconds: i64) -> Result<(), BuildError> {
    let failed = |error| BuildError::io("set the time of", path, error);
    let metadata = path.symlink_metadata().map_err(failed)?;
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path).map_err(failed)? {
            set_back(&entry.map_err(failed)?.path(), seconds)?;
        }
    }
    // Fractions of the second itself are newer, too.
    if metadata.mtime() > seconds || (metadata.mtime() == seconds && metadata.mtime_nsec() > 0) {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: 0 },
        };
        utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_newer_and_what_is_older_stays() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        let outside = scratch.path().join("outside");
        std::fs::write(&outside, "x").unwrap();
        let before = outside.metadata().unwrap().mtime();
        std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
        std::fs::write(root.join("etc/shadow"), "root:*:20700:0:99999:7:::\nold:!:10:0:::::\nnone:!::::::\n").unwrap();
        std::fs::write(root.join("old"), "x").unwrap();
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1000);
        std::fs::File::open(root.join("old")).unwrap().set_modified(old).unwrap();

        let seconds = 1_700_000_000;
        apply(&Tree::open(&root).unwrap(), &root, seconds).unwrap();
        let text = std::fs::read_to_string(root.join("etc/shadow")).unwrap();
        assert_eq!(text, "root:*:19675:0:99999:7:::\nold:!:10:0:::::\nnone:!::::::\n");
        for path in ["", "etc", "etc/shadow", "link"] {
            let metadata = root.join(path).symlink_metadata().unwrap();
            assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (seconds, 0), "{path}");
        }
        assert_eq!(root.join("old").metadata().unwrap().mtime(), 1000);
        assert_eq!(outside.metadata().unwrap().mtime(), before);
    }
}
