//! What can go wrong with a registry, and what it means: the one table from (step, code, status) to reason and retry.
//!
//! The OCI error code counts before the status, because registries answer the same event with different statuses.

use std::{fmt, sync::Arc, time::Duration};

use http::StatusCode;
use jiff::Timestamp;

use super::{
    envelope::{NO_REPOSITORY, NO_SPACE, UNAUTHORIZED, URLS_REFUSED, clean},
    network::Denied,
};
use crate::{auth::Unusable, reason::Reason};

/// A failed exchange with a registry.
#[derive(Clone, Debug, thiserror::Error)]
pub struct Error {
    /// What happened.
    pub kind: ErrorKind,
    /// What was being done.
    pub step: Step,
    /// The registry, or the token server of one, as `host[:port]`.
    pub host: String,
    /// What was asked for, such as `agent:7.70.0`; never a URL.
    pub subject: String,
    /// What to do, where it is known better than from the rest.
    pub advice: Option<String>,
    #[source]
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The name did not resolve or no connection came about.
    Connect,
    /// The certificate was not accepted.
    Tls(CertificateProblem),
    /// Nothing arrived for as long as [`Timing`](super::Timing) allows.
    TimedOut,
    /// Bytes move more slowly than [`Floor`](super::Floor) allows.
    TooSlow,
    /// The connection broke after the request was sent.
    Interrupted,
    /// An answer that is not a success.
    Status {
        /// The HTTP status.
        status: StatusCode,
        /// The first OCI error code of the body.
        code: Option<String>,
        /// The registry's own words, cleaned and shortened.
        message: Option<String>,
        /// When it may be asked again, as `Retry-After` says.
        until: Option<Timestamp>,
        /// Where the credential came from that was refused with 401 or 403.
        credential: Option<String>,
    },
    /// The host has asked to be left alone for this long, in which nothing should be held for it.
    Paused(Duration),
    /// The host has asked to be left alone until then, which is longer than a run waits.
    Closed(Timestamp),
    /// The address is in a network that the administrator has closed.
    Denied(Denied),
    /// The registry names a token server that its credentials must not be sent to.
    RealmRefused(String),
    /// A redirect leads where it must not: to plain HTTP, in a loop, or anywhere on a write.
    RedirectRefused(String),
    /// The next page of a list is at another host.
    LinkRefused(String),
    /// An upload location at another host.
    LocationRefused(String),
    /// A body larger than its kind may be.
    TooLarge(u64),
    /// There was no room in our memory for so many bytes.
    NoRoom(u64),
    /// Bytes that are not what the digest or the size promises.
    Integrity(String),
    /// An answer that the protocol does not allow.
    Malformed(String),
    /// A directory does not hold what was asked for.
    Missing,
    /// The file system refused.
    Io(std::io::ErrorKind),
    /// The client could not be set up.
    Setup(String),
    /// A credential that cannot be exchanged for what the registry takes.
    Unusable(Unusable),
    /// The same, which may pass.
    NotNow(Unusable),
    /// Another leader may have taken over: no tag is written any more.
    LeadershipLost,
}

/// What is wrong with a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateProblem {
    /// It was valid before.
    #[error("the registry's certificate has expired")]
    Expired,
    /// It will be valid later.
    #[error("the registry's certificate is not valid yet")]
    NotYetValid,
    /// It is for other names.
    #[error("the registry's certificate is for another name")]
    OtherName,
    /// Who has signed it is not known, or it is not as it should be.
    #[error("the registry's certificate is not trusted")]
    Untrusted,
    /// It is ours that the registry does not accept, or that there is none.
    #[error("the registry refused the TLS connection")]
    Refused,
}

/// A step of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// `GET` of a token.
    Token,
    /// The exchange of a credential for one that the registry takes.
    Login,
    /// The creation of a repository.
    CreateRepository,
    /// `HEAD` of a manifest.
    HeadManifest,
    /// `GET` of a manifest.
    GetManifest,
    /// `HEAD` of a blob.
    HeadBlob,
    /// `GET` of a manifest that another manifest names.
    GetChild,
    /// `GET` of a blob.
    GetBlob,
    /// `POST` that opens an upload, or mounts.
    StartUpload,
    /// `PUT` of a blob.
    PutBlob,
    /// `GET` of an upload session: what has arrived of it.
    UploadStatus,
    /// `DELETE` of an upload session.
    CancelUpload,
    /// `PUT` of a manifest or tag.
    PutManifest,
    /// `PUT` of a tag that has another digest.
    MoveTag,
    /// `GET` of a list of tags.
    ListTags,
    /// `GET` of what is attached to a manifest.
    ListReferrers,
}

/// Which of the two registries an exchange was with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The registry that is read.
    Source,
    /// The registry that is written.
    Target,
}

impl Error {
    pub(super) fn new(kind: ErrorKind, step: Step, host: &str, subject: &str) -> Self {
        Self { kind, step, host: host.to_owned(), subject: subject.to_owned(), advice: None, source: None }
    }

    pub(super) fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(Arc::from(source.into()));
        self
    }

    /// The same failure, of what somebody else has asked for.
    ///
    /// `origin` is where the credential is written that would have been shown.
    pub(super) fn about(mut self, subject: &str, origin: Option<&str>) -> Self {
        subject.clone_into(&mut self.subject);
        if let (ErrorKind::Status { credential: Some(credential), .. }, Some(origin)) = (&mut self.kind, origin) {
            origin.clone_into(credential);
        }
        self
    }

    /// The same failure, of a manifest that another manifest names.
    #[must_use]
    pub(crate) fn of_child(mut self) -> Self {
        if self.step == Step::GetManifest {
            self.step = Step::GetChild;
        }
        self
    }

    /// The same failure, of a tag that has another digest already.
    #[must_use]
    pub(super) fn of_existing_tag(mut self) -> Self {
        self.step = Step::MoveTag;
        self
    }

    /// The HTTP status, where there was an answer.
    #[must_use]
    pub fn status(&self) -> Option<StatusCode> {
        match &self.kind {
            ErrorKind::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// The HTTP status as a number; 0 where there was no answer.
    pub(super) fn status_code(&self) -> u16 {
        self.status().map_or(0, |status| status.as_u16())
    }

    /// The OCI error code, where there was one.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match &self.kind {
            ErrorKind::Status { code, .. } => code.as_deref(),
            _ => None,
        }
    }

    /// Whether the registry does not know who asks, or not any more.
    #[must_use]
    pub(super) fn is_unauthorized(&self) -> bool {
        self.status() == Some(StatusCode::UNAUTHORIZED) || self.code() == Some(UNAUTHORIZED)
    }

    /// Whether the content asked for is simply not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        // What a token server does not have says nothing of what it was to be asked for.
        (self.status() == Some(StatusCode::NOT_FOUND) && !self.step.is_beside()) || self.kind == ErrorKind::Missing
    }

    /// Whether the upload session is gone and a new one may do.
    #[must_use]
    pub fn is_lost_session(&self) -> bool {
        let lost_code = matches!(self.code(), Some("BLOB_UPLOAD_UNKNOWN" | "BLOB_UPLOAD_INVALID"));
        self.step == Step::PutBlob
            && (lost_code || matches!(self.status(), Some(StatusCode::NOT_FOUND | StatusCode::RANGE_NOT_SATISFIABLE)))
    }

    /// Whether it says nothing of what was asked for: the same may succeed later, soon or not.
    #[must_use]
    pub(super) fn may_pass(&self) -> bool {
        let is_about_now = matches!(
            self.kind,
            ErrorKind::Paused(_) | ErrorKind::Closed(_) | ErrorKind::NoRoom(_) | ErrorKind::Malformed(_)
        );
        is_about_now || self.is_retryable()
    }

    /// Whether the same exchange may succeed when it is repeated soon.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match &self.kind {
            ErrorKind::Connect
            | ErrorKind::TimedOut
            | ErrorKind::TooSlow
            | ErrorKind::Interrupted
            | ErrorKind::NotNow(_) => true,
            ErrorKind::Status { status, code, .. } => {
                let about_manifest = code.as_deref().is_some_and(|code| code.starts_with("MANIFEST_"));
                let refused_form = status.is_server_error() && about_manifest;
                let told = matches!(code.as_deref(), Some(NO_SPACE | URLS_REFUSED));
                let full = *status == StatusCode::INSUFFICIENT_STORAGE || told;
                (status.is_server_error() && !refused_form && !full)
                    || matches!(status.as_u16(), 408 | 429 | 499)
                    || self.is_lost_session()
            }
            _ => false,
        }
    }

    /// The reason that users see.
    #[must_use]
    pub fn reason(&self, side: Side) -> Reason {
        let unavailable = match side {
            Side::Source => Reason::SourceUnavailable,
            Side::Target => Reason::TargetUnavailable,
        };
        match &self.kind {
            ErrorKind::Tls(_) => Reason::CertificateInvalid,
            ErrorKind::Connect
            | ErrorKind::TimedOut
            | ErrorKind::TooSlow
            | ErrorKind::Interrupted
            | ErrorKind::LeadershipLost => unavailable,
            ErrorKind::Denied(_)
            | ErrorKind::RealmRefused(_)
            | ErrorKind::RedirectRefused(_)
            | ErrorKind::LinkRefused(_)
            | ErrorKind::LocationRefused(_) => Reason::Blocked,
            ErrorKind::Paused(_) | ErrorKind::Closed(_) => Reason::RateLimited,
            ErrorKind::TooLarge(_) if matches!(self.step, Step::GetManifest | Step::GetChild) => {
                Reason::ManifestRefused
            }
            ErrorKind::TooLarge(_) => unavailable,
            ErrorKind::NoRoom(_) => Reason::InternalError,
            ErrorKind::Integrity(_) => Reason::IntegrityError,
            ErrorKind::Malformed(_) => unavailable,
            ErrorKind::Missing => self.absent(side),
            ErrorKind::Io(std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded) => Reason::QuotaExceeded,
            ErrorKind::Io(_) => unavailable,
            ErrorKind::Setup(_) => Reason::CertificateInvalid,
            ErrorKind::Unusable(unusable) | ErrorKind::NotNow(unusable) => unusable.reason,
            ErrorKind::Status { status, code, .. } => self.status_reason(*status, code.as_deref(), side, unavailable),
        }
    }

    fn status_reason(&self, status: StatusCode, code: Option<&str>, side: Side, unavailable: Reason) -> Reason {
        match (self.step, code, status.as_u16()) {
            // A quota of the registry, without a time after which it is over.
            (_, Some("QUOTA_EXCEEDED" | NO_SPACE), _) | (_, _, 507) => Reason::QuotaExceeded,
            (_, Some(NO_REPOSITORY), _) => self.absent(side),
            (_, Some("TOOMANYREQUESTS"), _) | (_, _, 429) => Reason::RateLimited,
            (Step::Login | Step::CreateRepository, Some(code), _) if code.contains("AccessDenied") => {
                Reason::PermissionDenied
            }
            (Step::Token, _, 400 | 401 | 403)
            | (Step::Login, _, 400 | 401)
            | (_, Some(UNAUTHORIZED), _)
            | (_, _, 401) => Reason::AuthenticationFailed,
            (Step::PutManifest | Step::MoveTag, Some("TAG_INVALID"), _) => Reason::TagImmutable,
            (Step::PutManifest, _, 409) | (Step::MoveTag, _, 405 | 409 | 412) => Reason::TagImmutable,
            (_, Some("DENIED"), _) | (_, _, 403) => Reason::PermissionDenied,
            (_, Some("NAME_UNKNOWN"), _) => match side {
                Side::Source => Reason::SourceNotFound,
                Side::Target => Reason::RepositoryMissing,
            },
            (_, Some("DIGEST_INVALID" | "SIZE_INVALID"), _) => Reason::IntegrityError,
            (Step::PutManifest | Step::MoveTag, Some("MANIFEST_BLOB_UNKNOWN" | "BLOB_UNKNOWN"), _) => unavailable,
            (_, Some("MANIFEST_INVALID" | "MANIFEST_UNVERIFIED" | "UNSUPPORTED" | URLS_REFUSED), _) => {
                Reason::ManifestRefused
            }
            (Step::PutManifest | Step::MoveTag, _, 400 | 405 | 413 | 415 | 422) => Reason::ManifestRefused,
            (Step::Token | Step::Login | Step::PutBlob | Step::UploadStatus, _, 404) => unavailable,
            (_, _, 404) => self.absent(side),
            _ => unavailable,
        }
    }

    fn absent(&self, side: Side) -> Reason {
        match (side, self.step) {
            (Side::Source, Step::GetBlob | Step::GetChild) => Reason::SourceIncomplete,
            (Side::Source, _) => Reason::SourceNotFound,
            (Side::Target, _) => Reason::RepositoryMissing,
        }
    }
}

impl Step {
    /// Whether it is no question to the registry itself.
    pub(super) fn is_beside(self) -> bool {
        matches!(self, Self::Token | Self::Login | Self::CreateRepository)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Token => "getting a token for",
            Self::Login => "getting a login for",
            Self::CreateRepository => "creating the repository",
            Self::HeadManifest => "looking up",
            Self::GetManifest | Self::GetChild => "reading the manifest of",
            Self::HeadBlob => "looking up blob",
            Self::GetBlob => "reading blob",
            Self::StartUpload => "starting the upload of",
            Self::PutBlob => "uploading",
            Self::UploadStatus => "asking about the upload of",
            Self::CancelUpload => "cancelling the upload of",
            Self::PutManifest => "writing the manifest of",
            Self::MoveTag => "moving the tag",
            Self::ListTags => "listing the tags of",
            Self::ListReferrers => "listing what is attached to",
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} at {}: {}", self.step, self.subject, self.host, self.kind)?;
        if let Some(source) = &self.source {
            write!(f, " ({})", innermost(source.as_ref()))?;
        }
        Ok(())
    }
}

/// The last of a chain of causes: the one that says something, such as "connection refused".
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    clean(&last.to_string())
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.write_str("no connection"),
            Self::Tls(problem) => write!(f, "{problem}"),
            Self::TimedOut => f.write_str("no answer in time"),
            Self::TooSlow => f.write_str("bytes move more slowly than limits.minBytesPerSecond"),
            Self::Interrupted => f.write_str("the connection broke"),
            Self::Status { status, code, message, credential, until } => {
                write!(f, "{}", status.as_u16())?;
                if let Some(code) = code {
                    write!(f, " {code}")?;
                }
                if let Some(message) = message {
                    write!(f, ", {message}")?;
                }
                if let Some(until) = until {
                    write!(f, "; it may be asked again after {until}")?;
                }
                match (credential, status.as_u16()) {
                    (Some(origin), _) => write!(f, " with the credential of {origin}"),
                    (None, 401 | 403) => f.write_str(" without a credential, as none matches"),
                    (None, _) => Ok(()),
                }
            }
            Self::Paused(pause) => write!(f, "it asked to be left alone, for another {} s", pause.as_secs()),
            Self::Closed(until) => write!(f, "it asked to be left alone until {until}"),
            Self::Denied(denied) => {
                write!(f, "{denied}; allow it with networks.allow in the operator's configuration")
            }
            Self::RealmRefused(host) => write!(
                f,
                "it sends logins to {host}, which is not of its domain; allow it with authHosts in the operator's configuration"
            ),
            Self::RedirectRefused(why) => write!(f, "a redirect was refused: {why}"),
            Self::LinkRefused(host) => write!(f, "it says that its list goes on at {host}, another host"),
            Self::LocationRefused(host) => write!(
                f,
                "it wants the upload sent to {host}, another host; allow it with uploadHosts in the operator's configuration"
            ),
            Self::TooLarge(limit) => write!(f, "the answer is larger than {limit} bytes"),
            Self::NoRoom(bytes) => write!(
                f,
                "other manifests and lists take all the memory that there is for them (limits.memory), and this answer \
                 may have {bytes} bytes"
            ),
            Self::Integrity(what) => f.write_str(what),
            Self::Malformed(what) => write!(f, "an answer that the protocol does not allow: {what}"),
            Self::Missing => f.write_str("it is not there"),
            Self::Io(kind) => write!(f, "{kind}"),
            Self::Setup(what) => f.write_str(what),
            Self::Unusable(unusable) | Self::NotNow(unusable) => write!(f, "{unusable}"),
            Self::LeadershipLost => f.write_str("this replica may no longer be the leader"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::envelope::parse;

    fn answer(step: Step, status: u16, code: Option<&str>) -> Error {
        let kind = ErrorKind::Status {
            status: StatusCode::from_u16(status).unwrap(),
            code: code.map(Into::into),
            message: None,
            until: None,
            credential: None,
        };
        Error::new(kind, step, "r.example", "a:1")
    }

    #[test]
    fn words_that_say_more_than_the_code_are_what_counts() {
        for (status, words, reason) in [
            (403, "Quota exceeded when processing the request of adding 1.0 GiB of storage", Reason::QuotaExceeded),
            (403, "Your authorization token has expired. Reauthenticate and try again.", Reason::AuthenticationFailed),
            (500, "write: no space left on device", Reason::QuotaExceeded),
            (401, "project team not found", Reason::RepositoryMissing),
            (403, "permission_denied: create_package", Reason::RepositoryMissing),
            (403, "installation not allowed to Create organization package", Reason::RepositoryMissing),
            (403, "permission_denied: write_package", Reason::PermissionDenied),
            (403, "requested access to the resource is denied", Reason::PermissionDenied),
        ] {
            let body = serde_json::json!({"errors": [{"code": "DENIED", "message": words}]}).to_string();
            let (code, message) = parse(body.as_bytes());
            let found = answer(Step::StartUpload, status, code.as_deref());
            assert_eq!((found.reason(Side::Target), message.as_deref()), (reason, Some(words)));
            let is_unauthorized = status == 401 || reason == Reason::AuthenticationFailed;
            assert!(!found.is_retryable() && found.is_unauthorized() == is_unauthorized);
        }
    }

    #[test]
    fn every_answer_has_one_reason_and_one_retry() {
        use Side::{Source, Target};
        for (step, status, code, side, reason, retryable) in [
            (Step::GetManifest, 404, Some("MANIFEST_UNKNOWN"), Source, Reason::SourceNotFound, false),
            (Step::GetManifest, 404, Some("NAME_UNKNOWN"), Source, Reason::SourceNotFound, false),
            (Step::GetBlob, 404, Some("BLOB_UNKNOWN"), Source, Reason::SourceIncomplete, false),
            (Step::StartUpload, 404, Some("NAME_UNKNOWN"), Target, Reason::RepositoryMissing, false),
            (Step::GetManifest, 401, Some("UNAUTHORIZED"), Source, Reason::AuthenticationFailed, false),
            (Step::Token, 401, None, Target, Reason::AuthenticationFailed, false),
            (Step::GetManifest, 403, Some("DENIED"), Source, Reason::PermissionDenied, false),
            (Step::PutManifest, 500, Some("MANIFEST_INVALID"), Target, Reason::ManifestRefused, false),
            (Step::PutManifest, 400, None, Target, Reason::ManifestRefused, false),
            (Step::PutManifest, 409, None, Target, Reason::TagImmutable, false),
            (Step::PutBlob, 400, Some("BLOB_UPLOAD_UNKNOWN"), Target, Reason::TargetUnavailable, true),
            (Step::PutBlob, 400, Some("DIGEST_INVALID"), Target, Reason::IntegrityError, false),
            (Step::GetBlob, 503, None, Source, Reason::SourceUnavailable, true),
            (Step::GetBlob, 429, Some("TOOMANYREQUESTS"), Source, Reason::RateLimited, true),
            (Step::PutBlob, 507, None, Target, Reason::QuotaExceeded, false),
            (Step::PutBlob, 500, None, Target, Reason::TargetUnavailable, true),
        ] {
            let error = answer(step, status, code);
            assert_eq!(error.reason(side), reason, "{error}");
            assert_eq!(error.is_retryable(), retryable, "{error}");
        }
    }

    #[test]
    fn an_error_says_what_happened_and_where() {
        let error = answer(Step::GetManifest, 404, Some("MANIFEST_UNKNOWN"));
        assert_eq!(error.to_string(), "reading the manifest of a:1 at r.example: 404 MANIFEST_UNKNOWN");
    }
}
