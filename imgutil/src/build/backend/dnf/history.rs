//! What dnf writes down of the installation: which packages somebody asked for. That stays in the image; what is of this build alone
//! goes: its command line, who gave it, and, if nothing in the image is to be newer than a given moment, its time.

use super::super::Context;
use super::super::rpm;
use super::TOOL;
use crate::build::BuildError;
use crate::build::output::NoMeaning;
use crate::build::tree::Tree;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};

/// The database of the fourth dnf. The fifth has another in another place; it was never run here.
const DATABASE: &str = "/var/lib/dnf/history.sqlite";
/// Its log of changes that are not in the database yet (sqlite.org/wal.html), and an index of that.
const LOG: &str = "/var/lib/dnf/history.sqlite-wal";
const LOG_INDEX: &str = "/var/lib/dnf/history.sqlite-shm";

/// Makes one file of database and log, without what is of one build alone and without what deleted rows have left.
const TIDY: &str = "\
import sqlite3, sys
path, seconds = sys.argv[1:]
database = sqlite3.connect(path, isolation_level=None)
database.execute('PRAGMA journal_mode = DELETE')
database.execute(\"UPDATE trans SET cmdline = 'imgutil build', user_id = 0\")
if seconds:
    database.execute('UPDATE trans SET dt_begin = ?, dt_end = ?', [int(seconds)] * 2)
database.execute('VACUUM')
database.close()
";

/// The interpreter's usual name.
const PYTHON: &str = "/usr/bin/python3";
/// So much of a first line is read.
const LINE_LIMIT: u64 = 256;

/// Tidies the history in the new tree, if there is one.
pub(super) fn tidy(context: &mut Context<'_, '_>) -> Result<(), BuildError> {
    let root = context.work.root();
    let tree = Tree::open(&root)?;
    // In a copy: a link of the tree's could lead whoever opens it by path out of the tree.
    let copy = context.work.temporary().join("history.sqlite");
    if !take_out(&tree, DATABASE, &copy)? {
        return Ok(());
    }
    take_out(&tree, LOG, &copy.with_extension("sqlite-wal"))?;
    let mut command = interpreter();
    // Alone: no module of the folder that this was started in, where recipes come from.
    command.extend(["-I", "-c", TIDY].map(OsString::from));
    command.push(copy.clone().into());
    command.push(context.epoch.map_or_else(String::new, |seconds| seconds.to_string()).into());
    let (succeeded, tail) = rpm::run(context, &root, &mut NoMeaning, command, None)?;
    if !succeeded {
        return Err(rpm::failed(context.work, "tidying dnf's history", tail));
    }
    for path in [LOG, LOG_INDEX] {
        tree.remove(path)?;
    }
    let mut tidied = File::open(&copy).map_err(|error| BuildError::io("read", &copy, error))?;
    tree.write(DATABASE, 0o644, (0, 0), &mut tidied)
}

/// Copies a file of the tree to `place`. `false` if there is none.
fn take_out(tree: &Tree, path: &str, place: &std::path::Path) -> Result<bool, BuildError> {
    let Some(mut file) = tree.open_to_read(path)? else { return Ok(false) };
    let failed = |error| BuildError::io("write", place, error);
    let mut copy = File::create(place).map_err(failed)?;
    std::io::copy(&mut file, &mut copy).map_err(failed)?;
    Ok(true)
}

/// What dnf runs on, by its first line: the fourth is written in Python, whose library reads such databases.
fn interpreter() -> Vec<OsString> {
    let mut line = String::new();
    let read = File::open(TOOL).and_then(|file| BufReader::new(file.take(LINE_LIMIT)).read_line(&mut line));
    match line.strip_prefix("#!").filter(|_| read.is_ok()) {
        Some(words) if !words.trim().is_empty() => words.split_whitespace().map(OsString::from).collect(),
        _ => vec![PYTHON.into()],
    }
}
