//! User namespaces: the ids of an ordinary user who runs a command in an image as its root, and root's own where the
//! namespace is wanted for what it carries (`foreign`).
//!
//! Id 0 of the image is the user; 1 and up are the user's subordinate ids (subuid(5)), which only `newuidmap` may map. What a
//! machine lacks for that is named with the command that mends it.

use nix::unistd::{Pid, User};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Fewer subordinate ids than this do not cover the ids that packages give out (0 to 65534).
const ENOUGH: u32 = 65_534;

/// Why a user namespace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The program that maps ids is not there.
    #[error("'{0}' is not installed, which gives an ordinary user the ids of an image: {1}; or use sudo")]
    NoHelper(&'static str, String),
    /// The user has no name.
    #[error("uid {0} has no entry in /etc/passwd, so it can have no subordinate ids: use sudo")]
    NoName(u32),
    /// No subordinate ids.
    #[error(
        "'{user}' has no subordinate {what} in {file}, which the users of an image need: \
         sudo usermod --add-subuids {first}-{last} --add-subgids {first}-{last} {user}; or use sudo"
    )]
    NoRange {
        /// Whose.
        user: String,
        /// `uids` or `gids`.
        what: &'static str,
        /// Where they are missing.
        file: &'static str,
        /// A range that is free.
        first: u32,
        /// Its end.
        last: u32,
    },
    /// A file with ranges is there but cannot be read.
    #[error("cannot read '{0}': {1}")]
    Read(&'static str, io::Error),
    /// The map was refused.
    #[error("cannot map the ids of the user namespace: {0}")]
    Map(String),
    /// The tree belongs to somebody else.
    #[error(
        "'{tree}' belongs to uid {owner}, whom '{user}' cannot stand for: use sudo, or make the tree as this user \
         (a tree owned by '{user}', or by its subordinate ids, can be used without root)"
    )]
    Owner {
        /// The tree.
        tree: PathBuf,
        /// Its owner.
        owner: u32,
        /// Who wanted to use it.
        user: String,
    },
}

/// Consecutive ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    count: u32,
}

/// Which ids of the host stand for those of the image.
#[derive(Debug)]
pub(super) struct Mapping {
    uids: Vec<Range>,
    gids: Vec<Range>,
    /// `newuidmap` and `newgidmap`; root (`None`) needs no help.
    helpers: Option<(PathBuf, PathBuf)>,
}

impl Mapping {
    /// Every id stands for itself. Root only.
    pub(super) fn identity() -> Self {
        let all = vec![Range { inside: 0, outside: 0, count: u32::MAX }];
        Self { uids: all.clone(), gids: all, helpers: None }
    }

    /// The ids of the user who runs this process.
    pub(super) fn of_this_user() -> Result<Self, UserError> {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let name = user_name(uid)?;
        let helpers = (helper("newuidmap")?, helper("newgidmap")?);
        let range = |own, what, file: &'static str| -> Result<Vec<Range>, UserError> {
            let text = match std::fs::read_to_string(file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
                other => other.map_err(|error| UserError::Read(file, error))?,
            };
            let found = subordinate(&text, &name, uid);
            if found.is_empty() {
                let first = free_range(&text);
                return Err(UserError::NoRange { user: name.clone(), what, file, first, last: first + 65_535 });
            }
            Ok(std::iter::once(Range { inside: 0, outside: own, count: 1 }).chain(found).collect())
        };
        Ok(Self {
            uids: range(uid, "uids", "/etc/subuid")?,
            gids: range(gid, "gids", "/etc/subgid")?,
            helpers: Some(helpers),
        })
    }

    /// Whether somebody in the image can own a file of this uid.
    pub(super) fn knows(&self, uid: u32) -> bool {
        self.uids.iter().any(|range| range.outside <= uid && uid - range.outside < range.count)
    }

    /// What the user should know of a map that is short.
    pub(super) fn warning(&self) -> Option<String> {
        let count = |ranges: &[Range]| ranges.iter().map(|range| range.count).fold(0, u32::saturating_add);
        let least = count(&self.uids).min(count(&self.gids));
        (least < ENOUGH).then(|| {
            format!(
                "there are only {least} ids for the image's users: packages that use ids above will fail to install"
            )
        })
    }

    /// Maps the ids of `process`, which has just made its user namespace.
    pub(super) fn apply(&self, process: Pid) -> Result<(), UserError> {
        if let Some((for_users, for_groups)) = &self.helpers {
            run_helper(for_users, process, &self.uids)?;
            return run_helper(for_groups, process, &self.gids);
        }
        for (file, ranges) in [("uid_map", &self.uids), ("gid_map", &self.gids)] {
            let line = |range: &Range| format!("{} {} {}", range.inside, range.outside, range.count);
            let lines = ranges.iter().map(line).collect::<Vec<_>>().join("\n");
            // In one write, as user_namespaces(7) wants it.
            std::fs::File::options()
                .write(true)
                .open(format!("/proc/{process}/{file}"))
                .and_then(|mut file| file.write_all(lines.as_bytes()))
                .map_err(|error| UserError::Map(format!("writing {file}: {error}")))?;
        }
        Ok(())
    }
}

/// The name of this process' user, for messages.
pub(super) fn own_name() -> String {
    let uid = nix::unistd::geteuid().as_raw();
    user_name(uid).unwrap_or_else(|_| uid.to_string())
}

fn user_name(uid: u32) -> Result<String, UserError> {
    match User::from_uid(uid.into()) {
        Ok(Some(user)) => Ok(user.name),
        Ok(None) | Err(_) => Err(UserError::NoName(uid)),
    }
}

fn helper(name: &'static str) -> Result<PathBuf, UserError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/bin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| UserError::NoHelper(name, install("uidmap", "shadow-utils", "shadow")))
}

/// How a package is installed on this host.
pub(super) fn install(debian: &str, redhat: &str, suse: &str) -> String {
    let command = [("/usr/bin/dnf", "dnf install", redhat), ("/usr/bin/zypper", "zypper install", suse)]
        .into_iter()
        // Debian packages dnf and zypper too.
        .find(|(tool, ..)| Path::new(tool).exists() && !Path::new("/usr/bin/apt-get").exists())
        .map_or(("apt-get install", debian), |(_, command, package)| (command, package));
    format!("sudo {} {}", command.0, command.1)
}

fn run_helper(program: &Path, process: Pid, ranges: &[Range]) -> Result<(), UserError> {
    let mut command = Command::new(program);
    command.arg(process.to_string());
    for range in ranges {
        command.args([range.inside, range.outside, range.count].map(|number| number.to_string()));
    }
    let output =
        command.output().map_err(|error| UserError::Map(format!("cannot run '{}': {error}", program.display())))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(UserError::Map(format!("'{}' refused: {}", program.display(), said.trim())))
}

/// The ranges of a user in the text of subuid(5), laid one after the other from id 1 of the image.
fn subordinate(text: &str, name: &str, uid: u32) -> Vec<Range> {
    let mut next = 1;
    let mut ranges = Vec::new();
    for (owner, outside, count) in lines(text) {
        if owner == name || owner.parse() == Ok(uid) {
            ranges.push(Range { inside: next, outside, count });
            next += count;
        }
    }
    ranges
}

/// Where 65,536 ids are free: above all that are given out.
fn free_range(text: &str) -> u32 {
    let above = lines(text).map(|(_, first, count)| first.saturating_add(count)).max().unwrap_or(0).max(100_000);
    above.min(u32::MAX - 65_536)
}

fn lines(text: &str) -> impl Iterator<Item = (&str, u32, u32)> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let (owner, first, count) = (fields.next()?, fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        // More would leave no room in 32 bits.
        (count > 0 && count <= 1 << 30).then_some((owner, first, count))
    })
}

/// Why the kernel may have refused a user namespace, or what is done in one, and what mends it.
pub(super) fn advice() -> Option<String> {
    let value = |name: &str| std::fs::read_to_string(Path::new("/proc/sys").join(name)).ok();
    let is = |name: &str, wanted: &str| value(name).is_some_and(|text| text.trim() == wanted);
    if is("user/max_user_namespaces", "0") {
        Some("user namespaces are switched off: sudo sysctl -w user.max_user_namespaces=15000; or use sudo".to_owned())
    } else if is("kernel/unprivileged_userns_clone", "0") {
        Some(
            "user namespaces are root's only: sudo sysctl -w kernel.unprivileged_userns_clone=1; or use sudo"
                .to_owned(),
        )
    } else if is("kernel/apparmor_restrict_unprivileged_userns", "1") {
        Some(
            "AppArmor forbids user namespaces: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; or use sudo"
                .to_owned(),
        )
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_ranges_follow_each_other() {
        let text = "# comment\nann:100000:65536\n1000:300000:1000\nbob:165536:65536\nann:x:1\nann:5\nann:400000:10\n";
        let range = |inside, outside, count| Range { inside, outside, count };
        assert_eq!(
            subordinate(text, "ann", 1000),
            [range(1, 100_000, 65_536), range(65_537, 300_000, 1000), range(66_537, 400_000, 10)]
        );
        assert_eq!(subordinate(text, "bob", 1001), [range(1, 165_536, 65_536)]);
        assert_eq!(subordinate(text, "eve", 1002), []);
        assert_eq!(free_range(text), 400_010);
        assert_eq!(free_range(""), 100_000);
    }

    #[test]
    fn owners_that_are_mapped_are_known() {
        let range = |inside, outside, count| Range { inside, outside, count };
        let uids = vec![range(0, 1000, 1), range(1, 100_000, 65_536)];
        let mapping = Mapping { gids: uids.clone(), uids, helpers: None };
        for (uid, known) in
            [(1000, true), (1001, false), (0, false), (100_000, true), (165_535, true), (165_536, false)]
        {
            assert_eq!(mapping.knows(uid), known, "{uid}");
        }
        assert_eq!(mapping.warning(), None);
        assert!(Mapping::identity().knows(0) && Mapping::identity().warning().is_none());
    }
}
