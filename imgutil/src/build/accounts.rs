//! Groups and users: making those of a recipe, and finding the numbers of those that an image has.

use super::BuildError;
use super::backend::Context;
use super::inside::in_tree;
use super::tree::Tree;
use crate::recipe::{Owner, User};
use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;

/// Makes the groups and users of the recipe, without passwords.
pub(super) fn make(context: &mut Context<'_, '_>, tree: &Tree) -> Result<(), BuildError> {
    let plan = context.plan;
    for group in &plan.groups {
        let mut command: Vec<OsString> = vec!["groupadd".into()];
        if let Some(gid) = group.gid {
            command.extend(["--gid".into(), gid.to_string().into()]);
        }
        if group.system {
            command.push("--system".into());
        }
        command.push(group.name.0.clone().into());
        in_tree(context, &format!("making the group '{}'", group.name.0), &command)?;
    }
    for user in &plan.users {
        in_tree(context, &format!("making the user '{}'", user.name.0), &useradd(user))?;
        if !user.ssh_keys.is_empty() {
            lay_keys(tree, user)?;
        }
    }
    Ok(())
}

fn useradd(user: &User) -> Vec<OsString> {
    let mut command: Vec<OsString> = vec!["useradd".into()];
    command.push(if user.system { "--system" } else { "--create-home" }.into());
    if let Some(uid) = user.uid {
        command.extend(["--uid".into(), uid.to_string().into()]);
    }
    if let Some(group) = &user.group {
        command.extend(["--gid".into(), group.0.clone().into()]);
    }
    if !user.groups.is_empty() {
        let names: Vec<&str> = user.groups.iter().map(|name| name.0.as_str()).collect();
        command.extend(["--groups".into(), names.join(",").into()]);
    }
    if let Some(home) = &user.home {
        command.extend(["--home-dir".into(), home.0.clone().into()]);
    }
    let usual = if user.system { "/usr/sbin/nologin" } else { "/bin/bash" };
    let shell = user.shell.as_ref().map_or_else(|| PathBuf::from(usual), |shell| shell.0.clone());
    command.extend(["--shell".into(), shell.into(), user.name.0.clone().into()]);
    command
}

fn lay_keys(tree: &Tree, user: &User) -> Result<(), BuildError> {
    let name = &user.name.0;
    let owner = Owner { user: name.clone(), group: None };
    let ids = Accounts::read(tree)?
        .owner(&owner)
        .map_err(|name| BuildError::Setting(format!("there is no user '{name}'")))?;
    let home = user.home.as_ref().map_or_else(|| PathBuf::from("/home").join(name), |home| home.0.clone());
    let mut text = String::new();
    for key in &user.ssh_keys {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}", key.0);
    }
    let directory = home.join(".ssh");
    tree.make_directory(&directory, 0o700, ids)?;
    tree.write(directory.join("authorized_keys"), 0o600, ids, &mut text.as_bytes())
}

/// The numbers of an image's users and groups (passwd(5), group(5)).
pub(super) struct Accounts {
    users: HashMap<String, (u32, u32)>,
    groups: HashMap<String, u32>,
}

impl Accounts {
    pub(super) fn read(tree: &Tree) -> Result<Self, BuildError> {
        let number = |field: Option<&&str>| field.and_then(|field| field.parse::<u32>().ok());
        let (mut users, mut groups) = (HashMap::new(), HashMap::new());
        for line in tree.read_text("/etc/passwd")?.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            if let (Some(uid), Some(gid)) = (number(fields.get(2)), number(fields.get(3))) {
                users.insert(fields[0].to_owned(), (uid, gid));
            }
        }
        for line in tree.read_text("/etc/group")?.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            if let Some(gid) = number(fields.get(2)) {
                groups.insert(fields[0].to_owned(), gid);
            }
        }
        Ok(Self { users, groups })
    }

    /// User and group number of an owner; the name that there is not, otherwise.
    pub(super) fn owner(&self, owner: &Owner) -> Result<(u32, u32), String> {
        let number = owner.user.parse::<u32>().ok();
        let (uid, own_group) = match (self.users.get(&owner.user), number) {
            (Some(ids), _) => *ids,
            (None, Some(uid)) => (uid, uid),
            (None, None) => return Err(owner.user.clone()),
        };
        let Some(group) = &owner.group else { return Ok((uid, own_group)) };
        let gid = self.groups.get(group).copied().or_else(|| group.parse().ok()).ok_or_else(|| group.clone())?;
        Ok((uid, gid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_found_by_name_or_number() {
        let scratch = tempfile::tempdir().unwrap();
        std::fs::create_dir(scratch.path().join("etc")).unwrap();
        std::fs::write(
            scratch.path().join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nop:x:1000:100::/home/op:/bin/sh\n\n",
        )
        .unwrap();
        std::fs::write(scratch.path().join("etc/group"), "root:x:0:\nadm:x:4:op\n").unwrap();
        let accounts = Accounts::read(&Tree::open(scratch.path()).unwrap()).unwrap();
        for (text, expected) in [
            ("op", Ok((1000, 100))),
            ("op:adm", Ok((1000, 4))),
            ("7:8", Ok((7, 8))),
            ("7", Ok((7, 7))),
            ("nobody", Err("nobody".to_owned())),
            ("op:none", Err("none".to_owned())),
        ] {
            assert_eq!(accounts.owner(&text.parse().unwrap()), expected, "{text}");
        }
    }
}
