//! `moor content …`

use crate::output;
use moor_api::admin::{ContentBlob, ContentView};
use moor_api::client::admin::AdminClient;
use std::process::ExitCode;

pub(crate) async fn status(client: &mut AdminClient, all: bool, json: bool) -> anyhow::Result<ExitCode> {
    let view = client.content().await?;
    if json {
        output::json(&view)?;
    } else {
        print(&view, all)?;
    }
    let is_lost = view.silent.is_empty() && view.blobs.iter().any(|blob| blob.members.is_empty());
    Ok(if is_lost { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print(view: &ContentView, all: bool) -> anyhow::Result<()> {
    let reached = view.members.len() - view.silent.len();
    let shown = |blob: &&ContentBlob| all || blob.offered.is_some() || blob.members.len() < reached;
    for blob in view.blobs.iter().filter(shown) {
        let offer = match blob.offered {
            Some(false) => format!(", nodes wait for {}", view.copies),
            _ => String::new(),
        };
        let names = if blob.members.is_empty() { "none".to_owned() } else { blob.members.join(" ") };
        output::line(format_args!(
            "{}: {} of {} members ({names}){offer}",
            blob.of,
            blob.members.len(),
            view.members.len()
        ))?;
    }
    for name in &view.silent {
        eprintln!("moor: warning: member {name} does not answer: what it has is not known");
    }
    Ok(())
}
