use super::super::secure::Secure;
use super::*;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig, ServerConnection, SupportedCipherSuite};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Bytes of an answer: some tens of records.
const ANSWER: usize = 300_001;

type Stream = rustls::StreamOwned<ServerConnection, TcpStream>;

/// A server that speaks one cipher, and does with one connection what it is told.
struct Server {
    address: SocketAddr,
    client: Arc<ClientConfig>,
    thread: JoinHandle<()>,
}

impl Server {
    fn start(suite: SupportedCipherSuite, does: impl FnOnce(Stream) + Send + 'static) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::IpAddress(Ipv4Addr::LOCALHOST.into())];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().der().clone();
        let provider = Arc::new(CryptoProvider { cipher_suites: vec![suite], ..aws_lc_rs::default_provider() });
        let versions = [suite.version()];
        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let server = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&versions).unwrap();
        let server = server.with_no_client_auth().with_single_cert(vec![certificate.clone()], private).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate).unwrap();
        let client = ClientConfig::builder_with_provider(provider).with_protocol_versions(&versions).unwrap();
        let mut client = client.with_root_certificates(roots).with_no_client_auth();
        client.enable_secret_extraction = true;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let (tcp, _) = listener.accept().unwrap();
            does(Stream::new(ServerConnection::new(Arc::new(server)).unwrap(), tcp));
        });
        Self { address, client: Arc::new(client), thread }
    }

    async fn connect(&self) -> Secure {
        let tcp = tokio::net::TcpStream::connect(self.address).await.unwrap();
        Secure::connect(tcp, self.client.clone(), ServerName::from(self.address.ip())).await.unwrap()
    }
}

fn answer() -> Vec<u8> {
    (0_u8..=250).cycle().take(ANSWER).collect()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Receives so many bytes, in whatever parts they come.
async fn receive(secure: &mut Secure, length: usize) -> Vec<u8> {
    let (mut out, mut filled) = (vec![0; length], 0);
    while filled < length {
        let more = secure.receive(&mut out[filled..]).await.unwrap();
        assert_ne!(more, 0, "it ended after {filled}");
        filled += more;
    }
    out
}

#[test]
fn every_cipher_of_both_versions_is_spoken_with_new_keys_on_the_way() {
    let suites: Vec<_> =
        aws_lc_rs::ALL_CIPHER_SUITES.iter().filter(|suite| !format!("{suite:?}").contains("_RSA_")).copied().collect();
    assert_eq!(suites.len(), 6, "{suites:?}");
    for suite in suites {
        let is_13 = suite.tls13().is_some();
        let server = Server::start(suite, move |mut stream| {
            let mut request = [0; 5];
            stream.read_exact(&mut request).unwrap();
            assert_eq!(&request, b"first");
            stream.write_all(&answer()).unwrap();
            if is_13 {
                stream.conn.refresh_traffic_keys().unwrap();
            }
            stream.write_all(&answer()).unwrap();
            // Under the client's new keys.
            let mut long = vec![0; 40_000];
            stream.read_exact(&mut long).unwrap();
            assert!(long.iter().all(|byte| *byte == b'x'));
            stream.write_all(b"end").unwrap();
            stream.conn.send_close_notify();
            stream.flush().unwrap();
        });
        run(async {
            let mut secure = server.connect().await;
            secure.send(b"first").await.unwrap();
            let part = receive(&mut secure, 1000).await;
            assert!(part == answer()[..1000] && !secure.is_usable(), "{suite:?}: there is more");
            let rest = receive(&mut secure, 2 * ANSWER - 1000).await;
            assert!([part, rest].concat() == [answer(), answer()].concat(), "{suite:?}");
            assert!(secure.is_usable(), "{suite:?}");
            secure.send(&"x".repeat(40_000).into_bytes()).await.unwrap();
            assert_eq!(receive(&mut secure, 3).await, b"end", "{suite:?}");
            assert_eq!(secure.receive(&mut [0; 10]).await.unwrap(), 0, "{suite:?}: it was ended in order");
        });
        server.thread.join().unwrap();
    }
}

#[test]
fn records_that_the_server_did_not_send_are_faults_and_nothing_of_them_is_received() {
    // A record of another connection; one that is cut; one too long; a kind that is in the open.
    let foreign = [&[23, 3, 3, 0, 40][..], &[7; 40]].concat();
    let short = [&[23, 3, 3, 0, 10][..], &[0; 10]].concat();
    let long = vec![23, 3, 3, 0xff, 0xff];
    let open = [&[21, 3, 3, 0, 2][..], &[1, 0]].concat();
    for suite in [
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aws_lc_rs::cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    ] {
        for (bad, room) in [&foreign, &short, &long, &open].into_iter().flat_map(|bad| [(bad, 100), (bad, 1)]) {
            let sent = bad.clone();
            let server = Server::start(suite, move |mut stream| {
                stream.read_exact(&mut [0; 5]).unwrap();
                stream.write_all(b"good").unwrap();
                stream.flush().unwrap();
                stream.sock.write_all(&sent).unwrap();
                // Until the client has gone away.
                let _ = stream.sock.read(&mut [0; 1]);
            });
            run(async {
                let mut secure = server.connect().await;
                secure.send(b"first").await.unwrap();
                let mut out = Vec::new();
                let fault = loop {
                    // The record that is refused finds room, and does not.
                    let mut room = vec![0; if out.is_empty() { 100 } else { room }];
                    match secure.receive(&mut room).await {
                        Ok(length) => out.extend_from_slice(&room[..length]),
                        Err(fault) => break fault,
                    }
                };
                assert!(matches!(fault, Fault::Tls(_)), "{suite:?}: {bad:?}: {fault}");
                assert!(out.is_empty() || out == b"good", "{suite:?}: {bad:?}: {out:?}");
            });
            server.thread.join().unwrap();
        }
    }
}
