//! The TPM 2.0 of this node, by tss-esapi: endorsement key, attestation key, credential activation, quotes, and PCR 15, which closes
//! the boot stage.
//!
//! Every command runs in a salted session with encrypted parameters ([`session`]): the bus between processor and TPM can be tapped. At
//! most three objects and two sessions are loaded at any time, which every TPM has room for without a resource manager; the kernel's
//! (`/dev/tpmrm0`) is used where there is one, so that others can use the TPM as well.

pub(super) mod device;
mod keys;
mod pcr;
mod session;

use super::IdentityError;
use super::error::{Doing as _, wrong};
use keys::{Attestation, Endorsement};
use moor_api::node::{Base64, HexBytes, PcrBank, Quote};
use moor_tpm::quote::{self, Expected, QuoteError, STAGE_PCR};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::str::FromStr as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tss_esapi::Context;
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::structures::{Data, EncryptedSecret, IdObject, SignatureScheme};
use tss_esapi::tcti_ldr::{DeviceConfig, TctiNameConf};
use tss_esapi::traits::Marshall as _;
use zeroize::Zeroizing;

/// How often a quote is taken again when something was measured between reading the values and quoting them.
const QUOTE_ATTEMPTS: usize = 5;

/// An open TPM. A clone is another handle to the same one: work on it is done one after the other.
#[derive(Clone)]
pub struct TpmIdentity(Arc<Mutex<Tpm>>);

struct Tpm {
    context: Context,
    /// Banks that have PCR 15.
    banks: Vec<HashingAlgorithm>,
    attestation: Option<Attestation>,
    endorsement: Option<Endorsement>,
}

/// What an enrolment tells the member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// `TPMT_PUBLIC` of the endorsement key.
    pub ek_public: Vec<u8>,
    /// Its certificate in DER, where the TPM has one.
    pub ek_certificate: Option<Vec<u8>>,
    /// `TPMT_PUBLIC` of the attestation key.
    pub ak_public: Vec<u8>,
    /// The bank for quotes.
    pub bank: PcrBank,
}

/// A credential to activate, with the size fields it has on the wire.
#[derive(Debug, Clone)]
pub struct Challenge {
    /// `TPM2B_ID_OBJECT`.
    pub credential: Vec<u8>,
    /// `TPM2B_ENCRYPTED_SECRET`.
    pub secret: Vec<u8>,
}

/// A quote to make.
#[derive(Debug, Clone)]
pub struct QuoteRequest {
    /// Digest of the proof.
    pub digest: [u8; 32],
    /// The bank that the member pinned; `None`: the preferred one of this TPM.
    pub bank: Option<PcrBank>,
    /// PCRs, ascending, with 15.
    pub pcrs: Vec<u8>,
    /// Whether the firmware's event log goes along.
    pub event_log: bool,
}

impl TpmIdentity {
    /// Opens the TPM behind a device node.
    ///
    /// # Errors
    /// It cannot be opened, or no TPM 2.0 answers.
    pub fn open_device(device: &Path) -> Result<Self, IdentityError> {
        const DOING: &str = "opening the device";
        // The library says "0xa000a" for whatever the kernel says; the kernel's own word is better.
        let tried = File::options().read(true).write(true).open(device);
        tried.map_err(|error| wrong(DOING, format!("'{}': {error}", device.display())))?;
        let path = device.to_str().ok_or_else(|| wrong(DOING, "its path is not UTF-8"))?;
        Self::open(TctiNameConf::Device(DeviceConfig::from_str(path).doing(DOING)?))
    }

    /// Opens a TPM by any transport; tests use `swtpm:`.
    ///
    /// # Errors
    /// It cannot be opened, or no TPM 2.0 answers.
    pub fn open(transport: TctiNameConf) -> Result<Self, IdentityError> {
        let mut context = Context::new(transport).doing("opening it")?;
        let banks = pcr::active_banks(&mut context)?;
        Ok(Self(Arc::new(Mutex::new(Tpm { context, banks, attestation: None, endorsement: None }))))
    }

    /// The keys for an enrolment. The endorsement key stays loaded for [`Self::activate`]: making one again can take half a minute.
    ///
    /// # Errors
    /// The TPM failed, or has no usable PCR bank.
    pub fn keys(&mut self, pinned: Option<PcrBank>) -> Result<Keys, IdentityError> {
        let mut tpm = self.lock();
        let bank = tpm.bank(pinned)?;
        let ak_public = tpm.attestation()?.public.as_bytes().to_vec();
        let endorsement = tpm.endorsement()?;
        Ok(Keys {
            ek_public: endorsement.public.as_bytes().to_vec(),
            ek_certificate: endorsement.certificate.clone(),
            ak_public,
            bank,
        })
    }

    /// Activates a credential: only the TPM that has both keys can.
    ///
    /// # Errors
    /// The credential is for another endorsement key or another attestation key, or the TPM failed.
    pub fn activate(&mut self, challenge: &Challenge) -> Result<Zeroizing<Vec<u8>>, IdentityError> {
        const DOING: &str = "activating the member's credential";
        let credential = moor_tpm::content(&challenge.credential, "credential").doing(DOING)?;
        let secret = moor_tpm::content(&challenge.secret, "encrypted secret").doing(DOING)?;
        let credential = IdObject::try_from(credential).doing(DOING)?;
        let secret = EncryptedSecret::try_from(secret).doing(DOING)?;
        let mut tpm = self.lock();
        let ak = tpm.attestation()?.handle;
        tpm.endorsement()?;
        // Taken out, because its slot is wanted again whatever comes of it.
        let Some(endorsement) = tpm.endorsement.take() else { return Err(wrong(DOING, "no endorsement key")) };
        let result = session::salted(&mut tpm.context, |context, session| {
            session::with_endorsement_policy(context, session, &endorsement, |context| {
                context.activate_credential(ak, endorsement.handle, credential, secret).doing(DOING)
            })
        });
        let flushed = tpm.context.flush_context(endorsement.handle.into()).doing("unloading the endorsement key");
        let digest = result?;
        flushed?;
        Ok(Zeroizing::new(digest.value().to_vec()))
    }

    /// A quote, checked as the member will check it.
    ///
    /// # Errors
    /// The request is not one that a member of ours makes, the bank is not active, or the TPM failed.
    pub fn quote(&mut self, request: &QuoteRequest) -> Result<Quote, IdentityError> {
        let ascending = request.pcrs.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || !request.pcrs.contains(&STAGE_PCR) || request.pcrs.iter().any(|number| *number > pcr::MAX) {
            return Err(IdentityError::Answer(format!(
                "it asks to quote the PCRs {:?}; a selection is ascending, contains {STAGE_PCR} and ends at {}",
                request.pcrs,
                pcr::MAX
            )));
        }
        let event_log = if request.event_log { device::event_log() } else { None };
        let mut tpm = self.lock();
        let bank = tpm.bank(request.bank)?;
        for _ in 1..QUOTE_ATTEMPTS {
            match tpm.quote(request, bank)? {
                // Something was measured between the reading and the quote (the kernel does into PCR 10): values and quote differ.
                Err(QuoteError::Digest) => {}
                Err(error) => return Err(wrong("checking its quote", error.to_string())),
                Ok(quote) => return Ok(Quote { event_log, ..quote }),
            }
        }
        Err(wrong("quoting", "the PCR values changed at each attempt"))
    }

    /// Extends PCR 15 in every active bank, reads it back and compares it with what it must be now.
    ///
    /// # Errors
    /// The TPM failed, or a value is not what it must be: the boot must not go on.
    pub fn close_boot_stage(&mut self) -> Result<(), IdentityError> {
        let mut tpm = self.lock();
        let Tpm { context, banks, .. } = &mut *tpm;
        session::salted(context, |context, _| pcr::close(context, banks))
    }

    /// Whether PCR 15 differs from zero in any active bank.
    ///
    /// # Errors
    /// The TPM failed.
    pub fn is_closed(&mut self) -> Result<bool, IdentityError> {
        let mut tpm = self.lock();
        let Tpm { context, banks, .. } = &mut *tpm;
        session::salted(context, |context, _| pcr::is_closed(context, banks))
    }

    /// Runs `work` on a thread that may block: a TPM takes milliseconds to half a minute for one command.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Self) -> Result<T, IdentityError> + Send + 'static,
    ) -> Result<T, IdentityError> {
        let mut own = self.clone();
        tokio::task::spawn_blocking(move || work(&mut own))
            .await
            .map_err(|error| wrong("running its commands", error.to_string()))?
    }

    /// Each call leaves a consistent state also when it panics, so that a poisoned lock is as good.
    fn lock(&self) -> MutexGuard<'_, Tpm> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tpm {
    fn bank(&self, pinned: Option<PcrBank>) -> Result<PcrBank, IdentityError> {
        let active = |bank: &PcrBank| self.banks.contains(&pcr::algorithm(*bank));
        match pinned {
            Some(bank) if active(&bank) => Ok(bank),
            Some(bank) => Err(wrong(
                "choosing a PCR bank",
                format!(
                    "the node is enrolled with the {bank:?} bank, which is not active any more: activate it in the firmware's set-up, or \
                     rearm the node"
                ),
            )),
            None => [PcrBank::Sha256, PcrBank::Sha384].into_iter().find(active).ok_or_else(|| {
                wrong(
                    "choosing a PCR bank",
                    "neither SHA-256 nor SHA-384 is active: activate one in the firmware's set-up",
                )
            }),
        }
    }

    /// The attestation key, made at its first use. It is the same at each boot: the template is fixed, the seed is the TPM's.
    fn attestation(&mut self) -> Result<&Attestation, IdentityError> {
        if self.attestation.is_none() {
            self.attestation = Some(session::salted(&mut self.context, |context, _| keys::attestation(context))?);
        }
        self.attestation.as_ref().ok_or_else(|| wrong("making the attestation key", "there is none"))
    }

    fn endorsement(&mut self) -> Result<&Endorsement, IdentityError> {
        if self.endorsement.is_none() {
            self.endorsement = Some(session::salted(&mut self.context, |context, _| keys::endorsement(context))?);
        }
        self.endorsement.as_ref().ok_or_else(|| wrong("making the endorsement key", "there is none"))
    }

    /// One attempt; the inner result is what a member would say to it.
    fn quote(&mut self, request: &QuoteRequest, bank: PcrBank) -> Result<Result<Quote, QuoteError>, IdentityError> {
        const DOING: &str = "quoting";
        let ak = self.attestation()?.handle;
        let extra_data = Data::try_from(request.digest.as_slice()).doing(DOING)?;
        let (values, attest, signature) = session::salted(&mut self.context, |context, _| {
            let values = pcr::read(context, pcr::algorithm(bank), &request.pcrs)?;
            let selection = pcr::selection(pcr::algorithm(bank), &request.pcrs)?;
            let (attest, signature) = context.quote(ak, extra_data, SignatureScheme::Null, selection).doing(DOING)?;
            Ok((values, attest.marshall().doing(DOING)?, signature.marshall().doing(DOING)?))
        })?;
        let expected = Expected { extra_data: &request.digest, bank: pcr::bank(bank), pcrs: &request.pcrs };
        let judged = quote::verify(&self.attestation()?.public, &attest, &signature, &expected, &values);
        Ok(judged.map(|_| Quote {
            attest: Base64(attest),
            signature: Base64(signature),
            pcrs: values.into_iter().map(|(number, value)| (number, HexBytes(value))).collect::<BTreeMap<_, _>>(),
            event_log: None,
        }))
    }
}
