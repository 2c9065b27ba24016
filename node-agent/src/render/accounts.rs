//! root's password and keys. Other accounts of the image stay as they are.

use super::{AUTHORIZED_KEYS, Content, Facts, RenderError, RenderedFile, SHADOW, line, word};
use moor_api::deploy::DeployDocument;
use zeroize::Zeroizing;

pub(super) fn files(document: &DeployDocument, facts: &Facts<'_>) -> Result<Vec<RenderedFile>, RenderError> {
    let hash = document.secrets.as_ref().and_then(|secrets| secrets.root_password_hash.as_deref());
    // crypt(5): its alphabet, '$' between the parts, parameters like "rounds=5000".
    let hash = hash.map(|hash| word("the root password's hash", hash, "./$=,")).transpose();
    // The value must not be shown.
    let hash = hash.map_err(|error| RenderError { value: "…".into(), ..error })?;
    let mut files = Vec::new();
    if let Some(old) = &facts.shadow {
        files.push(RenderedFile { path: SHADOW.into(), content: Content::Replaced(shadow(old, hash)) });
    }
    if !facts.trust.authorized_keys.is_empty() {
        let text = authorized_keys(facts.authorized_keys.as_deref().unwrap_or_default(), &facts.trust.authorized_keys)?;
        files.push(RenderedFile { path: "/root/.ssh".into(), content: Content::Directory(0o700) });
        files.push(RenderedFile::new(AUTHORIZED_KEYS, 0o600, text));
    }
    Ok(files)
}

/// `old` with root's password set to `hash`, or to one that none matches. Not `!`: sshd without PAM takes that for an account that may
/// not log in by key either.
fn shadow(old: &str, hash: Option<&str>) -> Zeroizing<String> {
    let hash = hash.unwrap_or("*");
    let mut text = Zeroizing::new(String::with_capacity(old.len() + 256));
    let mut found = false;
    for entry in old.lines() {
        match entry.strip_prefix("root:").and_then(|rest| rest.split_once(':')) {
            Some((_, rest)) => {
                found = true;
                text.push_str("root:");
                text.push_str(hash);
                text.push(':');
                text.push_str(rest);
            }
            None => text.push_str(entry),
        }
        text.push('\n');
    }
    if !found {
        text.push_str("root:");
        text.push_str(hash);
        text.push_str(":19000:0:99999:7:::\n");
    }
    text
}

/// The image's own keys, then those of the site that are not among them.
fn authorized_keys(old: &str, keys: &[String]) -> Result<String, RenderError> {
    let mut text = String::new();
    for key in old.lines() {
        text.push_str(key);
        text.push('\n');
    }
    for key in keys {
        let key = line("an authorized key", key.trim())?;
        if !text.lines().any(|present| present == key) {
            text.push_str(key);
            text.push('\n');
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_roots_password_changes() {
        let old = "root:*:19700:0:99999:7:::\ndaemon:*:19700:0:99999:7:::\nrooty:x:1::::::\n";
        assert_eq!(
            *shadow(old, Some("$y$j9T$salt$hash")),
            "root:$y$j9T$salt$hash:19700:0:99999:7:::\ndaemon:*:19700:0:99999:7:::\nrooty:x:1::::::\n"
        );
        assert_eq!(*shadow(old, None), old);
        assert_eq!(*shadow("daemon:*:1::::::", None), "daemon:*:1::::::\nroot:*:19000:0:99999:7:::\n");
        let once = shadow(old, Some("$6$x"));
        assert_eq!(*shadow(&once, Some("$6$x")), *once);
    }

    #[test]
    fn keys_of_the_image_stay_and_none_is_there_twice() {
        let keys = ["ssh-ed25519 AAAA admin".to_owned(), "ssh-ed25519 BBBB other\n".to_owned()];
        let text = authorized_keys("# image\nssh-ed25519 AAAA admin\n", &keys).unwrap();
        assert_eq!(text, "# image\nssh-ed25519 AAAA admin\nssh-ed25519 BBBB other\n");
        assert_eq!(authorized_keys(&text, &keys).unwrap(), text);
        assert!(authorized_keys("", &["a\nb".to_owned()]).is_err());
    }
}
