//! The attestation key's template: exactly this, or the key is refused.

use crate::public::{Key, P256, Public};
use crate::{TpmError, alg};

/// Bits of `TPMA_OBJECT` (Part 2, 8.3).
pub mod attribute {
    /// The key cannot leave its TPM.
    pub const FIXED_TPM: u32 = 1 << 1;
    /// Nor its parent.
    pub const FIXED_PARENT: u32 = 1 << 4;
    /// The TPM made its secret.
    pub const SENSITIVE_DATA_ORIGIN: u32 = 1 << 5;
    /// The (empty) password authorises its use.
    pub const USER_WITH_AUTH: u32 = 1 << 6;
    /// Failed authorisations do not count towards a lockout.
    pub const NO_DA: u32 = 1 << 10;
    /// It signs only what the TPM itself made.
    pub const RESTRICTED: u32 = 1 << 16;
    /// It decrypts.
    pub const DECRYPT: u32 = 1 << 17;
    /// It signs.
    pub const SIGN: u32 = 1 << 18;
}

/// Attributes of an attestation key.
pub const AK_ATTRIBUTES: u32 = attribute::FIXED_TPM
    | attribute::FIXED_PARENT
    | attribute::SENSITIVE_DATA_ORIGIN
    | attribute::USER_WITH_AUTH
    | attribute::NO_DA
    | attribute::RESTRICTED
    | attribute::SIGN;

/// The template as `TPMT_PUBLIC`, with an empty point: input of `TPM2_CreatePrimary`.
#[must_use]
pub fn ak() -> Vec<u8> {
    let mut out = Vec::new();
    for half in [alg::ECC, alg::SHA256] {
        out.extend_from_slice(&half.to_be_bytes());
    }
    out.extend_from_slice(&AK_ATTRIBUTES.to_be_bytes());
    // Empty policy, no cipher, ECDSA with SHA-256 on P-256, no key derivation, an empty point.
    for half in [0, alg::NULL, alg::ECDSA, alg::SHA256, P256, alg::NULL, 0, 0] {
        out.extend_from_slice(&half.to_be_bytes());
    }
    out
}

/// Checks that a key was made from the template.
///
/// # Errors
/// The first property that differs.
pub fn check_ak(public: &Public) -> Result<(), TpmError> {
    let Key::Ecc { aes_bits, scheme, scheme_hash, curve, .. } = &public.key else {
        return Err(TpmError::Template("is no elliptic curve key"));
    };
    let rules = [
        (public.name_alg == alg::SHA256, "has a name that is not by SHA-256"),
        (*curve == P256, "is not on P-256"),
        (*scheme == alg::ECDSA && *scheme_hash == alg::SHA256, "does not sign by ECDSA with SHA-256"),
        (aes_bits.is_none(), "has a cipher, which no signing key has"),
        (public.policy.is_empty(), "has a policy, which the template has not"),
    ];
    for (good, why) in rules {
        if !good {
            return Err(TpmError::Template(why));
        }
    }
    let bits = [
        (attribute::FIXED_TPM, true, "may leave its TPM (fixedTPM is not set)"),
        (attribute::FIXED_PARENT, true, "may change its parent (fixedParent is not set)"),
        (attribute::SENSITIVE_DATA_ORIGIN, true, "was not made by the TPM (sensitiveDataOrigin is not set)"),
        (attribute::RESTRICTED, true, "signs foreign data (restricted is not set)"),
        (attribute::SIGN, true, "does not sign (sign is not set)"),
        (attribute::DECRYPT, false, "decrypts (decrypt is set)"),
    ];
    for (bit, wanted, why) in bits {
        if (public.attributes & bit != 0) != wanted {
            return Err(TpmError::Template(why));
        }
    }
    if public.attributes != AK_ATTRIBUTES {
        return Err(TpmError::Template("has other attributes than the template"));
    }
    Ok(())
}
