//! SSH host keys: made on the node at every boot, certified by a member, never sent and never kept elsewhere.

use ssh_key::rand_core::OsRng;
use ssh_key::{Algorithm, Certificate, EcdsaCurve, LineEnding, PrivateKey, PublicKey};
use zeroize::Zeroizing;

/// Host keys cannot be made, or a certificate does not belong to one.
#[derive(Debug, thiserror::Error)]
pub enum SshError {
    /// The library failed.
    #[error("cannot make an SSH host key: {0}")]
    Make(ssh_key::Error),
    /// The member's answer is not usable.
    #[error("the member's host certificates are not usable: {0}")]
    Certificate(String),
}

/// One key pair. No `Debug`: it is a secret.
pub struct HostKey {
    /// The word in the file's name: `ssh_host_WORD_key`. ssh-keysign knows these names alone, so they are not ours to choose.
    pub word: &'static str,
    /// In OpenSSH's format.
    pub private: Zeroizing<String>,
    /// `ssh-ed25519 AAAA… NAME`.
    pub public: String,
}

/// Makes the host keys of this boot; `name` becomes their comment.
///
/// # Errors
/// The system has no randomness.
pub fn make(name: &str) -> Result<Vec<HostKey>, SshError> {
    let kinds = [("ed25519", Algorithm::Ed25519), ("ecdsa", Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 })];
    kinds
        .into_iter()
        .map(|(word, algorithm)| {
            let mut key = PrivateKey::random(&mut OsRng, algorithm).map_err(SshError::Make)?;
            key.set_comment(name);
            let private = key.to_openssh(LineEnding::LF).map_err(SshError::Make)?;
            let public = key.public_key().to_openssh().map_err(SshError::Make)?;
            Ok(HostKey { word, private, public })
        })
        .collect()
}

/// Checks that each certificate is a host certificate for the key at its place.
///
/// # Errors
/// Another number of them, or one for another key.
pub fn check_certificates(publics: &[&str], certificates: &[String]) -> Result<(), SshError> {
    let bad = |reason: String| SshError::Certificate(reason);
    if publics.len() != certificates.len() {
        return Err(bad(format!("{} for {} keys", certificates.len(), publics.len())));
    }
    for (public, certificate) in publics.iter().zip(certificates) {
        let key = PublicKey::from_openssh(public).map_err(SshError::Make)?;
        let parsed = Certificate::from_openssh(certificate).map_err(|error| bad(error.to_string()))?;
        if !parsed.cert_type().is_host() {
            return Err(bad("one is a user certificate".into()));
        }
        if parsed.public_key() != key.key_data() {
            return Err(bad("one is for another key".into()));
        }
        if certificate.trim().contains(['\n', '\r']) {
            return Err(bad("one has several lines".into()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;
    use std::process::Command;

    fn write(path: &Path, text: &str) {
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// ssh-keygen certifies what was made here, and the certificate is recognised.
    #[test]
    fn openssh_reads_the_keys_and_its_certificates_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        let keygen = |args: &[&str], file: &Path| {
            let output = Command::new("ssh-keygen").args(args).arg(file).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        keygen(&["-q", "-t", "ed25519", "-N", "", "-f"], &ca);
        let ca = ca.display().to_string();
        let keys = make("n1").unwrap();
        let mut certificates = Vec::new();
        for key in &keys {
            let path = dir.path().join(format!("ssh_host_{}_key", key.word));
            write(&path, &key.private);
            assert_eq!(keygen(&["-y", "-f"], &path).trim(), key.public);
            let public = path.with_extension("pub");
            write(&public, &key.public);
            keygen(&["-q", "-s", &ca, "-h", "-I", "n1", "-n", "n1", "-V", "-5m:+1d"], &public);
            let certificate = dir.path().join(format!("ssh_host_{}_key-cert.pub", key.word));
            certificates.push(std::fs::read_to_string(certificate).unwrap());
        }
        let publics: Vec<&str> = keys.iter().map(|key| key.public.as_str()).collect();
        check_certificates(&publics, &certificates).unwrap();
        certificates.swap(0, 1);
        assert!(check_certificates(&publics, &certificates).unwrap_err().to_string().contains("another key"));
        assert!(check_certificates(&publics, &certificates[..1]).is_err());
        assert_ne!(make("n1").unwrap()[0].public, keys[0].public, "a key is used for one boot");
    }
}
