//! `moor collective …`

use crate::args::Collective;
use crate::output;
use anyhow::Context as _;
use moor_api::admin::{
    CollectiveMember, CollectiveView, InviteRequest, Invited, MAX_UNREADABLE, MemberRequest, ReplaceRequest,
    UnreadableSecret,
};
use moor_api::client::ClientError;
use moor_api::client::admin::AdminClient;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::ExitCode;

pub(crate) async fn run(client: &mut AdminClient, command: Collective, json: bool) -> anyhow::Result<ExitCode> {
    let (action, member, force, compromised, yes) = match command {
        // They are run by another program.
        Collective::Join(_) | Collective::Recover(_) => return Ok(ExitCode::SUCCESS),
        Collective::Show => {
            let view = client.collective().await?;
            return if json { output::json(&view).map(|()| ExitCode::SUCCESS) } else { show(&view) };
        }
        Collective::Invite { name, non_voting, expires, out } => {
            let request = InviteRequest { name, voter: !non_voting, lifetime: lifetime(&expires)? };
            return invite(out.as_deref(), async || client.invite(&request).await).await;
        }
        Collective::Replace { dead, name, expires, out } => {
            let request = ReplaceRequest { member: dead, name, lifetime: lifetime(&expires)? };
            return invite(out.as_deref(), async || client.replace(&request).await).await;
        }
        Collective::RotateKey => {
            let rotated = client.rotate_key().await?;
            if json {
                output::json(&rotated)?;
            } else {
                let version = rotated.version;
                output::line(format_args!(
                    "the keys have version {version}; secrets are sealed anew in the background"
                ))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        Collective::Promote { member } => ("promote", member, false, false, true),
        Collective::Demote { member, force } => ("demote", member, force, false, true),
        Collective::Remove { member, compromised, force, yes } => ("remove", member, force, compromised, yes),
    };
    if !yes && !output::confirm(&format!("remove member '{member}' from the collective for good?"))? {
        anyhow::bail!("nothing was removed: `-y` answers the question");
    }
    client.change_member(action, &MemberRequest { member: member.clone(), force }).await?;
    output::line(format_args!("{member}: {action}d"))?;
    if action == "remove" {
        eprintln!(
            "the keys of the collective are rotated now; `moor collective show` says when all secrets are under the new ones"
        );
    }
    if compromised {
        // Made after the removal: it is for those who are left.
        let rotated = client.rotate_authority().await.with_context(|| {
            format!(
                "{member} is removed, and the authority that it has was not rotated (one that is beside that already, it has too: `moor authority \
                 cancel`); run `moor authority rotate`"
            )
        })?;
        eprintln!(
            "authority {} is there beside the one that {member} has: once `moor authority show` says that all have acknowledged it, `moor authority \
             retire`",
            rotated.number
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// `90s`, `30m`, `1h`: seconds.
fn lifetime(text: &str) -> anyhow::Result<u64> {
    let wrong = || format!("'{text}' is not a time such as 90s, 30m or 1h");
    let unit = text.chars().last().with_context(wrong)?;
    let factor = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        _ => anyhow::bail!(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().with_context(wrong)?;
    number.checked_mul(factor).with_context(wrong)
}

async fn invite(
    out: Option<&Path>,
    ask: impl AsyncFnOnce() -> Result<Invited, ClientError>,
) -> anyhow::Result<ExitCode> {
    // The file comes first: an invitation that cannot be kept is not made.
    let file = match out {
        Some(path) => {
            let mut options = std::fs::OpenOptions::new();
            options.write(true).create_new(true).mode(0o600);
            Some((path, options.open(path).with_context(|| format!("creating '{}'", path.display()))?))
        }
        None => None,
    };
    let invited = ask().await.inspect_err(|_| {
        if let Some((path, _)) = &file {
            // The empty file is of no use; the error of the call is what matters.
            let _ = std::fs::remove_file(path);
        }
    })?;
    let text = zeroize::Zeroizing::new(format!("{}\n", invited.invitation));
    let until = output::time_ms(invited.expires.saturating_mul(1000));
    if let Some((path, mut file)) = file {
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .with_context(|| format!("writing '{}'", path.display()))?;
        output::line(format_args!("the invitation is in '{}', good once, until {until}", path.display()))?;
    } else {
        eprintln!("good once, until {until}; on the new member: `moor collective join`, and paste this");
        output::line(text.trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(view: &CollectiveView) -> anyhow::Result<ExitCode> {
    for member in &view.members {
        output::line(format_args!("{}: {}", member.name, describe(member, view)))?;
    }
    output::line(levels(view))?;
    if !view.incarnation.is_first() {
        output::line(format_args!("incarnation {}: it was recovered or restored", view.incarnation))?;
    }
    for (name, expires) in &view.invitations {
        let until = output::time_ms(expires.saturating_mul(1000));
        output::line(format_args!("{name}: invited until {until}"))?;
    }
    if let Some((current, older)) = view.keys.split_last() {
        let older: Vec<String> = older.iter().map(u32::to_string).collect();
        match &older[..] {
            [] => output::line(format_args!("keys: version {current}"))?,
            _ => output::line(format_args!("keys: version {current}, secrets are left under {}", older.join(", ")))?,
        }
    }
    for UnreadableSecret { of, version, remedy } in &view.unreadable {
        output::line(format_args!("{of} does not open, and version {version} of the keys is kept for it: {remedy}"))?;
    }
    if view.unreadable.len() == MAX_UNREADABLE {
        output::line("there may be more: they are shown once these are seen to")?;
    }
    if view.majority {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("moor: warning: no majority answers: known nodes boot for a while, changes wait");
    Ok(ExitCode::FAILURE)
}

/// The collective's feature level, and who keeps it from the next one.
fn levels(view: &CollectiveView) -> String {
    let newest = view.members.iter().map(|member| member.level).max().unwrap_or(view.level);
    let old: Vec<String> = view
        .members
        .iter()
        .filter(|member| member.level < newest)
        .map(|member| format!("{} ({})", member.name, member.level))
        .collect();
    if old.is_empty() {
        return format!("feature level {}", view.level);
    }
    format!(
        "feature level {}: {newest} is used once all members run a release that knows it; upgrade {}, or remove who is gone for good",
        view.level,
        old.join(", ")
    )
}

fn describe(member: &CollectiveMember, view: &CollectiveView) -> String {
    let mut words = vec![match (member.votes, member.voter) {
        (true, true) => "voter".to_owned(),
        (false, true) => "voter, catching up".to_owned(),
        (true, false) => "voter, until it is demoted".to_owned(),
        (false, false) => "non-voting".to_owned(),
    }];
    if view.leader == Some(member.number) {
        words.push("leader".into());
    }
    if view.number == member.number {
        words.push("answers".into());
    }
    if let Some(last) = member.last {
        words.push(format!("log {last} of {}", view.last));
    }
    words.push(member.urls.join(" "));
    if !member.near.is_empty() {
        let near: Vec<String> = member.near.iter().map(ToString::to_string).collect();
        words.push(format!("near {}", near.join(" ")));
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use moor_api::ids::MemberId;
    use moor_api::trust::Incarnation;

    fn member(number: u64, level: u32) -> CollectiveMember {
        CollectiveMember {
            number,
            id: MemberId::from_bytes([1; 16]),
            name: format!("m{number}"),
            urls: vec![format!("https://10.0.0.{number}")],
            votes: true,
            voter: true,
            last: None,
            level,
            near: vec!["10.0.0.0/24".parse().unwrap()],
        }
    }

    #[test]
    fn who_keeps_the_feature_level_down_is_named() {
        let mut view = CollectiveView {
            number: 1,
            leader: Some(1),
            term: 1,
            last: 7,
            applied: 7,
            majority: true,
            level: 1,
            incarnation: Incarnation::FIRST,
            members: vec![member(1, 2), member(2, 1), member(3, 1)],
            invitations: Vec::new(),
            keys: vec![1],
            unreadable: Vec::new(),
        };
        let said = levels(&view);
        assert!(said.starts_with("feature level 1: 2 is used once"), "{said}");
        assert!(said.contains("upgrade m2 (1), m3 (1)"), "{said}");
        assert_eq!(describe(&view.members[1], &view), "voter, https://10.0.0.2, near 10.0.0.0/24");
        view.level = 2;
        view.members.iter_mut().for_each(|member| member.level = 2);
        assert_eq!(levels(&view), "feature level 2");
    }

    #[test]
    fn times_are_read() {
        for (text, seconds) in [("90s", 90), ("30m", 1800), ("1h", 3600)] {
            assert_eq!(super::lifetime(text).unwrap(), seconds);
        }
        for bad in ["", "h", "1", "1d", "-1s", "1.5h", "99999999999999999999h", "ü"] {
            assert!(super::lifetime(bad).is_err(), "{bad}");
        }
    }
}
