//! Finds private keys by what files hold.
//!
//! A program that only knows the words ("-----BEGIN PRIVATE KEY-----" stands in every TLS library) has no key: after the first
//! line of one its body must follow.

use memchr::memmem;

/// So much of each file is looked at, in bytes: keys are small, and lie at the start of larger files if at all.
pub(crate) const BOUND: usize = 1 << 20;

/// The private key in the bytes of a file, as words for people.
pub(crate) fn find(bytes: &[u8]) -> Option<&'static str> {
    let bytes = &bytes[..bytes.len().min(BOUND)];
    armoured(bytes).or_else(|| putty(bytes)).or_else(|| age(bytes)).or_else(|| der(bytes))
}

/// PEM (RFC 7468), OpenSSH and PGP armour: a first line, perhaps headers, then base64.
fn armoured(bytes: &[u8]) -> Option<&'static str> {
    const BEGIN: &[u8] = b"-----BEGIN ";
    for at in memmem::find_iter(bytes, BEGIN) {
        let rest = &bytes[at + BEGIN.len()..];
        let Some(end) = memmem::find(&rest[..rest.len().min(64)], b"-----") else { continue };
        let what = match &rest[..end] {
            b"OPENSSH PRIVATE KEY" => "an OpenSSH private key",
            b"PGP PRIVATE KEY BLOCK" => "a PGP private key",
            label if label.ends_with(b"PRIVATE KEY") => "a PEM private key",
            _ => continue,
        };
        if has_body(&rest[end + 5..]) {
            return Some(what);
        }
    }
    None
}

/// Whether lines of base64 follow, at least as many bytes as the shortest key takes (Ed25519 in PKCS #8: 64 characters).
/// Keys that stand in a text of JSON or YAML have `\n` for their line ends, or blanks before them.
fn has_body(bytes: &[u8]) -> bool {
    const SHORTEST: usize = 60;
    let text = &bytes[..bytes.len().min(4096)];
    let escaped = text.starts_with(b"\\n") || text.starts_with(b"\\r\\n");
    let separator: &[u8] = if escaped { b"\\n" } else { b"\n" };
    let (mut rest, mut length, mut begun) = (text, 0, false);
    for _ in 0..64 {
        let (line, after) = match memmem::find(rest, separator) {
            Some(end) => (&rest[..end], &rest[end + separator.len()..]),
            None => (rest, &[][..]),
        };
        let line = line.strip_suffix(b"\\r").unwrap_or(line).trim_ascii();
        rest = after;
        if !line.is_empty() && line.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(byte)) {
            begun = true;
            length += line.len();
            if length >= SHORTEST {
                return true;
            }
        } else if begun || !(line.is_empty() || is_header(line)) {
            return false;
        }
        if rest.is_empty() {
            return false;
        }
    }
    false
}

/// `Proc-Type: 4,ENCRYPTED`, `Version: …`.
fn is_header(line: &[u8]) -> bool {
    line.split(|byte| *byte == b':').next().is_some_and(|name| {
        name.len() < line.len() && name.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
    }) && line.is_ascii()
}

/// `PuTTY`: a text of its own, whose first line says so.
fn putty(bytes: &[u8]) -> Option<&'static str> {
    let is_key = bytes.starts_with(b"PuTTY-User-Key-File-")
        && memmem::find(&bytes[..bytes.len().min(64 << 10)], b"\nPrivate-Lines: ").is_some();
    is_key.then_some("a PuTTY private key")
}

/// age: a line of bech32.
fn age(bytes: &[u8]) -> Option<&'static str> {
    const PREFIX: &[u8] = b"AGE-SECRET-KEY-1";
    let at = memmem::find(bytes, PREFIX)? + PREFIX.len();
    let body = bytes.get(at..at + 58)?;
    body.iter().all(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase()).then_some("an age private key")
}

/// DER: PKCS #8 (RFC 5958: version, algorithm, octets) and PKCS #1 (RFC 8017: version 0, then the modulus) that fill the file.
fn der(bytes: &[u8]) -> Option<&'static str> {
    let (body, rest) = element(bytes, 0x30)?;
    if !rest.is_empty() {
        return None;
    }
    let (version, after) = element(body, 0x02)?;
    if !matches!(version, [0 | 1]) {
        return None;
    }
    if let Some((algorithm, after)) = element(after, 0x30) {
        // rsaEncryption, id-ecPublicKey, Ed25519 and its relatives.
        const ALGORITHMS: [&[u8]; 3] =
            [b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01", b"\x2a\x86\x48\xce\x3d\x02\x01", b"\x2b\x65"];
        let (algorithm, _) = element(algorithm, 0x06)?;
        let known = ALGORITHMS.iter().any(|known| algorithm.starts_with(known));
        return (known && element(after, 0x04).is_some()).then_some("a PKCS #8 private key");
    }
    // Modulus, exponent and further numbers: nine in all.
    let mut rest = after;
    for _ in 0..8 {
        rest = element(rest, 0x02)?.1;
    }
    (version == [0] && rest.is_empty()).then_some("an RSA private key")
}

/// The contents of a DER element of this tag, and what follows it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (first, length, rest) = match bytes {
        [first, length, rest @ ..] => (*first, *length, rest),
        _ => return None,
    };
    let (length, rest) = match length {
        0..=0x7F => (usize::from(length), rest),
        0x81 => (usize::from(*rest.first()?), &rest[1..]),
        0x82 => (usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])), &rest[2..]),
        _ => return None,
    };
    (first == tag && length <= rest.len()).then(|| rest.split_at(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &str = "MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n";

    #[test]
    fn a_key_is_more_than_its_first_line() {
        let pem = |label: &str, body: &str| format!("-----BEGIN {label}-----\n{body}-----END {label}-----\n");
        let good = [
            pem("PRIVATE KEY", BODY),
            pem("RSA PRIVATE KEY", &format!("Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n{BODY}{BODY}")),
            pem("OPENSSH PRIVATE KEY", &format!("{BODY}{BODY}")),
            pem("PGP PRIVATE KEY BLOCK", &format!("Version: GnuPG v2\n\n{BODY}")),
            pem("PRIVATE KEY", BODY).replace('\n', "\r\n"),
            format!("<key>\n    {}</key>", pem("EC PRIVATE KEY", &format!("    {BODY}"))),
            format!("{{\"private_key\": \"{}\"}}", pem("PRIVATE KEY", BODY).replace('\n', "\\n")),
            format!("{}{}", pem("CERTIFICATE", BODY), pem("PRIVATE KEY", BODY)),
            "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none\nPrivate-Lines: 1\nAAAA\n".to_owned(),
            format!("# created\nAGE-SECRET-KEY-1{}\n", "Q".repeat(58)),
        ];
        for text in &good {
            assert!(find(text.as_bytes()).is_some(), "{text}");
        }
        let bad = [
            pem("PUBLIC KEY", BODY),
            pem("CERTIFICATE", BODY),
            "-----BEGIN PRIVATE KEY-----\0-----END PRIVATE KEY-----\0".to_owned(),
            "-----BEGIN RSA PRIVATE KEY-----\n".to_owned(),
            "looks for '-----BEGIN PRIVATE KEY-----' in what follows".to_owned(),
            "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----\n".to_owned(),
            pem("RSA PRIVATE KEY", "MIIC...\n"),
            "AGE-SECRET-KEY-1 is the prefix".to_owned(),
        ];
        for text in &bad {
            assert_eq!(find(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn keys_in_der_are_found() {
        let pkcs8 = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";
        let key: Vec<u8> = [pkcs8.as_slice(), &[7; 32]].concat();
        assert_eq!(find(&key), Some("a PKCS #8 private key"));
        assert_eq!(find(&key[..40]), None);
        assert_eq!(find(&[key.as_slice(), b"x"].concat()), None);
        let pkcs1 = [b"\x30\x1b\x02\x01\x00".as_slice(), &[0x02, 1, 5].repeat(8)].concat();
        assert_eq!(find(&pkcs1), Some("an RSA private key"));
    }
}
