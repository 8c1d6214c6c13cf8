//! What a copy failed of: the side, the exchange, or the document.

use crate::{
    oci::ManifestError,
    reason::Reason,
    registry::{Error, ErrorKind, Side},
};

/// A copy that did not end with the tag in place.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// An exchange with one of the registries failed.
    #[error("{error}")]
    Registry {
        /// Which of the two.
        side: Side,
        /// What it was.
        #[source]
        error: Error,
    },
    /// The source sent a document that is not copied.
    #[error("{subject} is not copied: {error}")]
    Manifest {
        /// Which one.
        subject: String,
        /// Why.
        #[source]
        error: ManifestError,
    },
    /// None of the platforms that are to be kept.
    #[error("{subject} is not copied: it is for none of {}", .platforms.join(", "))]
    PlatformMissing {
        /// The root.
        subject: String,
        /// What was asked for.
        platforms: Vec<String>,
    },
    /// Another client keeps changing what is to be changed here.
    #[error("{0}")]
    Contended(String),
    /// The graph is deeper or larger than any real image.
    #[error("{subject} is not copied: {what}")]
    Bounds {
        /// The root.
        subject: String,
        /// Which bound it exceeds.
        what: String,
    },
}

impl CopyError {
    /// The source failed.
    #[must_use]
    pub fn source(error: Error) -> Self {
        Self::Registry { side: Side::Source, error }
    }

    /// The target failed.
    #[must_use]
    pub fn target(error: Error) -> Self {
        Self::Registry { side: Side::Target, error }
    }

    /// The reason that users see.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Registry { side, error } => error.reason(*side),
            Self::Manifest { .. } | Self::Bounds { .. } => Reason::ManifestRefused,
            Self::PlatformMissing { .. } => Reason::PlatformMissing,
            Self::Contended(_) => Reason::Conflict,
        }
    }

    /// Whether the bytes of the source were not what was promised.
    #[must_use]
    pub fn is_integrity(&self) -> bool {
        matches!(self, Self::Registry { error, .. } if matches!(error.kind, ErrorKind::Integrity(_)))
    }

    /// What the user can do, in one clause; empty where waiting is all there is.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        let side = match self {
            Self::Registry { side, .. } => *side,
            Self::Contended(_) => Side::Target,
            Self::Manifest { .. } | Self::Bounds { .. } | Self::PlatformMissing { .. } => Side::Source,
        };
        match (self.reason(), side) {
            (Reason::AuthenticationFailed, Side::Source) => {
                "check the entry for this registry in spec.imagePullSecrets"
            }
            (Reason::AuthenticationFailed, Side::Target) => {
                "check the entry for this registry in spec.target.secretRef"
            }
            (Reason::PermissionDenied, Side::Source) => {
                "grant the credential the right to pull, or name another Secret"
            }
            (Reason::PermissionDenied, Side::Target) => {
                "grant the credential the right to push, or name another Secret"
            }
            (Reason::SourceNotFound, _) => "check the name and the tag in spec.images; a copy at the target stays",
            (Reason::RepositoryMissing, _) => "create the repository at the target first",
            (Reason::CertificateInvalid, _) => {
                "name the registry's CA in spec.registries[].certSecretRef, as the key ca.crt of a Secret"
            }
            (Reason::SourceUnavailable, _) => "check spec.images[].source and that the registry is up",
            (Reason::TargetUnavailable, _) => "check spec.target.registry and that the registry is up",
            (Reason::TagImmutable, _) => "use another tag, or allow this one to be moved at the target",
            (Reason::PlatformMissing, _) => "check spec.images[].platforms",
            (Reason::QuotaExceeded, _) => "make room at the target",
            _ => "",
        }
    }

    /// What happened, where, and what to do.
    #[must_use]
    pub fn message(&self) -> String {
        match self.advice() {
            "" => self.to_string(),
            advice => format!("{self}; {advice}"),
        }
    }
}
