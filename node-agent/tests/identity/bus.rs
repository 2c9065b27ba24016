//! A listener on the bus between processor and TPM: it passes everything on and keeps a copy.

use crate::port::free_ports;
use crate::swtpm::Swtpm;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use tss_esapi::tcti_ldr::{NetworkTPMConfig, TctiNameConf};

/// It listens until the test ends.
pub(crate) struct Bus {
    port: u16,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Bus {
    pub(crate) fn of(tpm: &Swtpm) -> Self {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let port = free_ports(2);
        for offset in 0..2 {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port + offset)).unwrap();
            let (target, heard) = (tpm.port() + offset, Arc::clone(&heard));
            thread::spawn(move || {
                for near in listener.incoming() {
                    let Ok(near) = near else { return };
                    let Ok(far) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)) else { return };
                    pass(near.try_clone().unwrap(), far.try_clone().unwrap(), Arc::clone(&heard));
                    pass(far, near, Arc::clone(&heard));
                }
            });
        }
        Self { port, heard }
    }

    pub(crate) fn transport(&self) -> TctiNameConf {
        TctiNameConf::Swtpm(format!("host=127.0.0.1,port={}", self.port).parse::<NetworkTPMConfig>().unwrap())
    }

    /// Whether these bytes went by.
    pub(crate) fn heard(&self, bytes: &[u8]) -> bool {
        self.heard.lock().unwrap().windows(bytes.len()).any(|window| window == bytes)
    }

    /// Tags of the commands of this code that went by (Part 3, "Command Structure": tag, size, code).
    pub(crate) fn tags(&self, code: u32) -> Vec<u16> {
        let heard = self.heard.lock().unwrap();
        let commands = heard.windows(10).filter(|window| window[6..] == code.to_be_bytes() && window[2..4] == [0, 0]);
        commands
            .map(|window| u16::from_be_bytes([window[0], window[1]]))
            .filter(|tag| matches!(tag, 0x8001 | 0x8002))
            .collect()
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, heard: Arc<Mutex<Vec<u8>>>) {
    thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            heard.lock().unwrap().extend_from_slice(&buffer[..count]);
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}
