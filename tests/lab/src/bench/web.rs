//! HTTPS servers for the tables: nginx with an authority of its own, good or with a fault.

use crate::Namespace;
use crate::process::{Guard, run, tied, wait_for};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// An authority and two certificates for the addresses of the tables: a good one and one that has expired.
pub(super) struct Authority {
    dir: PathBuf,
}

impl Authority {
    pub(super) fn new(dir: &Path) -> anyhow::Result<Self> {
        let authority = Self { dir: dir.to_owned() };
        let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
        let openssl = |arguments: &[&str]| run(tied("openssl").args(arguments).current_dir(dir)).map(drop);
        openssl(
            &[&["req", "-x509", "-subj", "/CN=bench", "-days", "2", "-keyout", "ca.key", "-out", "ca.pem"], &key[..]]
                .concat(),
        )?;
        openssl(&[&["req", "-subj", "/CN=server", "-keyout", "key.pem", "-out", "csr.pem"], &key[..]].concat())?;
        let names = format!("subjectAltName=IP:127.0.0.1,IP:{},IP:{}\n", crate::delay::NEAR, crate::delay::FAR);
        std::fs::write(dir.join("names"), names)?;
        for (name, days) in [("good.pem", "2"), ("expired.pem", "-1")] {
            let sign = ["x509", "-req", "-in", "csr.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"];
            openssl(&[&sign[..], &["-extfile", "names", "-days", days, "-out", name]].concat())?;
        }
        Ok(authority)
    }

    /// The file that clients trust.
    pub(super) fn file(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }
}

/// One nginx.
pub(super) struct Web {
    guard: Option<Guard>,
    home: PathBuf,
    address: String,
    port: u16,
}

/// What it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Conduct<'a> {
    /// Serves this folder.
    Good(&'a Path),
    /// The same, with a certificate that has expired.
    Expired(&'a Path),
    /// The same, without ranges.
    NoRanges(&'a Path),
    /// The same, with 10 KB/s.
    Slow(&'a Path),
    /// The same, beside others at the same address: they share what comes as the workers of one do, and none outlives this program.
    Crowd(&'a Path),
    /// Nothing listens.
    Refused,
}

impl Web {
    /// Starts one at `address` in `namespace`; its files are in `dir/NAME`.
    pub(super) fn start(
        (dir, name): (&Path, &str),
        (address, port): (&str, u16),
        namespace: Option<&Namespace>,
        conduct: Conduct<'_>,
    ) -> anyhow::Result<Self> {
        let home = dir.join(name);
        std::fs::create_dir_all(&home)?;
        let mut web = Self { guard: None, home, address: address.to_owned(), port };
        web.become_(dir, namespace, conduct)?;
        Ok(web)
    }

    /// Ends what runs, and starts one with another conduct at the same place.
    pub(super) fn become_(
        &mut self,
        dir: &Path,
        namespace: Option<&Namespace>,
        conduct: Conduct<'_>,
    ) -> anyhow::Result<()> {
        // Killed on drop.
        self.guard = None;
        let (root, extra) = match conduct {
            Conduct::Refused => return Ok(()),
            Conduct::Good(root) | Conduct::Expired(root) | Conduct::Crowd(root) => (root, ""),
            Conduct::NoRanges(root) => (root, "max_ranges 0;"),
            Conduct::Slow(root) => (root, "limit_rate 10k; sendfile_max_chunk 1k;"),
        };
        let certificate = if matches!(conduct, Conduct::Expired(_)) { "expired.pem" } else { "good.pem" };
        let (at, keys) = (self.home.display(), dir.display());
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {at}/{kind};\n"))
            .concat();
        let shared = if matches!(conduct, Conduct::Crowd(_)) { "reuseport" } else { "" };
        let text = format!(
            "daemon off; master_process off; pid {at}/pid; error_log {at}/error.log;\n\
             events {{ worker_connections 20000; }}\n\
             http {{ access_log off; {temporary} sendfile on; ssl_buffer_size 64k; keepalive_requests 1000000;\n\
             server {{ listen {}:{} ssl {shared}; root {}; autoindex on; {extra}\n\
             # httpdirfs ends at its first read of a 206 that has none.\n\
             add_header Accept-Ranges bytes;\n\
             ssl_certificate {keys}/{certificate}; ssl_certificate_key {keys}/key.pem; }} }}\n",
            self.address,
            self.port,
            root.display()
        );
        let config = self.home.join("nginx.conf");
        std::fs::write(&config, text).context("writing nginx.conf")?;
        let mut command = tied("nginx");
        command.arg("-c").arg(&config).arg("-e").arg(self.home.join("error.log"));
        let mut command = match namespace {
            Some(namespace) => namespace.enter(&command),
            None => command,
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let guard = self.guard.insert(Guard::new(child.context("starting nginx")?));
        let pid_file = self.home.join("pid");
        wait_for("nginx", Duration::from_secs(20), || {
            anyhow::ensure!(
                guard.is_running(),
                "nginx ended: {}",
                std::fs::read_to_string(self.home.join("error.log")).unwrap_or_default()
            );
            Ok(std::fs::read_to_string(&pid_file).is_ok_and(|text| text.trim() == guard.id().unwrap_or(0).to_string()))
        })
    }

    /// Stops it as a machine that hangs: connections stay, and nothing comes.
    pub(super) fn freeze(&self) -> anyhow::Result<()> {
        let pid = self
            .guard
            .as_ref()
            .and_then(Guard::id)
            .and_then(|pid| i32::try_from(pid).ok())
            .context("nginx is not running")?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGSTOP)?;
        Ok(())
    }

    /// Its process.
    pub(super) fn pid(&self) -> anyhow::Result<u32> {
        self.guard.as_ref().and_then(Guard::id).context("nginx is not running")
    }

    pub(super) fn url(&self, file: &str) -> String {
        format!("https://{}:{}/{file}", self.address, self.port)
    }
}
