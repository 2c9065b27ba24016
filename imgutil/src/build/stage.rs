//! The node's files (agent, tether, initramfs module, units): checked and copied with root's ownership, ready to be planted.

use super::{BuildError, lay};
use crate::exec::Machine;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, fchown, lchown, symlink};
use std::path::{Path, PathBuf};

/// Where systemd looks for units that a package brings, in the layout of the target.
const UNIT_DIRECTORIES: [&str; 3] = ["usr/lib/systemd/system", "lib/systemd/system", "etc/systemd/system"];

/// Copies `source` (a directory in the layout of the target's root) to `stage`: everything belongs to root and is writable
/// by root alone, whoever compiled it. Programs have to be for `machine`: those of another would be found out by the first node that boots.
pub(super) fn copy(source: &Path, stage: &Path, machine: Machine) -> Result<(), BuildError> {
    let metadata = source.metadata().map_err(|error| BuildError::NodeFiles(source.to_path_buf(), error))?;
    if !metadata.is_dir() {
        return Err(BuildError::NodeFiles(source.to_path_buf(), io::ErrorKind::NotADirectory.into()));
    }
    copy_directory(source, stage, machine)
}

fn copy_directory(from: &Path, to: &Path, machine: Machine) -> Result<(), BuildError> {
    let failed = |error| BuildError::io("copy the node file", from, error);
    std::fs::create_dir(to).map_err(failed)?;
    std::fs::set_permissions(to, Permissions::from_mode(0o755)).map_err(failed)?;
    lchown(to, Some(0), Some(0)).map_err(failed)?;
    for entry in std::fs::read_dir(from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() {
            copy_directory(&path, &target, machine)?;
            continue;
        }
        if kind.is_file()
            && let Some(other) = Machine::of_file(&path).map_err(|error| BuildError::io("read", &path, error))?
            && other != machine
        {
            return Err(BuildError::NodeFilesFor { path, files: other.name, image: machine.name });
        }
        let copied = if kind.is_symlink() {
            std::fs::read_link(&path)
                .and_then(|link| symlink(link, &target))
                .and_then(|()| lchown(&target, Some(0), Some(0)))
        } else if kind.is_file() {
            copy_file(&path, &target)
        } else {
            Err(io::Error::other("it is neither a file, a directory nor a link"))
        };
        copied.map_err(|error| BuildError::io("copy the node file", &path, error))?;
    }
    Ok(())
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = std::fs::File::open(from)?;
    let mode = lay::mode_in_image(&source.metadata()?) & 0o7777;
    let mut target = std::fs::File::create_new(to)?;
    io::copy(&mut source, &mut target)?;
    fchown(&target, Some(0), Some(0))?;
    target.set_permissions(Permissions::from_mode(mode))
}

/// The units among the node's files that ask to be enabled.
pub(super) fn units_to_enable(stage: &Path) -> Result<Vec<String>, BuildError> {
    let mut units = Vec::new();
    for directory in UNIT_DIRECTORIES.map(|directory| stage.join(directory)) {
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(BuildError::io("read", directory, error)),
        };
        for entry in entries {
            let path: PathBuf = entry.map_err(|error| BuildError::io("read", &directory, error))?.path();
            // A template is enabled by whoever knows an instance.
            let name = path.file_name().and_then(|name| name.to_str()).filter(|name| !name.contains("@."));
            if let Some(name) = name
                && path.is_file()
                && std::fs::read_to_string(&path)
                    .map_err(|error| BuildError::io("read", &path, error))?
                    .lines()
                    .any(|line| line.trim() == "[Install]")
            {
                units.push(name.to_owned());
            }
        }
    }
    units.sort();
    Ok(units)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn node_files_become_roots_and_units_are_found() {
        let scratch = tempfile::tempdir().unwrap();
        let source = scratch.path().join("source");
        let units = source.join("usr/lib/systemd/system");
        std::fs::create_dir_all(&units).unwrap();
        std::fs::create_dir_all(source.join("usr/bin")).unwrap();
        std::fs::write(units.join("a.service"), "[Service]\n[Install]\nWantedBy=multi-user.target\n").unwrap();
        std::fs::write(units.join("b.service"), "[Service]\n").unwrap();
        std::fs::write(units.join("c@.service"), "[Install]\n").unwrap();
        let agent = source.join("usr/bin/moor-agent");
        std::fs::write(&agent, "x").unwrap();
        std::fs::set_permissions(&agent, Permissions::from_mode(0o6777)).unwrap();
        // As a checkout under umask 077 has it.
        std::fs::set_permissions(units.join("a.service"), Permissions::from_mode(0o600)).unwrap();
        lchown(&agent, Some(1000), Some(1000)).unwrap();
        symlink("moor-agent", source.join("usr/bin/link")).unwrap();

        let stage = scratch.path().join("stage");
        let here = Machine::of_the_host();
        copy(&source, &stage, here).unwrap();
        let metadata = stage.join("usr/bin/moor-agent").metadata().unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (0, 0, 0o755));
        let unit = stage.join(units.strip_prefix(&source).unwrap()).join("a.service");
        assert_eq!(unit.metadata().unwrap().mode() & 0o7777, 0o644);
        assert_eq!(stage.join("usr/bin/link").read_link().unwrap(), Path::new("moor-agent"));
        assert_eq!(units_to_enable(&stage).unwrap(), ["a.service"]);
        let stage = |name: &str| scratch.path().join(name);
        assert!(matches!(copy(Path::new("/no/such"), &stage("s2"), here), Err(BuildError::NodeFiles(..))));

        // A real program, of the machine that this runs on.
        std::fs::copy("/bin/true", &agent).unwrap();
        copy(&source, &stage("s3"), here).unwrap();
        let other = Machine::named(if here.name == "arm64" { "amd64" } else { "arm64" }).unwrap();
        let error = copy(&source, &stage("s4"), other).unwrap_err().to_string();
        assert!(
            error.contains(&format!("usr/bin/moor-agent' is a program for {}, and the image", here.name)),
            "{error}"
        );
    }
}
