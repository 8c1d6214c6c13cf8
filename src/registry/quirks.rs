//! How registries differ where the specification leaves room: one table, a row for each vendor, each particularity with its
//! source and how it is met. What is not here is learned from their answers; an administrator overrides the quirks in the
//! operator's configuration.

use crate::{auth::cloud::Cloud, oci::Host};

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
    /// Whether 403 is its answer to a look at a manifest that is not there, too.
    pub absent_is_forbidden: bool,
}

impl Quirks {
    /// As the specification says.
    const NONE: Self = Self {
        upload: UploadStrategy::Put,
        mounts: true,
        resumes_uploads: true,
        referrers_api: None,
        absent_is_forbidden: false,
    };
    /// What was received of a broken upload is gone, or cannot be asked for.
    const DISCARDS: Self = Self { resumes_uploads: false, ..Self::NONE };

    /// What is known of this host.
    #[must_use]
    pub fn of(host: &Host) -> Self {
        Vendor::of(host).map_or(Self::NONE, |vendor| vendor.quirks)
    }
}

impl Default for Quirks {
    fn default() -> Self {
        Self::NONE
    }
}

/// What is known of the registries of one vendor: a row of [`VENDORS`].
#[derive(Debug)]
pub struct Vendor {
    /// Its name.
    pub name: &'static str,
    /// Which hosts are its own. What people run themselves may be at any.
    hosts: Hosts,
    /// What the client does otherwise there.
    pub quirks: Quirks,
    /// Its page in `docs/registries`.
    pub page: &'static str,
    /// What is particular about them.
    pub facts: &'static [Fact],
}

/// Something that a registry is known for.
#[derive(Debug)]
pub struct Fact {
    /// What it is.
    pub what: &'static str,
    /// Who says so.
    pub source: &'static str,
    /// How it is met.
    pub met: Met,
}

/// How a particularity is met.
#[derive(Clone, Copy, Debug)]
pub enum Met {
    /// By the quirks of the row, of which this is so; an administrator sets them for other hosts (`registries[].quirks`,
    /// `uploadStrategy`).
    Quirk(fn(&Quirks) -> bool),
    /// By what the client does at every registry: the case of the catalogue of faults that shows it.
    Case(&'static str),
    /// The same; the test that shows it.
    Test(&'static str),
    /// By its user: the page says it.
    Page,
}

#[derive(Debug)]
enum Hosts {
    /// These, and with a `.` before them those that end so.
    Names(&'static [&'static str]),
    Cloud(Cloud),
}

impl Vendor {
    /// Whose registry this is, as far as its host says.
    #[must_use]
    pub fn of(host: &Host) -> Option<&'static Self> {
        let is_one = |name: &&str| host.as_str() == *name || (name.starts_with('.') && host.as_str().ends_with(*name));
        VENDORS.iter().find(|vendor| match vendor.hosts {
            Hosts::Names(names) => names.iter().any(is_one),
            Hosts::Cloud(cloud) => Cloud::of(host) == Some(cloud),
        })
    }
}

const fn fact(what: &'static str, source: &'static str, met: Met) -> Fact {
    Fact { what, source, met }
}

use Met::{Case, Page, Quirk, Test};

const LOGINS: Met = Test("pull_secrets_as_they_are_made_for_every_registry_open_it");
const ECONOMY: Met = Test("the_registries_count_no_request_that_could_be_left_out");
const DISCARDS: Met = Quirk(|quirks| !quirks.resumes_uploads);

/// What is known of registries, and who says so. Rates are facts and no quirks: what is published of them is about single actions,
/// plans and accounts; a 429 is obeyed, and an administrator sets `limits.perSecond`.
pub const VENDORS: &[Vendor] = &[
    Vendor {
        name: "Docker Hub",
        hosts: Hosts::Names(&[Host::DOCKER_HUB]),
        quirks: Quirks::DISCARDS,
        page: "docker-hub.md",
        facts: &[
            fact("the API is at registry-1.docker.io", "https://docs.docker.com/docker-hub/usage/pulls/", LOGINS),
            fact(
                "logins are kept under https://index.docker.io/v1/",
                "https://docs.docker.com/reference/cli/docker/login/",
                LOGINS,
            ),
            fact(
                "a GET of a manifest is a pull, a HEAD is none",
                "https://docs.docker.com/docker-hub/usage/pulls/",
                ECONOMY,
            ),
            fact(
                "all requests of an address have a limit, too, which is answered 429 without a word of the limit of pulls",
                "https://docs.docker.com/docker-hub/usage/",
                Case("R13-once"),
            ),
            fact(
                "a HEAD may come without a digest, as in the first editions of the specification",
                "https://github.com/opencontainers/distribution-spec/blob/main/spec.md#checking-if-content-exists-in-the-registry",
                Case("Q-no-digest-old"),
            ),
            fact(
                "a mount may be answered 401",
                "https://github.com/oras-project/rust-oci-client/issues/235",
                Case("Q-mount-other-401"),
            ),
            fact(
                "it may be impossible to ask for an upload that broke, which is a late part of the specification",
                "https://github.com/opencontainers/distribution-spec/pull/366",
                DISCARDS,
            ),
        ],
    },
    Vendor {
        name: "GitHub Container Registry",
        hosts: Hosts::Names(&["ghcr.io"]),
        quirks: Quirks { referrers_api: Some(false), ..Quirks::DISCARDS },
        page: "ghcr.md",
        facts: &[
            fact(
                "no referrers API",
                "https://github.com/actions/attest-build-provenance/issues/71",
                Quirk(|quirks| quirks.referrers_api == Some(false)),
            ),
            fact(
                "pieces of a PATCH have 4 MiB at most",
                "https://github.com/oras-project/rust-oci-client/pull/37",
                Test("what_is_too_much_at_once_is_sent_in_pieces_from_then_on"),
            ),
            fact(
                "a mount from another owner's package opens an upload, as it may at every registry",
                "https://github.com/opencontainers/distribution-spec/blob/main/spec.md#mounting-a-blob-from-another-repository",
                Case("Q-mount-202"),
            ),
            fact(
                "2000 requests a minute, and when to go on is said in the message alone",
                "https://github.com/chainguard-images/images/issues/173",
                Case("R13-once"),
            ),
            fact(
                "a package is created by those whom its owner lets",
                "https://docs.github.com/packages/learn-github-packages/configuring-a-packages-access-control-and-visibility",
                Case("Q-create-package"),
            ),
        ],
    },
    Vendor {
        name: "Amazon ECR",
        hosts: Hosts::Cloud(Cloud::Aws),
        quirks: Quirks::DISCARDS,
        page: "ecr.md",
        facts: &[
            fact(
                "a password is a token that ends",
                "https://docs.aws.amazon.com/AmazonECR/latest/userguide/registry_auth.html",
                LOGINS,
            ),
            fact(
                "one that has ended is answered 403",
                "https://docs.aws.amazon.com/AmazonECR/latest/userguide/common-errors-docker.html",
                Test("a_password_that_has_ended_is_had_again"),
            ),
            fact(
                "a repository is there before it is pushed to, or a template makes it",
                "https://docs.aws.amazon.com/AmazonECR/latest/userguide/docker-push-ecr-image.html",
                Case("Q-create-404"),
            ),
            fact(
                "tags may be immutable",
                "https://docs.aws.amazon.com/AmazonECR/latest/userguide/image-tag-mutability.html",
                Case("R24-others"),
            ),
            fact(
                "what a PATCH says to have arrived is stale",
                "https://github.com/aws/containers-roadmap/issues/2831",
                DISCARDS,
            ),
            fact(
                "a PATCH is answered 201",
                "https://github.com/aws/containers-roadmap/issues/2831",
                Case("Q-patch-201"),
            ),
            fact(
                "mounting is off unless it is switched on",
                "https://docs.aws.amazon.com/AmazonECR/latest/userguide/blob-mounting.html",
                Case("Q-mount-202"),
            ),
            fact(
                "quotas are per action and region",
                "https://docs.aws.amazon.com/AmazonECR/latest/userguide/service-quotas.html",
                Case("R13-once"),
            ),
            fact(
                "a list of tags has 1000 entries a page at most",
                "https://docs.aws.amazon.com/AmazonECR/latest/APIReference/API_ListImages.html",
                Test("a_list_of_tags_is_read_as_far_as_it_makes_sense"),
            ),
            fact(
                "a manifest that an index names is not deleted",
                "https://docs.aws.amazon.com/AmazonECR/latest/APIReference/API_ImageFailure.html",
                Page,
            ),
        ],
    },
    Vendor {
        name: "Azure Container Registry",
        hosts: Hosts::Cloud(Cloud::Azure),
        // Refuses a large blob in one PUT.
        quirks: Quirks { upload: UploadStrategy::Patch, ..Quirks::DISCARDS },
        page: "acr.md",
        facts: &[
            fact(
                "an Entra token is exchanged at the registry",
                "https://github.com/Azure/acr/blob/main/docs/AAD-OAuth.md",
                Test("a_token_without_a_user_name_is_exchanged_at_the_registry"),
            ),
            fact(
                "a large blob in one PUT is refused",
                "https://github.com/goharbor/harbor/issues/23015",
                Quirk(|quirks| quirks.upload == UploadStrategy::Patch),
            ),
            fact(
                "reads and writes a minute are limited by tier",
                "https://learn.microsoft.com/azure/container-registry/container-registry-skus",
                Case("R12-seconds"),
            ),
        ],
    },
    Vendor {
        name: "Google Artifact Registry and Container Registry",
        hosts: Hosts::Cloud(Cloud::Gcp),
        quirks: Quirks::DISCARDS,
        page: "gar.md",
        facts: &[
            fact(
                "the user is _json_key or oauth2accesstoken",
                "https://cloud.google.com/artifact-registry/docs/docker/authentication",
                LOGINS,
            ),
            fact(
                "blobs come whole, not in pieces that could be continued",
                "https://github.com/dotnet/sdk-container-builds/issues/287",
                Quirk(|quirks| quirks.upload == UploadStrategy::Put && !quirks.resumes_uploads),
            ),
            fact(
                "a mount may open an upload instead",
                "https://github.com/google/go-containerregistry/issues/1846",
                Case("Q-mount-202"),
            ),
            fact(
                "requests have one quota for a project and a region",
                "https://cloud.google.com/artifact-registry/quotas",
                Case("R13-once"),
            ),
        ],
    },
    Vendor {
        name: "Quay",
        hosts: Hosts::Names(&["quay.io"]),
        quirks: Quirks::NONE,
        page: "quay.md",
        facts: &[
            fact(
                "a mount without `from` failed for long",
                "https://github.com/quay/quay/pull/899",
                Case("Q-mount-from"),
            ),
            fact(
                "older versions take few media types",
                "https://github.com/oras-project/oras/issues/738",
                Test("a_refused_form_is_told_by_what_the_manifest_is"),
            ),
            fact(
                "429 is for an address and what it asks for, after a few requests a second",
                "https://access.redhat.com/solutions/6218921",
                Case("R13-manifest"),
            ),
        ],
    },
    Vendor {
        name: "Harbor",
        hosts: Hosts::Names(&[]),
        quirks: Quirks::NONE,
        page: "harbor.md",
        facts: &[
            fact(
                "a robot has a `$` in its name",
                "https://goharbor.io/docs/main/working-with-projects/project-configuration/create-robot-accounts/",
                LOGINS,
            ),
            fact(
                "401 is the answer for a project that is not there",
                "https://github.com/goharbor/harbor/issues/17097",
                Case("R11"),
            ),
            fact(
                "what a quota of a project does not allow is answered DENIED",
                "https://github.com/goharbor/harbor/blob/main/src/controller/quota/controller.go",
                Test("words_that_say_more_than_the_code_are_what_counts"),
            ),
            fact("a project must exist", "https://github.com/goharbor/harbor/issues/20544", Case("Q-create-project")),
            fact(
                "a path has the project and a repository",
                "https://goharbor.io/docs/main/working-with-projects/working-with-images/pulling-pushing-images/",
                Page,
            ),
            fact(
                "a GET of a manifest is a pull, a HEAD is none",
                "https://github.com/goharbor/harbor/issues/21326",
                ECONOMY,
            ),
        ],
    },
    Vendor {
        name: "Artifactory",
        hosts: Hosts::Names(&[".jfrog.io"]),
        quirks: Quirks { absent_is_forbidden: true, ..Quirks::NONE },
        page: "artifactory.md",
        facts: &[
            fact(
                "403 is the answer to HEAD of a manifest that is not there",
                "https://github.com/google/go-containerregistry/issues/1691",
                Quirk(|quirks| quirks.absent_is_forbidden),
            ),
            fact(
                "an index is refused before its manifests are there",
                "https://jfrog.com/help/r/jfrog-artifactory-documentation/docker-registry",
                Case("R22-child-always"),
            ),
            fact(
                "a blob that came with the end of its upload may be unknown afterwards",
                "https://github.com/docker/buildx/issues/196",
                Case("Q-put-lost"),
            ),
        ],
    },
    Vendor {
        name: "Nexus",
        hosts: Hosts::Names(&[]),
        quirks: Quirks::NONE,
        page: "README.md",
        facts: &[
            fact(
                "a HEAD of a manifest may be answered 404 although it is there",
                "https://github.com/crazy-max/diun/issues/1614",
                Case("Q-head-404"),
            ),
            fact(
                "an upload may be refused as invalid at its end",
                "https://github.com/sonatype/nexus-public/issues/967",
                Case("Q-put-lost"),
            ),
        ],
    },
    Vendor {
        name: "GitLab",
        hosts: Hosts::Names(&["registry.gitlab.com"]),
        quirks: Quirks::NONE,
        page: "gitlab.md",
        facts: &[
            fact(
                "the token server is GitLab itself",
                "https://docs.gitlab.com/administration/packages/container_registry/",
                LOGINS,
            ),
            fact(
                "a path begins with a group and a project, and has so many parts at most",
                "https://docs.gitlab.com/user/packages/container_registry/",
                Page,
            ),
            fact(
                "the tag that lists referrers is read as the digest that it is made of",
                "https://github.com/oras-project/oras-go/issues/1396",
                Test("a_registry_that_reads_the_fallback_tag_as_the_digest_has_no_list_there"),
            ),
            fact(
                "blobs are at storage whose addresses may be good for GET alone",
                "https://github.com/moby/moby/issues/50065",
                Case("Q-head-storage"),
            ),
        ],
    },
    Vendor {
        name: "distribution",
        hosts: Hosts::Names(&[]),
        quirks: Quirks::NONE,
        page: "README.md",
        facts: &[
            fact(
                "giving an upload up needs the right to delete",
                "https://github.com/distribution/distribution/blob/main/registry/handlers/app.go",
                Case("R25-cancel"),
            ),
            fact(
                "an index without all its manifests is refused unless it is configured so",
                "https://github.com/distribution/distribution/pull/3536",
                Test("a_refused_form_is_told_by_what_the_manifest_is"),
            ),
            fact(
                "manifests with URLs are refused unless they are allowed",
                "https://distribution.github.io/distribution/about/configuration/#validation",
                Test("a_refused_form_is_told_by_what_the_manifest_is"),
            ),
        ],
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_known_by_their_hosts_and_others_are_as_the_specification_says() {
        let of = |host: &str| Quirks::of(&host.parse().unwrap());
        assert_eq!(of("registry.example.com"), Quirks::default());
        assert_eq!(of("team.azurecr.io").upload, UploadStrategy::Patch);
        assert_eq!(of("ghcr.io").referrers_api, Some(false));
        assert!(of("team.jfrog.io").absent_is_forbidden && !of("jfrog.io").absent_is_forbidden);
        for host in ["docker.io", "eu.gcr.io", "europe-docker.pkg.dev", "123456789012.dkr.ecr.eu-west-1.amazonaws.com"]
        {
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
