//! The command line of `moord`.

use clap::{Parser, Subcommand};
use std::path::PathBuf;

/// A member of a Mooring collective. It logs to standard error; `MOORD_LOG` sets the level (error, warn, info, debug), `MOORD_LOG_FORMAT=json` makes
/// lines of JSON.
#[derive(Debug, Parser)]
#[command(name = "moord", version, max_term_width = 120)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new collective with this member as its first: authorities, keys, store.
    Init {
        /// Configuration of the member; written when it is not there and an address is given.
        #[arg(long, default_value = "/etc/mooring/moord.toml")]
        config: PathBuf,
        /// A further address or name at which this member is reached, for its certificate.
        #[arg(long = "address", value_name = "ADDRESS")]
        addresses: Vec<String>,
        /// Name of the collective, instead of the configuration's.
        #[arg(long)]
        name: Option<String>,
        /// Where there is a member already, move its store aside (to `store.aside-TIME`) instead of refusing. Its content and the working
        /// directories of its profiles stay.
        #[arg(long)]
        set_aside: bool,
    },
    /// Come to a collective as a new member, with an invitation (`moor collective invite NAME` on a member).
    Join {
        /// Configuration of the member; written when it is not there and an address is given.
        #[arg(long, default_value = "/etc/mooring/moord.toml")]
        config: PathBuf,
        /// A further address or name at which this member is reached, for its certificate.
        #[arg(long = "address", value_name = "ADDRESS")]
        addresses: Vec<String>,
        /// The file that holds the invitation; '-' is standard input.
        #[arg(long = "invitation", value_name = "FILE", default_value = "-")]
        invitation: PathBuf,
        /// Where there is a member already, of this or of another collective, move its store aside (to `store.aside-TIME`) instead of
        /// refusing. Its content and the working directories of its profiles stay.
        #[arg(long)]
        set_aside: bool,
    },
    /// Make a new collective with this member as its first out of a backup (`moor backup FILE` on a member).
    Restore {
        /// The backup.
        file: PathBuf,
        /// Configuration of the member; written when it is not there and an address is given.
        #[arg(long, default_value = "/etc/mooring/moord.toml")]
        config: PathBuf,
        /// A further address or name at which this member is reached, for its certificate.
        #[arg(long = "address", value_name = "ADDRESS")]
        addresses: Vec<String>,
        /// The file that holds the passphrase; '-' is standard input. Without it the terminal is asked.
        #[arg(long, value_name = "FILE")]
        passphrase_file: Option<PathBuf>,
        /// For a backup that is encrypted to keys: the file that holds a private one of them (`moor backup-key`); '-' is standard input.
        #[arg(long, value_name = "FILE", conflicts_with = "passphrase_file")]
        identity: Option<PathBuf>,
        /// Take content from here: the directory `blobs` of another member, or one of files named by their SHA-256.
        #[arg(long, value_name = "DIRECTORY")]
        blobs: Option<PathBuf>,
        /// Where there is a member already, move its store aside (to `store.aside-TIME`) instead of refusing. Its content and the working
        /// directories of its profiles stay.
        #[arg(long)]
        set_aside: bool,
        /// Print JSON instead of text.
        #[arg(long)]
        json: bool,
    },
    /// When the majority of a collective is lost for ever: make this member, which survives, a collective of one. What only the lost ones
    /// had is lost. Without `--force` it says what would be, and changes nothing.
    Recover {
        /// Configuration of the member.
        #[arg(long, default_value = "/etc/mooring/moord.toml")]
        config: PathBuf,
        /// Do it.
        #[arg(long)]
        force: bool,
    },
    /// Run until SIGTERM.
    Run {
        /// Configuration of the member.
        #[arg(long, default_value = "/etc/mooring/moord.toml")]
        config: PathBuf,
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
}
