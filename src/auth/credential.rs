//! A user name and a password, or an identity token, that do not print themselves.

use std::{fmt, sync::Arc, time::Instant};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use secrecy::{ExposeSecret, SecretString};

use super::Exchange;
use crate::oci::Digest;

/// What one entry of a pull secret grants, and where it was written.
#[derive(Clone)]
pub struct Credential {
    username: String,
    password: SecretString,
    origin: String,
    fingerprint: Digest,
    exchange: Option<Arc<dyn Exchange>>,
    read_at: Instant,
}

/// The user name that says that the password is an identity token (distribution-spec, `OAuth2` token authentication).
const IDENTITY_TOKEN_USER: &str = "<token>";

impl Credential {
    /// `origin` is said in messages: `Secret "gcr"`, `the Docker configuration`.
    #[must_use]
    pub fn new(username: String, password: SecretString, origin: &str) -> Self {
        let fingerprint = Digest::sha256(format!("{username}\0{}", password.expose_secret()).as_bytes());
        Self { username, password, origin: origin.to_owned(), fingerprint, exchange: None, read_at: Instant::now() }
    }

    /// One that no registry is shown: what comes of the exchange is. Equal names are equal credentials.
    #[must_use]
    pub fn exchanged(exchange: Arc<dyn Exchange>, name: &str, origin: &str) -> Self {
        let plain = Self::new(name.to_owned(), SecretString::default(), origin);
        // A byte that is in no text: nobody gets the tokens of an identity by writing its name into a Secret.
        let fingerprint = Digest::sha256(&[b"\xff", name.as_bytes()].concat());
        Self { exchange: Some(exchange), fingerprint, ..plain }
    }

    /// This one for an exchange: as long as it stays the same, so does what comes of it.
    #[must_use]
    pub fn exchanged_by(&self, exchange: Arc<dyn Exchange>) -> Self {
        Self { read_at: self.read_at, ..Self::exchanged(exchange, &self.fingerprint.to_string(), &self.origin) }
    }

    /// When it was written into memory: what is refused since then is refused to it.
    #[must_use]
    pub fn read_at(&self) -> Instant {
        self.read_at
    }

    /// How to have what a registry is shown, where that is another one.
    #[must_use]
    pub fn exchange(&self) -> Option<&Arc<dyn Exchange>> {
        self.exchange.as_ref()
    }

    /// A token that a token server has given for logging in without a password.
    #[must_use]
    pub fn identity_token(token: SecretString, origin: &str) -> Self {
        Self::new(IDENTITY_TOKEN_USER.to_owned(), token, origin)
    }

    /// The identity token, if it is one: nobody but a token server is shown it.
    #[must_use]
    pub fn as_identity_token(&self) -> Option<&SecretString> {
        (self.username == IDENTITY_TOKEN_USER).then_some(&self.password)
    }

    /// The password.
    #[must_use]
    pub fn password(&self) -> &SecretString {
        &self.password
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

impl Credential {
    /// Whether a text repeats the password, or the password and the name as they were sent. What is shorter than four
    /// characters is in every text, and no secret.
    #[must_use]
    pub fn is_repeated_in(&self, text: &str) -> bool {
        let password = self.password.expose_secret();
        let sent = STANDARD.encode(format!("{}:{password}", self.username));
        password.len() > 3 && (text.contains(password) || text.contains(sent.trim_end_matches('=')))
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credential({:?} of {}, [redacted])", self.username, self.origin)
    }
}
