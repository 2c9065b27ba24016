//! Backups that are encrypted to keys: who opens them, who does not, and what is refused.

use crate::backup::{PASSPHRASE, backup, restore, secret_file, shown_path};
use crate::cli::{moor, said_no, shown};
use crate::collective::{define, knows, text};
use crate::support::{Member, UID, refusal};
use anyhow::ensure;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use moor_api::admin::{BackupRequest, TokenRequest};
use moor_api::backup_key::{KEY, MAX_RECIPIENTS, Recipient};
use moor_api::client::admin::AdminClient;
use moor_api::problem::Code;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Output;

/// A key pair, as an administrator makes it: the file of the private half, and the line that was printed.
struct Pair {
    file: PathBuf,
    public: String,
}

impl Pair {
    fn make(member: &Member, name: &str) -> anyhow::Result<Self> {
        let file = member.path(name);
        let (status, out, err) = shown(&moor(member, &["backup-key", shown_path(&file)])?.output()?);
        ensure!(status == Some(0) && err.is_empty() && out.lines().count() == 1, "{out}{err}");
        let mode = std::fs::metadata(&file)?.mode();
        ensure!(mode & 0o777 == 0o600, "{mode:o}");
        // Whoever restores reads it.
        chown(&file, Some(UID), Some(UID))?;
        Ok(Self { file, public: out.trim_end().to_owned() })
    }
}

/// `moor backup` to these keys; the backup belongs to the user that will restore it.
fn backup_to(member: &Member, name: &str, keys: &[&Pair]) -> anyhow::Result<PathBuf> {
    let file = member.path(name);
    let mut arguments = vec!["--json", "backup", shown_path(&file)];
    arguments.extend(keys.iter().flat_map(|pair| ["--recipient", &pair.public]));
    let (status, out, err) = shown(&moor(member, &arguments)?.output()?);
    ensure!(status == Some(0) && err.is_empty(), "{out}{err}");
    let told: serde_json::Value = serde_json::from_str(&out)?;
    let publics: Vec<&str> = keys.iter().map(|pair| pair.public.as_str()).collect();
    ensure!(told["redacted"] == false && told["recipients"] == serde_json::json!(publics), "{told}");
    chown(&file, Some(UID), Some(UID))?;
    Ok(file)
}

/// `moord restore` into `member`, by this private half.
fn restore_by(member: &Member, file: &Path, identity: &Path) -> anyhow::Result<Output> {
    member.moord("restore", &[shown_path(file), "--address", "127.0.0.1", "--identity", shown_path(identity)])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_its_keys_restores_a_backup_and_the_member_that_made_it_has_none() -> anyhow::Result<()> {
    let member = Member::start()?;
    define(&member, "n1").await?;
    let [one, two, stranger] = ["one", "two", "stranger"].map(|name| Pair::make(&member, name));
    let (one, two, stranger) = (one?, two?, stranger?);
    ensure!(one.public != two.public, "the same key twice");
    let file = backup_to(&member, "site.backup", &[&one, &two])?;
    // Nothing of the private halves comes to the member, and no file of it has the key of the backup: whoever has its keys is a stranger.
    for pair in [&one, &two] {
        let mut restored = Member::prepare()?;
        let output = restore_by(&restored, &file, &pair.file)?;
        ensure!(output.status.success(), "{}", text(&output.stderr));
        restored.run()?;
        knows(&restored, &["n1"]).await?;
    }
    let target = Member::prepare()?;
    said_no("a stranger", &restore_by(&target, &file, &stranger.file)?, &["none of the 2 keys", "is this one"]);
    let own = std::fs::read_to_string(member.path("state/store/keys/unwrap.key"))?;
    let own = secret_file(&member, "own", &private_text(&hex::decode(own.trim_end())?))?;
    said_no("the member's own key", &restore_by(&target, &file, &own)?, &["none of the 2 keys"]);
    // Who made it, and for whom, is in the audit log.
    let mut parts = member.admin().await?.backup(&BackupRequest::default()).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = parts.next().await? {
        bytes.extend_from_slice(&piece);
    }
    let lines = text(&bytes);
    let is_line = |line: &str| line.contains(r#""what":"backup""#) && line.contains(&two.public);
    ensure!(lines.lines().any(is_line), "it is not in the audit log");
    Ok(())
}

fn with_check(prefix: &str, key: &[u8]) -> String {
    let check = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &[prefix.as_bytes(), key].concat());
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode([key, &check.as_ref()[..4]].concat()))
}

fn private_text(key: &[u8]) -> String {
    with_check("moork_", key)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_for_other_keys_or_altered_is_refused_and_leaves_nothing() -> anyhow::Result<()> {
    let member = Member::start()?;
    define(&member, "n1").await?;
    let (pair, stranger) = (Pair::make(&member, "key")?, Pair::make(&member, "stranger")?);
    let file = backup_to(&member, "site.backup", &[&pair])?;
    let by_passphrase = backup(&member, "by-passphrase.backup")?;
    let whole = std::fs::read(&file)?;
    let target = Member::prepare()?;
    let is_bare = |what: &str| {
        ensure!(!target.path("state/store").exists(), "{what}: a store is left");
        anyhow::Ok(())
    };
    let refused = |what: &str, bytes: &[u8], says: &str| {
        let path = target.path("bad.backup");
        std::fs::write(&path, bytes)?;
        chown(&path, Some(UID), Some(UID))?;
        said_no(what, &restore_by(&target, &path, &pair.file)?, &[says]);
        is_bare(what)
    };
    let altered = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        bytes
    };
    refused("a newer format", &altered(9), "a newer release wrote it")?;
    refused("another way", &altered(10), "not what any release writes")?;
    refused("more keys", &altered(12), "none of the 5 keys")?;
    refused("too many keys", &altered(13), "not what any release writes")?;
    refused("altered salt", &altered(40), "none of the 1 keys")?;
    refused("altered key", &altered(70), "none of the 1 keys")?;
    refused("altered encrypted key", &altered(100), "none of the 1 keys")?;
    refused("altered MAC", &altered(64 + 80 + 5), "its header is damaged")?;
    refused("altered content", &altered(whole.len() / 2), "damaged at byte")?;
    refused("altered end", &altered(whole.len() - 1), "damaged at byte")?;
    refused("cut", &whole[..whole.len() - 1], "damaged at byte")?;
    refused("cut to its header", &whole[..64 + 80 + 32], "damaged at byte 176")?;
    refused("cut within its header", &whole[..64 + 80], "ends within its first 176 bytes")?;
    refused("goes on", &[&whole[..], b"x"].concat(), "damaged at byte")?;

    // Files that hold no such key, and the wrong kind of one.
    let exposed = secret_file(&member, "exposed", &std::fs::read_to_string(&pair.file)?)?;
    std::fs::set_permissions(&exposed, std::fs::Permissions::from_mode(0o644))?;
    let public = secret_file(&member, "public", &pair.public)?;
    let cut = std::fs::read_to_string(&pair.file)?;
    let cut = secret_file(&member, "cut", &cut[..cut.len() - 2])?;
    let missing = member.path("missing");
    for (what, file, identity, says) in [
        ("another key", &file, &stranger.file, "none of the 1 keys"),
        ("a key that others read", &file, &exposed, "can be read by others"),
        ("the public half", &file, &public, "the public half, which opens nothing"),
        ("half a key", &file, &cut, "altered or not whole"),
        ("no file", &file, &missing, "reading a backup's private key"),
        ("a backup that has a passphrase", &by_passphrase, &pair.file, "leave `--identity` away"),
    ] {
        said_no(what, &restore_by(&target, file, identity)?, &[says]);
        is_bare(what)?;
    }
    said_no("a passphrase", &restore(&target, &file, PASSPHRASE, &[])?, &["no passphrase opens it", "--identity FILE"]);
    let bare = target.moord("restore", &[shown_path(&file), "--address", "127.0.0.1"])?;
    said_no("nothing", &bare, &["no passphrase opens it", "--identity FILE"]);
    is_bare("nothing")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_is_made_to_usable_keys_only_and_over_the_socket() -> anyhow::Result<()> {
    let member = Member::start()?;
    let pair = Pair::make(&member, "key")?;
    let private = std::fs::read_to_string(&pair.file)?;
    let private = private.lines().find(|line| line.starts_with("moork_")).unwrap_or_default();
    let mut mistyped = pair.public.clone();
    mistyped.replace_range(10..11, if &mistyped[10..11] == "x" { "y" } else { "x" });
    let lowest = with_check("moorb_", &[0; KEY]);
    let new = member.path("new.backup");
    // Nobody answers there: what was typed is looked at before.
    let nobody = Member::prepare()?;
    for (what, key, says) in [
        ("no key", "age1qqqq", "`moor backup-key FILE` makes a pair"),
        ("a mistyped key", &mistyped, "mistyped"),
        ("a private key", private, "must not be on a command line"),
        ("a key that agrees on the same with everybody", &lowest, "no usable key"),
    ] {
        // Whether one of the right form is good for anything is seen when something is encrypted to it.
        let asked = if key == lowest { vec![&member] } else { vec![&member, &nobody] };
        for asked in asked {
            let output = moor(asked, &["backup", shown_path(&new), "--recipient", key])?.output()?;
            said_no(what, &output, &[says]);
            ensure!(what != "a private key" || !text(&output.stderr).contains(&key[6..]), "the private key is shown");
        }
    }
    let mut many = vec!["backup", shown_path(&new)];
    many.extend(["--recipient", pair.public.as_str()].repeat(MAX_RECIPIENTS + 1));
    said_no("many keys", &moor(&nobody, &many)?.output()?, &["16 at most"]);
    let short = secret_file(&member, "short", "short")?;
    let output = moor(&nobody, &["backup", shown_path(&new), "--passphrase-file", shown_path(&short)])?.output()?;
    said_no("a short passphrase", &output, &["5 characters"]);
    let output = moor(&nobody, &["backup", shown_path(&new), "--recipient", &pair.public])?.output()?;
    said_no("nobody", &output, &["is moord running here?"]);
    said_no("a file that is there", &moor(&member, &["backup-key", shown_path(&pair.file)])?.output()?, &["exists"]);
    ensure!(!new.exists(), "a refused backup left something");
    // By the API.
    let recipient: Recipient = pair.public.parse()?;
    let request =
        |passphrase, count| BackupRequest { passphrase, recipients: vec![recipient; count], without_majority: false };
    let mut admin = member.admin().await?;
    for wrong in [request(None, MAX_RECIPIENTS + 1), request(Some(PASSPHRASE.into()), 1)] {
        assert_eq!(refusal(admin.backup(&wrong).await.map(drop)).0, Code::BadRequest);
    }
    let bundle = member.site().await?.bundle;
    let token = admin.create_token(&TokenRequest { name: "me".into(), lifetime: 600 }).await?.token;
    let mut remote = AdminClient::https(&member.url(), &bundle, &token).await?;
    assert_eq!(refusal(remote.backup(&request(None, 1)).await.map(drop)).0, Code::Forbidden);
    Ok(())
}
