//! The man pages in packaging/man are made from the command line's own definition. `UPDATE_MAN=1` writes them anew.

use clap::{CommandFactory as _, Parser as _};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[test]
fn man_pages_are_those_of_the_command_line() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/man");
    let made = pages();
    if std::env::var_os("UPDATE_MAN").is_some() {
        std::fs::create_dir_all(&dir).unwrap();
        for (name, text) in &made {
            std::fs::write(dir.join(name), text).unwrap();
        }
    }
    let mut kept: BTreeMap<String, String> = BTreeMap::new();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("imgutil") {
            kept.insert(name, std::fs::read_to_string(&path).unwrap());
        }
    }
    let names = |pages: &BTreeMap<String, String>| pages.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&kept), names(&made), "UPDATE_MAN=1 cargo test --test man makes them anew");
    for (name, text) in &made {
        assert_eq!(kept[name], *text, "{name} is not what the command line says: UPDATE_MAN=1 cargo test --test man");
    }
}

#[test]
fn every_command_has_an_example() {
    for command in root().get_subcommands() {
        let help = command.get_after_help().or_else(|| command.get_after_long_help());
        let text = help.map(ToString::to_string).unwrap_or_default();
        let call = format!("imgutil {} ", command.get_name());
        assert!(
            text.contains("Example") && text.contains(&call),
            "imgutil {} --help shows no example",
            command.get_name()
        );
    }
}

/// What help, man pages and documents say can be copied as it stands.
#[test]
fn examples_are_commands_that_imgutil_takes() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut texts: Vec<(String, String)> = Vec::new();
    for command in root().get_subcommands() {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        texts.push((format!("imgutil {} --help", command.get_name()), help.replace("Example: ", "Example:\n")));
    }
    for entry in std::fs::read_dir(top.join("docs")).unwrap() {
        let path = entry.unwrap().path();
        texts.push((path.display().to_string(), std::fs::read_to_string(&path).unwrap()));
    }
    // A repository is looked at as it is named.
    let work = tempfile::tempdir().unwrap();
    std::fs::create_dir(work.path().join("debs")).unwrap();
    std::fs::write(work.path().join("debs/own.deb"), "").unwrap();
    std::env::set_current_dir(work.path()).unwrap();
    for (place, text) in texts {
        let calls: Vec<&str> = text.lines().map(str::trim).filter(|line| line.starts_with("imgutil ")).collect();
        assert!(!calls.is_empty() || !place.ends_with("--help"), "{place} shows nothing to copy");
        for call in calls {
            // A pipe's other end is not ours. The words and the comments are the shell's.
            let call = call.split(" | ").next().unwrap_or_default();
            let script = format!("set -- {call}\nprintf '%s\\n' \"$@\"");
            let output = std::process::Command::new("sh").args(["-euc", &script]).output().unwrap();
            let words = String::from_utf8(output.stdout).unwrap();
            if let Err(error) = imgutil::cmd::Cli::try_parse_from(words.lines()) {
                panic!("{place}: '{call}': {error}");
            }
        }
    }
}

fn root() -> clap::Command {
    // The version changes with every release; a page that changes with it hides what else did.
    imgutil::cmd::Cli::command().version("").disable_help_subcommand(true)
}

/// One page for the program and one for each command, by file name.
fn pages() -> BTreeMap<String, String> {
    let root = root();
    let mut pages = BTreeMap::from([("imgutil.1".to_owned(), page(root.clone()))]);
    for command in root.get_subcommands() {
        let name = format!("imgutil-{}", command.get_name());
        // The name of a command lives as long as the program: clap wants it so.
        let shown: &'static str = Box::leak(name.clone().into_boxed_str());
        let usage: &'static str = Box::leak(format!("imgutil {}", command.get_name()).into_boxed_str());
        pages.insert(format!("{name}.1"), page(command.clone().name(shown).bin_name(usage)));
    }
    pages
}

fn page(command: clap::Command) -> String {
    let mut text = Vec::new();
    clap_mangen::Man::new(command)
        .date("")
        .source("Mooring")
        .manual("Mooring")
        .render(&mut text)
        .expect("writing to memory");
    String::from_utf8(text).expect("clap writes UTF-8")
}
