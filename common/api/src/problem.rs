//! Errors on the wire: `application/problem+json` (RFC 9457) with a code for programs and a sentence for people.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The media type of a problem.
pub const CONTENT_TYPE: &str = "application/problem+json";

/// Why a request was not carried out. `detail` says what, where and what to do, in one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The HTTP status.
    pub status: u16,
    /// Stable, for programs.
    pub code: Code,
    /// One line for people.
    pub detail: String,
}

/// What kind of refusal it is. Programs decide by this; new codes may come, so an unknown one reads as [`Code::Other`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The request does not parse or breaks a bound. Trying again does not help.
    BadRequest,
    /// No token, or one that is malformed, expired, of an older epoch, or bound to another key.
    TokenInvalid,
    /// The token is good, but its stage may not ask for this.
    StageForbidden,
    /// The machine is not known: no node has its UUID, MAC or serial.
    UnknownNode,
    /// Known, but not armed, and it has no identity yet.
    NotArmed,
    /// The proof does not match the identity that is bound to the node (another TPM, another key).
    IdentityMismatch,
    /// The proof is malformed or does not verify.
    ProofInvalid,
    /// The boot stage of this boot is already closed.
    StageClosed,
    /// More than one node matches the machine.
    Ambiguous,
    /// No such object.
    NotFound,
    /// It exists already, or the state does not allow the change.
    Conflict,
    /// The node has no profile, or the profile has no generation that can boot.
    NoProfile,
    /// The caller may not do this.
    Forbidden,
    /// Whoever asks, or is asked, is a member of the collective no more.
    Removed,
    /// Too many requests; try again later.
    RateLimited,
    /// No majority of the members answers: known nodes boot for a while, changes wait.
    NoMajority,
    /// A fault of the server: its log says more.
    Internal,
    /// A code this program does not know.
    #[serde(other)]
    Other,
}

impl Problem {
    /// A problem with the usual status of its code.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        let status = match code {
            Code::BadRequest => 400,
            Code::TokenInvalid => 401,
            Code::StageForbidden
            | Code::UnknownNode
            | Code::NotArmed
            | Code::IdentityMismatch
            | Code::ProofInvalid
            | Code::StageClosed
            | Code::Forbidden
            | Code::Removed => 403,
            Code::NotFound => 404,
            Code::Ambiguous | Code::Conflict | Code::NoProfile => 409,
            Code::RateLimited => 429,
            Code::NoMajority => 503,
            Code::Internal | Code::Other => 500,
        };
        Self { status, code, detail: detail.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_code_still_parses() {
        let text = r#"{"status":403,"code":"from-the-future","detail":"no"}"#;
        assert_eq!(serde_json::from_str::<Problem>(text).unwrap().code, Code::Other);
    }
}
