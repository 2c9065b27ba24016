//! Digests of everything that a recipe brings: its own files, keys, files to lay in, the node's files.

use super::BuildError;
use super::lay;
use super::plan::{Plan, Repository};
use crate::recipe::What;
use aws_lc_rs::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::Metadata;
use std::io::Read;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// A file or directory that goes into an image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Source {
    /// Its path, from the directory of the recipe where it is below that.
    pub(super) path: String,
    /// SHA-256, hexadecimal; of a directory, over names, contents and the modes in the image of all that is in it.
    pub(super) sha256: String,
}

/// All sources of a plan, sorted.
pub(super) fn all(plan: &Plan) -> Result<Vec<Source>, BuildError> {
    let mut paths: BTreeSet<PathBuf> = plan.recipe_files.iter().cloned().collect();
    paths.extend(plan.files.iter().filter_map(|file| match &file.what {
        What::Copy(source) => Some(source.clone()),
        _ => None,
    }));
    let recipe = plan.recipe_files.last().and_then(|path| std::path::absolute(path).ok());
    let directory = recipe.as_deref().and_then(Path::parent).unwrap_or(Path::new("/"));
    let mut sources = Vec::new();
    for path in paths {
        let absolute = std::path::absolute(&path).map_err(|error| BuildError::io("find", &path, error))?;
        let shown = absolute.strip_prefix(directory).unwrap_or(&absolute);
        sources.push(Source { path: shown.display().to_string(), sha256: digest(&path, lay::mode_in_image)? });
    }
    Ok(sources)
}

/// Digest of a repository's key; a word of its own where it has none.
pub(super) fn key_digest(repository: &Repository) -> Result<String, BuildError> {
    if repository.unsigned { Ok("unsigned".to_owned()) } else { of_path(&repository.key) }
}

/// Digest of a file's content, or of a directory with everything in it.
pub(super) fn of_path(path: &Path) -> Result<String, BuildError> {
    digest(path, |metadata| metadata.permissions().mode())
}

/// Digest of what is left to read.
pub(super) fn of_reader(reader: &mut impl Read) -> std::io::Result<String> {
    let mut context = Context::new(&SHA256);
    feed(reader, &mut context)?;
    Ok(hex::encode(context.finish()))
}

/// The same, where not the modes on this host count but what `mode` makes of them.
fn digest(path: &Path, mode: fn(&Metadata) -> u32) -> Result<String, BuildError> {
    let failed = |error| BuildError::io("read", path, error);
    let mut context = Context::new(&SHA256);
    if path.metadata().map_err(failed)?.is_dir() {
        feed_directory(path, &mut context, mode).map_err(failed)?;
    } else {
        feed_file(path, &mut context).map_err(failed)?;
    }
    Ok(hex::encode(context.finish()))
}

fn feed_file(path: &Path, context: &mut Context) -> std::io::Result<()> {
    feed(&mut lay::open_file(path)?, context)
}

fn feed(reader: &mut impl Read, context: &mut Context) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(()),
            count => context.update(&buffer[..count]),
        }
    }
}

/// Every entry as kind, mode, name and, with its length before it, content; sorted by name.
fn feed_directory(path: &Path, context: &mut Context, mode: fn(&Metadata) -> u32) -> std::io::Result<()> {
    let mut names =
        std::fs::read_dir(path)?.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<Vec<_>>>()?;
    names.sort();
    for name in names {
        let path = path.join(&name);
        let metadata = path.symlink_metadata()?;
        context.update(&mode(&metadata).to_le_bytes());
        context.update(&(name.len() as u64).to_le_bytes());
        context.update(name.as_bytes());
        if metadata.is_dir() {
            feed_directory(&path, context, mode)?;
            context.update(b"\0end of directory\0");
        } else if metadata.is_symlink() {
            let target = path.read_link()?;
            context.update(&(target.as_os_str().len() as u64).to_le_bytes());
            context.update(target.as_os_str().as_bytes());
        } else if metadata.is_file() {
            context.update(&metadata.len().to_le_bytes());
            feed_file(&path, context)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_digest_for_all_that_is_in_it() {
        let make = |change: &dyn Fn(&Path)| {
            let scratch = tempfile::tempdir().unwrap();
            std::fs::create_dir(scratch.path().join("d")).unwrap();
            std::fs::write(scratch.path().join("d/a"), "1").unwrap();
            std::fs::write(scratch.path().join("b"), "2").unwrap();
            change(scratch.path());
            of_path(scratch.path()).unwrap()
        };
        let same = make(&|_| {});
        assert_eq!(make(&|_| {}), same);
        let changes: [&dyn Fn(&Path); 4] = [
            &|path| std::fs::write(path.join("d/a"), "3").unwrap(),
            &|path| std::fs::rename(path.join("d/a"), path.join("a")).unwrap(),
            &|path| std::fs::set_permissions(path.join("b"), std::fs::Permissions::from_mode(0o600)).unwrap(),
            &|path| std::os::unix::fs::symlink("b", path.join("c")).unwrap(),
        ];
        for (index, change) in changes.iter().enumerate() {
            assert_ne!(make(change), same, "change {index}");
        }
    }

    #[test]
    fn nobody_waits_for_what_a_pipe_may_bring() {
        let scratch = tempfile::tempdir().unwrap();
        let pipe = scratch.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        let error = of_path(&pipe).unwrap_err().to_string();
        assert!(error.contains("pipe'") && error.contains("neither a file, a directory nor a link"), "{error}");
        // Below a directory only its kind counts; what is laid in refuses it.
        of_path(scratch.path()).unwrap();
    }

    #[test]
    fn what_a_recipe_lays_in_is_the_same_whatever_the_umask_was() {
        let scratch = tempfile::tempdir().unwrap();
        let (directory, file) = (scratch.path().join("d"), scratch.path().join("d/file"));
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(&file, "1").unwrap();
        let with = |of_directory: u32, of_file: u32| {
            std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(of_directory)).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(of_file)).unwrap();
            digest(scratch.path(), lay::mode_in_image).unwrap()
        };
        let usual = with(0o755, 0o644);
        assert_eq!((with(0o775, 0o664), with(0o700, 0o600)), (usual.clone(), usual.clone()));
        assert_ne!(with(0o755, 0o755), usual, "a program is another thing");
    }
}
