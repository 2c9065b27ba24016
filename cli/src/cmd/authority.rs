//! `moor authority …`

use crate::args::Authority;
use crate::output;
use moor_api::admin::{AuthorityInfo, AuthorityState, AuthorityView, RetireRequest};
use moor_api::client::admin::AdminClient;
use moor_api::ids::NodeName;
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
        Authority::Rotate => {
            let rotated = client.rotate_authority().await?;
            if json {
                output::json(&rotated)?;
            } else {
                output::line(format_args!(
                    "authority {} is there, and trust bundle {} has it: `moor authority show` says who has acknowledged that",
                    rotated.number, rotated.version
                ))?;
            }
            eprintln!("now {MAKE_ANEW}; then `moor authority retire`");
        }
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
        Authority::Retire { force } => {
            let retired = client.retire_authority(&RetireRequest { force }).await?;
            if json {
                output::json(&retired)?;
            } else if retired.waits_for.is_empty() {
                output::line(format_args!("authority {} is retired, and trusted no more", retired.number))?;
            } else {
                output::line(format_args!(
                    "authority {} is retired; it is trusted until these members show the new one: {}",
                    retired.number,
                    retired.waits_for.join(", ")
                ))?;
            }
            for (what, nodes) in [
                ("left behind, until they boot with new boot files", &retired.left_behind),
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

fn names(nodes: &[NodeName]) -> String {
    let shown = nodes.iter().take(MAX_NAMES).map(NodeName::as_str).collect::<Vec<_>>().join(", ");
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

fn describe(view: &AuthorityView) -> Vec<String> {
    let mut lines: Vec<String> = view.authorities.iter().map(authority).collect();
    for ssh in &view.ssh {
        let made = output::time_ms(ssh.made.saturating_mul(1000));
        lines.push(format!("SSH {} authority: made {made}, {}", ssh.role, ssh.fingerprint));
    }
    let newest = view.version;
    let acknowledged = view.nodes - view.nodes_behind.len().min(view.nodes);
    lines.push(format!("trust bundle {newest}: acknowledged by {acknowledged} of {} nodes", view.nodes));
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
    use moor_api::admin::{MemberTrust, SshAuthorityInfo};

    #[test]
    fn what_is_shown_names_who_is_behind() {
        let info = |number, state| AuthorityInfo {
            number,
            state,
            fingerprint: format!("ab{number}"),
            made: 1,
            expires: 86_400,
        };
        let member = |name: &str, version| MemberTrust { name: name.into(), version, shows: 1 };
        let view = AuthorityView {
            version: 2,
            authorities: vec![info(1, AuthorityState::InUse), info(2, AuthorityState::Next)],
            ssh: vec![SshAuthorityInfo { role: "host".into(), fingerprint: "SHA256:x".into(), made: 1 }],
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
        assert_eq!(lines[2], "SSH host authority: made 1970-01-01 00:00:01, SHA256:x");
        assert_eq!(lines[3], "trust bundle 2: acknowledged by 9 of 30 nodes");
        assert!(lines[4].ends_with("from authority 1") && lines[5].ends_with("authority 1, behind"), "{lines:?}");
        assert!(lines[6].ends_with("n19, n20 and 1 more"), "{lines:?}");
        assert_eq!(lines[7], "nodes that booted with a bundle without the newest authority: n30");
        assert_eq!(lines.len(), 8);
    }
}
