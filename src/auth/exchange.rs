//! Logins that say nothing to a registry themselves, and are exchanged for ones that do, for a while: a key pair or an
//! identity of a cloud.
//!
//! An [`Exchange`] does not talk to the network by itself: it is given an [`Http`], which keeps the walls that requests to
//! registries have, too.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use secrecy::{ExposeSecret as _, SecretString};

use super::Credential;
use crate::{oci::RepositoryName, reason::Reason};

/// How a login is had from another one.
pub trait Exchange: fmt::Debug + Send + Sync {
    /// A login that the registry takes. Whoever asks remembers it, and asks again before it ends.
    fn exchange(&self, http: Arc<dyn Http>) -> BoxFuture<'_, Result<Issued, ExchangeError>>;

    /// What to do where a registry refuses what came of it, in one clause. None: to look into the Secret that it is of.
    fn advice(&self) -> Option<&'static str> {
        None
    }

    /// Makes a repository, where the same login may do that and pushes need it. One that is there is as good.
    fn create_repository<'a>(
        &'a self,
        http: Arc<dyn Http>,
        name: &'a RepositoryName,
        settings: &'a NewRepository,
    ) -> BoxFuture<'a, Result<(), ExchangeError>> {
        let (_, _, _) = (http, name, settings);
        let message = "repositories cannot be created at this registry; create it there".to_owned();
        Box::pin(async { Err(Unusable { reason: Reason::RepositoryMissing, message }.into()) })
    }
}

/// How repositories are made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewRepository {
    /// Tags of the repository, for people and bills.
    pub tags: BTreeMap<String, String>,
    /// Whether its images' tags cannot be moved.
    pub immutable_tags: bool,
    /// Whether images are scanned when they arrive.
    pub scan_on_push: bool,
}

/// A login that ends.
#[derive(Clone, Debug)]
pub struct Issued {
    /// What the registry is shown: a user name and a password, or an identity token.
    pub credential: Arc<Credential>,
    /// How long it is good for, from now.
    pub life: Duration,
}

/// Marks a request (its extensions) that may go, if its host is one of these, to where a cloud tells the machine who it is. That is closed to everybody
/// (see [`Networks`](crate::registry::Networks)) but the program's own identity, and nothing that a user writes is in such
/// a request.
#[derive(Clone, Copy, Debug)]
pub struct ToMetadata;

/// Sends single requests, with neither redirects nor repetition.
pub trait Http: fmt::Debug + Send + Sync {
    /// Sends one. An answer of any status is one; its body is at most 64 KiB.
    fn send(&self, request: http::Request<Bytes>) -> BoxFuture<'_, Result<http::Response<Bytes>, BoxError>>;
}

/// Somebody whom a cloud believes by a signed token (`OpenID` Connect), such as a `ServiceAccount`.
pub trait Identity: fmt::Debug + Send + Sync {
    /// A fresh token for this audience.
    fn token<'a>(&'a self, audience: &'a str) -> BoxFuture<'a, Result<SecretString, ExchangeError>>;
}

/// Any error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A login that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// No answer came: the cause is of the [`Http`].
    #[error("there was no answer")]
    Unanswered(#[source] BoxError),
    /// The server said no.
    #[error("{host} answered {status}{}", code.as_ref().map(|code| format!(" {code}")).unwrap_or_default())]
    Refused {
        /// The server.
        host: String,
        /// The HTTP status.
        status: u16,
        /// Its own name for what is wrong.
        code: Option<String>,
        /// Its own words.
        message: Option<String>,
    },
    /// An answer that is none.
    #[error("{host}: {what}")]
    Malformed {
        /// The server.
        host: String,
        /// What is wrong with it.
        what: String,
    },
    /// There is no point in asking.
    #[error("{0}")]
    Unusable(#[from] Unusable),
    /// What is asked for on the way, and is no registry's, cannot be had now; soon it may.
    #[error("{0}")]
    NotNow(Unusable),
    /// One of these, of which it is known what to do.
    #[error("{error}; {advice}")]
    Advised {
        /// What happened.
        error: Box<ExchangeError>,
        /// What to do, in one clause.
        advice: String,
    },
}

impl ExchangeError {
    /// A refusal. Its words are left out if they repeat what the server was shown.
    pub(super) fn refused(
        host: &str,
        status: http::StatusCode,
        code: Option<String>,
        message: Option<String>,
        shown: &[&SecretString],
    ) -> Self {
        let is_clean = |text: &String| !shown.iter().any(|secret| text.contains(secret.expose_secret()));
        Self::Refused {
            host: host.to_owned(),
            status: status.as_u16(),
            code: code.filter(is_clean),
            message: message.filter(is_clean),
        }
    }

    pub(super) fn advised(self, advice: String) -> Self {
        Self::Advised { error: Box::new(self), advice }
    }
}

/// What stands in the way before anybody is asked, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Unusable {
    /// For the status.
    pub reason: Reason,
    /// For its reader.
    pub message: String,
}
