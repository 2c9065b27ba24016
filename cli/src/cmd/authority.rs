//! `moor authority …`

use crate::args::{self, Authority};
use crate::output;
use moor_api::admin::{
    AuthorityInfo, AuthorityKind, AuthorityRetired, AuthorityRotated, AuthorityState, AuthorityView, RetireRequest,
    SshAuthorityInfo, SshRole,
};
use moor_api::client::admin::AdminClient;
use std::process::ExitCode;

/// Names in one line.
const MAX_NAMES: usize = 20;

/// What is to be done about boot files and bundles that were made before; it is no error, so it goes to standard error beside the answer.
const MAKE_ANEW: &str = "make boot files that lie elsewhere than on members anew (`moor profile boot-files`), and give remote administrators the \
                         new bundle (`moor site --bundle`)";

pub(crate) async fn run(client: &mut AdminClient, command: Authority, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Authority::Show => {
            let view = client.authority().await?;
            if json {
                output::json(&view)?;
            } else {
                for line in describe(&view) {
                    output::line(line)?;
                }
            }
        }
        Authority::Rotate { kind } => match kind.into() {
            AuthorityKind::X509 => {
                let rotated = client.rotate_authority().await?;
                is_rotated(&rotated, "authority", "trust bundle", json)?;
                eprintln!("now {MAKE_ANEW}; then `moor authority retire`");
            }
            AuthorityKind::Ssh(role) => {
                let rotated = client.rotate_ssh_authority(role).await?;
                is_rotated(&rotated, &format!("SSH {role} authority"), "SSH version", json)?;
                eprintln!("now {}; then `moor authority retire ssh-{role}`", give_out(role));
            }
        },
        Authority::Cancel => {
            let cancelled = client.cancel_authority().await?;
            if json {
                output::json(&cancelled)?;
            } else {
                output::line(format_args!(
                    "authority {} is trusted no more: trust bundle {} is without it",
                    cancelled.number, cancelled.version
                ))?;
            }
            eprintln!(
                "boot files and bundles that were made meanwhile stay good, and trust it until they are made anew"
            );
        }
        Authority::Retire { kind, force } => {
            let request = RetireRequest { force };
            let (retired, what, who, until) = match kind.into() {
                AuthorityKind::X509 => {
                    let until = "left behind, until they boot with new boot files";
                    (client.retire_authority(&request).await?, "authority".to_owned(), "members", until)
                }
                AuthorityKind::Ssh(role) => {
                    let until = "left behind, until they run and have heard of it";
                    let retired = client.retire_ssh_authority(role, &request).await?;
                    (retired, format!("SSH {role} authority"), "nodes", until)
                }
            };
            is_retired(&retired, &what, who, json)?;
            for (what, nodes) in [
                (until, &retired.left_behind),
                (
                    "booted with a bundle that has the old authority alone; if that came out of boot files, make them anew",
                    &retired.old_boot_files,
                ),
            ] {
                if !nodes.is_empty() {
                    eprintln!("moor: warning: {what}: {}", names(nodes));
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl From<args::AuthorityKind> for AuthorityKind {
    fn from(kind: args::AuthorityKind) -> Self {
        match kind {
            args::AuthorityKind::X509 => Self::X509,
            args::AuthorityKind::SshHost => Self::Ssh(SshRole::Host),
            args::AuthorityKind::SshUser => Self::Ssh(SshRole::User),
        }
    }
}

/// What whoever logs in has to do between the two steps.
fn give_out(role: SshRole) -> &'static str {
    match role {
        SshRole::Host => "give whoever logs in to nodes the new `known_hosts` lines (`moor site --known-hosts`)",
        SshRole::User => "certify users by the new authority",
    }
}

fn is_rotated(rotated: &AuthorityRotated, what: &str, version: &str, json: bool) -> anyhow::Result<()> {
    if json {
        return output::json(rotated);
    }
    output::line(format_args!(
        "{what} {} is there, and {version} {} has it: `moor authority show` says who has acknowledged that",
        rotated.number, rotated.version
    ))?;
    Ok(())
}

fn is_retired(retired: &AuthorityRetired, what: &str, who: &str, json: bool) -> anyhow::Result<()> {
    if json {
        return output::json(retired);
    }
    let number = retired.number;
    if retired.waits_for.is_empty() {
        output::line(format_args!("{what} {number} is retired, and trusted no more"))?;
    } else {
        output::line(format_args!(
            "{what} {number} is retired; it is trusted until these {who} show the new one: {}",
            names(&retired.waits_for)
        ))?;
    }
    Ok(())
}

fn names<T: ToString>(nodes: &[T]) -> String {
    let shown = nodes.iter().take(MAX_NAMES).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if nodes.len() > MAX_NAMES { format!("{shown} and {} more", nodes.len() - MAX_NAMES) } else { shown }
}

fn authority(info: &AuthorityInfo) -> String {
    let state = match info.state {
        AuthorityState::InUse => "in use",
        AuthorityState::Next => "trusted, takes over with `moor authority retire`",
        AuthorityState::Retiring => "retired, goes once no member shows it",
    };
    let time = |seconds: u64| output::time_ms(seconds.saturating_mul(1000));
    format!(
        "authority {}: {state}, made {}, good until {}, SHA-256 {}",
        info.number,
        time(info.made),
        time(info.expires),
        info.fingerprint
    )
}

fn ssh_authority(info: &SshAuthorityInfo) -> String {
    let state = match (info.state, info.role) {
        (AuthorityState::InUse, _) => "in use".to_owned(),
        (AuthorityState::Next, role) => format!("trusted, takes over with `moor authority retire ssh-{role}`"),
        (AuthorityState::Retiring, _) => "retired, goes once no node shows it".to_owned(),
    };
    let made = output::time_ms(info.made.saturating_mul(1000));
    format!("SSH {} authority {}: {state}, made {made}, {}", info.role, info.number, info.fingerprint)
}

fn describe(view: &AuthorityView) -> Vec<String> {
    let mut lines: Vec<String> = view.authorities.iter().map(authority).collect();
    lines.extend(view.ssh.iter().map(ssh_authority));
    let newest = view.version;
    let acknowledged =
        |behind: usize| format!("acknowledged by {} of {} nodes", view.nodes - behind.min(view.nodes), view.nodes);
    lines.push(format!("trust bundle {newest}: {}", acknowledged(view.nodes_behind.len())));
    lines.push(format!("SSH version {}: {}", view.ssh_version, acknowledged(view.ssh_behind.len())));
    for member in &view.members {
        let behind = if member.version < newest { ", behind" } else { "" };
        lines.push(format!(
            "member {}: trust bundle {}, its certificate is from authority {}{behind}",
            member.name, member.version, member.shows
        ));
    }
    if !view.nodes_behind.is_empty() {
        lines.push(format!("nodes that have not acknowledged it: {}", names(&view.nodes_behind)));
    }
    if !view.ssh_behind.is_empty() {
        lines.push(format!("nodes that have not acknowledged the SSH version: {}", names(&view.ssh_behind)));
    }
    if !view.old_boot_files.is_empty() {
        lines.push(format!(
            "nodes that booted with a bundle without the newest authority: {}",
            names(&view.old_boot_files)
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use moor_api::admin::MemberTrust;

    #[test]
    fn what_is_shown_names_who_is_behind() {
        let info = |number, state| AuthorityInfo {
            number,
            state,
            fingerprint: format!("ab{number}"),
            made: 1,
            expires: 86_400,
        };
        let ssh = |number, state| SshAuthorityInfo {
            role: SshRole::Host,
            number,
            state,
            fingerprint: "SHA256:x".into(),
            made: 1,
        };
        let member = |name: &str, version| MemberTrust { name: name.into(), version, shows: 1 };
        let view = AuthorityView {
            version: 2,
            authorities: vec![info(1, AuthorityState::InUse), info(2, AuthorityState::Next)],
            ssh: vec![ssh(1, AuthorityState::Retiring), ssh(2, AuthorityState::InUse)],
            ssh_version: 3,
            ssh_behind: vec!["n2".parse().unwrap()],
            members: vec![member("m1", 2), member("m2", 1)],
            nodes: 30,
            nodes_behind: (1..=21).map(|number| format!("n{number}").parse().unwrap()).collect(),
            old_boot_files: vec!["n30".parse().unwrap()],
        };
        let lines = describe(&view);
        assert_eq!(
            lines[0],
            "authority 1: in use, made 1970-01-01 00:00:01, good until 1970-01-02 00:00:00, SHA-256 ab1"
        );
        assert!(lines[1].starts_with("authority 2: trusted, takes over with `moor authority retire`, "), "{lines:?}");
        assert_eq!(
            lines[2..6],
            [
                "SSH host authority 1: retired, goes once no node shows it, made 1970-01-01 00:00:01, SHA256:x",
                "SSH host authority 2: in use, made 1970-01-01 00:00:01, SHA256:x",
                "trust bundle 2: acknowledged by 9 of 30 nodes",
                "SSH version 3: acknowledged by 29 of 30 nodes",
            ]
        );
        assert!(lines[6].ends_with("from authority 1") && lines[7].ends_with("authority 1, behind"), "{lines:?}");
        assert!(lines[8].ends_with("n19, n20 and 1 more"), "{lines:?}");
        assert_eq!(lines[9], "nodes that have not acknowledged the SSH version: n2");
        assert_eq!(lines[10], "nodes that booted with a bundle without the newest authority: n30");
        assert_eq!(lines.len(), 11);
    }
}
