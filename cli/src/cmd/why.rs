//! `moor why`: the most frequent question of this field, answered at the command line.

use crate::output;
use moor_api::client::admin::AdminClient;
use std::process::ExitCode;

pub(crate) async fn run(client: &mut AdminClient, subject: &str, json: bool) -> anyhow::Result<ExitCode> {
    let why = client.why(subject).await?;
    if json {
        output::json(&why)?;
        return Ok(ExitCode::SUCCESS);
    }
    let name = why.node.as_ref().map_or(why.subject.as_str(), |node| node.as_str());
    match &why.state {
        Some(state) if state.detail.is_empty() => {
            output::line(format_args!("{name}: {} since {}", state.state, output::time_ms(state.time_ms)))?;
        }
        Some(state) => {
            output::line(format_args!(
                "{name}: {} since {}: {}",
                state.state,
                output::time_ms(state.time_ms),
                state.detail
            ))?;
        }
        None => output::line(format_args!("{name}: has not been heard of"))?,
    }
    if let Some(age) = why.heard {
        output::line(format_args!("{name}: last heartbeat {age} s ago"))?;
    }
    for refusal in &why.refusals {
        let times = if refusal.count > 1 { format!(" ({} times)", refusal.count) } else { String::new() };
        let (time, call, peer) = (output::time_ms(refusal.time_ms), &refusal.call, &refusal.peer);
        output::line(format_args!("{name}: refused {time} {call} from {peer}{times}: {}", refusal.problem.detail))?;
    }
    for advice in &why.advice {
        output::line(format_args!("{name}: advice: {advice}"))?;
    }
    Ok(ExitCode::SUCCESS)
}
