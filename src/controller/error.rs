//! What can go wrong between the operator and the Kubernetes API.

use std::time::Duration;

use crate::reason::Reason;

/// A reconcile that could not be carried through. The object is looked at again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call to the Kubernetes API failed.
    #[error("{what}: {source}")]
    Api {
        /// What was being done.
        what: &'static str,
        /// What the API said.
        source: Box<kube::Error>,
    },
    /// A call to the Kubernetes API took longer than `timing.apiTimeout`.
    #[error("{0}: no answer from the Kubernetes API in time")]
    TimedOut(&'static str),
    /// The object has no uid or namespace, which every stored object has.
    #[error("the object has no uid or no namespace")]
    Anonymous,
}

impl Error {
    /// The reason that metrics count it under.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Api { source, .. } if is_forbidden(source) => Reason::Forbidden,
            Self::Api { source, .. } if self::is_conflict(source) => Reason::Conflict,
            _ => Reason::InternalError,
        }
    }

    /// Somebody else wrote the object meanwhile: look again at once, with what they wrote.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Api { source, .. } if is_conflict(source))
    }

    /// The API server could not do what it was asked to.
    #[must_use]
    pub fn is_internal(&self) -> bool {
        matches!(self, Self::Api { source, .. } if matches!(&**source, kube::Error::Api(status) if status.code == 500))
    }

    /// The object is gone.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Api { source, .. } if is_not_found(source))
    }
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_conflict())
}

pub(super) fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_not_found())
}

pub(super) fn is_forbidden(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_forbidden())
}

/// Calls the Kubernetes API with a deadline.
pub(super) async fn call<T>(
    what: &'static str,
    deadline: Duration,
    future: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(deadline, future).await {
        Ok(result) => result.map_err(|error| Error::Api { what, source: Box::new(error) }),
        Err(_) => Err(Error::TimedOut(what)),
    }
}
