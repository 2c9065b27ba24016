//! `moor node …`, `moor arm`, `moor deploy`.

use super::status;
use crate::args::{Arm, Deploy, Node, Status, Trust};
use crate::output;
use anyhow::{Context as _, bail};
use moor_api::admin::{ArmRequest, DefineNodes, DeployRequest, NodeView, RangeRequest, SetAttributes};
use moor_api::client::admin::AdminClient;
use std::collections::BTreeMap;
use std::io::Read as _;
use std::process::ExitCode;

pub(crate) async fn run(client: &mut AdminClient, command: Node, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Node::Define { range, attributes } => {
            let attributes = assignments(&attributes)?;
            output::changed(&client.define(&DefineNodes { range, attributes }).await?, "defined", json)
        }
        Node::List { range, attributes } => list(client, range.as_deref(), &attributes, json).await,
        Node::Set { range, attributes, clear, file, maxnodes } => {
            let mut set = assignments(&attributes)?;
            for entry in &file {
                let (name, path) = split(entry)?;
                set.insert(name.to_owned(), value_from(path)?);
            }
            if set.is_empty() && clear.is_empty() {
                bail!("nothing to set or clear: give category.attribute=value, --file or --clear");
            }
            check_count(client, &range, maxnodes).await?;
            output::changed(&client.set(&SetAttributes { range, set, clear }).await?, "set", json)
        }
        Node::Remove { range, yes } => {
            let nodes = client.nodes(Some(&range)).await?;
            if !yes && !output::confirm(&format!("Forget {} and all that is known of them?", names(&nodes)))? {
                bail!("nothing was removed: answer y, or give -y");
            }
            output::changed(&client.remove(&RangeRequest { range }).await?, "removed", json)
        }
        Node::Arm(args) => arm(client, &args, json).await,
        Node::Deploy(args) => deploy(client, &args, json).await,
        Node::Trust(Trust::Rearm { node, yes }) => {
            let question =
                format!("Drop the identity of {node}? Whoever enrols next under its name becomes this node.");
            if !yes && !output::confirm(&question)? {
                bail!("nothing was changed: answer y, or give -y");
            }
            output::changed(
                &client.rearm(&RangeRequest { range: node.to_string() }).await?,
                "identity dropped, armed once",
                json,
            )
        }
    }
}

pub(crate) async fn arm(client: &mut AdminClient, args: &Arm, json: bool) -> anyhow::Result<ExitCode> {
    let until = if args.off {
        String::new()
    } else if args.continuous {
        "continuous".into()
    } else {
        args.until.clone().unwrap_or_else(|| "once".into())
    };
    let word = if until.is_empty() { "not armed".into() } else { format!("armed {until}") };
    output::changed(&client.arm(&ArmRequest { range: args.range.clone(), until }).await?, &word, json)
}

pub(crate) async fn deploy(client: &mut AdminClient, args: &Deploy, json: bool) -> anyhow::Result<ExitCode> {
    let range = args.range.clone();
    let watch = Status { range: Some(range.clone()), history: false, watch: args.watch, until_booted: args.watch };
    let Some(profile) = args.profile.clone() else {
        return status::run(client, &watch, json).await;
    };
    check_count(client, &range, args.maxnodes).await?;
    let changed = client.deploy(&DeployRequest { range: range.clone(), profile: profile.clone() }).await?;
    let code = output::changed(&changed, &format!("pending {profile}"), json)?;
    if !changed.refused.is_empty() {
        return Ok(code);
    }
    if args.arm {
        let armed = client.arm(&ArmRequest { range, until: "once".into() }).await?;
        let code = output::changed(&armed, "armed once", json)?;
        if !armed.refused.is_empty() {
            return Ok(code);
        }
    }
    if args.watch { status::run(client, &watch, json).await } else { Ok(code) }
}

async fn list(
    client: &mut AdminClient,
    range: Option<&str>,
    attributes: &[String],
    json: bool,
) -> anyhow::Result<ExitCode> {
    let nodes = client.nodes(range).await?;
    if json {
        output::json(&nodes)?;
        return Ok(ExitCode::SUCCESS);
    }
    for node in &nodes {
        if attributes.is_empty() {
            output::line(&node.name)?;
        }
        for wanted in attributes {
            if wanted == "all" {
                for (name, value) in &node.attributes {
                    output::line(format_args!("{}: {name}: {value}", node.name))?;
                }
            } else {
                let value = node.attributes.get(wanted).map_or("", String::as_str);
                output::line(format_args!("{}: {wanted}: {value}", node.name))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn check_count(client: &mut AdminClient, range: &str, maximum: Option<usize>) -> anyhow::Result<()> {
    let Some(maximum) = maximum else { return Ok(()) };
    let count = client.nodes(Some(range)).await?.len();
    if count > maximum {
        bail!("'{range}' is {count} nodes, more than the {maximum} of --maxnodes: nothing was changed");
    }
    Ok(())
}

fn names(nodes: &[NodeView]) -> String {
    let shown: Vec<&str> = nodes.iter().take(8).map(|node| node.name.as_str()).collect();
    let more = nodes.len().saturating_sub(shown.len());
    let list = shown.join(", ");
    if more == 0 { list } else { format!("{list} and {more} more") }
}

fn split(text: &str) -> anyhow::Result<(&str, &str)> {
    text.split_once('=').with_context(|| format!("'{text}' is not of the form category.attribute=value"))
}

/// Values from the command line; secrets are refused there, because every user of the machine can read it.
fn assignments(texts: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let mut set = BTreeMap::new();
    for text in texts {
        let (name, value) = split(text)?;
        if is_secret(name) {
            bail!(
                "'{name}' is a secret, and a command line is no place for one: use --file {name}=FILE (or {name}=- for standard input)"
            );
        }
        if set.insert(name.to_owned(), value.to_owned()).is_some() {
            bail!("'{name}' is given twice");
        }
    }
    Ok(set)
}

fn is_secret(name: &str) -> bool {
    ["secret.", "crypted.", "custom.nodesecret."].iter().any(|prefix| name.starts_with(prefix))
}

/// The first line of a file or of standard input.
fn value_from(path: &str) -> anyhow::Result<String> {
    let mut text = String::new();
    if path == "-" {
        std::io::stdin().lock().take(1 << 20).read_to_string(&mut text).context("reading standard input")?;
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(1 << 20).read_to_string(&mut text))
            .with_context(|| format!("reading '{path}'"))?;
    }
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_refused_on_the_command_line() {
        for name in ["secret.snmpcommunity", "crypted.rootpassword", "custom.nodesecret.x"] {
            let error = assignments(&[format!("{name}=v")]).unwrap_err().to_string();
            assert!(error.contains("--file"), "{error}");
        }
        assert_eq!(assignments(&["info.note=a=b".into()]).unwrap()["info.note"], "a=b");
        assert!(assignments(&["info.note".into()]).is_err());
        assert!(assignments(&["a.b=1".into(), "a.b=2".into()]).is_err());
    }
}
