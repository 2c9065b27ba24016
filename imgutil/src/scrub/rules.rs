//! What does not belong into an image, as data. The packer leaves it out of what it writes, `imgutil build` removes it from the
//! tree it makes, and a capture masks it: one list for all three.
//!
//! Removed is what a system makes again by itself, and what belongs to a person or to one machine. A private key that lies
//! anywhere else was put there on purpose, and an image without it may not work: such a key is not removed, packing is refused.

/// Why something is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Category {
    /// SSH host keys and other keys that a machine makes for itself.
    HostKeys,
    /// What tells one machine from another.
    MachineIdentity,
    /// Keys and key rings of persons.
    PersonalKeys,
    /// Tokens, passwords and session files of programs.
    Credentials,
    /// State of cloud-init.
    CloudInit,
    /// Passwords of networks.
    NetworkSecrets,
    /// Log files, core dumps and memory on disk.
    Logs,
    /// What package managers have fetched.
    PackageCaches,
    /// Other caches and backups.
    Caches,
    /// Histories of shells and programs.
    History,
    /// Leases of DHCP clients.
    Leases,
    /// Files of editors that were not ended.
    EditorFiles,
    /// /tmp, /var/tmp, /run.
    Temporary,
    /// Mail and print queues.
    Spools,
}

impl Category {
    /// For people.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::HostKeys => "host keys",
            Self::MachineIdentity => "identity of the machine",
            Self::PersonalKeys => "personal keys",
            Self::Credentials => "credentials",
            Self::CloudInit => "cloud-init state",
            Self::NetworkSecrets => "network secrets",
            Self::Logs => "logs",
            Self::PackageCaches => "package caches",
            Self::Caches => "caches and backups",
            Self::History => "histories",
            Self::Leases => "DHCP leases",
            Self::EditorFiles => "editor files",
            Self::Temporary => "temporary files",
            Self::Spools => "spools",
        }
    }
}

/// What happens to an entry that a pattern matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Left out, with all below it.
    Remove,
    /// Left out unless it is a directory: packages own the directories, programs want them.
    RemoveFile,
    /// Left out if it is a regular file and holds one of these.
    RemoveIfHolds(&'static [&'static str]),
    /// A regular file is kept, without a byte in it.
    Empty,
}

/// One rule.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Why.
    pub category: Category,
    /// What, as patterns are in an `--exclude` file.
    pub pattern: &'static str,
    /// How.
    pub action: Action,
}

use Action::{Empty, Remove, RemoveFile, RemoveIfHolds};
use Category::{
    Caches, CloudInit, Credentials, EditorFiles, History, HostKeys, Leases, Logs, MachineIdentity, NetworkSecrets,
    PackageCaches, PersonalKeys, Spools, Temporary,
};

const fn rule(category: Category, action: Action, pattern: &'static str) -> Rule {
    Rule { category, pattern, action }
}

/// The rules; the first one that matches counts.
pub const RULES: &[Rule] = &[
    rule(HostKeys, RemoveFile, "/etc/ssh/ssh_host_*"),
    rule(HostKeys, RemoveFile, "/etc/dropbear/dropbear_*_host_key"),
    // Debian's ssl-cert and EL's mod_ssl make them when the package is installed.
    rule(HostKeys, RemoveFile, "/etc/ssl/private/ssl-cert-snakeoil.key"),
    rule(HostKeys, RemoveFile, "/etc/pki/tls/private/localhost.key"),
    rule(HostKeys, RemoveFile, "/var/lib/swtpm-localca/**"),
    rule(HostKeys, RemoveFile, "/etc/docker/key.json"),
    // Empty, not missing: systemd then makes one at boot without treating it as a first boot (machine-id(5)).
    rule(MachineIdentity, Empty, "/etc/machine-id"),
    // The agent writes it on the node.
    rule(MachineIdentity, RemoveFile, "/etc/hostname"),
    rule(MachineIdentity, RemoveFile, "/var/lib/dbus/machine-id"),
    rule(MachineIdentity, RemoveFile, "/var/lib/systemd/random-seed"),
    rule(MachineIdentity, RemoveFile, "/var/lib/systemd/credential.secret"),
    rule(MachineIdentity, RemoveFile, "/var/lib/systemd/tpm2-srk-public-key.*"),
    rule(MachineIdentity, RemoveFile, "/var/lib/urandom/random-seed"),
    rule(MachineIdentity, RemoveFile, "/boot/loader/random-seed"),
    rule(MachineIdentity, RemoveFile, "/boot/efi/loader/random-seed"),
    rule(MachineIdentity, RemoveFile, "/efi/loader/random-seed"),
    rule(MachineIdentity, RemoveFile, "/etc/iscsi/initiatorname.iscsi"),
    rule(MachineIdentity, RemoveFile, "/etc/nvme/hostnqn"),
    rule(MachineIdentity, RemoveFile, "/etc/nvme/hostid"),
    rule(MachineIdentity, RemoveFile, "/etc/udev/rules.d/70-persistent-*.rules"),
    rule(MachineIdentity, RemoveFile, "/var/lib/NetworkManager/secret_key"),
    // zypper counts installations by it.
    rule(MachineIdentity, RemoveFile, "/var/lib/zypp/AnonymousUniqueId"),
    // TPM state: objects of a chip that no other machine has.
    rule(MachineIdentity, RemoveFile, "/var/lib/tpm/**"),
    rule(MachineIdentity, RemoveFile, "/var/lib/tpm2-tss/**"),
    rule(MachineIdentity, RemoveFile, "/var/lib/tpm2_pkcs11/**"),
    rule(MachineIdentity, RemoveFile, "**/.tpm2_pkcs11/**"),
    rule(PersonalKeys, RemoveFile, "**/.ssh/id_*"),
    rule(PersonalKeys, RemoveFile, "**/.ssh/identity"),
    rule(PersonalKeys, RemoveFile, "**/.ssh/*.pem"),
    rule(PersonalKeys, RemoveFile, "**/private-keys-v1.d/*"),
    rule(PersonalKeys, RemoveFile, "**/.gnupg/secring.gpg"),
    rule(PersonalKeys, RemoveFile, "**/.gnupg/random_seed"),
    rule(PersonalKeys, RemoveFile, "**/openpgp-revocs.d/*"),
    rule(PersonalKeys, RemoveFile, "**/.local/share/keyrings/*"),
    rule(PersonalKeys, RemoveFile, "**/.password-store/**"),
    rule(Credentials, RemoveFile, "**/.netrc"),
    rule(Credentials, RemoveFile, "**/.git-credentials"),
    rule(Credentials, RemoveFile, "**/.aws/credentials"),
    rule(Credentials, RemoveFile, "**/.aws/*/cache/*"),
    rule(Credentials, Remove, "**/.azure/"),
    rule(Credentials, Remove, "**/.config/gcloud/"),
    rule(Credentials, RemoveFile, "**/.config/gh/hosts.yml"),
    rule(Credentials, RemoveFile, "**/.config/containers/auth.json"),
    rule(Credentials, RemoveFile, "**/.config/rclone/rclone.conf"),
    rule(Credentials, RemoveFile, "**/.docker/config.json"),
    rule(Credentials, RemoveFile, "**/.kube/config"),
    rule(Credentials, RemoveFile, "**/.kube/cache/**"),
    rule(Credentials, RemoveFile, "**/.vault-token"),
    rule(Credentials, RemoveFile, "**/.terraform.d/credentials.tfrc.json"),
    rule(Credentials, RemoveFile, "**/.pypirc"),
    rule(Credentials, RemoveIfHolds(&["_authToken", "_password", "_auth="]), "**/.npmrc"),
    rule(Credentials, RemoveFile, "**/.cargo/credentials*"),
    rule(Credentials, RemoveIfHolds(&["<password>", "<passphrase>"]), "**/.m2/settings.xml"),
    rule(Credentials, RemoveFile, "**/.pgpass"),
    rule(Credentials, RemoveFile, "**/.my.cnf"),
    rule(Credentials, RemoveFile, "**/.smbcredentials"),
    rule(Credentials, RemoveFile, "/etc/krb5.keytab"),
    rule(Credentials, RemoveFile, "/var/kerberos/krb5kdc/.k5*"),
    rule(Credentials, RemoveFile, "/etc/apt/auth.conf"),
    rule(Credentials, RemoveFile, "/etc/apt/auth.conf.d/*"),
    rule(Credentials, RemoveFile, "/etc/zypp/credentials.d/*"),
    rule(Credentials, RemoveFile, "/etc/sysconfig/rhn/systemid"),
    rule(Credentials, RemoveFile, "/etc/pki/consumer/*"),
    rule(Credentials, RemoveFile, "/etc/pki/entitlement/*"),
    rule(Credentials, RemoveFile, "/var/lib/rhsm/**"),
    rule(Credentials, RemoveFile, "/var/lib/ubuntu-advantage/private/**"),
    rule(Credentials, RemoveFile, "/var/lib/sss/db/*"),
    rule(Credentials, RemoveFile, "/var/lib/sss/secrets/*"),
    rule(Credentials, RemoveFile, "/var/lib/samba/private/*"),
    rule(Credentials, RemoveFile, "/var/lib/certmonger/requests/*"),
    rule(Credentials, RemoveFile, "/etc/kubernetes/*.conf"),
    rule(Credentials, RemoveFile, "/etc/kubernetes/pki/**"),
    rule(Credentials, RemoveFile, "/var/lib/kubelet/pki/**"),
    rule(Credentials, RemoveFile, "/var/lib/kubelet/kubeconfig"),
    rule(Credentials, RemoveFile, "/etc/rancher/k3s/k3s.yaml"),
    rule(Credentials, RemoveFile, "/var/lib/rancher/*/server/**"),
    rule(CloudInit, Remove, "/var/lib/cloud/*"),
    rule(CloudInit, RemoveFile, "/etc/netplan/50-cloud-init.yaml"),
    rule(
        NetworkSecrets,
        RemoveIfHolds(&["psk=", "password=", "wep-key", "private-key=", "secrets]"]),
        "/etc/NetworkManager/system-connections/*",
    ),
    rule(
        NetworkSecrets,
        RemoveIfHolds(&["psk=", "password=", "wep_key", "private_key_passwd="]),
        "/etc/wpa_supplicant/*.conf",
    ),
    rule(
        NetworkSecrets,
        RemoveIfHolds(&["psk=", "password=", "wep_key", "private_key_passwd="]),
        "/etc/wpa_supplicant.conf",
    ),
    rule(NetworkSecrets, RemoveIfHolds(&["password:"]), "/etc/netplan/*.yaml"),
    rule(NetworkSecrets, RemoveFile, "/etc/sysconfig/network-scripts/keys-*"),
    rule(NetworkSecrets, RemoveFile, "/var/lib/iwd/*"),
    rule(NetworkSecrets, RemoveFile, "/var/lib/connman/*/settings"),
    rule(NetworkSecrets, RemoveFile, "/etc/ppp/*-secrets"),
    rule(Logs, RemoveFile, "/var/log/**"),
    rule(Logs, RemoveFile, "/var/lib/systemd/coredump/*"),
    rule(Logs, RemoveFile, "/var/crash/**"),
    rule(Logs, RemoveFile, "/var/lib/abrt/**"),
    rule(Logs, RemoveFile, "/var/spool/abrt/**"),
    rule(Logs, RemoveFile, "/swapfile"),
    rule(Logs, RemoveFile, "/swap.img"),
    rule(PackageCaches, RemoveFile, "/var/lib/apt/lists/**"),
    rule(PackageCaches, RemoveFile, "/var/cache/apt/**"),
    rule(PackageCaches, RemoveFile, "/var/cache/debconf/*-old"),
    rule(PackageCaches, Remove, "/var/cache/dnf/*"),
    rule(PackageCaches, Remove, "/var/cache/libdnf5/*"),
    rule(PackageCaches, Remove, "/var/cache/yum/*"),
    rule(PackageCaches, Remove, "/var/cache/zypp/*"),
    rule(PackageCaches, Remove, "/var/cache/PackageKit/*"),
    rule(Caches, RemoveFile, "/var/cache/ldconfig/*"),
    rule(Caches, RemoveFile, "/var/cache/man/**"),
    rule(Caches, RemoveFile, "/var/cache/fontconfig/*"),
    rule(Caches, RemoveFile, "/var/backups/**"),
    rule(Caches, RemoveFile, "/var/lib/dpkg/*-old"),
    rule(Caches, RemoveFile, "/etc/passwd-"),
    rule(Caches, RemoveFile, "/etc/shadow-"),
    rule(Caches, RemoveFile, "/etc/group-"),
    rule(Caches, RemoveFile, "/etc/gshadow-"),
    rule(Caches, RemoveFile, "/etc/subuid-"),
    rule(Caches, RemoveFile, "/etc/subgid-"),
    rule(Caches, Remove, "/root/.cache/*"),
    rule(Caches, Remove, "/home/*/.cache/*"),
    rule(History, RemoveFile, "**/.*_history"),
    rule(History, RemoveFile, "**/.*_history-*.tmp"),
    rule(History, RemoveFile, "**/fish_history"),
    rule(History, RemoveFile, "**/.lesshst"),
    rule(History, RemoveFile, "**/.viminfo"),
    rule(History, RemoveFile, "**/.wget-hsts"),
    rule(Leases, RemoveFile, "/var/lib/dhcp/*"),
    rule(Leases, RemoveFile, "/var/lib/dhclient/*"),
    rule(Leases, RemoveFile, "/var/lib/dhcpcd/*"),
    rule(Leases, RemoveFile, "/var/lib/dhcpcd5/*"),
    rule(Leases, RemoveFile, "/var/lib/wicked/*"),
    rule(Leases, RemoveFile, "/var/lib/NetworkManager/*.lease"),
    rule(Leases, RemoveFile, "/var/lib/NetworkManager/timestamps"),
    rule(Leases, RemoveFile, "/var/lib/NetworkManager/seen-bssids"),
    rule(EditorFiles, RemoveFile, "**/.*.sw[a-p]"),
    rule(EditorFiles, RemoveFile, "**/.#*"),
    rule(EditorFiles, RemoveFile, "**/#*#"),
    rule(Temporary, Remove, "/tmp/*"),
    rule(Temporary, Remove, "/var/tmp/*"),
    rule(Temporary, Remove, "/run/*"),
    rule(Spools, RemoveFile, "/var/mail/*"),
    rule(Spools, RemoveFile, "/var/spool/mail/**"),
    rule(Spools, RemoveFile, "/var/spool/exim4/**"),
    rule(Spools, RemoveFile, "/var/spool/postfix/maildrop/*"),
    rule(Spools, RemoveFile, "/var/spool/postfix/incoming/*"),
    rule(Spools, RemoveFile, "/var/spool/postfix/active/*"),
    rule(Spools, RemoveFile, "/var/spool/postfix/deferred/**"),
    rule(Spools, RemoveFile, "/var/spool/postfix/hold/*"),
    rule(Spools, RemoveFile, "/var/spool/mqueue/**"),
    rule(Spools, RemoveFile, "/var/spool/clientmqueue/**"),
    rule(Spools, RemoveFile, "/var/spool/cups/**"),
];

/// Files that hold a secret by what they are, whatever their bytes say: what it is, and where. A program that needs one does not make it
/// again by itself, so they are refused and not removed.
pub(crate) const KEY_PATHS: &[(&str, &str)] = &[
    // Whoever has it can be any user of the cluster.
    ("a MUNGE key", "/etc/munge/munge.key"),
    ("a key of Slurm", "/etc/slurm*/slurm.key"),
    ("a key of Slurm", "/etc/slurm*/jwt*.key"),
    ("a key of Slurm", "/var/spool/slurm*/**/jwt*.key"),
    ("a key of Slurm", "/var/lib/slurm*/**/jwt*.key"),
    ("a key of Corosync", "/etc/corosync/authkey"),
    ("a key of Pacemaker", "/etc/pacemaker/authkey"),
    ("a key of Ceph", "/etc/ceph/*.keyring"),
    ("a key of Ceph", "/etc/ceph/*.secret"),
    ("a key of Ceph", "/var/lib/ceph/**/keyring"),
    ("a WireGuard private key", "/etc/wireguard/*.key"),
    ("a WireGuard private key", "/etc/wireguard/*private*"),
    ("a key of an encrypted disk", "/etc/cryptsetup-keys.d/*"),
    ("a key of an encrypted disk", "/crypto_keyfile.bin"),
    ("a key of an encrypted disk", "/etc/luks-keys/*"),
    ("a master key of Kerberos", "/etc/krb5kdc/stash"),
    ("a key of a member of Mooring", "/var/lib/mooring/store/keys/**"),
];

/// Names of files that hold a private key by what they are, whatever their bytes say.
pub(crate) const KEY_NAMES: &[&str] = &["*.p12", "*.pfx", "*.jks", "*.keystore", "*.ppk", "*.keytab", "*.kdbx"];
