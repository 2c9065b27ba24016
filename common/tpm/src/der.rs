//! The little DER that an RSA key needs.

/// DER length octets (X.690, 8.1.3).
fn put_length(out: &mut Vec<u8>, length: usize) {
    let bytes = length.to_be_bytes();
    let significant = &bytes[bytes.iter().position(|b| *b != 0).unwrap_or(bytes.len() - 1)..];
    if length >= 128 {
        out.push(0x80 | u8::try_from(significant.len()).unwrap_or(0));
    }
    out.extend_from_slice(significant);
}

fn object(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    put_length(&mut out, content.len());
    out.extend_from_slice(content);
    out
}

fn integer(bytes: &[u8]) -> Vec<u8> {
    let start = bytes.iter().position(|b| *b != 0).unwrap_or(bytes.len().saturating_sub(1));
    let mut content = Vec::new();
    if bytes.get(start).is_some_and(|b| b & 0x80 != 0) {
        content.push(0);
    }
    content.extend_from_slice(&bytes[start..]);
    object(0x02, &content)
}

/// `RSAPublicKey` (RFC 8017, A.1.1).
pub(crate) fn rsa_public_key(modulus: &[u8], exponent: u32) -> Vec<u8> {
    object(0x30, &[integer(modulus), integer(&exponent.to_be_bytes())].concat())
}

/// `SubjectPublicKeyInfo` of an RSA key (RFC 3279, 2.3.1).
pub(crate) fn rsa_spki(modulus: &[u8], exponent: u32) -> Vec<u8> {
    let key = rsa_public_key(modulus, exponent);
    // rsaEncryption 1.2.840.113549.1.1.1 with NULL parameters.
    let algorithm = object(0x30, &[0x06, 0x09, 0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x01, 0x05, 0x00]);
    let bits = object(0x03, &[&[0][..], &key].concat());
    object(0x30, &[algorithm, bits].concat())
}
