//! What can go wrong between the operator and the Kubernetes API.

use std::time::Duration;

use crate::reason::Reason;

/// Longer than any API server means it: they ask for seconds. A bound for nonsense, and no wait of its own.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(1);

/// A reconcile that could not be carried through. The object is looked at again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call to the Kubernetes API failed.
    #[error("{what}: {}", api_words(source))]
    Api {
        /// What was being done.
        what: &'static str,
        /// What the API said.
        source: Box<kube::Error>,
    },
    /// A call to the Kubernetes API took longer than `timing.apiTimeout`.
    #[error("{0}: no answer from the Kubernetes API in time")]
    TimedOut(&'static str),
    /// A reconcile panicked.
    #[error("a reconcile ended by a fault of ImageMirror; its log has the place")]
    Panicked,
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
        matches!(self, Self::Api { source, .. } if has_code(source, 500))
    }

    /// The object is gone, or the API server does not know the kind.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Api { source, .. } if is_not_found(source))
    }

    /// How long the API server wants to be left alone.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let Self::Api { source, .. } = self else { return None };
        let kube::Error::Api(status) = &**source else { return None };
        let seconds = status.details.as_ref()?.retry_after_seconds;
        (seconds > 0).then(|| Duration::from_secs(seconds.into()).min(MAX_RETRY_AFTER))
    }
}

/// What the API server said. kube's own words have the whole answer in them.
pub(crate) fn api_words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        kube::Error::Api(status) => format!("status {} {}", status.code, status.reason).trim_end().to_owned(),
        other => other.to_string(),
    }
}

fn is_conflict(error: &kube::Error) -> bool {
    has_code(error, 409)
}

pub(super) fn is_not_found(error: &kube::Error) -> bool {
    has_code(error, 404)
}

pub(super) fn is_forbidden(error: &kube::Error) -> bool {
    has_code(error, 403)
}

/// By the code alone: what is not the API server's own object, as its plain 404 for a kind that it does not know, has no
/// reason.
fn has_code(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: u16, retry_after: u32) -> Error {
        let status = serde_json::json!({"code": code, "details": {"retryAfterSeconds": retry_after}});
        let status = serde_json::from_value(status).expect("a status");
        Error::Api { what: "asking", source: Box::new(kube::Error::Api(Box::new(status))) }
    }

    #[test]
    fn an_answer_is_known_by_its_code_alone_and_says_when_to_ask_again() {
        assert!(answer(404, 0).is_not_found() && answer(409, 0).is_conflict() && answer(500, 0).is_internal());
        assert_eq!(answer(403, 0).reason(), Reason::Forbidden);
        for (seconds, expected) in [(0, None), (7, Some(7)), (9999, Some(60))] {
            assert_eq!(answer(429, seconds).retry_after(), expected.map(Duration::from_secs));
        }
    }
}
