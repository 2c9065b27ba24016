//! `make bench [TABLE=name]`: makes the tables, prints them, and writes `target/bench/NAME.json`. The exit status is not 0 if a
//! table could not be made; a bar that was not reached is in the table and is no failure of the run.

use anyhow::{Context as _, bail};
use moor_lab::Bins;
use moor_lab::bench::{
    ALL, Lab, NODES, Place, READS, RECORD, REPLAY, TABLES, WRAPPER, nodes, read, read_all, record, replay, run_wrapped,
};
use moor_lab::delay::{CARRIER, carry};
use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let result = match arguments.split_first() {
        Some((word, command)) if word == WRAPPER => run_wrapped(command).map(|()| true),
        Some((word, arguments)) if word == CARRIER => carry(arguments).map(|()| true),
        Some((word, arguments)) if word == READS => read(arguments).map(|()| true),
        Some((word, arguments)) if word == ALL => read_all(arguments).map(|()| true),
        Some((word, arguments)) if word == NODES => nodes(arguments).map(|()| true),
        Some((word, arguments)) if word == REPLAY => replay(arguments).map(|()| true),
        Some((word, arguments)) if word == RECORD => record(arguments).map(|()| true),
        _ => tables(&arguments),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Makes the tables that are named, or all; `false` if one could not be made.
fn tables(wanted: &[OsString]) -> anyhow::Result<bool> {
    if let Some(unknown) = wanted.iter().find(|wanted| !TABLES.iter().any(|(name, _)| wanted.as_os_str() == *name)) {
        let known: Vec<_> = TABLES.iter().map(|(name, _)| *name).collect();
        bail!("there is no table '{}': there are {}", unknown.display(), known.join(", "));
    }
    let bins = Bins::find()?;
    let place = Place::take(&bins.dir.parent().context("the programs have no folder above")?.join("bench"))?;
    let bench = &place.dir;
    let mut all_made = true;
    for (name, make) in TABLES.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| w == name)) {
        let cache = bench.join("cache");
        std::fs::create_dir_all(&cache).with_context(|| format!("making '{}'", cache.display()))?;
        // On the same file system as the cache: not in memory, where writing costs nothing.
        let dir = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(bench).context("making a folder")?;
        let lab = Lab { bins: bins.clone(), dir: dir.path(), cache };
        match make(&lab) {
            Ok(table) => {
                table.write(bench)?;
                println!("{}", table.markdown());
                if !table.is_ok() {
                    eprintln!("bench: table {name}: a bar was not reached");
                }
            }
            Err(error) => {
                eprintln!("bench: table {name} could not be made: {error:#}");
                all_made = false;
            }
        }
    }
    Ok(all_made)
}
