//! Records of TLS after the handshake, which is rustls' (RFC 8446, 5; RFC 5246, 6.2 with RFC 5288 and RFC 7905). They are decrypted to
//! where they are wanted, and that is all that happens to them; rustls copies each into memory of its own first, which is a tenth of a reader's
//! time.
//!
//! Keys, their updates and tickets for later connections stay with rustls ([`KernelConnection`]).

use super::fault::Fault;
use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::{ConnectionTrafficSecrets, ContentType, HandshakeType, ProtocolVersion};

/// Bytes before each record: its kind, a version that says nothing, its length.
pub(super) const HEADER: usize = 5;
/// The longest record: RFC 5246, 6.2.3, which allows more than RFC 8446.
const LONGEST: usize = (16 << 10) + 2048;
/// The longest plaintext.
const PLAIN: usize = 16 << 10;
/// Bytes of every cipher's tag, and of its nonce.
const TAG: usize = 16;
const NONCE: usize = 12;
/// Bytes of the nonce that TLS 1.2 sends with each record (AES-GCM).
const EXPLICIT: usize = 8;
/// Handshake messages after the handshake are short: tickets.
const MESSAGES: usize = 64 << 10;
/// After so many records the connection serves no more requests: far below what one key may encrypt (RFC 8446, 5.5).
const SPENT: u64 = 1 << 23;

/// What a record held.
pub(super) enum Content<'a> {
    /// What lies in the record.
    Data(&'a [u8]),
    /// So many bytes, which are at the beginning of the room.
    Placed(usize),
    /// Nothing for the user.
    Other,
    /// The peer has ended the connection in order.
    Closed,
}

/// Both directions of a connection.
pub(super) struct Records {
    rustls: KernelConnection<ClientConnectionData>,
    receives: Direction,
    sends: Direction,
    /// The beginning of a handshake message whose end is in the next record.
    message: Vec<u8>,
}

/// How a nonce is made, and what else is authenticated.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Tls13,
    /// With a part of the nonce in each record.
    Tls12Explicit,
    Tls12,
}

/// Where the plaintext of a record is.
enum Plain<'record, 'room> {
    Record(&'record [u8]),
    Room(&'room [u8]),
}

struct Direction {
    key: LessSafeKey,
    iv: [u8; NONCE],
    sequence: u64,
    scheme: Scheme,
}

impl Records {
    /// Takes over from rustls, which is done with the handshake.
    pub(super) fn new(tls: UnbufferedClientConnection) -> Result<Self, Fault> {
        let (secrets, rustls) =
            tls.dangerous_into_kernel_connection().map_err(|error| Fault::Tls(error.to_string()))?;
        let version = rustls.protocol_version();
        Ok(Self {
            receives: Direction::new(version, secrets.rx)?,
            sends: Direction::new(version, secrets.tx)?,
            rustls,
            message: Vec::new(),
        })
    }

    /// The length of the record that `bytes` begin with, if all of it is there.
    pub(super) fn length(bytes: &[u8]) -> Result<Option<usize>, Fault> {
        let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if length > LONGEST {
            return Err(Fault::Tls("a record is longer than any can be".into()));
        }
        Ok((bytes.len() >= HEADER + length).then_some(HEADER + length))
    }

    /// Decrypts a record, into `room` if it is large enough, which then may have anything behind the data, or else where it lies. What has to be said
    /// to the peer because of it is appended to `outgoing`.
    pub(super) fn open<'a>(
        &mut self,
        record: &'a mut [u8],
        room: &mut [u8],
        outgoing: &mut Vec<u8>,
    ) -> Result<Content<'a>, Fault> {
        let (kind, plain) = self.receives.open(record, room)?;
        let plain = match (kind, plain) {
            (ContentType::ApplicationData, Plain::Room(plain)) => return Ok(Content::Placed(plain.len())),
            (ContentType::ApplicationData, Plain::Record(plain)) => return Ok(Content::Data(plain)),
            (_, Plain::Room(plain) | Plain::Record(plain)) => plain,
        };
        match kind {
            ContentType::Alert => match plain {
                // close_notify
                [_, 0] => Ok(Content::Closed),
                _ => Err(Fault::Tls(format!("the server ended it: alert {}", plain.get(1).unwrap_or(&0)))),
            },
            ContentType::Handshake => {
                self.message.extend_from_slice(plain);
                self.messages(outgoing)?;
                Ok(Content::Other)
            }
            kind => Err(Fault::Tls(format!("a record of kind {kind:?} after the handshake"))),
        }
    }

    /// Encrypts what is sent.
    pub(super) fn seal(&mut self, data: &[u8], outgoing: &mut Vec<u8>) -> Result<(), Fault> {
        data.chunks(PLAIN).try_for_each(|part| self.sends.seal(ContentType::ApplicationData, part, outgoing))
    }

    /// Whether its keys have done enough.
    pub(super) fn is_spent(&self) -> bool {
        self.receives.sequence.max(self.sends.sequence) >= SPENT
    }

    /// Handshake messages that are whole.
    fn messages(&mut self, outgoing: &mut Vec<u8>) -> Result<(), Fault> {
        let message = std::mem::take(&mut self.message);
        let mut rest = &message[..];
        while let [kind, a, b, c, more @ ..] = rest {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            let Some((body, more)) = more.split_at_checked(length) else { break };
            let kind = HandshakeType::from(*kind);
            if kind == HandshakeType::KeyUpdate && !more.is_empty() {
                // RFC 8446, 5.1: what follows is under the new keys, so it cannot be here.
                return Err(Fault::Tls("there is more in a record that changes the keys".into()));
            }
            self.handshake(kind, body, outgoing)?;
            rest = more;
        }
        if rest.len() > MESSAGES {
            return Err(Fault::Tls("a handshake message is longer than any should be".into()));
        }
        self.message = rest.to_vec();
        Ok(())
    }

    fn handshake(&mut self, kind: HandshakeType, body: &[u8], outgoing: &mut Vec<u8>) -> Result<(), Fault> {
        let fault = |error: rustls::Error| Fault::Tls(error.to_string());
        let is_13 = self.receives.scheme == Scheme::Tls13;
        match (kind, body) {
            (HandshakeType::NewSessionTicket, _) if is_13 => self.rustls.handle_new_session_ticket(body).map_err(fault),
            // RFC 8446, 4.6.3: both messages are under the old keys.
            (HandshakeType::KeyUpdate, &[wants_ours @ (0 | 1)]) if is_13 => {
                self.receives.renew(self.rustls.update_rx_secret().map_err(fault)?)?;
                if wants_ours == 1 {
                    let update = [u8::from(HandshakeType::KeyUpdate), 0, 0, 1, 0];
                    self.sends.seal(ContentType::Handshake, &update, outgoing)?;
                    self.sends.renew(self.rustls.update_tx_secret().map_err(fault)?)?;
                }
                Ok(())
            }
            // It may be ignored (RFC 5246, 7.4.1.1).
            (HandshakeType::HelloRequest, []) if !is_13 => Ok(()),
            _ => Err(Fault::Tls(format!("a handshake message {kind:?} after the handshake"))),
        }
    }
}

impl Direction {
    fn new(version: ProtocolVersion, (sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Fault> {
        let (cipher, key, iv, scheme) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv, Scheme::Tls12Explicit),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv, Scheme::Tls12Explicit),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv, Scheme::Tls12),
            _ => return Err(Fault::Tls("the server has chosen an unknown cipher".into())),
        };
        let unusable = || Fault::Tls("a key of the connection is not usable".into());
        let key = LessSafeKey::new(UnboundKey::new(cipher, key.as_ref()).map_err(|_| unusable())?);
        let iv = iv.as_ref().try_into().map_err(|_| unusable())?;
        let scheme = if version == ProtocolVersion::TLSv1_3 { Scheme::Tls13 } else { scheme };
        Ok(Self { key, iv, sequence, scheme })
    }

    /// New keys of TLS 1.3.
    fn renew(&mut self, secrets: (u64, ConnectionTrafficSecrets)) -> Result<(), Fault> {
        *self = Self::new(ProtocolVersion::TLSv1_3, secrets)?;
        Ok(())
    }

    /// The number of the next record; there is no second one with it.
    fn count(&mut self) -> Result<u64, Fault> {
        let sequence = self.sequence;
        self.sequence = sequence.checked_add(1).ok_or_else(|| Fault::Tls("its keys are used up".into()))?;
        Ok(sequence)
    }

    /// RFC 8446, 5.3; RFC 7905, 2.
    fn nonce(&self, sequence: u64) -> [u8; NONCE] {
        let mut nonce = self.iv;
        for (byte, count) in nonce[NONCE - 8..].iter_mut().zip(sequence.to_be_bytes()) {
            *byte ^= count;
        }
        nonce
    }

    /// What is authenticated beside the data: the header (RFC 8446, 5.2), or number, kind, version and length of the plaintext (RFC 5246, 6.2.3.3).
    fn beside(&self, sequence: u64, kind: u8, length: usize) -> Result<([u8; 13], usize), Fault> {
        let length = u16::try_from(length).map_err(|_| damaged())?.to_be_bytes();
        let mut bytes = [0; 13];
        let header = [kind, 3, 3, length[0], length[1]];
        if self.scheme == Scheme::Tls13 {
            bytes[..HEADER].copy_from_slice(&header);
            return Ok((bytes, HEADER));
        }
        bytes[..8].copy_from_slice(&sequence.to_be_bytes());
        bytes[8..].copy_from_slice(&header);
        Ok((bytes, 13))
    }

    fn open<'a, 'b>(
        &mut self,
        record: &'a mut [u8],
        room: &'b mut [u8],
    ) -> Result<(ContentType, Plain<'a, 'b>), Fault> {
        let sequence = self.count()?;
        let (header, body) = record.split_first_chunk_mut::<HEADER>().ok_or_else(damaged)?;
        let mut nonce = self.nonce(sequence);
        let body = if self.scheme == Scheme::Tls12Explicit {
            let (explicit, body) = body.split_first_chunk_mut::<EXPLICIT>().ok_or_else(damaged)?;
            nonce = self.iv;
            nonce[NONCE - EXPLICIT..].copy_from_slice(explicit);
            body
        } else {
            body
        };
        let plain = body.len().checked_sub(TAG).ok_or_else(damaged)?;
        let length = if self.scheme == Scheme::Tls13 { body.len() } else { plain };
        let (beside, used) = self.beside(sequence, header[0], length)?;
        let nonce = Nonce::assume_unique_for_key(nonce);
        let beside = Aad::from(&beside[..used]);
        if plain > room.len() {
            let plain = self.key.open_in_place(nonce, beside, body).map_err(|_| damaged())?;
            let (kind, plain) = self.kind(header[0], plain)?;
            return Ok((kind, Plain::Record(plain)));
        }
        let ((sealed, tag), room) = (body.split_at(plain), &mut room[..plain]);
        self.key.open_separate_gather(nonce, beside, sealed, tag, room).map_err(|_| damaged())?;
        let (kind, plain) = self.kind(header[0], room)?;
        Ok((kind, Plain::Room(plain)))
    }

    /// Of what kind a record is, from the kind in its header and what was decrypted; and the data in that.
    fn kind<'a>(&self, outer: u8, plain: &'a [u8]) -> Result<(ContentType, &'a [u8]), Fault> {
        if self.scheme != Scheme::Tls13 {
            return Ok((ContentType::from(outer), plain));
        }
        // The kind comes last, before zeros that hide the length.
        let at = plain.iter().rposition(|byte| *byte != 0).ok_or_else(damaged)?;
        if outer != u8::from(ContentType::ApplicationData) {
            return Err(damaged());
        }
        Ok((ContentType::from(plain[at]), &plain[..at]))
    }

    fn seal(&mut self, kind: ContentType, data: &[u8], outgoing: &mut Vec<u8>) -> Result<(), Fault> {
        let sequence = self.count()?;
        let nonce = self.nonce(sequence);
        let is_13 = self.scheme == Scheme::Tls13;
        let explicit = if self.scheme == Scheme::Tls12Explicit { &nonce[NONCE - EXPLICIT..] } else { &[] };
        let outer = if is_13 { ContentType::ApplicationData } else { kind };
        let length = data.len() + usize::from(is_13);
        let body = u16::try_from(explicit.len() + length + TAG).map_err(|_| damaged())?.to_be_bytes();
        outgoing.extend_from_slice(&[outer.into(), 3, 3, body[0], body[1]]);
        outgoing.extend_from_slice(explicit);
        let at = outgoing.len();
        outgoing.extend_from_slice(data);
        if is_13 {
            outgoing.push(kind.into());
        }
        let (beside, used) = self.beside(sequence, outer.into(), if is_13 { length + TAG } else { length })?;
        let nonce = Nonce::assume_unique_for_key(nonce);
        let sealed = self.key.seal_in_place_separate_tag(nonce, Aad::from(&beside[..used]), &mut outgoing[at..]);
        let tag = sealed.map_err(|_| Fault::Tls("a request cannot be encrypted".into()))?;
        outgoing.extend_from_slice(tag.as_ref());
        Ok(())
    }
}

fn damaged() -> Fault {
    Fault::Tls("a record is not what the server sent".into())
}

#[cfg(test)]
mod tests;
