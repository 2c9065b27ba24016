//! What the library has to say beside its results, as lines on standard error.

use super::printable;
use std::fmt;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Which events are shown, in the words of `RUST_LOG`.
const FILTER: &str = "IMGUTIL_LOG";
/// If it is not set: warnings of ours. What other libraries warn of is rarely for people.
const USUAL: &str = "imgutil=warn,moor_api=warn,moor_image=warn,moor_vm=warn";

/// Shows them from now on.
pub(super) fn show() {
    let filter = EnvFilter::try_from_env(FILTER).unwrap_or_else(|_| EnvFilter::new(USUAL));
    let shown = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).event_format(Line);
    // Refused where somebody listens already.
    let _ = shown.try_init();
}

/// `imgutil: warning: …`
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = *event.metadata().level();
        let word = if level == Level::WARN { "warning".to_owned() } else { level.to_string().to_lowercase() };
        let mut text = String::new();
        context.field_format().format_fields(Writer::new(&mut text), event)?;
        writeln!(out, "imgutil: {word}: {}", printable(&text))
    }
}
