//! The command line. Help, completion and man pages are made from these definitions.

use clap::{Args, Parser, Subcommand, ValueEnum};
use moor_api::ids::{ImageName, NodeName, ProfileName};
use std::path::PathBuf;

/// Deploys operating systems to the nodes of a cluster and keeps them deployed.
#[derive(Debug, Parser)]
#[command(name = "moor", version, max_term_width = 120)]
pub struct Cli {
    /// How to reach a member.
    #[command(flatten)]
    pub connection: Connection,
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How to reach a member: the local socket, or HTTPS with a token.
#[derive(Debug, Args)]
pub struct Connection {
    /// Unix socket of the local member.
    #[arg(long, global = true, default_value = "/run/mooring/api.sock", env = "MOOR_SOCKET")]
    pub socket: PathBuf,
    /// A member's URL, instead of the socket.
    #[arg(long, global = true, env = "MOOR_SERVER", requires = "token_file", requires = "site_file")]
    pub server: Option<String>,
    /// File with the administrator's token (`moor token create`), readable by its owner only.
    #[arg(long, global = true, env = "MOOR_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// The site bundle, which says who is a member (`moor site --bundle`).
    #[arg(long, global = true, env = "MOOR_SITE_FILE")]
    pub site_file: Option<PathBuf>,
}

/// Nouns, and the verbs that need none.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make this machine the first member of a new collective (runs `moord init`).
    Init(Init),
    /// The members: show, invite, join, replace, promote, demote, remove, recover.
    #[command(subcommand)]
    Collective(Collective),
    /// The authorities that members and nodes know each other by: show, rotate, retire.
    #[command(subcommand)]
    Authority(Authority),
    /// Write a backup of the store to a new file: all records, and the keys of the collective, under a passphrase or encrypted to keys.
    /// Content (images, files of profiles) is not in it.
    Backup {
        /// The file; it must not exist.
        file: PathBuf,
        /// File with the passphrase, readable by its owner only ('-': standard input). Without it the terminal is asked.
        #[arg(long, value_name = "FILE")]
        passphrase_file: Option<PathBuf>,
        /// Encrypt it to this key instead, the line that `moor backup-key` prints: nothing on this machine opens it then. May be given again, up
        /// to 16 times: any one of the private halves opens it.
        #[arg(long = "recipient", value_name = "KEY", conflicts_with = "passphrase_file")]
        recipients: Vec<String>,
        /// Write lines of JSON without any secret instead: to read and to compare, not to restore.
        #[arg(long, conflicts_with_all = ["passphrase_file", "recipients"])]
        redact: bool,
        /// Where no majority of the members answers, write what this member holds. Others may have agreed about more; the backup says so when
        /// it is restored.
        #[arg(long)]
        without_majority: bool,
    },
    /// Make a key pair for backups, on a machine that is no member: the private half goes to a new file, which `moor restore --identity` opens
    /// backups by; the public one is printed, for `moor backup --recipient`.
    BackupKey {
        /// The file, readable by its owner only; it must not exist.
        file: PathBuf,
    },
    /// Make a new collective of this machine out of a backup (runs `moord restore`).
    Restore {
        /// The backup.
        file: PathBuf,
        /// Configuration of the member.
        #[arg(long, default_value = "/etc/mooring/moord.toml")]
        config: PathBuf,
        /// Further arguments of `moord restore`: --passphrase-file or --identity FILE, --blobs, --set-aside and others.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Define, list and change nodes.
    #[command(subcommand)]
    Node(Node),
    /// Open the window in which nodes may enrol.
    Arm(Arm),
    /// Say what nodes are to boot; with no profile, show their state.
    Deploy(Deploy),
    /// Show the state of nodes.
    Status(Status),
    /// Say why a node does not boot: what it did last, what it was refused, and what to do.
    Why {
        /// A node's name; or the UUID or MAC of a machine that is no node yet.
        subject: String,
    },
    /// Show what a node's phases printed.
    Log {
        /// The node.
        node: NodeName,
    },
    /// List and import images.
    #[command(subcommand)]
    Image(Image),
    /// Where the content of the collective is.
    #[command(subcommand)]
    Content(Content),
    /// Create, list and publish profiles.
    #[command(subcommand)]
    Profile(Profile),
    /// Show the collective.
    Site {
        /// Print the site bundle (JSON), which nodes and remote administrators trust members by.
        #[arg(long)]
        bundle: bool,
        /// Print the `@cert-authority` lines for `known_hosts`.
        #[arg(long, conflicts_with = "bundle")]
        known_hosts: bool,
    },
    /// Tokens for administrators who come over HTTPS.
    #[command(subcommand)]
    Token(Token),
}

/// `moor collective …`
#[derive(Debug, Subcommand)]
pub enum Collective {
    /// Show the members, who leads, and whether a majority answers.
    Show,
    /// Invite a machine to become a member: prints a text for `moor collective join` there. It is good once.
    Invite {
        /// Name of the member to be.
        name: String,
        /// It takes no part in votes: a site far away, say.
        #[arg(long)]
        non_voting: bool,
        /// How long it is good: 90s, 30m, 1h; at most 24h.
        #[arg(long, default_value = "1h")]
        expires: String,
        /// Write it to this file (0600) instead of the terminal.
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Make this machine a member, with an invitation on standard input or in a file (runs `moord join`).
    Join(Init),
    /// Invite a machine to take the place of a member that is dead: prints a text for `moor collective join` there. The old member is removed
    /// once the new one has all and votes.
    Replace {
        /// Name or number of the member that goes.
        dead: String,
        /// Name of the member to be; it may be the same.
        name: String,
        /// How long the invitation is good: 90s, 30m, 1h; at most 24h.
        #[arg(long, default_value = "1h")]
        expires: String,
        /// Write it to this file (0600) instead of the terminal.
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// When the majority is lost for ever: make this machine's member, which is stopped, a collective of one (runs `moord recover`). Says what
    /// would be lost; `--force` does it.
    Recover(Init),
    /// Let a non-voting member vote.
    Promote {
        /// Its name or number.
        member: String,
    },
    /// Let a member vote no more.
    Demote {
        /// Its name or number.
        member: String,
        /// Also where no majority of those that vote then answers.
        #[arg(long)]
        force: bool,
    },
    /// Rotate the keys of the collective: new ones for those who are members, and all secrets are sealed anew in the background. Done by itself
    /// when a member is removed.
    RotateKey,
    /// Remove a member for good; a dead one, to make room for its replacement.
    Remove {
        /// Its name or number.
        member: String,
        /// Somebody else may have what is on it: rotate the authority of certificates as well (`moor authority rotate`).
        #[arg(long)]
        compromised: bool,
        /// Also where no majority of those that vote then answers.
        #[arg(long)]
        force: bool,
        /// Do not ask.
        #[arg(short)]
        yes: bool,
    },
}

/// `moor authority …`
#[derive(Debug, Subcommand)]
pub enum Authority {
    /// Show the authorities, and which members and nodes have not acknowledged the newest trust bundle.
    Show,
    /// Make a new authority beside the one in use: nodes and members trust both from now on. No certificate of a member or a host is from the
    /// new one before the old one is retired.
    Rotate {
        /// Which.
        #[arg(default_value = "x509")]
        kind: AuthorityKind,
    },
    /// Take a rotation of the authority of certificates back, before the old one is retired: the new one is trusted no more, and its keys are
    /// removed.
    Cancel,
    /// Let the new authority take over, and trust the old one no more. Refused as long as members or nodes have not acknowledged the new one.
    Retire {
        /// Which.
        #[arg(default_value = "x509")]
        kind: AuthorityKind,
        /// Leave nodes behind that have not acknowledged: of x509, they trust no member until they boot with new boot files.
        #[arg(long)]
        force: bool,
    },
}

/// An authority that is rotated by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AuthorityKind {
    /// That of certificates.
    X509,
    /// That of hosts.
    SshHost,
    /// That of users.
    SshUser,
}

/// Arguments of `moor init`, `moor collective join` and `moor collective recover`.
#[derive(Debug, Args)]
pub struct Init {
    /// Configuration of the member.
    #[arg(long, default_value = "/etc/mooring/moord.toml")]
    pub config: PathBuf,
    /// Further arguments of the `moord` that it runs.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub rest: Vec<String>,
}

/// `moor node …`
#[derive(Debug, Subcommand)]
pub enum Node {
    /// Define nodes: `moor node define n[1-4] net.ipv4_method=dhcp`.
    Define {
        /// Names, as a noderange.
        range: String,
        /// `category.attribute=value`, common to all.
        attributes: Vec<String>,
    },
    /// List nodes, or the values of attributes.
    List {
        /// Which nodes; none: all.
        range: Option<String>,
        /// Attributes to show; none: names only. `all` shows every one that is set.
        attributes: Vec<String>,
    },
    /// Set or clear attributes.
    Set {
        /// Which nodes.
        range: String,
        /// `category.attribute=value`.
        attributes: Vec<String>,
        /// Clear these.
        #[arg(short, long)]
        clear: Vec<String>,
        /// Take a secret's value from a file (`-`: standard input): `category.attribute=FILE`.
        #[arg(short, long)]
        file: Vec<String>,
        /// Refuse to change more nodes than this.
        #[arg(short, long)]
        maxnodes: Option<usize>,
    },
    /// Forget nodes.
    Remove {
        /// Which nodes.
        range: String,
        /// Do not ask.
        #[arg(short)]
        yes: bool,
    },
    /// Open the window in which nodes may enrol.
    Arm(Arm),
    /// Say what nodes are to boot.
    Deploy(Deploy),
    /// A node's identity.
    #[command(subcommand)]
    Trust(Trust),
}

/// `moor node trust …`
#[derive(Debug, Subcommand)]
pub enum Trust {
    /// Drop a node's identity (its TPM was replaced, say) and let it enrol once more.
    Rearm {
        /// The node, by its name.
        node: NodeName,
        /// Do not ask.
        #[arg(short)]
        yes: bool,
    },
}

/// Arguments of `moor arm`.
#[derive(Debug, Args)]
pub struct Arm {
    /// Which nodes.
    pub range: String,
    /// Stay open, for nodes that keep no identity.
    #[arg(long, conflicts_with_all = ["until", "off"])]
    pub continuous: bool,
    /// Stay open until this time (RFC 3339).
    #[arg(long, conflicts_with = "off")]
    pub until: Option<String>,
    /// Close the window.
    #[arg(long)]
    pub off: bool,
}

/// Arguments of `moor deploy`.
#[derive(Debug, Args)]
pub struct Deploy {
    /// Which nodes.
    pub range: String,
    /// The profile.
    #[arg(short = 'n', long)]
    pub profile: Option<ProfileName>,
    /// Also open the enrolment window for one boot.
    #[arg(long)]
    pub arm: bool,
    /// Then follow the nodes until each is booted or failed.
    #[arg(long)]
    pub watch: bool,
    /// Refuse more nodes than this.
    #[arg(short, long)]
    pub maxnodes: Option<usize>,
}

/// Arguments of `moor status`.
#[derive(Debug, Args)]
pub struct Status {
    /// Which nodes; none: all.
    pub range: Option<String>,
    /// Show every change that is kept, oldest first, instead of the last one of each node.
    #[arg(long)]
    pub history: bool,
    /// Go on showing changes until interrupted.
    #[arg(long)]
    pub watch: bool,
    /// With `--watch`: end when each node of the range is booted (exit 0) or one failed (exit 1).
    #[arg(long, requires = "watch")]
    pub until_booted: bool,
}

/// `moor image …`
#[derive(Debug, Subcommand)]
pub enum Image {
    /// List the catalogue.
    List,
    /// Put a sealed image into the catalogue, as a new generation of its name.
    Import {
        /// Its name in the catalogue.
        name: ImageName,
        /// The file that `imgutil pack` wrote.
        file: PathBuf,
        /// Its key; none for a plain image.
        #[arg(long)]
        key_file: Option<PathBuf>,
        /// Folder with `vmlinuz` and `initrd.img`, and shim and GRUB for Secure Boot where they are to be used (`imgutil pack --boot-dir`).
        #[arg(long)]
        boot_dir: PathBuf,
    },
}

/// `moor content …`
#[derive(Debug, Subcommand)]
pub enum Content {
    /// Show images and what else is not on every member; the exit status is not 0 when something is on none.
    Status {
        /// Show everything.
        #[arg(long)]
        all: bool,
    },
}

/// `moor profile …`
#[derive(Debug, Subcommand)]
pub enum Profile {
    /// List profiles.
    List,
    /// Make a working directory for a new profile.
    Create {
        /// Its name.
        name: ProfileName,
        /// The image it boots.
        #[arg(long)]
        image: ImageName,
        /// The shipped profile to start from.
        #[arg(long, default_value = "debian-diskless")]
        template: String,
    },
    /// Make the working directory of a profile its newest generation: nodes get it from now on.
    Publish {
        /// The profile.
        name: ProfileName,
    },
    /// Write kernel, initramfs (with the site's cpio behind it), command line, and shim and GRUB where the image brought them, into a folder.
    BootFiles {
        /// The profile.
        name: ProfileName,
        /// The folder.
        #[arg(long, short)]
        out: PathBuf,
    },
}

/// `moor token …`
#[derive(Debug, Subcommand)]
pub enum Token {
    /// Make a token and write it to a file (0600) that must not exist.
    Create {
        /// For whom; the audit log names it.
        name: String,
        /// Where to write it.
        #[arg(long, short)]
        out: PathBuf,
        /// How long it is good, in hours.
        #[arg(long, default_value_t = 12)]
        hours: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn kinds_of_authorities_are_words() {
        let parsed = |line: &str| Cli::try_parse_from(line.split(' ')).map(|cli| cli.command);
        for (word, wanted) in [
            ("", AuthorityKind::X509),
            (" x509", AuthorityKind::X509),
            (" ssh-host", AuthorityKind::SshHost),
            (" ssh-user", AuthorityKind::SshUser),
        ] {
            match parsed(&format!("moor authority rotate{word}")) {
                Ok(Command::Authority(Authority::Rotate { kind })) => assert_eq!(kind, wanted),
                other => panic!("{other:?}"),
            }
            match parsed(&format!("moor authority retire{word} --force")) {
                Ok(Command::Authority(Authority::Retire { kind, force: true })) => assert_eq!(kind, wanted),
                other => panic!("{other:?}"),
            }
        }
        // Before anybody is asked, and with the words that there are.
        for line in ["moor authority rotate ssh", "moor authority retire ssh"] {
            let error = parsed(line).unwrap_err().to_string();
            assert!(
                error.contains("'ssh'") && error.contains("[possible values: x509, ssh-host, ssh-user]"),
                "{error}"
            );
        }
        // Nothing but the authority of certificates is taken back.
        assert!(parsed("moor authority cancel ssh-host").is_err());
    }

    /// What another program is to read is passed on, and what is ours is not.
    #[test]
    fn options_of_moord_are_passed_on() {
        let parsed = |line: &str| Cli::try_parse_from(line.split(' ')).unwrap();
        let cli = parsed("moor --json restore a.backup --config c.toml --passphrase-file - --blobs /b");
        assert!(cli.json);
        let Command::Restore { file, config, rest } = cli.command else { panic!("another command") };
        assert_eq!((file, config), ("a.backup".into(), "c.toml".into()));
        assert_eq!(rest, ["--passphrase-file", "-", "--blobs", "/b"]);
        let Command::Collective(Collective::Recover(recover)) = parsed("moor collective recover --force").command
        else {
            panic!("another command")
        };
        assert_eq!(recover.rest, ["--force"]);
    }
}
