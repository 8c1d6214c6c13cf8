//! A user name and a password that do not print themselves.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use secrecy::{ExposeSecret, SecretString};

use crate::oci::Digest;

/// What one entry of a pull secret grants, and where it was written.
#[derive(Clone)]
pub struct Credential {
    username: String,
    password: SecretString,
    origin: String,
    fingerprint: Digest,
}

impl Credential {
    /// `origin` is said in messages: `Secret "gcr"`, `the Docker configuration`.
    #[must_use]
    pub fn new(username: String, password: SecretString, origin: &str) -> Self {
        let fingerprint = Digest::sha256(format!("{username}\0{}", password.expose_secret()).as_bytes());
        Self { username, password, origin: origin.to_owned(), fingerprint }
    }

    /// The user name.
    #[must_use]
    pub fn username(&self) -> &str {
        &self.username
    }

    /// Where it was written, for messages.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The same for equal credentials and no others: what token caches are keyed by.
    #[must_use]
    pub fn fingerprint(&self) -> &Digest {
        &self.fingerprint
    }

    /// The value of an `Authorization` header (RFC 7617).
    #[must_use]
    pub fn basic(&self) -> SecretString {
        let pair = format!("{}:{}", self.username, self.password.expose_secret());
        format!("Basic {}", STANDARD.encode(pair)).into()
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credential({:?} of {}, [redacted])", self.username, self.origin)
    }
}
