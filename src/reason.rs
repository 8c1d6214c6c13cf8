//! The closed list of reasons that users see in conditions, failures, events and metrics, and how each is retried.
//!
//! Every error of the engine maps to exactly one reason here, and every reason to exactly one [`Retry`]. The list is
//! part of the API: a reason is added with its documentation in `docs/reasons.md`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why an image, a condition or an event is as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Reason {
    /// The last run ended with nothing failed.
    Succeeded,
    /// A run for this generation, or for a requested token, has not ended yet.
    Progressing,
    /// The last run failed, and what failed is being retried.
    ProgressingWithRetry,
    /// Some images failed, others are in step.
    PartialFailure,
    /// `spec.suspend` is true and the spec has changed since the last run.
    Suspended,
    /// The spec cannot be carried out as it is written.
    InvalidSpec,
    /// A named Secret or `ServiceAccount` does not exist.
    SecretNotFound,
    /// A named Secret has the wrong type, does not parse, or has no entry for the registry.
    SecretInvalid,
    /// The registry answered 401 after a fresh token.
    AuthenticationFailed,
    /// The registry answered 403.
    PermissionDenied,
    /// The Kubernetes API answered 403 to the operator.
    Forbidden,
    /// The tag, digest or repository does not exist at the source.
    SourceNotFound,
    /// The source registry cannot be reached or answers with errors.
    SourceUnavailable,
    /// The target registry cannot be reached or answers with errors.
    TargetUnavailable,
    /// The target repository does not exist and the registry does not create it.
    RepositoryMissing,
    /// The registry asked to slow down for longer than a run waits.
    RateLimited,
    /// The target is full, or a quota is used up.
    QuotaExceeded,
    /// The target refuses to move a tag that has another digest.
    TagImmutable,
    /// The target tag has a digest that was not written here, and it stays.
    TargetChanged,
    /// Two images or two mirrors want one target tag.
    Conflict,
    /// The image is for none of the platforms that are to be kept.
    PlatformMissing,
    /// The certificate of the registry is not trusted, or the CA given does not parse.
    CertificateInvalid,
    /// The registry sent us somewhere that credentials or bytes must not go.
    Blocked,
    /// The bytes received are not the bytes that the digest promises.
    IntegrityError,
    /// The target refuses the form of the manifest, or the source sent none that can be copied safely.
    ManifestRefused,
    /// A manifest at the source names content that the source does not have.
    SourceIncomplete,
    /// The run took longer than `spec.timeout`.
    Timeout,
    /// A fault of `ImageMirror` itself.
    InternalError,
}

/// How soon something that failed is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// 30 s, doubling to 15 min.
    Transient,
    /// Every 15 min, and at once when a credential changes.
    Authentication,
    /// At the next regular run, or when the spec changes.
    Permanent,
}

impl Reason {
    /// The name as users see it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "Succeeded",
            Self::Progressing => "Progressing",
            Self::ProgressingWithRetry => "ProgressingWithRetry",
            Self::PartialFailure => "PartialFailure",
            Self::Suspended => "Suspended",
            Self::InvalidSpec => "InvalidSpec",
            Self::SecretNotFound => "SecretNotFound",
            Self::SecretInvalid => "SecretInvalid",
            Self::AuthenticationFailed => "AuthenticationFailed",
            Self::PermissionDenied => "PermissionDenied",
            Self::Forbidden => "Forbidden",
            Self::SourceNotFound => "SourceNotFound",
            Self::SourceUnavailable => "SourceUnavailable",
            Self::TargetUnavailable => "TargetUnavailable",
            Self::RepositoryMissing => "RepositoryMissing",
            Self::RateLimited => "RateLimited",
            Self::QuotaExceeded => "QuotaExceeded",
            Self::TagImmutable => "TagImmutable",
            Self::TargetChanged => "TargetChanged",
            Self::Conflict => "Conflict",
            Self::PlatformMissing => "PlatformMissing",
            Self::CertificateInvalid => "CertificateInvalid",
            Self::Blocked => "Blocked",
            Self::IntegrityError => "IntegrityError",
            Self::ManifestRefused => "ManifestRefused",
            Self::SourceIncomplete => "SourceIncomplete",
            Self::Timeout => "Timeout",
            Self::InternalError => "InternalError",
        }
    }

    /// How soon an image that failed for this reason is tried again.
    #[must_use]
    pub fn retry(self) -> Retry {
        match self {
            Self::AuthenticationFailed
            | Self::PermissionDenied
            | Self::SecretNotFound
            | Self::SecretInvalid
            | Self::CertificateInvalid
            | Self::Forbidden => Retry::Authentication,
            Self::SourceUnavailable
            | Self::TargetUnavailable
            | Self::RateLimited
            | Self::Timeout
            | Self::InternalError
            | Self::Conflict
            | Self::Progressing
            | Self::ProgressingWithRetry => Retry::Transient,
            Self::Succeeded
            | Self::PartialFailure
            | Self::Suspended
            | Self::InvalidSpec
            | Self::SourceNotFound
            | Self::RepositoryMissing
            | Self::QuotaExceeded
            | Self::TagImmutable
            | Self::TargetChanged
            | Self::PlatformMissing
            | Self::Blocked
            | Self::IntegrityError
            | Self::ManifestRefused
            | Self::SourceIncomplete => Retry::Permanent,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
