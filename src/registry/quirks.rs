//! How registries differ where the specification leaves room, by host. What is not here is learned from their answers;
//! an administrator overrides it in the operator's configuration.

use crate::oci::Host;

/// How a large blob is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UploadStrategy {
    /// One `PUT` with the whole blob (distribution-spec, "POST then PUT").
    Put,
    /// One `PATCH` with the whole blob and a `PUT` that closes the upload.
    Patch,
    /// `PATCH`es of this many bytes and a `PUT` that closes the upload (distribution-spec, "Pushing a blob in chunks").
    Chunks(u64),
}

impl UploadStrategy {
    const LARGE_CHUNK: u64 = 16 << 20;
    const SMALL_CHUNK: u64 = 1 << 20;

    /// Chunks of a size that registries take.
    #[must_use]
    pub fn chunks() -> Self {
        Self::Chunks(Self::LARGE_CHUNK)
    }

    /// What to try when a registry says that this is too much at once.
    pub(super) fn after_refusal(self) -> Option<Self> {
        match self {
            Self::Put => Some(Self::Patch),
            Self::Patch => Some(Self::chunks()),
            Self::Chunks(size) if size > Self::SMALL_CHUNK => Some(Self::Chunks(size / 4)),
            Self::Chunks(_) => None,
        }
    }
}

/// What is known of a registry before the first request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quirks {
    /// How large blobs are sent.
    pub upload: UploadStrategy,
    /// Whether blobs can be taken from another repository of the registry.
    pub mounts: bool,
    /// Whether what arrived of an upload that broke is kept.
    pub resumes_uploads: bool,
    /// Whether there is a referrers API; `None` to find out.
    pub referrers_api: Option<bool>,
}

impl Default for Quirks {
    fn default() -> Self {
        Self { upload: UploadStrategy::Put, mounts: true, resumes_uploads: true, referrers_api: None }
    }
}

impl Quirks {
    /// What is known of this host.
    #[must_use]
    pub fn of(host: &Host) -> Self {
        let host = host.as_str();
        let default = Self::default();
        // What these clouds received of a broken upload is gone, or cannot be asked for.
        let discards = Self { resumes_uploads: false, ..default };
        match host {
            "ghcr.io" => Self { referrers_api: Some(false), ..discards },
            Host::DOCKER_HUB | "gcr.io" => discards,
            _ if host.ends_with(".gcr.io") || host.ends_with(".pkg.dev") => discards,
            _ if host.contains(".dkr.ecr.") && host.contains(".amazonaws.com") => discards,
            // Refuses a large blob in one PUT.
            _ if host.ends_with(".azurecr.io") => Self { upload: UploadStrategy::Patch, ..discards },
            _ => default,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clouds_are_known_by_their_hosts_and_others_are_as_the_specification_says() {
        let of = |host: &str| Quirks::of(&host.parse().unwrap());
        assert_eq!(of("registry.example.com"), Quirks::default());
        assert_eq!(of("team.azurecr.io").upload, UploadStrategy::Patch);
        assert_eq!(of("ghcr.io").referrers_api, Some(false));
        for host in ["docker.io", "eu.gcr.io", "europe-docker.pkg.dev", "1234.dkr.ecr.eu-west-1.amazonaws.com"] {
            assert!(!of(host).resumes_uploads, "{host}");
        }
        assert!(of("azurecr.io.example.com").resumes_uploads && of("notgcr.io").resumes_uploads);
    }

    #[test]
    fn what_is_too_much_at_once_is_sent_in_smaller_pieces_down_to_a_mebibyte() {
        let mut strategy = UploadStrategy::Put;
        let mut tried = vec![strategy];
        while let Some(next) = strategy.after_refusal() {
            strategy = next;
            tried.push(strategy);
        }
        let chunks = [16, 4, 1].map(|mebibytes| UploadStrategy::Chunks(mebibytes << 20));
        assert_eq!(tried, [&[UploadStrategy::Put, UploadStrategy::Patch][..], &chunks].concat());
    }
}
