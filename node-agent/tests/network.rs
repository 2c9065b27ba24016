//! Addresses on a real link between two network namespaces: DHCP by a server that answers with what the test says, the kernel argument,
//! and the change from one address to another.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking; its helpers too")]

use moor_agent::network::links::Links;
use moor_agent::network::{Candidate, Netlink, Origin, Search, StaticAddress};
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A node's and a server's namespace with a cable between; `/sys/class/net` of the node with a device behind its end.
struct Cable {
    node: String,
    server: String,
    sys: tempfile::TempDir,
}

impl Drop for Cable {
    fn drop(&mut self) {
        for name in [&self.node, &self.server] {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

impl Cable {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let cable = Self {
            node: format!("moor-n-{number}"),
            server: format!("moor-s-{number}"),
            sys: tempfile::tempdir().unwrap(),
        };
        let Self { node, server, .. } = &cable;
        ip(&format!("netns add {node}"));
        ip(&format!("netns add {server}"));
        ip(&format!("-n {server} link add eth0 type veth peer name eth0 netns {node}"));
        ip(&format!("-n {server} addr add 10.9.0.1/24 dev eth0"));
        ip(&format!("-n {server} link set eth0 up"));
        // For 255.255.255.255.
        ip(&format!("-n {server} route add default dev eth0"));
        let shown = ip(&format!("-n {node} -o link show eth0"));
        let index = shown.split(':').next().unwrap();
        let mac = shown.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap();
        let dir = cable.sys.path().join("eth0");
        std::fs::create_dir_all(dir.join("device")).unwrap();
        for (file, text) in [("type", "1"), ("ifindex", index), ("address", mac), ("carrier", "1")] {
            std::fs::write(dir.join(file), text).unwrap();
        }
        cable
    }

    /// Runs `work` in the node's namespace with a runtime of its own.
    fn on_node<T: Send + 'static>(&self, work: impl AsyncFnOnce(Links) -> T + Send + 'static) -> T {
        let (name, links) = (self.node.clone(), Links::under(self.sys.path()));
        std::thread::spawn(move || {
            enter(&name);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { tokio::time::timeout(Duration::from_mins(1), work(links)).await.unwrap() })
        })
        .join()
        .unwrap()
    }

    fn addresses(&self) -> String {
        ip(&format!("-n {} -4 -o addr show eth0", self.node))
    }

    fn routes(&self) -> String {
        ip(&format!("-n {} -4 route", self.node))
    }

    /// Serves DHCP until the process ends. `options` are those of RFC 2132, in its encoding.
    fn serve(&self, address: Ipv4Addr, options: Vec<u8>) {
        let name = self.server.clone();
        std::thread::spawn(move || {
            enter(&name);
            let socket = UdpSocket::bind("0.0.0.0:67").unwrap();
            socket.set_broadcast(true).unwrap();
            let mut packet = [0; 1500];
            while let Ok((length, _)) = socket.recv_from(&mut packet) {
                if let Some(answer) = answer(&packet[..length], address, &options) {
                    let to = SocketAddrV4::new(Ipv4Addr::BROADCAST, 68);
                    socket.send_to(&answer, to).unwrap();
                }
            }
        });
    }
}

fn enter(name: &str) {
    let namespace = File::open(Path::new("/run/netns").join(name)).unwrap();
    nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
}

/// OFFER for DISCOVER, ACK for REQUEST (RFC 2131), for a client that names itself by its hardware address.
fn answer(request: &[u8], address: Ipv4Addr, options: &[u8]) -> Option<Vec<u8>> {
    let mut rest = request.get(240..)?;
    let (mut kind, mut client_id) = (0, None);
    while let [code, length, tail @ ..] = rest {
        let (value, after) = tail.split_at_checked(usize::from(*length))?;
        match code {
            53 => kind = value[0],
            61 => client_id = Some(value.to_vec()),
            255 => break,
            _ => (),
        }
        rest = after;
    }
    let mut expected = vec![1];
    expected.extend_from_slice(&request[28..34]);
    assert_eq!(client_id, Some(expected), "the client id is the hardware address");
    let mut reply = request[..240].to_vec();
    reply[0] = 2;
    reply[16..20].copy_from_slice(&address.octets());
    reply.extend([
        53,
        1,
        if kind == 1 { 2 } else { 5 },
        54,
        4,
        10,
        9,
        0,
        1,
        51,
        4,
        0,
        0,
        14,
        16,
        1,
        4,
        255,
        255,
        255,
        0,
    ]);
    reply.extend_from_slice(options);
    reply.push(255);
    Some(reply)
}

async fn search(links: Links, arguments: Vec<StaticAddress>) -> (Netlink, Search, Candidate) {
    let netlink = Netlink::open().unwrap();
    let mut search = Search::new(netlink.clone(), links, arguments);
    assert_eq!(search.take_links().await.unwrap(), ["eth0"]);
    let candidate = search.next().await;
    (netlink, search, candidate)
}

#[test]
fn a_lease_becomes_an_address_a_route_and_a_resolver() {
    let cable = Cable::new();
    let mut options = vec![3, 4, 10, 9, 0, 254, 6, 8, 10, 9, 0, 53, 10, 9, 0, 54, 15, 12];
    options.extend_from_slice(b"site.example");
    cable.serve(Ipv4Addr::new(10, 9, 0, 77), options);
    let candidate = cable.on_node(async |links| {
        let (netlink, _search, candidate) = search(links, Vec::new()).await;
        candidate.apply(&netlink).await.unwrap();
        // Once more: nothing is in the way of it.
        candidate.apply(&netlink).await.unwrap();
        candidate
    });
    assert_eq!((candidate.address.to_string().as_str(), candidate.origin), ("10.9.0.77/24", Origin::Dhcp));
    assert_eq!(candidate.dns, ["10.9.0.53".parse::<std::net::IpAddr>().unwrap(), "10.9.0.54".parse().unwrap()]);
    assert_eq!(candidate.domain.as_deref(), Some("site.example"));
    assert!(cable.addresses().contains("10.9.0.77/24"), "{}", cable.addresses());
    assert!(cable.routes().contains("default via 10.9.0.254 dev eth0"), "{}", cable.routes());
}

#[test]
fn classless_routes_stand_in_for_the_router() {
    let cable = Cable::new();
    // Option 121: 192.168.0.0/16 by 10.9.0.5, then the default route by 10.9.0.6; the router option is to be ignored.
    let options = vec![3, 4, 10, 9, 0, 254, 121, 12, 16, 192, 168, 10, 9, 0, 5, 0, 10, 9, 0, 6];
    cable.serve(Ipv4Addr::new(10, 9, 0, 78), options);
    cable.on_node(async |links| {
        let (netlink, _search, candidate) = search(links, Vec::new()).await;
        candidate.apply(&netlink).await.unwrap();
    });
    let routes = cable.routes();
    assert!(routes.contains("192.168.0.0/16 via 10.9.0.5") && routes.contains("default via 10.9.0.6"), "{routes}");
    assert!(!routes.contains("10.9.0.254"), "{routes}");
}

#[test]
fn an_argument_needs_no_server_and_goes_without_a_trace() {
    let cable = Cable::new();
    let argument = StaticAddress {
        address: "10.9.0.9/32".parse().unwrap(),
        // Outside of the address's network, as some providers have it.
        gateway: Some("10.9.0.1".parse().unwrap()),
        interface: None,
    };
    let candidate = cable.on_node(async move |links| {
        let (netlink, _search, candidate) = search(links, vec![argument]).await;
        candidate.apply(&netlink).await.unwrap();
        candidate
    });
    assert_eq!(candidate.origin, Origin::Argument);
    assert!(cable.routes().contains("default via 10.9.0.1 dev eth0 proto static onlink"), "{}", cable.routes());
    cable.on_node(async move |_| {
        candidate.withdraw(&Netlink::open().unwrap()).await;
    });
    assert_eq!((cable.addresses().as_str(), cable.routes().as_str()), ("", ""));
}

#[test]
fn a_link_that_was_left_alone_is_searched_again_when_it_is_needed() {
    let cable = Cable::new();
    let argument = StaticAddress { address: "10.9.0.9/24".parse().unwrap(), gateway: None, interface: None };
    let (first, again) = cable.on_node(async move |links| {
        let (_netlink, mut search, first) = search(links, vec![argument]).await;
        search.keep_only("eth1");
        assert_eq!(search.take_links().await.unwrap(), ["eth0"]);
        (first, search.next().await)
    });
    assert_eq!(first, again);
}
