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
    armoured(bytes)
        .or_else(|| putty(bytes))
        .or_else(|| age(bytes))
        .or_else(|| wireguard(bytes))
        .or_else(|| dnssec(bytes))
        .or_else(|| jwk(bytes))
        .or_else(|| openpgp(bytes))
        .or_else(|| der(bytes))
}

/// Whether a file is what `imgutil pack` writes as a key: 64 hexadecimal digits. Other files are so as well, such as sums: its name has to
/// say that it is a key.
pub(crate) fn is_of_image(bytes: &[u8]) -> bool {
    bytes.len() <= 128 && bytes.trim_ascii().len() == 64 && bytes.trim_ascii().iter().all(u8::is_ascii_hexdigit)
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
            b"OpenVPN Static key V1" | b"OpenVPN tls-crypt-v2 client key" | b"OpenVPN tls-crypt-v2 server key" => {
                "an OpenVPN key"
            }
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

/// `WireGuard` (wg(8), systemd.netdev(5)): a line `PrivateKey = ` and 32 bytes in base64.
fn wireguard(bytes: &[u8]) -> Option<&'static str> {
    const KEY: &[u8] = b"PrivateKey";
    let is_base64 = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/".contains(byte);
    memmem::find_iter(bytes, KEY).find_map(|at| {
        let begins = bytes[..at].iter().rev().find(|byte| !b" \t".contains(byte)).is_none_or(|byte| *byte == b'\n');
        let line = bytes[at + KEY.len()..].split(|byte| *byte == b'\n').next()?;
        let value = line.trim_ascii_start().strip_prefix(b"=")?.trim_ascii();
        let is_key = value.len() == 44 && value[..43].iter().all(is_base64) && value[43] == b'=';
        (begins && is_key).then_some("a WireGuard private key")
    })
}

/// A key of a DNS zone, as BIND and ldns write it: `Private-key-format: v1.3`, then numbers in base64.
fn dnssec(bytes: &[u8]) -> Option<&'static str> {
    let is_key = bytes.starts_with(b"Private-key-format: v1.")
        && [&b"\nPrivateKey: "[..], b"\nPrivateExponent: ", b"\nPrivate_value(x): ", b"\nKey: "]
            .iter()
            .any(|field| memmem::find(&bytes[..bytes.len().min(64 << 10)], field).is_some());
    is_key.then_some("a DNSSEC private key")
}

/// A JSON Web Key (RFC 7517) with its private part: `d`, or `k` of a symmetric one (RFC 7518, 6.2 to 6.4), near its type.
fn jwk(bytes: &[u8]) -> Option<&'static str> {
    /// So far from each other the members of one key are: RSA of 8192 bits has 8 KiB in all.
    const NEAR: usize = 8 << 10;
    memmem::find_iter(bytes, b"\"kty\"").find_map(|at| {
        let kind = member(&bytes[at..], b"\"kty\"")?;
        let (name, shortest) = if kind == b"oct" { (b"\"k\"", 22) } else { (b"\"d\"", 40) };
        let near = &bytes[at.saturating_sub(NEAR)..bytes.len().min(at + NEAR)];
        let is_key = memmem::find_iter(near, name).filter_map(|at| member(&near[at..], name)).any(|value| {
            let is_base64url = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_".contains(byte);
            value.len() >= shortest && value.iter().all(is_base64url)
        });
        is_key.then_some("a JSON web key")
    })
}

/// The text of the JSON member whose name `bytes` begin with.
fn member<'a>(bytes: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let value =
        bytes.strip_prefix(name)?.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start().strip_prefix(b"\"")?;
    value.split(|byte| *byte == b'"').next()
}

/// A key ring without armour that begins with a secret key: its packet has version, time and algorithm (RFC 9580, 4.2 and 5.5), and a
/// further packet behind it, or nothing.
fn openpgp(bytes: &[u8]) -> Option<&'static str> {
    let (first, rest) = bytes.split_first()?;
    let (length, body) = match (*first, rest) {
        // The old form, with a length of one, two or four bytes; then the new form.
        (0x94, [length, body @ ..]) | (0xC5, [length @ 0..=191, body @ ..]) => (usize::from(*length), body),
        (0x95, [high, low, body @ ..]) => (usize::from(u16::from_be_bytes([*high, *low])), body),
        (0xC5, [high @ 192..=223, low, body @ ..]) => {
            (usize::from(u16::from_be_bytes([*high - 192, *low])) + 192, body)
        }
        _ => return None,
    };
    let is_followed = match body.get(length) {
        Some(next) => next & 0x80 != 0,
        None => body.len() == length,
    };
    let is_key = matches!(body, [3..=6, _, _, _, _, 1..=3 | 16..=19 | 22 | 25..=28, ..]) && length >= 40;
    (is_key && is_followed).then_some("a PGP private key")
}

/// DER that fills the file: PKCS #8 (RFC 5958: version, algorithm, octets), encrypted (algorithm, octets) or not, and the older forms that
/// have numbers alone: PKCS #1 (RFC 8017: version 0, then the modulus), DSA of OpenSSL, SEC 1 (RFC 5915: version 1, octets, curve or point).
fn der(bytes: &[u8]) -> Option<&'static str> {
    let (body, rest) = element(bytes, 0x30)?;
    if !rest.is_empty() {
        return None;
    }
    if let Some((algorithm, after)) = element(body, 0x30) {
        // PKCS #5 and the ciphers of PKCS #12.
        const CIPHERS: [&[u8]; 2] = [b"\x2a\x86\x48\x86\xf7\x0d\x01\x05", b"\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x01"];
        let (cipher, _) = element(algorithm, 0x06)?;
        let is_key = CIPHERS.iter().any(|known| cipher.starts_with(known)) && element(after, 0x04)?.1.is_empty();
        return is_key.then_some("an encrypted PKCS #8 private key");
    }
    let (version, after) = element(body, 0x02)?;
    if !matches!(version, [0 | 1]) {
        return None;
    }
    if let Some((algorithm, after)) = element(after, 0x30) {
        // RSA of all kinds, Diffie-Hellman, elliptic curves, DSA, X9.42, Ed25519 and its relatives, ML-DSA and SLH-DSA, ML-KEM.
        const ALGORITHMS: [&[u8]; 8] = [
            b"\x2a\x86\x48\x86\xf7\x0d\x01\x01",
            b"\x2a\x86\x48\x86\xf7\x0d\x01\x03",
            b"\x2a\x86\x48\xce\x3d\x02\x01",
            b"\x2a\x86\x48\xce\x38\x04\x01",
            b"\x2a\x86\x48\xce\x3e\x02\x01",
            b"\x2b\x65",
            b"\x60\x86\x48\x01\x65\x03\x04\x03",
            b"\x60\x86\x48\x01\x65\x03\x04\x04",
        ];
        let (algorithm, _) = element(algorithm, 0x06)?;
        let known = ALGORITHMS.iter().any(|known| algorithm.starts_with(known));
        return (known && element(after, 0x04).is_some()).then_some("a PKCS #8 private key");
    }
    if version == [1] {
        let (key, after) = element(after, 0x04)?;
        let is_key = key.len() >= 16 && (element(after, 0xA0).is_some() || element(after, 0xA1).is_some());
        return is_key.then_some("an elliptic curve private key");
    }
    let (mut numbers, mut rest) = (Vec::new(), after);
    while let Some((number, after)) = element(rest, 0x02) {
        numbers.push(number);
        rest = after;
    }
    if !rest.is_empty() {
        return None;
    }
    match numbers[..] {
        // Modulus, exponent and further numbers: nine with the version.
        [_, _, _, _, _, _, _, _] => Some("an RSA private key"),
        // Prime, its divisor, base, public and private number.
        [prime, _, _, _, _] if prime.len() >= 64 => Some("a DSA private key"),
        _ => None,
    }
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
    fn keys_that_have_no_armour_are_found() {
        let base64 = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=";
        let url = BODY.replace('+', "-").replace('/', "_");
        let vpn = "0123456789abcdef0123456789abcdef\n".repeat(16);
        let good = [
            (format!("[Interface]\nAddress = 10.0.0.1/24\nPrivateKey = {base64}\n"), "a WireGuard private key"),
            (format!("[WireGuard]\r\n  PrivateKey={base64}\r\n"), "a WireGuard private key"),
            (
                format!(
                    "# 2048 bit\n-----BEGIN OpenVPN Static key V1-----\n{vpn}-----END OpenVPN Static key V1-----\n"
                ),
                "an OpenVPN key",
            ),
            (
                format!("Private-key-format: v1.3\nAlgorithm: 15 (ED25519)\nPrivateKey: {base64}\n"),
                "a DNSSEC private key",
            ),
            (
                format!("{{\"keys\": [{{\"kty\":\"OKP\", \"crv\":\"Ed25519\", \"d\" : \"{}\"}}]}}", &url[..43]),
                "a JSON web key",
            ),
            (format!("{{\"k\":\"{}\",\"kty\":\"oct\"}}", &url[..43]), "a JSON web key"),
        ];
        for (text, what) in &good {
            assert_eq!(find(text.as_bytes()), Some(*what), "{text}");
        }
        let bad = [
            format!("[Peer]\nPublicKey = {base64}\n"),
            "PrivateKey = <your key>\n".to_owned(),
            format!("# PrivateKey = {base64}\n"),
            format!("PrivateKeyFile=/etc/wireguard/key\n{base64}\n"),
            "looks for Private-key-format: v1.3".to_owned(),
            format!("{{\"kty\":\"OKP\", \"crv\":\"Ed25519\", \"x\": \"{}\"}}", &url[..43]),
            format!("{{\"kty\":\"RSA\", \"d\": 5, \"n\": \"{BODY}\"}}"),
        ];
        for text in &bad {
            assert_eq!(find(text.as_bytes()), None, "{text}");
        }
    }

    /// Runs a tool of the field; what it prints.
    fn tool(directory: &std::path::Path, program: &str, arguments: &[&str]) -> Vec<u8> {
        let mut command = std::process::Command::new(program);
        let output =
            command.args(arguments).current_dir(directory).env("GNUPGHOME", directory).output().expect(program);
        assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    #[test]
    fn what_openssl_and_gpg_write_is_a_key_only_where_it_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let run = |program: &str, arguments: &str| tool(dir.path(), program, &arguments.split(' ').collect::<Vec<_>>());
        run("openssl", "ecparam -name prime256v1 -genkey -noout -out ec.pem");
        run("openssl", "genrsa -traditional -out rsa.pem 1024");
        run("openssl", "dsaparam -genkey -noout -out dsa.pem 1024");
        run("openssl", "req -x509 -new -key rsa.pem -subj /CN=x -outform DER -out certificate.der");
        for (arguments, expected) in [
            ("ec -in ec.pem -outform DER", Some("an elliptic curve private key")),
            ("ec -in ec.pem -no_public -outform DER", Some("an elliptic curve private key")),
            ("rsa -in rsa.pem -traditional -outform DER", Some("an RSA private key")),
            ("dsa -in dsa.pem -outform DER", Some("a DSA private key")),
            ("pkcs8 -topk8 -nocrypt -in ec.pem -outform DER", Some("a PKCS #8 private key")),
            ("pkcs8 -topk8 -nocrypt -in dsa.pem -outform DER", Some("a PKCS #8 private key")),
            ("genpkey -algorithm RSA-PSS -outform DER", Some("a PKCS #8 private key")),
            ("genpkey -algorithm X448 -outform DER", Some("a PKCS #8 private key")),
            ("pkcs8 -topk8 -passout pass:x -in rsa.pem -outform DER", Some("an encrypted PKCS #8 private key")),
            (
                "pkcs8 -topk8 -v1 PBE-SHA1-3DES -passout pass:x -in rsa.pem -outform DER",
                Some("an encrypted PKCS #8 private key"),
            ),
            ("ec -in ec.pem -pubout -outform DER", None),
            ("rsa -in rsa.pem -pubout -outform DER", None),
            ("rsa -in rsa.pem -RSAPublicKey_out -outform DER", None),
            ("dsaparam -outform DER 1024", None),
            ("x509 -in certificate.der -inform DER -outform DER", None),
        ] {
            assert_eq!(find(&run("openssl", arguments)), expected, "openssl {arguments}");
        }
        for kind in ["rsa2048", "ed25519"] {
            run("gpg", &format!("--batch --quiet --passphrase= --quick-generate-key {kind}@mooring.example {kind}"));
            let who = format!("{kind}@mooring.example");
            let secret = run("gpg", &format!("--batch --export-secret-keys {who}"));
            assert_eq!(find(&secret), Some("a PGP private key"), "{kind}");
            assert_eq!(find(&secret[..secret.len() / 8]), None, "{kind}");
            assert_eq!(find(&run("gpg", &format!("--batch --export {who}"))), None, "{kind}");
        }
        run("gpgconf", "--kill gpg-agent");
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
