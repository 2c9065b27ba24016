//! Key pairs for backups: a backup is encrypted to public halves, so that the machine which makes it cannot read it back; a private half
//! opens it. Both are a line of text with a checksum: a backup to a mistyped key would be one that nobody can ever open.

use aws_lc_rs::agreement::{PrivateKey, X25519};
use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::crypto::aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_256 as SUITE;
use rustls::crypto::hpke::Hpke as _;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use zeroize::Zeroizing;

/// Keys that one backup is encrypted to at most.
pub const MAX_RECIPIENTS: usize = 16;
/// Bytes of either half (X25519).
pub const KEY: usize = 32;
/// Bytes of the checksum behind it.
const CHECK: usize = 4;
/// What a public half begins with.
const PUBLIC: &str = "moorb_";
/// What a private half begins with.
const PRIVATE: &str = "moork_";
/// Longest file with a private half, in bytes: comments may be in it.
const MAX_FILE: usize = 4096;

/// There is no such key, or none can be made. What was given as a key is in none of the messages: it may be a private one.
#[derive(Debug, thiserror::Error)]
pub enum BackupKeyError {
    /// It is no public key.
    #[error(
        "that is no key for backups: `moor backup-key FILE` makes a pair and prints the public one, '{PUBLIC}' and 48 characters"
    )]
    NotPublic,
    /// Whoever is on the machine could read it meanwhile.
    #[error(
        "that is the private half of a key, which must not be on a command line: make another pair with `moor backup-key FILE`, and give \
         the line that it prints"
    )]
    GivenAway,
    /// A character is another one.
    #[error("the key is mistyped or not whole: its checksum is another one")]
    Mistyped,
    /// The file cannot be read.
    #[error("reading a backup's private key from '{}': {cause}", file.display())]
    Read {
        /// Which; `-` is standard input.
        file: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Others can read it.
    #[error("'{path}' can be read by others than its owner: `chmod 600 '{path}'`", path = .0.display())]
    Exposed(PathBuf),
    /// It is another file.
    #[error("'{}' holds no private key for backups: {why}", file.display())]
    NotPrivate {
        /// Which.
        file: PathBuf,
        /// What it has instead.
        why: String,
    },
    /// The file cannot be made.
    #[error("making '{}': {cause}", file.display())]
    Write {
        /// Which.
        file: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// No randomness.
    #[error("making a key pair failed: {0}")]
    Make(String),
}

/// The first bytes of SHA-256 over prefix and key: a mistyped key passes once in four thousand million times, and one half never for the other.
fn check(prefix: &str, key: &[u8; KEY]) -> [u8; CHECK] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(prefix.as_bytes());
    context.update(key);
    let mut check = [0; CHECK];
    check.copy_from_slice(&context.finish().as_ref()[..CHECK]);
    check
}

fn to_text(prefix: &str, key: &[u8; KEY]) -> Zeroizing<String> {
    let mut bytes = Zeroizing::new([0; KEY + CHECK]);
    bytes[..KEY].copy_from_slice(key);
    bytes[KEY..].copy_from_slice(&check(prefix, key));
    // Long enough from the start, so that growing leaves no copy behind.
    let mut text = Zeroizing::new(String::with_capacity(prefix.len() + (KEY + CHECK).div_ceil(3) * 4));
    text.push_str(prefix);
    URL_SAFE_NO_PAD.encode_string(bytes.as_slice(), &mut text);
    text
}

/// The key of a text that begins with `prefix`; `None`: it is mistyped.
fn from_text(prefix: &str, text: &str) -> Option<Zeroizing<[u8; KEY]>> {
    // What base64 makes of 36 bytes: of a longer text nothing is decoded.
    let text = text.strip_prefix(prefix).filter(|text| text.len() == (KEY + CHECK) / 3 * 4)?;
    let mut bytes = Zeroizing::new([0; KEY + CHECK]);
    URL_SAFE_NO_PAD.decode_slice(text, &mut *bytes).ok().filter(|length| *length == KEY + CHECK)?;
    let mut key = Zeroizing::new([0; KEY]);
    key.copy_from_slice(&bytes[..KEY]);
    (bytes[KEY..] == check(prefix, &key)).then_some(key)
}

/// The public half of a key pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Recipient([u8; KEY]);

impl Recipient {
    /// The X25519 public key.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; KEY] {
        &self.0
    }
}

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&to_text(PUBLIC, &self.0))
    }
}

impl FromStr for Recipient {
    type Err = BackupKeyError;

    fn from_str(text: &str) -> Result<Self, BackupKeyError> {
        if text.starts_with(PRIVATE) {
            return Err(BackupKeyError::GivenAway);
        }
        if !text.starts_with(PUBLIC) {
            return Err(BackupKeyError::NotPublic);
        }
        from_text(PUBLIC, text).map(|key| Self(*key)).ok_or(BackupKeyError::Mistyped)
    }
}

impl From<Recipient> for String {
    fn from(recipient: Recipient) -> Self {
        recipient.to_string()
    }
}

impl TryFrom<String> for Recipient {
    type Error = BackupKeyError;

    fn try_from(text: String) -> Result<Self, BackupKeyError> {
        text.parse()
    }
}

/// The private half. No `Debug`; it is wiped.
pub struct BackupIdentity(Zeroizing<[u8; KEY]>);

impl BackupIdentity {
    /// Makes a pair.
    ///
    /// # Errors
    /// No randomness.
    pub fn generate() -> Result<Self, BackupKeyError> {
        let (_, private) = SUITE.generate_key_pair().map_err(|error| BackupKeyError::Make(error.to_string()))?;
        let mut key = Zeroizing::new([0; KEY]);
        let bytes = private.secret_bytes();
        if bytes.len() != KEY {
            return Err(BackupKeyError::Make("it has another length".into()));
        }
        key.copy_from_slice(bytes);
        Ok(Self(key))
    }

    /// The public half.
    ///
    /// # Errors
    /// The key is not usable.
    pub fn recipient(&self) -> Result<Recipient, BackupKeyError> {
        let failed = || BackupKeyError::Make("the private key is not usable".into());
        let private = PrivateKey::from_private_key(&X25519, &*self.0).map_err(|_| failed())?;
        let public = private.compute_public_key().map_err(|_| failed())?;
        public.as_ref().try_into().map(Recipient).map_err(|_| failed())
    }

    /// The X25519 private key.
    #[must_use]
    pub fn secret_bytes(&self) -> &[u8; KEY] {
        &self.0
    }

    /// Writes it to a new file that its owner alone reads (0600); when this returns, it is durable.
    ///
    /// # Errors
    /// The file exists, or cannot be written: then it is not there.
    pub fn create(&self, file: &Path) -> Result<(), BackupKeyError> {
        let failed = |cause| BackupKeyError::Write { file: file.to_owned(), cause };
        let recipient = self.recipient()?;
        let mut new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file).map_err(failed)?;
        let key = to_text(PRIVATE, &self.0);
        let comment = format!(
            "# Opens backups of Mooring that are encrypted to {recipient}. Not for the members: keep it elsewhere.\n"
        );
        let mut put = || {
            for part in [comment.as_bytes(), key.as_bytes(), b"\n"] {
                new.write_all(part)?;
            }
            new.sync_all()?;
            let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(folder)?.sync_all()
        };
        put().map_err(|cause| {
            // Half a key is of no use; the first failure is the one to report.
            let _ = std::fs::remove_file(file);
            failed(cause)
        })
    }

    /// Reads it from a file that only its owner can read; `-` is standard input. Lines that begin with `#` are comments.
    ///
    /// # Errors
    /// There is none, or more than one.
    pub fn read(file: &Path) -> Result<Self, BackupKeyError> {
        let failed = |cause| BackupKeyError::Read { file: file.to_owned(), cause };
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_FILE + 1));
        let limit = MAX_FILE as u64 + 1;
        if file == Path::new("-") {
            io::stdin().lock().take(limit).read_to_end(&mut bytes).map_err(failed)?;
        } else {
            let open = File::open(file).map_err(failed)?;
            if open.metadata().map_err(failed)?.mode() & 0o077 != 0 {
                return Err(BackupKeyError::Exposed(file.to_owned()));
            }
            open.take(limit).read_to_end(&mut bytes).map_err(failed)?;
        }
        parse(&bytes).map_err(|why| BackupKeyError::NotPrivate { file: file.to_owned(), why })
    }
}

/// The one key in a file.
fn parse(bytes: &[u8]) -> Result<BackupIdentity, String> {
    if bytes.len() > MAX_FILE {
        return Err(format!("it is longer than {MAX_FILE} bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "it is no text".to_owned())?;
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let line = lines.next().ok_or("no line of it is a key")?;
    if lines.next().is_some() {
        return Err("it has more than one line that is no comment".into());
    }
    if line.starts_with(PUBLIC) {
        return Err("that is the public half, which opens nothing".into());
    }
    if !line.starts_with(PRIVATE) {
        return Err(format!("its line does not begin with '{PRIVATE}' (`moor backup-key FILE` makes one)"));
    }
    from_text(PRIVATE, line).map(BackupIdentity).ok_or_else(|| "the key is altered or not whole".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(number: u8) -> BackupIdentity {
        BackupIdentity(Zeroizing::new([number; KEY]))
    }

    /// Computed by other programs: the public half by openssl, the text by Python.
    #[test]
    fn a_key_has_this_form() {
        let mut private = Zeroizing::new([0; KEY]);
        let hexadecimal = "77076d0a7318a57d3c16c17251b26645df4c2f92ebc0992ac177fba51db92c2a";
        hex::decode_to_slice(hexadecimal, &mut *private).unwrap();
        let recipient = BackupIdentity(private.clone()).recipient().unwrap();
        assert_eq!(
            hex::encode(recipient.as_bytes()),
            "f8a9535a2d2ff605e8e144d54f4ef5c62313a2055dbb21fddd3fd9c299eb015d"
        );
        assert_eq!(recipient.to_string(), "moorb_-KlTWi0v9gXo4UTVT071xiMTogVduyH93T_ZwpnrAV2wkJv7");
        let text = "moork_dwdtCnMYpX08FsFyUbJmRd9ML5LrwJkqwXf7pR25LCrDa2eb";
        assert_eq!(*to_text(PRIVATE, &private), text);
        assert_eq!(*parse(text.as_bytes()).ok().unwrap().secret_bytes(), *private);
        assert_eq!(recipient.to_string().parse::<Recipient>().unwrap(), recipient);
    }

    #[test]
    fn one_character_that_is_another_is_noticed_wherever_it_is() {
        let text = identity(7).recipient().unwrap().to_string();
        let parsed = |text: &str| text.parse::<Recipient>();
        assert_eq!(parsed(&text).unwrap().to_string(), text);
        for at in PUBLIC.len()..text.len() {
            let mut altered = text.clone().into_bytes();
            altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
            let altered = String::from_utf8(altered).unwrap();
            assert!(matches!(parsed(&altered), Err(BackupKeyError::Mistyped)), "{altered}");
        }
        for other in [&text[..text.len() - 1], &format!("{text}A"), &format!("{text}="), &format!("{text} "), PUBLIC] {
            assert!(matches!(parsed(other), Err(BackupKeyError::Mistyped)), "{other}");
        }
        for other in ["", "age1xyz", "ssh-ed25519 AAAA"] {
            assert!(matches!(parsed(other), Err(BackupKeyError::NotPublic)), "{other}");
        }
    }

    #[test]
    fn one_half_is_never_taken_for_the_other_nor_shown() {
        let pair = identity(9);
        let (private, public) = (to_text(PRIVATE, &pair.0), pair.recipient().unwrap().to_string());
        let error = private.parse::<Recipient>().unwrap_err();
        assert!(matches!(error, BackupKeyError::GivenAway) && !error.to_string().contains(&private[6..]), "{error}");
        // Nor by another prefix.
        assert!(format!("{PUBLIC}{}", &private[6..]).parse::<Recipient>().is_err());
        let why = |text: &str| parse(text.as_bytes()).err().unwrap();
        assert!(why(&public).contains("the public half"));
        assert!(why(&format!("{PRIVATE}{}", &public[6..])).contains("altered"));
    }

    #[test]
    fn a_file_has_one_key_and_comments() {
        let text = to_text(PRIVATE, &[3; KEY]);
        let key = |text: &str| parse(text.as_bytes()).map(|identity| *identity.0);
        for good in [format!("{}\n", *text), text.to_string(), format!("# a\r\n\n  {}\r\n# b\n", *text)] {
            assert_eq!(key(&good), Ok([3; KEY]), "{good:?}");
        }
        for (bad, says) in [
            (String::new(), "no line"),
            ("# only\n".into(), "no line"),
            (format!("{0}\n{0}\n", *text), "more than one"),
            ("x\n".into(), "does not begin"),
            (text[..text.len() - 1].into(), "not whole"),
            (format!("{}\n{}", *text, "#".repeat(MAX_FILE)), "longer than"),
        ] {
            let error = key(&bad).unwrap_err();
            assert!(error.contains(says) && !error.contains(&text[6..20]), "{bad:?}: {error}");
        }
        assert!(parse(&[0xff]).is_err());
    }
}
