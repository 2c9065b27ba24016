//! A backup without secrets: lines of JSON, to read, to compare, and to look things up in when the collective is gone. It cannot be
//! restored.
//!
//! Secrets that the store keeps are replaced by a word. Tables that hold what machines or people said in their own words are left out,
//! because nobody can tell what is in there: output and states of nodes, refusals; and tokens and invitations.

use super::Stale;
use crate::state::{Member, now};
use crate::store::tables::{self, Table};
use crate::store::{Snapshot, StoreError};
use serde_json::{Value, json};
use std::io::{self, Write};

/// What is written.
const TABLES: [Table; 8] = [
    tables::SITE,
    tables::MEMBERS,
    tables::NODES,
    tables::IMAGES,
    tables::PROFILES,
    tables::GENERATIONS,
    tables::COUNTERS,
    tables::AUDIT,
];

/// What stands for a secret.
const REDACTED: &str = "(a secret)";

/// Writes the store as it is now; `is_stale`: no majority answers.
///
/// # Errors
/// The database is damaged; `out` failed.
pub fn write<W: Write>(member: &Member, is_stale: bool, out: W) -> anyhow::Result<W> {
    let view = member.view()?;
    let mut head = json!({ "backup": "redacted", "version": 1, "created": now() });
    if let Some(stale) = Stale::of(member, &view, is_stale)? {
        head["stale"] = json!(stale);
    }
    Ok(lines(&view, &head, out)?)
}

fn lines<W: Write>(view: &Snapshot, head: &Value, mut out: W) -> Result<W, StoreError> {
    let failed = |error: io::Error| StoreError::Snapshot(error.to_string());
    let mut put = |line: &Value| writeln!(out, "{line}");
    put(head).map_err(failed)?;
    let mut records = 0_u64;
    for table in TABLES {
        let name = tables::name_of(table);
        let written = view.each(table, |key, bytes| {
            let mut value: Value = serde_json::from_slice(bytes)?;
            redact(&mut value);
            records += 1;
            put(&json!({ "table": name, "key": key, "value": value }))
        })?;
        written.map_err(failed)?;
    }
    put(&json!({ "records": records })).map_err(failed)?;
    Ok(out)
}

/// Replaces all that has the form of a [`SealedSecret`](crate::secrets::SealedSecret), wherever it is.
fn redact(value: &mut Value) {
    match value {
        Value::Object(fields) if fields.contains_key("ciphertext") => *value = REDACTED.into(),
        Value::Object(fields) => fields.values_mut().for_each(redact),
        Value::Array(items) => items.iter_mut().for_each(redact),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_replaced_at_any_depth_and_nothing_else_is() {
        let sealed = json!({ "key_version": 1, "nonce": "00", "ciphertext": "aa" });
        let mut value = json!({ "a": sealed, "b": [{ "c": sealed }, 1], "d": { "nonce": "no secret" } });
        redact(&mut value);
        assert_eq!(value, json!({ "a": REDACTED, "b": [{ "c": REDACTED }, 1], "d": { "nonce": "no secret" } }));
    }

    /// The form that is looked for is the one that secrets have.
    #[test]
    fn a_sealed_secret_is_found() {
        use crate::secrets::{Place, Ring};
        let ring = Ring::first(moor_api::ids::CollectiveId::random()).unwrap();
        let secret = ring.seal(Place { table: "nodes", id: "a", field: "x" }, b"secret").unwrap();
        let mut value = serde_json::to_value(secret).unwrap();
        redact(&mut value);
        assert_eq!(value, REDACTED);
    }
}
