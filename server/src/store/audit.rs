//! The audit chain: who changed what, and when.

use super::command::Outcome;
use super::tables::{self, Write};
use super::{StoreError, apply};
use serde::{Deserialize, Serialize};

/// A line of the audit chain. All members write the same bytes, of whatever release they are: fields stay in this order.
#[derive(Serialize)]
struct AuditLine<'a> {
    entry: &'a serde_json::Value,
    hash: &'a str,
    previous: &'a str,
}

/// What the next line needs of it.
#[derive(Deserialize)]
struct AuditHash {
    hash: Option<String>,
}

/// Appends to this member's audit chain: each line carries the hash of the one before, so that none can be cut out unseen.
pub(super) fn append(write: &Write<'_>, entry: &serde_json::Value) -> Result<Outcome, StoreError> {
    let number = apply::next(write, "audit")?;
    let before = if number > 1 {
        write.get::<AuditHash>(tables::AUDIT, &apply::ordered_key(number - 1))?.and_then(|line| line.hash)
    } else {
        None
    };
    let before = before.unwrap_or_default();
    let text = entry.to_string();
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    context.update(b"moor/v1 audit\0");
    context.update(before.as_bytes());
    context.update(&number.to_le_bytes());
    context.update(text.as_bytes());
    let hash = hex::encode(context.finish());
    write.put(tables::AUDIT, &apply::ordered_key(number), &AuditLine { entry, hash: &hash, previous: &before })?;
    Ok(Outcome::Number(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_bytes_that_earlier_releases_write() {
        let entry = serde_json::json!({ "what": "set", "by": "root", "attributes": { "b": 1, "a": [2, "\u{e4}"] } });
        let line = AuditLine { entry: &entry, hash: "ab", previous: "" };
        let before = serde_json::json!({ "entry": entry, "previous": "", "hash": "ab" });
        assert_eq!(serde_json::to_string(&line).unwrap(), before.to_string());
    }
}
