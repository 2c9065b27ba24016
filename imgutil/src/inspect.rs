//! What an image says of itself, as text and as JSON.

use moor_image::{Header, Metadata, Payload};
use serde::Serialize;
use std::fmt::Write as _;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::cmd::printable;
use crate::progress::bytes_text;

/// Everything that is shown. Without the key of a sealed image there is no metadata.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// Header hash.
    pub digest: String,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Which key opens it.
    pub key_id: Option<String>,
    /// `squashfs`, `set` or `opaque`.
    pub payload: &'static str,
    /// Lineage.
    pub lineage: Uuid,
    /// Serial in the lineage.
    pub serial: u64,
    /// When it was sealed, RFC 3339.
    pub created: String,
    /// Length of the file in bytes.
    pub size: u64,
    /// Length of the payload in bytes.
    pub plaintext: u64,
    /// Size of a chunk in bytes.
    pub chunk_size: u64,
    /// Count of chunks.
    pub chunks: u64,
    /// Ids of the keys in the signature file beside the image; whether they are good is `verify`'s business.
    pub signed_by: Vec<String>,
    /// The metadata section, where it could be read.
    pub metadata: Option<Metadata>,
}

impl Inspection {
    /// Puts together what was read.
    #[must_use]
    pub fn new(header: &Header, signed_by: Vec<String>, metadata: Option<Metadata>) -> Self {
        let created =
            i64::try_from(header.created).ok().and_then(|time| OffsetDateTime::from_unix_timestamp(time).ok());
        Self {
            digest: hex::encode(header.digest),
            encrypted: header.encrypted,
            key_id: header.encrypted.then(|| hex::encode(header.key_id)),
            payload: match header.payload {
                Payload::Squashfs => "squashfs",
                Payload::Set => "set",
                Payload::Opaque => "opaque",
            },
            lineage: Uuid::from_bytes(header.lineage),
            serial: header.serial,
            created: created.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_else(|| header.created.to_string()),
            size: header.file_length(),
            plaintext: header.plaintext_length,
            chunk_size: header.chunk_size(),
            chunks: header.chunks,
            signed_by,
            metadata,
        }
    }

    /// Lines for people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: &dyn std::fmt::Display| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<14} {}", printable(&value.to_string()));
        };
        if let Some(metadata) = &self.metadata {
            line("name", &metadata.name);
            line("system", &format_args!("{} {}", metadata.os, metadata.arch));
            line("kernel", &metadata.kernel.as_deref().unwrap_or("none"));
            line("packages", &metadata.packages.len());
            line("builder", &metadata.builder);
            line("payload sha256", &metadata.payload_sha256);
        }
        line("digest", &self.digest);
        line("lineage", &self.lineage);
        line("serial", &self.serial);
        line("created", &self.created);
        match &self.key_id {
            Some(id) => line("encryption", &format_args!("AES-256-GCM, key id {id}")),
            None => line("encryption", &"none"),
        }
        line("payload", &format_args!("{}, {}", self.payload, bytes_text(self.plaintext)));
        line(
            "file",
            &format_args!("{}, {} chunks of {}", bytes_text(self.size), self.chunks, bytes_text(self.chunk_size)),
        );
        for key in &self.signed_by {
            line("signed by", key);
        }
        if self.metadata.is_none() {
            line("metadata", &"sealed: give --key-file to read it");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_says_of_itself_does_not_reach_the_terminal_as_it_is() {
        let metadata = Metadata { name: "a\nb\u{1b}[2J".into(), ..Metadata::default() };
        let inspection = Inspection {
            digest: String::new(),
            encrypted: false,
            key_id: None,
            payload: "squashfs",
            lineage: Uuid::nil(),
            serial: 1,
            created: String::new(),
            size: 1,
            plaintext: 1,
            chunk_size: 1,
            chunks: 1,
            signed_by: vec!["\u{1b}c".into()],
            metadata: Some(metadata),
        };
        let text = inspection.text();
        assert!(text.chars().all(|character| character == '\n' || !character.is_control()), "{text:?}");
        assert!(text.contains("a\\nb\\u{1b}[2J"), "{text:?}");
    }
}
