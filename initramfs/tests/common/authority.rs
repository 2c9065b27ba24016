//! Certificates: an ordinary authority for an address, and a collective with its member authority.

use moor_api::ids::{CollectiveId, MemberId};
use moor_api::trust::{Incarnation, SiteBundle, authority_uri, member_uri};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::net::Ipv4Addr;

/// A server's certificate chain and key.
pub(crate) struct Identity {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: KeyPair,
    pub chain_pem: String,
}

impl Identity {
    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialize_der()).into()
    }
}

/// An authority that vouches for addresses.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn uri(text: String) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = params("test authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    pub(crate) fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// For a server on 127.0.0.1.
    pub(crate) fn identity(&self) -> Identity {
        self.identity_until(2999)
    }

    /// One that has expired.
    pub(crate) fn expired(&self) -> Identity {
        self.identity_until(2020)
    }

    /// One that is not valid before 2990.
    pub(crate) fn early(&self) -> Identity {
        self.identity_between(2990, 2999)
    }

    fn identity_until(&self, year: i32) -> Identity {
        self.identity_between(1990, year)
    }

    pub(crate) fn identity_between(&self, begin: i32, year: i32) -> Identity {
        let mut params = params("server");
        params.not_before = rcgen::date_time_ymd(begin, 1, 1);
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        params.subject_alt_names = vec![SanType::IpAddress(Ipv4Addr::LOCALHOST.into())];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Identity { chain: vec![certificate.der().clone()], chain_pem: certificate.pem(), key }
    }
}

/// A collective: root, and intermediates of its roles.
pub(crate) struct Collective {
    pub id: CollectiveId,
    root: CertifiedIssuer<'static, KeyPair>,
}

impl Collective {
    pub(crate) fn new() -> Self {
        let mut params = params("site root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { id: CollectiveId::random(), root }
    }

    /// The same collective with another root.
    pub(crate) fn with_new_root(&self) -> Self {
        Self { id: self.id, ..Self::new() }
    }

    pub(crate) fn bundle(&self) -> SiteBundle {
        SiteBundle {
            version: 1,
            collective: self.id,
            name: "test".into(),
            roots: vec![self.root.pem()],
            members: Vec::new(),
            ssh_host_authorities: Vec::new(),
            built: 1_700_000_000,
            incarnation: Incarnation::FIRST,
        }
    }

    /// A leaf under the intermediate of `role`; its address is never looked at.
    pub(crate) fn identity(&self, role: &str) -> Identity {
        self.identity_since(role, 1990)
    }

    /// The same, not valid before that year.
    pub(crate) fn identity_since(&self, role: &str, year: i32) -> Identity {
        let mut intermediate = params(role);
        intermediate.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        intermediate.subject_alt_names = vec![uri(authority_uri(self.id, role))];
        let issuer = CertifiedIssuer::signed_by(intermediate, KeyPair::generate().unwrap(), &self.root).unwrap();
        let mut leaf = params("member");
        leaf.not_before = rcgen::date_time_ymd(year, 1, 1);
        leaf.subject_alt_names = vec![uri(member_uri(self.id, MemberId::random()))];
        let key = KeyPair::generate().unwrap();
        let certificate = leaf.signed_by(&key, &issuer).unwrap();
        Identity {
            chain: vec![certificate.der().clone(), issuer.der().clone()],
            chain_pem: format!("{}{}", certificate.pem(), issuer.pem()),
            key,
        }
    }
}
