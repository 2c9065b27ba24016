//! What the machine says of itself in `hello`: SMBIOS identity, hardware addresses, architecture. Whatever cannot be read is absent:
//! the member decides whether the rest is enough to know the node by.

use moor_api::ids::{BootId, HwAddr};
use moor_api::node::{Hello, MAX_MACS};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use uuid::Uuid;

/// Longest attribute of `/sys` that is read; the longest wanted one has 59 characters.
const MAX_ATTRIBUTE: u64 = 4096;

/// Longest serial number that is sent. SMBIOS strings are short; what is longer is cut.
const MAX_SERIAL: usize = 128;

/// `ARPHRD_ETHER` and `ARPHRD_INFINIBAND` (`linux/if_arp.h`), as `/sys/class/net/*/type` says them.
const LINK_TYPES: [&str; 2] = ["1", "32"];

/// Describes this machine. Never fails.
#[must_use]
pub fn describe(boot: BootId, capabilities: Vec<String>) -> Hello {
    describe_at(Path::new("/sys"), boot, capabilities)
}

fn describe_at(sys: &Path, boot: BootId, capabilities: Vec<String>) -> Hello {
    let dmi = sys.join("class/dmi/id");
    Hello {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        capabilities,
        // The kernel prints it in the order of SMBIOS 2.6, that is, of the text form. Dummies ("all zero", "all one", a vendor's
        // default) are left in: the member knows the list, and `moor why` then shows what the firmware really says.
        uuid: attribute(&dmi.join("product_uuid")).and_then(|text| Uuid::parse_str(&text).ok()),
        serial: attribute(&dmi.join("product_serial")).map(|text| printable(&text)).filter(|text| !text.is_empty()),
        macs: hardware_addresses(&sys.join("class/net")),
        arch: architecture(),
        boot,
    }
}

/// The text of an attribute without its newline; `None` where it is absent, unreadable or empty.
fn attribute(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    // `product_uuid` is for root only; a driver may refuse a read that its file mode allows (EINVAL from a link that is down).
    File::open(path).ok()?.take(MAX_ATTRIBUTE).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

/// Firmware puts any bytes into a serial number; control characters have no business in logs and tables.
fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control() && *c != char::REPLACEMENT_CHARACTER)
        .take(MAX_SERIAL)
        .collect::<String>()
        .trim()
        .to_owned()
}

/// Addresses of the machine's own ports, sorted, each once.
fn hardware_addresses(class: &Path) -> Vec<HwAddr> {
    let Ok(entries) = class.read_dir() else { return Vec::new() };
    let mut addresses: Vec<HwAddr> = entries.flatten().filter_map(|entry| hardware_address(&entry.path())).collect();
    addresses.sort();
    addresses.dedup();
    addresses.truncate(MAX_MACS);
    addresses
}

/// The address of one interface; `None` for those that are no port of this machine.
fn hardware_address(interface: &Path) -> Option<HwAddr> {
    // Only what hangs on a bus has a device: loopback, bridges, bonds, VLANs, tunnels and containers' ends have none.
    let device = interface.join("device");
    if !device.exists() {
        return None;
    }
    // A virtual function of an SR-IOV port is drawn at random by many drivers.
    if device.join("physfn").exists() {
        return None;
    }
    if !LINK_TYPES.contains(&attribute(&interface.join("type"))?.as_str()) {
        return None;
    }
    // A port of a bond shows the bond's address as its own and keeps its real one here.
    let text =
        attribute(&interface.join("bonding_slave/perm_hwaddr")).or_else(|| attribute(&interface.join("address")))?;
    // Before its firmware is up, a port may show zeros.
    if text.bytes().all(|byte| matches!(byte, b'0' | b':')) {
        return None;
    }
    text.parse().ok()
}

fn architecture() -> String {
    let compiled = || std::env::consts::ARCH.to_owned();
    nix::sys::utsname::uname()
        .map_or_else(|_| compiled(), |name| name.machine().to_str().map_or_else(compiled, str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// A `/sys` with what a test puts in.
    struct Sys(tempfile::TempDir);

    impl Sys {
        fn new() -> Self {
            let sys = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(sys.0.path().join("class/dmi/id")).unwrap();
            fs::create_dir_all(sys.0.path().join("class/net")).unwrap();
            sys
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        /// An interface as the kernel shows it: a link into the device tree.
        fn interface(&self, name: &str, bus: &str, kind: &str, address: &str) {
            let place = format!("devices/{bus}/net/{name}");
            self.write(&format!("{place}/type"), &format!("{kind}\n"));
            self.write(&format!("{place}/address"), &format!("{address}\n"));
            if bus != "virtual" {
                symlink("../..", self.0.path().join(&place).join("device")).unwrap();
            }
            symlink(format!("../../{place}"), self.0.path().join("class/net").join(name)).unwrap();
        }

        fn hello(&self) -> Hello {
            describe_at(self.0.path(), BootId::from_bytes([1; 16]), vec!["tpm2".into()])
        }
    }

    #[test]
    fn an_empty_sys_still_makes_a_hello() {
        let hello = Sys::new().hello();
        assert_eq!((hello.uuid, hello.serial, hello.macs.len()), (None, None, 0));
        assert_eq!(hello.capabilities, ["tpm2"]);
        assert!(!hello.arch.is_empty());
    }

    #[test]
    fn the_uuid_is_canonical_whatever_its_case() {
        for (text, wanted) in [
            ("4C4C4544-0042-3510-8051-B7C04F4D3732\n", Some("4c4c4544-0042-3510-8051-b7c04f4d3732")),
            ("4c4c4544-0042-3510-8051-b7c04f4d3732", Some("4c4c4544-0042-3510-8051-b7c04f4d3732")),
            // A dummy is passed on: the member knows it.
            ("03000200-0400-0500-0006-000700080009\n", Some("03000200-0400-0500-0006-000700080009")),
            ("Not Settable\n", None),
            ("\n", None),
        ] {
            let sys = Sys::new();
            sys.write("class/dmi/id/product_uuid", text);
            assert_eq!(sys.hello().uuid.map(|uuid| uuid.to_string()).as_deref(), wanted, "{text:?}");
        }
    }

    #[test]
    fn the_serial_has_no_control_characters_and_no_end() {
        let long = "x".repeat(4000);
        for (text, wanted) in [
            ("ABC 123 \n", Some("ABC 123")),
            ("A\u{1b}[31mB\n", Some("A[31mB")),
            ("  \n", None),
            (long.as_str(), Some(&long[..MAX_SERIAL])),
        ] {
            let sys = Sys::new();
            sys.write("class/dmi/id/product_serial", text);
            assert_eq!(sys.hello().serial.as_deref(), wanted, "{text:?}");
        }
    }

    #[test]
    fn only_ports_of_the_machine_have_addresses() {
        let sys = Sys::new();
        let infiniband = "80:00:02:08:fe:80:00:00:00:00:00:00:f4:52:14:03:00:7b:e0:a1";
        sys.interface("lo", "virtual", "772", "00:00:00:00:00:00");
        sys.interface("br0", "virtual", "1", "52:54:00:00:00:01");
        sys.interface("eno2", "pci0/0000:01:00.1", "1", "52:54:00:00:00:03");
        sys.interface("eno1", "pci0/0000:01:00.0", "1", "52:54:00:00:00:02");
        sys.interface("ib0", "pci0/0000:02:00.0", "32", infiniband);
        sys.interface("fw0", "pci0/0000:03:00.0", "24", "00:11:22:33:44:55:66:77");
        sys.interface("dark", "pci0/0000:04:00.0", "1", "00:00:00:00:00:00");
        // The second port of a bond shows the first one's address.
        sys.interface("eno3", "pci0/0000:01:00.2", "1", "52:54:00:00:00:02");
        sys.write("devices/pci0/0000:01:00.2/net/eno3/bonding_slave/perm_hwaddr", "52:54:00:00:00:04\n");
        // A virtual function.
        sys.interface("eno1v0", "pci0/0000:01:10.0", "1", "7e:00:00:00:00:01");
        sys.write("devices/pci0/0000:01:10.0/physfn/vendor", "0x8086\n");
        let macs: Vec<String> = sys.hello().macs.into_iter().map(String::from).collect();
        assert_eq!(macs, ["52:54:00:00:00:02", "52:54:00:00:00:03", "52:54:00:00:00:04", infiniband]);
    }

    #[test]
    fn more_addresses_than_a_hello_holds_are_cut() {
        let sys = Sys::new();
        for number in 0..MAX_MACS + 3 {
            sys.interface(
                &format!("e{number}"),
                &format!("pci/{number}"),
                "1",
                &format!("52:54:00:00:00:{number:02x}"),
            );
        }
        assert_eq!(sys.hello().macs.len(), MAX_MACS);
    }

    #[test]
    fn this_machine_can_be_described() {
        let hello = describe(BootId::random(), Vec::new());
        assert_eq!(
            hello.arch,
            String::from_utf8(std::process::Command::new("uname").arg("-m").output().unwrap().stdout).unwrap().trim()
        );
    }
}
