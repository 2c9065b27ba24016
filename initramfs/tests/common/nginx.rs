//! A real web server, as a process of its own that can be killed.

#[path = "../../../tests/port.rs"]
mod port;

use self::port::free_ports;
use super::authority::Authority;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) struct Nginx {
    child: Child,
    port: u16,
    home: PathBuf,
}

impl Nginx {
    /// Serves the files in `dir/web`.
    pub(crate) fn start(dir: &Path, name: &str, authority: &Authority) -> Self {
        Self::limited(dir, name, authority, 0)
    }

    /// The same with so many KiB per second on each connection; 0: as many as it can.
    pub(crate) fn limited(dir: &Path, name: &str, authority: &Authority, rate: u32) -> Self {
        let port = free_ports(1);
        let home = dir.join(name);
        std::fs::create_dir(&home).unwrap();
        let identity = authority.identity();
        std::fs::write(home.join("cert.pem"), &identity.chain_pem).unwrap();
        std::fs::write(home.join("key.pem"), identity.key.serialize_pem()).unwrap();
        let (at, web) = (home.display(), dir.join("web"));
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {at}/{kind};\n"))
            .concat();
        let text = format!(
            "daemon off; master_process off; pid {at}/pid; error_log {at}/error.log; events {{}}\n\
             http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port} ssl; root {};\n\
             limit_rate {rate}k; ssl_certificate {at}/cert.pem; ssl_certificate_key {at}/key.pem; }} }}\n",
            web.display()
        );
        std::fs::write(home.join("nginx.conf"), text).unwrap();
        Self { child: run(&home, port), port, home }
    }

    /// Once more where it was, after [`Self::kill`].
    pub(crate) fn restart(&mut self) {
        self.child = run(&self.home, self.port);
    }

    pub(crate) fn url(&self) -> String {
        format!("https://127.0.0.1:{}/image.moor", self.port)
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        self.kill();
    }
}

fn run(home: &Path, port: u16) -> Child {
    let child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", "nginx", "-c"])
        .arg(home.join("nginx.conf"))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        let log = || std::fs::read_to_string(home.join("error.log")).unwrap_or_default();
        assert!(Instant::now() < end, "nginx does not start: {}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}
