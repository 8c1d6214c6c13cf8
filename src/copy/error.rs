//! What a copy failed of: the side, the exchange, or the document.

use crate::{
    oci::{Algorithm, Child, Digest, ManifestError, RawManifest, media_type},
    reason::Reason,
    registry::{CertificateProblem, Error, ErrorKind, Side, Step},
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
    /// The target does not take a manifest of this form.
    #[error("{error}")]
    Form {
        /// How it said so.
        #[source]
        error: Error,
        /// What would make it take the form.
        advice: &'static str,
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
    /// The tag has another digest than when the copy was decided on.
    #[error("the tag has been moved by another client meanwhile")]
    TargetChanged,
    /// Another client keeps changing what is to be changed here.
    #[error("{0}")]
    Contended(String),
    /// The target has no referrers API, and reads its fallback tag as the digest that it is made of.
    #[error(
        "what is attached to {subject} was copied to {target} and cannot be found there: the registry has no referrers \
         API, and takes the tag in its place for the digest itself"
    )]
    Unlisted {
        /// What it is attached to.
        subject: Digest,
        /// The repository.
        target: String,
    },
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

    /// The digest or tag of the manifest that the target has answered with an error.
    #[must_use]
    pub(crate) fn refused_manifest(&self) -> Option<&str> {
        let Self::Registry { side: Side::Target, error } = self else { return None };
        let is_answer = matches!(error.step, Step::PutManifest | Step::MoveTag) && error.status().is_some();
        let reference = error.subject.split_once('@').or_else(|| error.subject.rsplit_once(':'));
        reference.filter(|_| is_answer).map(|(_, reference)| reference)
    }

    /// The same error, or what it means where it is about the form of this manifest.
    #[must_use]
    pub(crate) fn about(self, manifest: &RawManifest) -> Self {
        match self {
            Self::Registry { side: Side::Target, error } => {
                let status = error.status().map_or(0, |status| status.as_u16());
                match form_advice(manifest, status, error.code()) {
                    Some(advice) => Self::Form { error, advice },
                    None => Self::Registry { side: Side::Target, error },
                }
            }
            other => other,
        }
    }

    /// The reason that users see.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Registry { side, error } => error.reason(*side),
            Self::Form { .. } | Self::Manifest { .. } | Self::Bounds { .. } | Self::Unlisted { .. } => {
                Reason::ManifestRefused
            }
            Self::PlatformMissing { .. } => Reason::PlatformMissing,
            Self::Contended(_) => Reason::Conflict,
            Self::TargetChanged => Reason::TargetChanged,
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
            Self::Form { advice, .. } => return advice,
            Self::Unlisted { .. } => return "leave it with spec.referrers.policy: None, or use another registry",
            Self::Registry { error: Error { kind: ErrorKind::Tls(problem), .. }, .. } => {
                return certificate_advice(*problem);
            }
            // It says itself what to do.
            Self::Registry { error: Error { kind: ErrorKind::Unusable(_) | ErrorKind::NotNow(_), .. }, .. } => {
                return "";
            }
            Self::Registry { side, .. } => *side,
            Self::Contended(_) | Self::TargetChanged => Side::Target,
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
            (Reason::RepositoryMissing, _) => {
                "create the repository at the target first, or give the credential the right to make it by a push"
            }
            (Reason::CertificateInvalid, _) => certificate_advice(CertificateProblem::Untrusted),
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
        let known = match self {
            Self::Registry { error, .. } => error.advice.as_deref(),
            _ => None,
        };
        match known.unwrap_or_else(|| self.advice()) {
            "" => self.to_string(),
            advice => format!("{self}; {advice}"),
        }
    }
}

fn certificate_advice(problem: CertificateProblem) -> &'static str {
    match problem {
        CertificateProblem::Expired => "have the certificate renewed, and check that the clocks are right",
        CertificateProblem::NotYetValid => "check the clocks of the registry and of this machine",
        CertificateProblem::OtherName => "use a name that the certificate is for, or have one made for this name",
        CertificateProblem::Untrusted => {
            "name the registry's CA in spec.registries[].certSecretRef, as the key ca.crt of a Secret"
        }
        CertificateProblem::Refused => {
            "if it wants a client certificate, name one in spec.registries[].certSecretRef, as the keys tls.crt and \
             tls.key of a Secret"
        }
    }
}

/// What lets a target take a manifest that it has answered with this status and code; none if its form is no reason.
///
/// Registries rarely say what they do not like, and distribution calls a layer with `urls` an unknown error: what the
/// manifest is tells more than the answer.
fn form_advice(manifest: &RawManifest, status: u16, code: Option<&str>) -> Option<&'static str> {
    let children = manifest.children().ok()?;
    let is_sha512 = |digest: &crate::oci::Digest| digest.algorithm() == Algorithm::Sha512;
    let has_sha512 = is_sha512(&manifest.digest) || children.iter().any(|child| is_sha512(&child.descriptor().digest));
    match (code, status) {
        (Some("MANIFEST_BLOB_UNKNOWN" | "MANIFEST_UNKNOWN"), 400..=499) if manifest.is_index() => {
            let is_other = |child: &Child| !child.descriptor().is_manifest();
            children.iter().any(is_other).then_some(
                "the index lists content that is no manifest: distribution takes that with \
                 validation.manifests.indexes.platforms: none",
            )
        }
        (Some("DIGEST_INVALID" | "UNSUPPORTED"), 400..=499) if has_sha512 => {
            Some("the image has sha512 digests, which no setting of distribution allows: olareg takes them")
        }
        (None | Some("UNKNOWN" | "MANIFEST_INVALID" | "URLS_REFUSED"), 400..=500)
            if children.iter().any(|child| child.descriptor().is_foreign()) =>
        {
            Some("a layer has urls: distribution takes those that validation.manifests.urls.allow matches")
        }
        (None | Some("MANIFEST_INVALID" | "UNSUPPORTED"), 400 | 405 | 415 | 422) => {
            match manifest.media_type.as_str() {
                media_type::DOCKER_SCHEMA1 | media_type::DOCKER_SCHEMA1_SIGNED => Some(
                    "the manifest is of schema 1, which only distribution 2 takes, signed and with \
                 compatibility.schema1.enabled: build the image anew or leave it out",
                ),
                media_type::OCI_MANIFEST
                | media_type::OCI_INDEX
                | media_type::DOCKER_MANIFEST
                | media_type::DOCKER_LIST => None,
                _ => Some(
                    "the target takes no manifests of this type, and neither distribution nor olareg has a setting for it",
                ),
            }
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;

    fn manifest(media_type: &str, text: &str) -> RawManifest {
        let digest = Digest::sha256(text.as_bytes());
        RawManifest { bytes: text.to_owned().into(), media_type: media_type.into(), digest }
    }

    #[test]
    fn a_refused_form_is_told_by_what_the_manifest_is() {
        let descriptor = |media_type: &str, more: &str| {
            format!(r#"{{"mediaType":"{media_type}","digest":"sha256:{}","size":3{more}}}"#, "a".repeat(64))
        };
        let sha512 = format!(r#"{{"digest":"sha512:{}","size":3}}"#, "b".repeat(128));
        let layers = |layer: &str| manifest(media_type::OCI_MANIFEST, &format!(r#"{{"layers":[{layer}]}}"#));
        let index = |entry: &str| manifest(media_type::OCI_INDEX, &format!(r#"{{"manifests":[{entry}]}}"#));
        let plain = layers(&descriptor("application/x", ""));
        let foreign = layers(&descriptor(
            "application/vnd.oci.image.layer.nondistributable.v1.tar",
            r#","urls":["https://example.org/x"]"#,
        ));
        let with_blob = index(&descriptor("application/x", ""));
        let images = index(&descriptor(media_type::OCI_MANIFEST, ""));
        let schema_1 = manifest(media_type::DOCKER_SCHEMA1, r#"{"fsLayers":[]}"#);
        let artifact = manifest(media_type::OCI_ARTIFACT, r#"{"blobs":[]}"#);
        for (manifest, status, code, expected) in [
            (&foreign, 500, Some("UNKNOWN"), Some("validation.manifests.urls.allow")),
            (&foreign, 400, Some("MANIFEST_INVALID"), Some("validation.manifests.urls.allow")),
            (&foreign, 503, None, None),
            (&foreign, 403, Some("DENIED"), None),
            (&plain, 500, Some("UNKNOWN"), None),
            (&plain, 400, Some("MANIFEST_INVALID"), None),
            (&plain, 400, Some("MANIFEST_BLOB_UNKNOWN"), None),
            (&plain, 400, Some("DIGEST_INVALID"), None),
            (&with_blob, 400, Some("MANIFEST_BLOB_UNKNOWN"), Some("validation.manifests.indexes.platforms: none")),
            (&images, 400, Some("MANIFEST_BLOB_UNKNOWN"), None),
            (&layers(&sha512), 400, Some("DIGEST_INVALID"), Some("olareg takes them")),
            (&schema_1, 400, Some("MANIFEST_INVALID"), Some("compatibility.schema1.enabled")),
            (&schema_1, 503, None, None),
            (&artifact, 400, Some("MANIFEST_INVALID"), Some("no manifests of this type")),
            (&artifact, 401, Some("UNAUTHORIZED"), None),
        ] {
            let advice = form_advice(manifest, status, code);
            let is_expected = match (advice, expected) {
                (Some(advice), Some(part)) => advice.contains(part),
                (advice, expected) => advice.is_none() && expected.is_none(),
            };
            assert!(is_expected, "{status} {code:?} of {}: {advice:?}", manifest.media_type);
        }
    }
}
