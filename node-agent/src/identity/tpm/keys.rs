//! The TPM's keys: the endorsement key, which its maker certified, and the attestation key, which signs quotes.
//!
//! Both are primary keys of the endorsement hierarchy, made from fixed templates, so that the same keys appear at every boot and
//! nothing has to be stored.

use super::super::IdentityError;
use super::super::error::{Doing as _, chain, wrong};
use moor_tpm::template;
use tss_esapi::abstraction::ek::create_ek_public_from_default_template_2;
use tss_esapi::abstraction::{AsymmetricAlgorithmSelection, DefaultKey, nv};
use tss_esapi::constants::CapabilityType;
use tss_esapi::constants::response_code::Tss2ResponseCodeKind;
use tss_esapi::handles::{KeyHandle, NvIndexTpmHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::resource_handles::{Hierarchy, NvAuth};
use tss_esapi::structures::{CapabilityData, Public};
use tss_esapi::traits::{Marshall as _, UnMarshall as _};
use tss_esapi::{Context, Error};

/// First NV index of endorsement certificates, and how many handles are looked at from there (TCG EK Credential Profile, 2.2.1).
const CERTIFICATES: (u32, u32) = (0x01C0_0000, 64);

/// A loaded attestation key.
pub(super) struct Attestation {
    pub(super) handle: KeyHandle,
    pub(super) public: moor_tpm::Public,
}

/// A loaded endorsement key.
pub(super) struct Endorsement {
    pub(super) kind: EndorsementKind,
    pub(super) handle: KeyHandle,
    pub(super) public: moor_tpm::Public,
    pub(super) certificate: Option<Vec<u8>>,
}

/// Templates of the TCG EK Credential Profile that are used (L-1, L-2 and H-3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndorsementKind {
    P384,
    P256,
    Rsa2048,
}

/// `PolicySecret(TPM_RH_ENDORSEMENT)` in SHA-384 (TCG EK Credential Profile 2.5, B.6.2, "`PolicyA`").
const POLICY_A_SHA384: [u8; 48] = [
    0x8b, 0xbf, 0x22, 0x66, 0x53, 0x7c, 0x17, 0x1c, 0xb5, 0x6e, 0x40, 0x3c, 0x4d, 0xc1, 0xd4, 0xb6, 0x4f, 0x43, 0x26,
    0x11, 0xdc, 0x38, 0x6e, 0x6f, 0x53, 0x20, 0x50, 0xc3, 0x27, 0x8c, 0x93, 0x0e, 0x14, 0x3e, 0x8b, 0xb1, 0x13, 0x38,
    0x24, 0xcc, 0xb4, 0x31, 0x05, 0x38, 0x71, 0xc6, 0xdb, 0x53,
];
/// `PolicyAuthorizeNV` in SHA-384 (as above, "`PolicyC`"): the other branch, which nobody takes here.
const POLICY_C_SHA384: [u8; 48] = [
    0xd6, 0x03, 0x2c, 0xe6, 0x1f, 0x2f, 0xb3, 0xc2, 0x40, 0xeb, 0x3c, 0xf6, 0xa3, 0x32, 0x37, 0xef, 0x2b, 0x6a, 0x16,
    0xf4, 0x29, 0x3c, 0x22, 0xb4, 0x55, 0xe2, 0x61, 0xcf, 0xfd, 0x21, 0x7a, 0xd5, 0xb4, 0x94, 0x7c, 0x2d, 0x73, 0xe6,
    0x30, 0x05, 0xee, 0xd2, 0xdc, 0x2b, 0x35, 0x93, 0xd1, 0x65,
];

impl EndorsementKind {
    /// The fastest first.
    const ALL: [Self; 3] = [Self::P384, Self::P256, Self::Rsa2048];

    /// NV index of the certificate.
    const fn certificate_index(self) -> u32 {
        match self {
            Self::P384 => 0x01C0_0016,
            Self::P256 => 0x01C0_000A,
            Self::Rsa2048 => 0x01C0_0002,
        }
    }

    const fn selection(self) -> AsymmetricAlgorithmSelection {
        match self {
            Self::P384 => AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP384),
            Self::P256 => AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP256),
            Self::Rsa2048 => AsymmetricAlgorithmSelection::Rsa(RsaKeyBits::Rsa2048),
        }
    }

    /// Hash of name and policy.
    pub(super) const fn hash(self) -> HashingAlgorithm {
        match self {
            Self::P384 => HashingAlgorithm::Sha384,
            Self::P256 | Self::Rsa2048 => HashingAlgorithm::Sha256,
        }
    }

    /// The branches of its policy, where it has more than one.
    pub(super) const fn policy_branches(self) -> Option<[[u8; 48]; 2]> {
        match self {
            Self::P384 => Some([POLICY_A_SHA384, POLICY_C_SHA384]),
            Self::P256 | Self::Rsa2048 => None,
        }
    }
}

/// Makes the attestation key, by the session that is set.
pub(super) fn attestation(context: &mut Context) -> Result<Attestation, IdentityError> {
    const DOING: &str = "making the attestation key";
    let public = Public::unmarshall(&template::ak()).doing(DOING)?;
    let (handle, public) = primary(context, public, DOING)?;
    template::check_ak(&public).doing(DOING)?;
    Ok(Attestation { handle, public })
}

/// Makes the endorsement key, by the session that is set: the fastest kind that the maker certified, else the fastest that the TPM has.
pub(super) fn endorsement(context: &mut Context) -> Result<Endorsement, IdentityError> {
    let indices = certificate_indices(context)?;
    let certified = EndorsementKind::ALL.into_iter().filter(|kind| indices.contains(&kind.certificate_index()));
    for kind in certified {
        let certificate = der_object(&read_certificate(context, kind)?);
        let Ok((handle, public)) = endorsement_of(context, kind) else { continue };
        // A certificate says nothing about a key that it does not hold (a maker's template of its own, for example).
        if let Some(certificate) = certificate.filter(|der| contains(der, &public.key_bits())) {
            return Ok(Endorsement { kind, handle, public, certificate: Some(certificate) });
        }
        context.flush_context(handle.into()).doing("unloading an endorsement key")?;
    }
    // Without a certificate the member trusts the key at first sight.
    let mut last = wrong("making the endorsement key", "it has none");
    for kind in [EndorsementKind::P256, EndorsementKind::P384, EndorsementKind::Rsa2048] {
        match endorsement_of(context, kind) {
            Ok((handle, public)) => return Ok(Endorsement { kind, handle, public, certificate: None }),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn endorsement_of(
    context: &mut Context,
    kind: EndorsementKind,
) -> Result<(KeyHandle, moor_tpm::Public), IdentityError> {
    const DOING: &str = "making the endorsement key";
    let public = create_ek_public_from_default_template_2(kind.selection(), DefaultKey).doing(DOING)?;
    primary(context, public, DOING)
}

fn primary(
    context: &mut Context,
    template: Public,
    doing: &'static str,
) -> Result<(KeyHandle, moor_tpm::Public), IdentityError> {
    let made = context.create_primary(Hierarchy::Endorsement, template, None, None, None, None).map_err(|error| {
        match error {
            Error::Tss2Error(code) if code.kind() == Some(Tss2ResponseCodeKind::BadAuth) => wrong(
                doing,
                "the endorsement hierarchy has a password; it must be empty: clear the TPM in the firmware's set-up",
            ),
            other => wrong(doing, chain(&other)),
        }
    })?;
    let parsed = made.out_public.marshall().doing(doing).and_then(|bytes| moor_tpm::Public::parse(&bytes).doing(doing));
    match parsed {
        Ok(public) => Ok((made.key_handle, public)),
        Err(error) => {
            context.flush_context(made.key_handle.into()).doing(doing)?;
            Err(error)
        }
    }
}

/// NV indices in the range of certificates that exist.
fn certificate_indices(context: &mut Context) -> Result<Vec<u32>, IdentityError> {
    const DOING: &str = "looking for endorsement certificates";
    let (first, count) = CERTIFICATES;
    let (data, _) = context
        .execute_without_session(|context| context.get_capability(CapabilityType::Handles, first, count))
        .doing(DOING)?;
    let CapabilityData::Handles(handles) = data else { return Err(wrong(DOING, "it answers something else")) };
    Ok(handles.iter().map(|handle| u32::from(*handle)).collect())
}

fn read_certificate(context: &mut Context, kind: EndorsementKind) -> Result<Vec<u8>, IdentityError> {
    const DOING: &str = "reading the endorsement certificate";
    let index = NvIndexTpmHandle::new(kind.certificate_index()).doing(DOING)?;
    let handle = context
        .execute_without_session(|context| context.tr_from_tpm_public(TpmHandle::NvIndex(index)))
        .doing(DOING)?;
    // The reader has the library's one record of this index and closes it.
    nv::read_full(context, NvAuth::NvIndex(handle.into()), index).doing(DOING)
}

/// The DER object at the start: some makers fill the index up with zeros or ones. `None`: it is none.
fn der_object(bytes: &[u8]) -> Option<Vec<u8>> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (head, length) = if first < 0x80 {
        (2, usize::from(first))
    } else {
        let count = usize::from(first & 0x7F);
        let digits = rest.get(..count).filter(|digits| (1..=3).contains(&digits.len()))?;
        (2 + count, digits.iter().fold(0, |length, digit| (length << 8) | usize::from(*digit)))
    };
    let object = bytes.get(..head + length)?;
    (tag == 0x30).then(|| object.to_vec())
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    !needle.is_empty() && haystack.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_cut_out_of_its_padding() {
        let long = [&[0x30, 0x82, 0x01, 0x00][..], &[7; 256]].concat();
        let padded = [&long[..], &[0xFF; 40]].concat();
        for (bytes, wanted) in [
            (&[0x30, 0x02, 1, 2][..], Some(&[0x30, 0x02, 1, 2][..])),
            (&[0x30, 0x02, 1, 2, 0, 0][..], Some(&[0x30, 0x02, 1, 2][..])),
            (&padded, Some(&long)),
            (&long[..200], None),
            (&[0x30, 0x80, 1, 2], None),
            (&[0x30, 0x84, 0xFF, 0xFF, 0xFF, 0xFF], None),
            (&[0x31, 0x00], None),
            (&[0x30], None),
            (&[], None),
        ] {
            assert_eq!(der_object(bytes).as_deref(), wanted, "{bytes:?}");
        }
    }
}
